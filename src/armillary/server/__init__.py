"""HTTP on top of the engine: an OpenAI-compatible server."""

from armillary.server.app import Server
from armillary.server.hosted import Hosted
from armillary.server.limits import Door, Load
from armillary.server.run import Lines, check_address, leave, log_to, run

__all__ = ["Door", "Hosted", "Lines", "Load", "Server", "check_address", "leave", "log_to", "run"]

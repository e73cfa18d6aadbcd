"""`armillary serve`: models over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from armillary.cli.shared import Device, Dtype, note

KEYS = "ARMILLARY_API_KEYS"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(help="Run folders, model folders or hub names; NAME=FOLDER names one.", metavar="MODEL..."),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option(help="Answers at a time.", min=1)] = 16,
    capacity: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt and its answer; by default the model's context.", min=2)
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GiB for states, running and kept.", min=0)] = None,
    guess: Annotated[
        bool, typer.Option(help="Guess tokens from what was said before, and check them together.")
    ] = False,
    rpm: Annotated[float | None, typer.Option(help="Requests per minute of a key.", min=0)] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens per minute of a key.", min=0)] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that answers may go on after the first signal to end.", min=0)
    ] = 30.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve models over HTTP.

    OpenAI clients find what they expect there. Keys come from the environment:
    ARMILLARY_API_KEYS="name:secret,other:secret". Without keys the server answers this machine only.

    Example: armillary serve runs/demo
    """
    from armillary.base.errors import InputError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError("serving needs an extra", hint="pip install 'armillary[server]'") from None
    import logging
    import sys

    from armillary.cli.shared import open_model
    from armillary.engine.core import Engine
    from armillary.engine.drafts import PromptLookup
    from armillary.server import Door, Hosted, Lines, Load, Server, check_address, run

    keys = read_keys(os.environ.get(KEYS, ""))
    check_address(host, bool(keys))
    hosted: list[Hosted] = []
    for given in models:
        name, _, folder = given.rpartition("=")
        model = open_model(folder, device, dtype)
        name = name or Path(folder).name or folder
        if any(one.name == name for one in hosted):
            raise InputError(f"two models are called '{name}'", hint=f"name one: other={folder}")
        generates = model.settings.form != "encoder" and model.settings.head.kind == "language_model"
        engine = None
        if generates:
            engine = Engine(
                model.network,
                model.tokenizer,
                slots=slots,
                capacity=capacity,
                memory=None if memory is None else int(memory * 2**30),
                drafter=PromptLookup() if guess else None,
            ).start()
        hosted.append(Hosted(name, model.network, model.tokenizer, engine, Load(4 * slots)))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logger = logging.getLogger("armillary.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def started(port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        note(f"serving {', '.join(one.name for one in hosted)} on http://{shown}:{port}/v1")

    run(Server(hosted, Door(keys, requests_per_minute=rpm, tokens_per_minute=tpm)), host, port, drain, started)


def read_keys(text: str) -> dict[str, str]:
    """`name:secret,name:secret` → {secret: name}; raises InputError."""
    from armillary.base.errors import InputError

    found: dict[str, str] = {}
    for place, part in enumerate(filter(None, (part.strip() for part in text.split(",")))):
        name, colon, secret = part.partition(":")
        if not colon or not name or len(secret) < 8:
            raise InputError(
                f"entry {place + 1} of {KEYS} is no name with a secret of 8 characters or more",
                hint="write name:secret, several with commas between",
            )
        found[secret] = name
    return found


COMMANDS = {"serve": serve}

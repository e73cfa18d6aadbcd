"""A real `armillary serve` on a port of this machine, and what the system says of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.load import Call, ask, closed_loop, completion, prompts

KEYS = {"a": "secret-of-tenant-a", "b": "secret-of-tenant-b"}
SLOTS = 8
Figures = dict[str, Any]
Reach = dict[str, tuple[float, str]]
SOURCE = Path(__file__).resolve().parents[2] / "src"


def make_model(folder: Path, seed: int = 0) -> Path:
    """A small hybrid (keys and values beside fixed states), trained for some seconds on the package's sources so
    that what it says is mostly text."""
    import torch

    import armillary
    from armillary.base.settings import parse
    from armillary.nn.network import ModelSettings, build
    from armillary.objectives.base import Vocabulary
    from armillary.recipe.training import TrainingSettings
    from armillary.text import TokenizerSettings, train_tokenizer
    from armillary.train import Trainer

    torch.set_num_threads(1)  # it is small
    texts = [path.read_text(encoding="utf-8") for path in sorted((SOURCE / "armillary").rglob("*.py"))[:80]]
    tokenizer = train_tokenizer(TokenizerSettings(kind="bpe", size=512), texts)
    blocks = {
        "look": {"mixer": {"kind": "attention", "heads": 4, "position": "rope"}, "channel": "gated"},
        "state": {"mixer": "retention", "channel": "gated"},
    }
    model = {"width": 128, "depth": 4, "vocabulary": tokenizer.size, "context": 2048}
    network = build(parse(ModelSettings, model | {"blocks": blocks, "pattern": ["look", "state"]}), seed=seed)
    training = {"context": 128, "batch": 8, "steps": 40, "precision": "float32", "compile": "no"}
    training |= {"optimiser": {"learning_rate": 3e-3}, "schedule": {"kind": "cosine", "warmup": 4}}
    trainer = Trainer(network, parse(TrainingSettings, training), vocabulary=Vocabulary(tokenizer.size), seed=seed)
    ids = torch.tensor([id for row in tokenizer.encode_batch(texts) for id in row])
    draw = random.Random(seed)
    for _ in range(40):
        starts = [draw.randrange(len(ids) - 129) for _ in range(8)]
        trainer.step(torch.stack([ids[start : start + 129] for start in starts]))
    armillary.save(armillary.Model(network.eval(), tokenizer), folder)
    return folder


def environment(threads: int | None = 1) -> dict[str, str]:
    """Of a process that computes; with one thread a core is left for the client."""
    around = {key: value for key, value in os.environ.items() if key not in ("ARMILLARY_API_KEYS", "OMP_NUM_THREADS")}
    around |= {"PYTHONPATH": str(SOURCE)} | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    return around


class Process:
    """options: of the command; log: where its stderr goes, by default a file beside the model; startup: source of a
    module that Python imports first (`sitecustomize`); files: the most descriptors that it may have; threads: of
    its steps, None: as it chooses."""

    def __init__(
        self,
        model: Path,
        *options: str,
        port: int = 0,
        keys: bool = False,
        log: Path | None = None,
        startup: str | None = None,
        files: int | None = None,
        slots: int = SLOTS,
        threads: int | None = 1,
    ) -> None:
        self.log = log or model.parent / f"log-{time.monotonic_ns()}"
        around = environment(threads)
        if keys:
            around["ARMILLARY_API_KEYS"] = ",".join(f"{name}:{secret}" for name, secret in KEYS.items())
        if startup is not None:
            place = model.parent / f"startup-{time.monotonic_ns()}"
            place.mkdir()
            (place / "sitecustomize.py").write_text(startup, encoding="utf-8")
            around["PYTHONPATH"] = f"{place}{os.pathsep}{SOURCE}"
        self.slots = slots
        self.key = KEYS["a"] if keys else None
        command = [sys.executable, "-m", "armillary", "serve", f"tiny={model}", "--slots", str(slots), *options]
        begun = time.monotonic()
        with self.log.open("ab") as errors:
            self.inner = subprocess.Popen([*command, "--port", str(port)], env=around, stderr=errors)
        if files is not None:
            resource.prlimit(self.inner.pid, resource.RLIMIT_NOFILE, (files, files))
        self.pid = self.inner.pid
        try:
            self.port = port or self._told()
            self.wait_until_live()
        except BaseException:
            self.kill()
            raise
        self.took = time.monotonic() - begun

    def _told(self) -> int:
        while True:
            text = self.log.read_text(encoding="utf-8")
            if " on http://127.0.0.1:" in text and "/v1\n" in text:
                return int(text.split(" on http://127.0.0.1:")[1].split("/")[0])
            if self.inner.poll() is not None:
                raise RuntimeError(f"the server ended before it served: {text[-2000:]}")
            time.sleep(0.02)

    def wait_until_live(self, within: float = 60) -> None:
        end = time.monotonic() + within
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/live", timeout=5).close()
                return
            if self.inner.poll() is not None:
                raise RuntimeError(f"the server ended with {self.inner.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"the server is not live after {within:g} s")
            time.sleep(0.02)

    def ready(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5).close()
        except OSError:
            return False
        return True

    # -- what it says

    def metrics(self) -> dict[str, float]:
        """Every sample by its name, labels included."""
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics")
        if self.key is not None:
            asked.add_header("authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(asked, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def under_way(self) -> dict[str, float]:
        """What must be nothing when nothing is going on."""
        found = self.metrics()
        return {
            "running": found['armillary_running{model="tiny"}'],
            "waiting": found['armillary_waiting{model="tiny"}'],
            "held bytes": found['armillary_state_bytes{kind="held",model="tiny"}'],
        }

    def filled(self) -> float:
        """The share of the memory for states that is held or kept."""
        found = self.metrics()
        sizes = {
            kind: found[f'armillary_state_bytes{{kind="{kind}",model="tiny"}}'] for kind in ("held", "cached", "free")
        }
        return 1 - sizes["free"] / sum(sizes.values())

    def quiet(self, within: float = 20, descriptors: int | None = None) -> float:
        """Seconds until nothing is under way (and no more descriptors are open than said), at most `within`."""
        begun = time.monotonic()
        while time.monotonic() - begun < within:
            if not any(self.under_way().values()) and (descriptors is None or self.descriptors <= descriptors):
                break
            time.sleep(0.05)
        return time.monotonic() - begun

    def said(self) -> str:
        """A fixed question's answer, greedy: the same as long as all is well."""
        greedy = completion(range(40, 72), 16, temperature=0, seed=0)
        seen = asyncio.run(ask(self.port, Call(greedy, key=self.key)))
        return seen.text if seen.complete else f"{seen.status} {seen.error}"

    # -- what the system says

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])

    @property
    def rss(self) -> float:
        """MiB."""
        return self._status("VmRSS") / 1024

    @property
    def threads(self) -> int:
        return self._status("Threads")

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    # -- its end

    def signal(self, number: int) -> None:
        self.inner.send_signal(number)

    def wait(self, within: float) -> int | None:
        """Its exit status, or the number of the signal that ended it; None: still there."""
        try:
            return abs(self.inner.wait(within))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self.inner.kill()
        self.inner.wait()

    def end(self) -> int:
        """Politely, then not; its exit status, or the number of the signal that ended it."""
        self.signal(signal.SIGTERM)
        if self.wait(60) is None:
            self.kill()
        return abs(self.inner.returncode)


@contextlib.contextmanager
def serving(model: Path, *options: str, **more: Any) -> Iterator[Process]:
    process = Process(model, *options, **more)
    try:
        yield process
    finally:
        if process.inner.poll() is None:
            process.end()


def warm(server: Process, seconds: float) -> None:
    """Until every place has held a long sequence and what is kept of prompts fills its memory, so that RSS does not
    grow because of that; at most about `seconds`."""
    begun, seed = time.monotonic(), 100
    while time.monotonic() - begun < seconds / 2:
        asyncio.run(closed_loop(server.port, prompts(1950, 60, seed, key=server.key), server.slots, 1))
        seed += 1
    while time.monotonic() - begun < seconds and server.filled() < 0.9:
        asyncio.run(closed_loop(server.port, prompts(500, 4, seed, key=server.key), 8, 1))
        seed += 1

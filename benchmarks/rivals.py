"""The peers of decoding on the same shape, asked for what they take: `llama.cpp` and `transformers`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


def missing(benchmark: str) -> str:
    """Why llama.cpp cannot be used, or nothing; says so, too."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        print(f"{benchmark}: llama.cpp is not here ({error}); pip install llama-cpp-python gguf", file=sys.stderr)
        return str(error)
    return ""


class Way(NamedTuple):
    """How llama.cpp is asked to compute. spins: how its threads wait for each other, as GOMP_SPINCOUNT takes it; None:
    as its users have it who set nothing. packs: whether quantised weights are put into an order of its own; flash:
    whether with its fused attention."""

    threads: int
    spins: str | None
    packs: bool
    flash: bool

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        waiting = "waiting as set for us" if self.spins else "waiting as it does by itself"
        order = "weights in its own order" if self.packs else "weights as in the file"
        return ", ".join([threads, waiting, order, "fused attention" if self.flash else "plain attention"])


def ways() -> list[Way]:
    """One thread waits for nobody."""
    together = [(torch.get_num_threads(), spins) for spins in dict.fromkeys([os.environ.get("GOMP_SPINCOUNT"), None])]
    waits = dict.fromkeys([*together, (1, None)])
    return [Way(*wait, *how) for wait, how in itertools.product(waits, itertools.product((True, False), (False, True)))]


class Llama:
    """A model of llama.cpp in a process of its own, with as many sequences as prompts, which are read, and at most
    `room` tokens each."""

    def __init__(self, file: Path, prompts: Sequence[Sequence[int]], room: int, way: Way) -> None:
        self.rows, self.way = len(prompts), way
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        if way.spins is not None:
            environment["GOMP_SPINCOUNT"] = way.spins
        given = json.dumps([str(file), self.rows, room, way.threads, way.flash, way.packs])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("llama.py")), given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.version = self._heard()
        for row, prompt in enumerate(prompts):
            self._ask("read", row, prompt)

    def decode(self, steps: int) -> float:
        """Tokens/s of all rows together."""
        return self.rows * steps / self._ask("steps", steps)

    def prefill(self, prompt: Sequence[int]) -> float:
        """Tokens/s of a prompt from the beginning on."""
        self._ask("clear")
        return len(prompt) / self._ask("read", 0, prompt)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __str__(self) -> str:
        return f"{self.version}: {self.way}"

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"llama.cpp ended with {self._process.wait()}")
        return json.loads(line)


def fastest(file: Path, prompts: Sequence[Sequence[int]], room: int, speed: Callable[[Llama], float]) -> Llama:
    """The quickest of all ways, by the best of three figures of each. One in which it crashes is said and passed over:
    built by some compilers, its products with AMX end with SIGSEGV where it packs quantised weights."""
    best, highest = None, 0.0
    for way in ways():
        try:
            made = Llama(file, prompts, room, way)
            found = max(speed(made) for _ in range(3))
        except (EOFError, BrokenPipeError) as error:
            print(f"  llama.cpp ({way}): {error}", file=sys.stderr)
            continue
        print(f"  llama.cpp ({way}): {found:.0f} tokens/s", file=sys.stderr)
        slower = best if found > highest else made
        if found > highest:
            best, highest = made, found
        if slower is not None:
            slower.close()
    if best is None:
        raise RuntimeError("llama.cpp computes in none of its ways")
    return best


class Transformers:
    """`generate` of transformers for several prompts at once."""

    def __init__(self, network: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.network, self.ids = network, torch.tensor(prompts)

    def decode(self, tokens: int) -> float:
        """Tokens/s of all rows together, greedily, from the first token of each on."""
        from transformers import StoppingCriteriaList

        times: list[float] = []

        def clock(ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        self.network.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=tokens + 1,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        assert len(times) == tokens + 1
        return len(self.ids) * tokens / (times[-1] - times[0])

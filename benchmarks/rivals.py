"""The peers of decoding on the same shape, asked for what they take: `llama.cpp` and `transformers`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


class Llama:
    """A model of llama.cpp in a process of its own, with `rows` sequences of at most `room` tokens each behind such
    prompts; flash: whether with its fused attention. It puts quantised weights into an order of its own, unless it
    crashes so: built by some compilers, its products with AMX end with SIGSEGV."""

    def __init__(self, file: Path, prompts: Sequence[Sequence[int]], room: int, *, flash: bool = False) -> None:
        self.rows = len(prompts)
        for packs in (True, False):
            given = json.dumps([str(file), self.rows, room, torch.get_num_threads(), flash, packs])
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("llama.py")), given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                self._heard()
                for row, prompt in enumerate(prompts):
                    self._ask("read", row, prompt)
                return
            except (EOFError, BrokenPipeError):
                if not packs:
                    raise
                print("  llama.cpp ends with its own order of weights; it is asked without", file=sys.stderr)

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

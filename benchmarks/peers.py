"""The peers of decoding on the same shape: `llama.cpp` through its C interface, and `transformers`."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import Shape, write_gguf

BATCH = 512  # tokens that llama.cpp takes at a time


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
    """A random model of llama.cpp over `rows` sequences of at most `room` tokens, each with a past of its own.

    flash: its fused attention; packs: whether it puts quantised weights into an order of its own (`packs()`).
    Logits are computed and waited for, and nothing is chosen.
    """

    def __init__(
        self, file: Path, rows: int, room: int, *, threads: int, flash: bool = False, packs: bool = True
    ) -> None:
        import llama_cpp

        self._api, self.rows = llama_cpp, rows
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        given = llama_cpp.llama_model_default_params()
        given.use_extra_bufts = packs
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), given)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch, settings.n_ubatch = rows * room, rows, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = False  # pasts apart: with 16 streams 1.75 times as fast as all in one
        settings.flash_attn_type, settings.no_perf = int(flash), True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        assert self._context, "llama.cpp made no context"
        self._batch = llama_cpp.llama_batch_init(max(BATCH, rows), 0, 1)
        self._length = [0] * rows

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._length = [0] * self.rows

    def read(self, row: int, ids: Sequence[int]) -> None:
        """Take in tokens of one sequence; the scores after the last are there when it returns."""
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self._run([row] * len(part), part, len(ids) - start <= BATCH)

    def step(self, tokens: Sequence[int]) -> None:
        """A token of each sequence."""
        self._run(range(self.rows), tokens, None)

    def _run(self, rows: Sequence[int], ids: Sequence[int], ends: bool | None) -> None:
        """ends: whether the last place's scores are wanted; None: those of all places."""
        batch, last = self._batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            batch.token[place], batch.pos[place] = token, self._length[row]
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = ends is None or (ends and place == last)
            self._length[row] += 1
        failed = self._api.llama_decode(self._context, batch)
        assert not failed, f"llama.cpp could not compute: {failed}"
        if ends is not False:
            self._api.llama_get_logits_ith(self._context, last)[0]  # waits for them


@cache
def packs() -> bool:
    """Whether llama.cpp computes several rows by weights in its own order without a crash, tried in a process of
    its own: where it was built by some compilers, its products with AMX end with SIGSEGV."""
    tried = subprocess.run([sys.executable, __file__], capture_output=True)
    if tried.returncode:
        print("  llama.cpp crashes here with weights in an order of its own; it is asked without", file=sys.stderr)
    return tried.returncode == 0


def _try() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.gguf"
        write_gguf(file, "Q8_0", Shape(256, 1, 4, 2, 512, 512))
        Llama(file, 1, 64, threads=2).read(0, list(range(3, 40)))


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


if __name__ == "__main__":
    _try()

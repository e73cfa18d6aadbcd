"""`llama.cpp` in a process of its own: a peer that is asked through pipes, one line of JSON for each question.

It lives apart because it may crash, and because its products with AMX take for granted that nobody else uses the
tiles of their threads. `rivals.Llama` is who asks.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence

BATCH = 512  # tokens taken at a time


class Model:
    """`rows` sequences of at most `room` tokens, each with a past of its own. Logits are computed and waited for,
    and nothing is chosen."""

    def __init__(self, file: str, rows: int, room: int, threads: int, flash: bool, packs: bool) -> None:
        import llama_cpp

        self.api, self.rows = llama_cpp, rows
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        given = llama_cpp.llama_model_default_params()
        given.use_extra_bufts = packs
        model = llama_cpp.llama_model_load_from_file(file.encode(), given)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch, settings.n_ubatch = rows * room, rows, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = False  # pasts apart: with 16 streams 1.75 times as fast as all in one
        settings.flash_attn_type, settings.no_perf = int(flash), True
        self.context = llama_cpp.llama_init_from_model(model, settings)
        assert self.context, "llama.cpp made no context"
        self.batch = llama_cpp.llama_batch_init(max(BATCH, rows), 0, 1)
        self.lengths = [0] * rows

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.lengths = [0] * self.rows

    def read(self, row: int, ids: Sequence[int]) -> float:
        """Take in tokens of one sequence; seconds until the scores after the last were there."""
        start = time.perf_counter()
        for at in range(0, len(ids), BATCH):
            part = ids[at : at + BATCH]
            self._run([row] * len(part), part, len(ids) - at <= BATCH)
        return time.perf_counter() - start

    def steps(self, count: int) -> float:
        """Seconds of so many steps, each of a token of every sequence."""
        start = time.perf_counter()
        for _ in range(count):
            self._run(range(self.rows), [5] * self.rows, None)
        return time.perf_counter() - start

    def _run(self, rows: Sequence[int], ids: Sequence[int], ends: bool | None) -> None:
        """ends: whether the last place's scores are wanted; None: those of all places."""
        batch, last = self.batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            batch.token[place], batch.pos[place] = token, self.lengths[row]
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = ends is None or (ends and place == last)
            self.lengths[row] += 1
        failed = self.api.llama_decode(self.context, batch)
        assert not failed, f"llama.cpp could not compute: {failed}"
        if ends is not False:
            self.api.llama_get_logits_ith(self.context, last)[0]  # waits for them


def main() -> None:
    model = Model(*json.loads(sys.argv[1]))
    patched = " with a library of its own" if "LLAMA_CPP_LIB_PATH" in os.environ else ""
    print(json.dumps(f"llama-cpp-python {model.api.__version__}{patched}"), flush=True)
    for line in sys.stdin:
        name, *given = json.loads(line)
        print(json.dumps(getattr(model, name)(*given)), flush=True)


if __name__ == "__main__":
    main()

"""Processes that tokenise: plain programs at the other end of two pipes, fed in order.

They are started as new interpreters and not forked (the parent may hold threads and locks) nor spawned
by `multiprocessing` (which would run the user's script again in each). What crosses the pipes is
bytes: counts, lengths, text one way and token ids the other; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from armillary.base.errors import DataError
from armillary.data.shards import Tokens, Width, token_type
from armillary.text.tokenizer import Tokenizer

M = TypeVar("M")
Lengths = NDArray[np.int64]
LENGTH = np.dtype("<i8")
QUEUED = 3  # batches in flight per worker
PROGRAM = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from armillary.data.workers import serve; serve()"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """Turns batches of UTF-8 texts into token ids, in order, whatever the number of workers.

    With one worker it encodes in this process. Use as a context manager; a worker that dies is a
    DataError. The tokenizer is loaded from `folder` by each worker.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, width: Width, workers: int) -> None:
        self._tokenizer, self._width = tokenizer, width
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        if workers > 1:
            command = [sys.executable, "-c", PROGRAM, json.dumps(sys.path), os.fspath(folder), width]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
            for _ in range(workers):
                worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                self._workers.append(worker)
                self._idle.put(worker)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for worker in self._workers:
                worker.kill()  # threads that wait for an answer see the pipe close
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            assert worker.stdin is not None and worker.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()
            worker.stdout.close()

    def map(self, batches: Iterable[tuple[M, Sequence[bytes]]]) -> Iterator[tuple[M, list[Tokens]]]:
        """(what came with a batch, ids [T] of each of its texts), batch after batch."""
        if self._threads is None:
            for note, texts in batches:
                yield note, _split(*encode(self._tokenizer, texts, self._width))
            return
        waiting: deque[tuple[M, Future[list[Tokens]]]] = deque()
        for note, texts in batches:
            waiting.append((note, self._threads.submit(self._ask, texts)))
            if len(waiting) >= QUEUED * len(self._workers):
                note, future = waiting.popleft()
                yield note, future.result()
        for note, future in waiting:
            yield note, future.result()

    def _ask(self, texts: Sequence[bytes]) -> list[Tokens]:
        worker = self._idle.get()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            lengths = np.fromiter(map(len, texts), LENGTH, len(texts))
            _send(worker.stdin, lengths, b"".join(texts))
            answer = _receive(worker.stdout, token_type(self._width).itemsize)
        except BrokenPipeError:
            answer = None
        finally:
            self._idle.put(worker)  # even a dead one: who waits for it learns of its death
        if answer is None:
            code = worker.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"
            raise DataError(
                f"a tokenising process {how}",
                hint="finished shards are kept: run again to go on, with fewer `workers` if memory ran out",
            )
        counts, ids = answer
        return _split(counts, np.frombuffer(ids, token_type(self._width)))


def encode(tokenizer: Tokenizer, texts: Sequence[bytes], width: Width) -> tuple[Lengths, Tokens]:
    """(number of ids of each text, all ids one after another)."""
    found = tokenizer.encode_batch([text.decode("utf-8") for text in texts])
    lengths = np.fromiter(map(len, found), LENGTH, len(found))
    return lengths, np.fromiter(chain.from_iterable(found), token_type(width), int(lengths.sum()))


def serve() -> None:
    """A worker's life: answer requests on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write into the pipe
    folder, width = sys.argv[2:4]
    assert width in ("uint16", "uint32")
    wide: Width = "uint16" if width == "uint16" else "uint32"
    tokenizer = Tokenizer.load(Path(folder))
    while (request := _receive(source, 1)) is not None:
        lengths, data = request
        stops = np.cumsum(lengths)
        texts = [data[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
        counts, ids = encode(tokenizer, texts, wide)
        _send(answers, counts, ids.tobytes())


def _split(lengths: Lengths, ids: Tokens) -> list[Tokens]:
    stops = np.cumsum(lengths)
    return [ids[stop - length : stop] for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True)]


def _send(pipe: IO[bytes], lengths: Lengths, content: bytes) -> None:
    pipe.write(np.asarray([len(lengths)], LENGTH).tobytes())
    pipe.write(lengths.tobytes())
    pipe.write(content)
    pipe.flush()


def _receive(pipe: IO[bytes], item: int) -> tuple[Lengths, bytes] | None:
    """Lengths and the content they add up to (in items of `item` bytes); None when the other end closed."""
    head = pipe.read(LENGTH.itemsize)
    if len(head) < LENGTH.itemsize:
        return None
    count = int(np.frombuffer(head, LENGTH)[0])
    table = pipe.read(count * LENGTH.itemsize)
    if len(table) < count * LENGTH.itemsize:
        return None
    lengths = np.frombuffer(table, LENGTH)
    size = int(lengths.sum()) * item
    content = pipe.read(size)
    return (lengths, content) if len(content) == size else None

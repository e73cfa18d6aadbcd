"""An engine in a process of its own, asked directly: what a server is measured against.

`python -m service.direct FOLDER SLOTS`, from benchmarks/, opens the model as `armillary serve` does and answers lines
of JSON: {"prompt": text} with the seconds from its ids to the first token of an answer; {"beside": n} once n long
answers run; {"end": true} once they are gone. Between lines it does nothing but what runs beside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from service.process import environment

LASTING = 4000  # tokens of an answer that runs beside


class Direct:
    """The process, from outside."""

    def __init__(self, model: Path, slots: int, threads: int | None = None) -> None:
        command = [sys.executable, "-m", "service.direct", str(model), str(slots)]
        around = environment(threads)
        around["PYTHONPATH"] += f":{Path(__file__).resolve().parents[1]}"
        self.inner = subprocess.Popen(command, env=around, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **line: Any) -> Any:
        assert self.inner.stdin is not None and self.inner.stdout is not None
        self.inner.stdin.write(json.dumps(line) + "\n")
        self.inner.stdin.flush()
        return json.loads(self.inner.stdout.readline())

    def end(self) -> None:
        assert self.inner.stdin is not None
        self.inner.stdin.close()
        self.inner.wait()


def main() -> None:
    from armillary.cli.shared import open_model
    from armillary.engine.core import Engine
    from armillary.engine.request import Request
    from armillary.engine.sampling import Sampling

    model = open_model(sys.argv[1], "auto", "auto")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    begin = [] if tokenizer.begin is None else [tokenizer.begin]  # as the server's prompts
    engine, running = Engine(model.network, tokenizer, slots=int(sys.argv[2])).start(), list[Any]()
    lasting = Sampling(max_new_tokens=LASTING, min_new_tokens=LASTING, temperature=1.0)
    for line in sys.stdin:
        asked, said = json.loads(line), None
        if "prompt" in asked:
            ids = (*begin, *tokenizer.encode(asked["prompt"]))
            begun = time.perf_counter()
            answer = engine.submit(Request(ids, Sampling(max_new_tokens=1, min_new_tokens=1, temperature=0)))
            next(iter(answer))
            said = time.perf_counter() - begun
        elif "beside" in asked:
            ids = (*begin, *tokenizer.encode("x" * 32))
            running = [engine.submit(Request(ids, lasting, stream=row)) for row in range(asked["beside"])]
            while not all(answer.choices for answer in running):
                time.sleep(0.005)
        else:
            assert all(answer.finish is None for answer in running), "the other answers ended too early"
            for answer in running:
                answer.cancel()
            while engine.busy:
                time.sleep(0.005)
        print(json.dumps(said), flush=True)
    engine.close()


if __name__ == "__main__":
    main()

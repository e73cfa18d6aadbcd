"""What serving adds to the network: the engine's own time in a step, the server's before the first token (with nothing
else to do and beside 4 running answers), the longest gaps of running answers while a long prompt is read, and the
price of a schema.

The engine's steps and gaps are measured in this process. The first token and answers with a schema are asked of
`armillary serve` as it starts by itself, in processes of its own: the first token by a client outside, on a connection
that stands and on new ones, against an engine that another process asks directly, in turn, while the other is idle;
whole answers with a schema in fresh processes, against answers of as many tokens without one.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

import armillary
from armillary.engine.constraints import Grammars
from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.nn.network import ModelSettings, build
from armillary.nn.ops import computes_bf16
from armillary.text import TokenizerSettings, train_tokenizer
from common import DEPTH, HEADS, HIDDEN, KV_HEADS, WIDTH, report
from service.added import measured
from service.process import Process

BATCH, TOKENS, LONG, REPEATS = 8, 64, 4000, 20
STEPPED = 9  # batches of each kind, in turn
BESIDE = 4  # answers that run meanwhile
BEGUN, FIRST = 3, 16  # processes in which a first answer is asked for, and its tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}


def network(context: int):
    """The shape of the other benchmarks, over bytes."""
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    settings = ModelSettings(
        width=WIDTH,
        depth=DEPTH,
        vocabulary=tokenizer.size,
        context=context,
        block={
            "mixer": {"kind": "attention", "heads": HEADS, "kv_heads": KV_HEADS, "position": "rope"},
            "channel": {"kind": "gated", "hidden": HIDDEN},
        },
    )
    # a processor without bf16 products imitates them, which says nothing of serving
    dtype = torch.bfloat16 if computes_bf16() else torch.float32
    return build(settings, seed=0).compute(dtype).eval(), tokenizer


def overhead(net, tokenizer) -> dict[str, float]:
    """Steps of a full batch: the engine's, with every token handed out by itself and of answers that are given whole,
    and the network's own on the same states, in turn."""
    prompt = tuple(range(20, 52))
    sampling = Sampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS, temperature=1.0)

    def filled(whole: bool) -> Engine:
        engine = Engine(net, tokenizer, slots=BATCH, keep=False)
        answers = [engine.submit(Request(prompt, sampling, stream=row, whole=whole)) for row in range(BATCH)]
        while any(not answer.choices for answer in answers):
            engine.step()
        return engine

    def stepped(whole: bool) -> float:
        engine = filled(whole)
        steps, start = engine.steps, time.perf_counter()
        while engine.step():
            pass
        return (time.perf_counter() - start) / (engine.steps - steps)

    def computed() -> float:
        engine, rows = filled(False), range(BATCH)
        start = time.perf_counter()
        for step in range(TOKENS - 1):
            engine.slots.extend(rows, [[20 + step]] * BATCH)
        return (time.perf_counter() - start) / (TOKENS - 1)

    times = [(stepped(False), stepped(True), computed()) for _ in range(STEPPED)]
    single, whole, inside = map(statistics.median, zip(*times, strict=True))
    return {
        "step ms": 1000 * single,
        "step of answers that are given whole ms": 1000 * whole,
        "step of the network alone ms": 1000 * inside,
        "engine's share of a step": 1 - inside / single,
        "engine's share of a step of answers that are given whole": 1 - inside / whole,
    }


def gaps(net, tokenizer) -> dict[str, float]:
    """Between tokens of running answers, alone and while a long prompt is read."""
    engine = Engine(net, tokenizer, slots=BATCH, keep=False, capacity=LONG + TOKENS).start()
    sampling = Sampling(max_new_tokens=400, min_new_tokens=400, temperature=1.0)
    times: list[list[float]] = [[] for _ in range(4)]
    running = [
        engine.submit(
            Request(tuple(range(20, 52)), sampling, stream=row),
            lambda _, row=row: times[row].append(time.perf_counter()),
        )
        for row in range(4)
    ]
    while min(map(len, times)) < 60:
        time.sleep(0.005)
    begin = time.perf_counter()
    long = engine.submit(Request(tuple(40 + i % 50 for i in range(LONG)), Sampling(max_new_tokens=1)))
    long.wait()
    end = time.perf_counter()
    for answer in running:
        answer.cancel()
    engine.close()
    alone, beside = [], []
    for row in times:
        for one, other in itertools.pairwise(row):
            if other < end:
                (alone if other < begin else beside).append(other - one)
    beside.sort()
    return {
        "gap between tokens alone, median ms": 1000 * statistics.median(alone),
        "gap while 4,000 tokens are read, median ms": 1000 * statistics.median(beside),
        "gap while 4,000 tokens are read, p99 ms": 1000 * beside[int(0.99 * (len(beside) - 1))],
        "reading 4,000 tokens beside 4 answers s": end - begin,
    }


def first_token(net) -> dict[str, float]:
    """From a request's first byte to the event of the first token, over HTTP and asked directly (`service.added`)."""
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte", chat_template="{{ messages[0].content }}"), [])
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        armillary.save(armillary.Model(net, tokenizer), model)
        return measured(model, BESIDE)


def schemas(tokenizer) -> dict[str, float]:
    """A schema's first constraint, later ones, and a mask."""
    grammars = Grammars(tokenizer)
    start = time.perf_counter()
    grammars.constraint("regex", "warm")  # starts the helper, reads the vocabulary
    begun = time.perf_counter() - start
    firsts, laters, masks = [], [], []
    for place in range(REPEATS):
        schema = SCHEMA | {"title": str(place)}
        start = time.perf_counter()
        grammars.constraint("json_schema", schema)
        firsts.append(time.perf_counter() - start)
        start = time.perf_counter()
        constraint = grammars.constraint("json_schema", schema)
        laters.append(time.perf_counter() - start)
        scores = torch.zeros(tokenizer.size)
        for token in tokenizer.encode('{"name":"'):
            free = scores.clone()  # which are changed in place
            start = time.perf_counter()
            allowed = constraint.apply(free, ())
            masks.append(time.perf_counter() - start)
            assert allowed[token] == 0
            constraint.accept(token)
    grammars.close()
    return {
        "first constraint of a process ms": 1000 * begun,
        "first use of a schema ms": 1000 * statistics.median(firsts),
        "later use of a schema ms": 1000 * statistics.median(laters),
        "mask per token µs": 1e6 * statistics.median(masks),
    }


class Served:
    """A fresh `armillary serve` of a model, and a client that asks it one thing after the other."""

    def __init__(self, model: Path) -> None:
        self.process = Process(model)
        self._seeds = itertools.count()

    def _ask(self, tokens: int, schema: dict[str, Any] | None) -> tuple[int, float]:
        body: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Name a pet."}],
            "max_tokens": tokens,
            "seed": next(self._seeds),
            "temperature": 1.0,
        }
        if schema is not None:
            form = {"name": "pet", "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        url = f"http://127.0.0.1:{self.process.port}/v1/chat/completions"
        asked = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        start = time.perf_counter()
        with urllib.request.urlopen(asked) as answer:
            found = json.loads(answer.read())
        return found["usage"]["completion_tokens"], time.perf_counter() - start

    def constrained(self, tokens: int, schema: dict[str, Any]) -> tuple[int, float]:
        """How many tokens it has become, and seconds."""
        return self._ask(tokens, schema)

    def plain(self, tokens: int) -> float:
        """Seconds of an answer of just so many tokens; one that ends by itself before is not taken."""
        while True:
            count, took = self._ask(tokens, None)
            if count == tokens:
                return took


def answers(net, tokenizer) -> dict[str, float]:
    """Whole answers over HTTP: the first of a process that follows a schema, after some that do not, and later
    ones with the same schema and with new ones; each against answers of as many tokens without."""
    firsts, ratios, news = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        armillary.save(armillary.Model(net, tokenizer), model)
        for _ in range(BEGUN):
            served = Served(model)
            try:
                plain = statistics.median([served.plain(FIRST) for _ in range(9)][2:])
                count, took = served.constrained(FIRST, SCHEMA)
                assert count == FIRST
                firsts.append(took - plain)
                for place in range(5):
                    count, took = served.constrained(LONG, SCHEMA)
                    ratios.append(took / served.plain(count) - 1)
                    count, took = served.constrained(LONG, SCHEMA | {"title": str(place)})
                    news.append(took - served.plain(count))
            finally:
                served.process.end()
    return {
        "first answer with a schema, more than without ms": 1000 * statistics.median(firsts),
        "later answers with a schema, slower by": statistics.median(ratios),
        "later answers with a new schema, more than without ms": 1000 * statistics.median(news),
    }


def main() -> None:
    net, tokenizer = network(LONG + 2 * TOKENS)
    figures = overhead(net, tokenizer) | first_token(net) | gaps(net, tokenizer) | schemas(tokenizer)
    figures |= answers(net, tokenizer)
    beside = figures["gap while 4,000 tokens are read, p99 ms"]
    figures["p99 gap beside a long prompt over median alone"] = beside / figures["gap between tokens alone, median ms"]
    report(
        "serving",
        figures,
        {
            "engine's share of a step": (0.05, "max"),
            "engine's share of a step of answers that are given whole": (0.05, "max"),
            "server adds ms": (1.0, "max"),
            f"beside {BESIDE} streams, server adds ms": (1.0, "max"),
            "p99 gap beside a long prompt over median alone": (2.0, "max"),
            "first answer with a schema, more than without ms": (20.0, "max"),
            "later answers with a schema, slower by": (0.05, "max"),
        },
    )


if __name__ == "__main__":
    main()

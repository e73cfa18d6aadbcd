"""POST /v1/completions: texts that go on."""

from __future__ import annotations

import uuid
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from armillary.engine.request import Answer, Piece
from armillary.engine.sampling import Choice
from armillary.server.answering import Answered, Context, Form, Job, now, used
from armillary.server.chat import FINISH
from armillary.server.errors import HTTPError
from armillary.server.hosted import Hosted
from armillary.server.limits import Client
from armillary.server.protocol import PROMPTS, CompletionRequest
from armillary.text import Tokenizer


def answer(
    context: Context, hosted: Hosted, client: Client, asked: CompletionRequest, headers: dict[str, str]
) -> Answered:
    rows = hosted.prompts(asked.prompt)
    copies = asked.best_of or asked.n
    if len(rows) * copies > PROMPTS:
        raise HTTPError(400, f"{len(rows)} prompts with {copies} answers each are more than {PROMPTS}", param="n")
    # the best of several is found by their log-probabilities, which are there in any case
    groups = [
        hosted.requests(
            asked,
            ids,
            most=asked.max_tokens
            if asked.max_tokens is not None
            else min(16, max(1, hosted.engine.capacity - len(ids))),
            alternatives=asked.logprobs or 0,
            client=client,
            copies=copies,
            prompt_logprobs=asked.echo and asked.logprobs is not None,
        )
        for ids in rows
    ]
    job = Job(hosted, client, groups)
    base = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": now(), "model": hosted.name}
    prompt = sum(len(ids) for ids in rows)

    if not asked.stream:

        def whole(answers: list[Answer]) -> dict[str, Any]:
            kept = []
            for group in range(len(groups)):
                mine = answers[group * copies : (group + 1) * copies]
                kept += sorted(mine, key=_mean, reverse=True)[: asked.n] if copies > asked.n else mine
            choices = [_choice(place, one, asked, hosted.tokenizer) for place, one in enumerate(kept)]
            return base | {"choices": choices, "usage": used(prompt, sum(len(one.choices) for one in answers))}

        return Answered(context, job, whole=whole, headers=headers)

    def event(place: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return base | {"choices": [{"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish}]}

    places: dict[int, int] = {}
    forms: dict[int, Form] = {}
    generated = 0

    def piece(place: int, given: Piece, one: Answer) -> list[Any]:
        nonlocal generated
        generated += len(given.choices)
        if not given.text and given.finish is None and not given.choices:
            return []
        if given.finish is None and asked.logprobs is None and not asked.counts:
            if place not in forms:
                forms[place] = Form(lambda text: event(place, text))
            return [forms[place].written(given.text)]
        start = places.get(place, 0)
        places[place] = start + len(given.text)
        found = None if asked.logprobs is None else _logprobs(given.choices, asked.logprobs, start, hosted.tokenizer)
        finish = None if given.finish is None else FINISH[given.finish]
        return [event(place, given.text, found, finish) | ({"usage": used(prompt, generated)} if asked.counts else {})]

    def last(answers: list[Answer]) -> list[Any]:
        if asked.stream_options is None or not asked.stream_options.include_usage:
            return []
        return [base | {"choices": [], "usage": used(prompt, sum(len(one.choices) for one in answers))}]

    return Answered(context, job, first=list, piece=piece, last=last, headers=headers)


def _mean(one: Answer) -> float:
    return sum(choice.logprob for choice in one.choices) / max(1, len(one.choices))


def _choice(place: int, one: Answer, asked: CompletionRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    assert one.finish is not None
    text, before = one.text, ""
    found = None
    if asked.echo:
        before = tokenizer.decode(one.request.ids)
        text = before + text
    if asked.logprobs is not None:
        chosen = list(one.choices)
        if asked.echo:
            first = Choice(one.request.ids[0], 0.0)
            chosen = [first, *one.prompt_choices, *chosen]
        found = _logprobs(chosen, asked.logprobs, 0, tokenizer)
        if asked.echo:
            found["token_logprobs"][0] = None  # nothing came before it
            found["top_logprobs"][0] = None
    return {"index": place, "text": text, "logprobs": found, "finish_reason": FINISH[one.finish]}


def _logprobs(chosen: Sequence[Choice], top: int, start: int, tokenizer: Tokenizer) -> dict[str, Any]:
    offsets, at = [], start
    letters = getincrementaldecoder("utf-8")("replace")  # a letter may take several tokens
    for choice in chosen:
        offsets.append(at)
        if not tokenizer.is_special(choice.token):  # texts are without them
            at += len(letters.decode(tokenizer.token_bytes(choice.token)))
    return {
        "tokens": [_word(choice.token, tokenizer) for choice in chosen],
        "token_logprobs": [max(choice.logprob, -9999.0) for choice in chosen],
        "top_logprobs": [
            {_word(id, tokenizer): max(logprob, -9999.0) for id, logprob in one.top[:top]} for one in chosen
        ],
        "text_offset": offsets,
    }


def _word(id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(id).decode("utf-8", "replace")

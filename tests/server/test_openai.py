"""The official client against the server: every endpoint, streams, and errors as its own exceptions.

What the answers say is compared with the engine asked directly.
"""

from __future__ import annotations

import json
import math

import httpx
import openai
import pytest

from armillary.engine.request import Request
from armillary.engine.sampling import Sampling

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def direct(served, ids, **options) -> str:
    """The oracle: the engine itself."""
    engine = served.server.models["tiny"].engine
    return engine.submit(Request(tuple(ids), Sampling(**options))).wait().text


def chat_ids(served, messages=MESSAGES) -> list[int]:
    return served.server.models["tiny"].tokenizer.encode_chat(messages)


def test_chat(served) -> None:
    found = served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    assert found.choices[0].message.content == direct(served, chat_ids(served), max_new_tokens=12, temperature=0)
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage.prompt_tokens == len(chat_ids(served))
    assert found.usage.completion_tokens == len(found.choices[0].logprobs.content)
    for token in found.choices[0].logprobs.content:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy: the likeliest
        assert -9999 <= token.logprob <= 0


def test_chat_streamed_is_chat_whole(served) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 1.0, "seed": 7, "n": 3}
    whole = served.client().chat.completions.create(**options)
    texts, finishes, usage = ["", "", ""], [None, None, None], None
    for chunk in served.client().chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) > 1, "copies draw apart"
    assert usage.completion_tokens == whole.usage.completion_tokens


def computed(answer) -> int:
    """Every token but the last one chosen, which nobody had looked at yet; the end is not counted as a token."""
    return answer.usage.total_tokens - (answer.choices[0].finish_reason == "length")


def test_a_second_turn_finds_the_first(served) -> None:
    client = served.client()
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    turn = [
        *MESSAGES,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and then?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=turn, max_tokens=4, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens == computed(first)
    other = served.client("secret-of-b")
    cold = other.chat.completions.create(model="tiny", messages=turn, max_tokens=4, temperature=0)
    assert cold.usage.prompt_tokens_details.cached_tokens == 0, "what one key asked is not seen from another"


def test_answers_come_back_in_the_tokens_in_which_they_were_given(served) -> None:
    """Random bytes are no text, and what a client sends back is not what the model said: its tokens are kept."""
    client = served.client()
    asked, before = [{"role": "user", "content": "speak"}], None
    for turn in range(3):
        found = client.chat.completions.create(model="tiny", messages=asked, max_tokens=12, temperature=2.0, seed=turn)
        if before is not None:
            assert found.usage.prompt_tokens_details.cached_tokens == computed(before)
        asked = [*asked, {"role": "assistant", "content": found.choices[0].message.content}]
        asked, before = [*asked, {"role": "user", "content": "more"}], found


def test_response_formats(served) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["yes", "n"],
        "additionalProperties": False,
    }
    found = served.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=60,
        temperature=1.5,
        n=3,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        data = json.loads(choice.message.content)
        assert set(data) == {"yes", "n"}
        assert data["n"] in range(10)
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://e.org"}}},
        )
    assert caught.value.param == "response_format"
    found = served.client().completions.create(
        model="tiny", prompt="a", max_tokens=9, extra_body={"regex": "(ab|cd){2}"}
    )
    assert found.choices[0].text in ("abab", "abcd", "cdab", "cdcd")


def test_completions(served) -> None:
    client = served.client()
    found = client.completions.create(model="tiny", prompt=["ab", "xyz"], max_tokens=6, temperature=0, logprobs=1)
    tokenizer = served.server.models["tiny"].tokenizer
    for text, choice in zip(["ab", "xyz"], found.choices, strict=True):
        ids = [*([] if tokenizer.begin is None else [tokenizer.begin]), *tokenizer.encode(text)]
        assert choice.text == direct(served, ids, max_new_tokens=6, temperature=0)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) <= 6
    echoed = client.completions.create(model="tiny", prompt="ab", max_tokens=2, temperature=0, echo=True, logprobs=0)
    assert echoed.choices[0].text.startswith("ab")
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    ids = [*([] if tokenizer.begin is None else [tokenizer.begin]), *tokenizer.encode("ab")]
    assert len(echoed.choices[0].logprobs.token_logprobs) >= len(ids)
    best = client.completions.create(
        model="tiny", prompt="ab", max_tokens=5, temperature=1.2, seed=3, best_of=4, logprobs=0
    )
    many = client.completions.create(model="tiny", prompt="ab", max_tokens=5, temperature=1.2, seed=3, n=4, logprobs=0)
    means = [sum(one.logprobs.token_logprobs) / max(1, len(one.logprobs.token_logprobs)) for one in many.choices]
    assert best.choices[0].text == many.choices[means.index(max(means))].text


def test_offsets_of_tokens_are_places_in_the_text(served) -> None:
    """Bytes are tokens here: é takes two, and the token that texts begin with none of the text."""
    tokenizer = served.server.models["tiny"].tokenizer
    options = {"model": "tiny", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    found = served.client().completions.create(prompt="aéb", **options).choices[0].logprobs
    begun = [] if tokenizer.begin is None else [0]
    assert found.text_offset[: len(begun) + 4] == [*begun, 0, 1, 1, 2]


def test_completions_streamed(served) -> None:
    options = {"model": "tiny", "prompt": "ab", "max_tokens": 9, "temperature": 1.0, "seed": 5}
    whole = served.client().completions.create(**options)
    pieces = list(served.client().completions.create(**options, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_what_load_tools_ask_for(served) -> None:
    """guidellm and vLLM's own client: health first, answers of a fixed length, and the usage so far in every event."""
    assert httpx.get(f"{served.url}/health").status_code == 200
    more = {"extra_body": {"ignore_eos": True}, "stream": True}
    more["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    bias = {str(served.server.models["tiny"].tokenizer.eos): 100}  # the end would come first
    options = {"model": "tiny", "max_tokens": 7, "logit_bias": bias}
    client = served.client()
    assert client.completions.create(prompt="ab", **options).usage.completion_tokens == 0
    pieces = list(client.completions.create(prompt="ab", **options, **more))
    assert [one.usage.completion_tokens for one in pieces] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert all(one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens for one in pieces)
    talk = [{"role": "user", "content": "hello"}]
    chunks = list(client.chat.completions.create(messages=talk, **options, **more))
    counts = [one.usage.completion_tokens for one in chunks]
    assert counts[0] == 0
    assert counts[-1] == 7
    assert counts == sorted(counts)
    with pytest.raises(openai.BadRequestError, match="ignore_eos"):
        client.completions.create(prompt="ab", **options, extra_body={"ignore_eos": True, "target_tokens": 3})


def test_stop_texts_and_lengths(served) -> None:
    client = served.client()
    options = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "temperature": 1.0, "seed": 11}
    text = client.completions.create(**options).choices[0].text
    assert len(text) > 3
    cut = client.completions.create(**options, stop=[text[2:4]]).choices[0]
    assert cut.text == text[: text.find(text[2:4])]
    assert cut.finish_reason == "stop"


def test_embeddings(served) -> None:
    client = served.client()
    plain = client.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
    coded = client.embeddings.create(model="tiny", input=["one", "two"])  # the client asks for base64
    for one, other in zip(plain.data, coded.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert math.dist(plain.data[0].embedding, plain.data[1].embedding) > 1e-3


def test_embeddings_are_those_of_the_model(served) -> None:
    """Texts that stand alone, with the tokens that their tokenizer puts around them."""
    from armillary.model import Model

    one = served.server.models["tiny"]
    expected = Model(one.network, one.tokenizer).embed(["one", "two"])
    before = one.tokenizer.around
    try:
        one.tokenizer.around = ([5], [6, 7])  # as an encoder's tokenizer has them
        surrounded = Model(one.network, one.tokenizer).embed(["one", "two"])
        found = served.client().embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
    finally:
        one.tokenizer.around = before
    for data, vector, other in zip(found.data, surrounded.tolist(), expected.tolist(), strict=True):
        assert data.embedding == pytest.approx(vector, abs=1e-6)
        assert data.embedding != pytest.approx(other, abs=1e-3)


def test_models(served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_tokens_there_and_back(served) -> None:
    import httpx

    headers = {"authorization": "Bearer secret-of-a"}
    made = httpx.post(f"{served.url}/tokenize", json={"model": "tiny", "text": "grüße"}, headers=headers).json()
    back = httpx.post(f"{served.url}/detokenize", json={"model": "tiny", "ids": made["ids"]}, headers=headers).json()
    assert back["text"] == "grüße"
    talk = httpx.post(f"{served.url}/tokenize", json={"model": "tiny", "messages": MESSAGES}, headers=headers).json()
    assert talk["ids"] == chat_ids(served)


@pytest.mark.parametrize(
    "options, kind, field",
    [
        ({"model": "huge"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"stop": ["x"] * 40}, openai.BadRequestError, "stop"),
    ],
)
def test_errors_name_the_field(served, options, kind, field) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2} | options
    with pytest.raises(kind) as caught:
        served.client().chat.completions.create(**asked)
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)
    served.quiet()


def test_keys(served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong-secret").models.list()
    import httpx

    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert httpx.get(f"{served.url}{path}").status_code == 401
    for path in ("/live", "/ready"):
        assert httpx.get(f"{served.url}{path}").status_code == 200


def test_a_dead_end_of_a_grammar_is_an_error_of_its_request(served) -> None:
    """No character is both b and c, which shows only after the a: asked again, it would fail again."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 9, "grammar": 'start: "a" A\nA: /b/ & /c/'}
    headers = {"authorization": "Bearer secret-of-a"}
    found = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)
    error = found.json()["error"]
    assert (found.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "grammar")
    assert "could not follow its 'grammar'" in error["message"]
    found = httpx.post(f"{served.url}/v1/completions", json=body | {"stream": True}, headers=headers, timeout=60)
    events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
    assert [event["error"] for event in events if "error" in event] == [error]
    assert served.client().completions.create(model="tiny", prompt="a", max_tokens=3).choices

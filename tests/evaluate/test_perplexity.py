"""Window scores against one full-context pass and against a plain loop over windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.base.errors import InputError, UnsupportedError
from armillary.base.settings import parse
from armillary.evaluate import DocumentScore, score_documents
from armillary.evaluate.perplexity import windows
from armillary.nn.network import ModelSettings, Network, build

VOCABULARY = 29


def network(mixer: dict[str, object] | None = None, **more: object) -> Network:
    mixer = mixer or {"kind": "attention", "heads": 2}
    data = {"width": 16, "depth": 2, "vocabulary": VOCABULARY, "block": {"mixer": mixer, "channel": "gated"}, **more}
    built = build(parse(ModelSettings, data), seed=1)
    with torch.no_grad():  # larger weights, so that what comes before matters to what comes next
        for parameter in built.parameters():
            parameter.mul_(4.0)
    return built


def documents(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, VOCABULARY, length).tolist() for length in lengths]


def nll(net: Network, tokens: list[int]) -> list[float]:
    """−log softmax of the full logits: the oracle."""
    with torch.no_grad():
        logits = net(torch.tensor([tokens[:-1]])).double()
    chosen = torch.log_softmax(logits, -1)[0].gather(-1, torch.tensor(tokens[1:])[:, None])
    return (-chosen[:, 0]).tolist()


@pytest.mark.parametrize("mixer", [None, {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}])
def test_documents_within_the_context_get_their_exact_likelihood(mixer: dict[str, object] | None) -> None:
    net, docs = network(mixer), documents(2, 17, 5, 33, 8)
    scores = score_documents(net, docs, context=32, batch=2)
    assert [score.tokens for score in scores] == [1, 16, 4, 32, 7]
    for score, tokens in zip(scores, docs, strict=True):
        assert score.nats == pytest.approx(sum(nll(net, tokens)), rel=1e-5)


def test_long_documents_are_scored_as_by_a_loop_over_windows() -> None:
    net, docs = network(), documents(60, 31, 7)
    context, stride = 12, 5
    scores = score_documents(net, docs, context=context, stride=stride, batch=3)
    for score, tokens in zip(scores, docs, strict=True):
        total, done, start = 0.0, 1, 0
        while done < len(tokens):
            part = nll(net, tokens[start : start + context + 1])
            total += sum(part[done - start - 1 :])
            done = start + 1 + len(part)
            start += stride
        assert score.nats == pytest.approx(total, rel=1e-5)
        assert score.tokens == len(tokens) - 1


def test_more_context_is_seen_than_in_separate_chunks() -> None:
    net = network()
    tokens = documents(40)[0]
    strided = score_documents(net, [tokens], context=8)[0].nats
    chunks = sum(sum(nll(net, tokens[start : start + 9])) for start in range(0, 39, 8))
    assert strided != pytest.approx(chunks, rel=1e-3)  # the first tokens of chunks would be predicted blind
    assert score_documents(net, [tokens], context=8, stride=8)[0].nats == pytest.approx(chunks, rel=1e-5)


@given(st.integers(0, 200), st.integers(1, 40), st.data())
@settings(max_examples=200)
def test_windows_predict_each_token_once_with_enough_before_it(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    given_tokens = data.draw(st.integers(1, 3))
    targets = []
    for window in windows(0, length, context=context, stride=stride, given=given_tokens):
        assert 0 <= window.start <= window.first < window.stop <= length - 1
        assert window.stop - window.start <= context
        for position in range(window.first, window.stop):
            targets.append(position + 1)
            assert position - window.start + 1 >= min(position + 1, context - stride + 1)
    assert targets == list(range(given_tokens, length))


def test_batches_and_order_change_nothing() -> None:
    net, docs = network(), documents(3, 90, 12, 41, 2, 64)
    one = score_documents(net, docs, context=16, batch=1)
    many = score_documents(net, docs[::-1], context=16, batch=64)[::-1]
    for a, b in zip(one, many, strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-5)


def test_more_documents_than_are_held_at_once() -> None:
    net, docs = network(), documents(*[9] * 150)
    seen: list[int] = []
    scores = score_documents(net, iter(docs), context=8, batch=1, progress=seen.append)
    assert sum(score.nats for score in scores) == pytest.approx(sum(sum(nll(net, tokens)) for tokens in docs), rel=1e-5)
    assert seen == sorted(seen) and seen[-1] == 150 * 8 and len(seen) > 2


def test_given_tokens_are_not_predicted_and_short_documents_count_nothing() -> None:
    net, docs = network(), documents(10, 1, 0, 2)
    scores = score_documents(net, docs, context=16, given=2)
    assert scores[0].nats == pytest.approx(sum(nll(net, docs[0])[1:]), rel=1e-5)
    assert scores[1:] == [DocumentScore(0.0, 0)] * 3
    assert score_documents(net, [], context=16) == []


def test_recurrent_and_prefix_networks_are_scored_too() -> None:
    docs = documents(14)
    for net in (network({"kind": "retention", "heads": 2}), network(form="prefix")):
        assert score_documents(net, docs, context=20)[0].nats > 0
    prefix, tokens = network(form="prefix"), torch.tensor(docs)
    with torch.no_grad():
        logits = prefix(tokens[:, :-1], side={"prefix": torch.zeros(1, dtype=torch.int64)})
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
    assert score_documents(prefix, docs, context=20)[0].nats == pytest.approx(expected, rel=1e-5)


def test_mode_and_gradients_are_left_as_they_were() -> None:
    net = network().train()
    score_documents(net, documents(5), context=8)
    assert net.training and all(parameter.grad is None for parameter in net.parameters())


def test_wrong_input_is_named() -> None:
    net = network()
    with pytest.raises(InputError, match=f"token id {VOCABULARY}"):
        score_documents(net, [[1, 2], [1, VOCABULARY]], context=8)
    with pytest.raises(InputError, match="stride 9"):
        score_documents(net, [[1, 2]], context=8, stride=9)
    with pytest.raises(InputError, match="at least 1"):
        score_documents(net, [[1, 2]], context=0)
    with pytest.raises(InputError, match="document 0 has shape"):
        score_documents(net, [[[1, 2]]], context=8)  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match="encoder"):
        score_documents(network(form="encoder"), [[1, 2]], context=8)
    with torch.no_grad():
        net.embed.weight[0] = math.nan
    with pytest.raises(InputError, match="no finite likelihood to document 0"):
        score_documents(net, [[1, 2], [3, 4]], context=8)

"""Decoding: against whole forward passes, alone and in batches, with stop texts, filters and seeds."""

from __future__ import annotations

import copy

import pytest
import torch

from armillary.base.errors import InputError
from armillary.engine.choosing import choose, filtered
from armillary.engine.generate import generate, stream
from armillary.engine.sampling import Chooser, Sampling
from armillary.model import Model
from armillary.nn.network import ModelSettings, build
from armillary.text import TokenizerSettings, train_tokenizer

TOKENIZER = train_tokenizer(TokenizerSettings(kind="byte"), [])
BLOCKS = {
    "look": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}, "channel": "gated"},
    "state": {"mixer": "retention", "channel": "ffn"},
}


@pytest.fixture(scope="module")
def network():
    settings = {"width": 32, "depth": 2, "vocabulary": TOKENIZER.size, "pattern": ["look", "state"], "blocks": BLOCKS}
    return build(ModelSettings(**settings), seed=3)


PROMPTS = [[256, 10, 20, 30], [256], [256, 1, 2, 3, 4, 5, 6, 7]]


def greedy_by_whole_passes(network, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The oracle: no state, the whole sequence anew for every token."""
    ids, logprobs = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            scores = torch.log_softmax(network(torch.tensor([ids]))[0, -1].float(), -1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs


def test_greedy_equals_whole_passes_alone_and_in_a_ragged_batch(network) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0)
    together = generate(network, TOKENIZER, PROMPTS, sampling)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids, logprobs = greedy_by_whole_passes(network, prompt, 12)
        if TOKENIZER.eos in ids:
            ids = ids[: ids.index(TOKENIZER.eos)]
        assert found.ids == ids
        assert found.logprobs == pytest.approx(logprobs[: len(ids)], abs=1e-4)
        assert found.ids == generate(network, TOKENIZER, [prompt], sampling)[0].ids


def test_seeds(network) -> None:
    def run(seed: int, prompts=PROMPTS) -> list[list[int]]:
        return generate(network, TOKENIZER, prompts, Sampling(max_new_tokens=16, temperature=1.0, seed=seed)).ids

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] == run(1, PROMPTS[:1])[0]  # a row's draws do not depend on its neighbours


def test_streamed_pieces_join_to_the_whole(network) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=5)
    whole = generate(network, TOKENIZER, PROMPTS, sampling)
    pieces = [""] * len(PROMPTS)
    for piece in stream(network, TOKENIZER, PROMPTS, sampling):
        pieces[piece.row] += piece.text
    assert pieces == whole.text
    for one in whole:
        assert TOKENIZER.decode(one.ids) == one.text


def test_stop_texts_are_left_out(network) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=8)
    plain = generate(network, TOKENIZER, PROMPTS[:1], sampling)[0]
    stop = plain.text[5:8]
    at = plain.text.find(stop)
    cut = generate(network, TOKENIZER, PROMPTS[:1], sampling.derive(stop=(stop,)))[0]
    assert cut.text == plain.text[:at]
    assert cut.finish == "stop"


def test_filters_against_their_definitions() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))

    def kept(**options) -> list[bool]:
        return torch.isfinite(filtered(scores, Sampling(**options)))[0].tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]  # 0.5 < 0.6 <= 0.75
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(min_p=0.25) == [True, True, True, False]  # 0.15 >= 0.25 * 0.5 > 0.1
    assert kept(top_k=1, min_p=1.0, top_p=0.01) == [True, False, False, False]


def test_draws_follow_the_distribution() -> None:
    shares = torch.tensor([0.6, 0.3, 0.0, 0.1])
    chooser = Chooser(Sampling(temperature=1.0, seed=1), [0])
    drawn = torch.tensor([choose(shares.log()[None], [chooser])[0].token for _ in range(4000)])
    counts = torch.bincount(drawn, minlength=4) / 4000
    assert counts[2] == 0
    assert torch.allclose(counts, shares, atol=0.04)  # five standard deviations of the largest


def test_repetition_penalty_divides_what_was_seen() -> None:
    chooser = Chooser(Sampling(temperature=0, repetition_penalty=2.0), [0, 1])
    assert choose(torch.tensor([[3.0, -1.0, 1.6]]), [chooser])[0].token == 2  # 3/2 < 1.6
    assert choose(torch.tensor([[3.0, -1.0, 1.6]]), [chooser])[0].token == 0  # now 1.6/2 < 3/2


def test_bad_requests(network) -> None:
    model = Model(network, TOKENIZER)
    for options, message in (
        ({"temprature": 1.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate("x", **options)
    with pytest.raises(InputError, match="outside the vocabulary"):
        model.generate(torch.tensor([100_000]))
    with pytest.raises(InputError, match="no tokens"):
        generate(network, TOKENIZER, [[]], Sampling())


def test_learned_positions_bound_the_length() -> None:
    settings = ModelSettings(width=16, depth=1, vocabulary=TOKENIZER.size, context=8, position="learned")
    model = Model(build(settings), TOKENIZER)
    with pytest.raises(InputError, match="8 were learned"):
        model.generate("abc", max_new_tokens=20)


def test_the_end_token_ends(network) -> None:
    """With the token that greedy decoding chooses fourth as the end token, three or fewer are given out."""
    ids, _ = greedy_by_whole_passes(network, PROMPTS[2], 8)
    ending = copy.copy(TOKENIZER)
    ending.ends = (ids[3],)
    done = generate(network, ending, [PROMPTS[2]], Sampling(max_new_tokens=8, temperature=0))[0]
    assert done.finish == "end"
    assert done.ids == ids[: ids.index(ids[3])]
    assert len(done.logprobs) == len(done.ids)

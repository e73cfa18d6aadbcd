"""Watermarks against what their papers derive: the size of z, the share of marked tokens, unbiasedness."""

from __future__ import annotations

import math

import pytest
import torch

from armillary.base.errors import InputError
from armillary.engine.choosing import choose
from armillary.engine.constraints import Grammars
from armillary.engine.core import Engine
from armillary.engine.drafts import PromptLookup
from armillary.engine.request import Request
from armillary.engine.sampling import Chooser, Sampling
from armillary.engine.watermark import Watermark, detect, free, read_key
from armillary.model import Model
from armillary.nn.network import ModelSettings, build
from armillary.text import TokenizerSettings, train_tokenizer

TOKENIZER = train_tokenizer(TokenizerSettings(kind="byte"), [])
DRAWN = Sampling(temperature=1.0, max_new_tokens=64)


def key(number: int = 0) -> bytes:
    return b"a secret for tests %d" % number


def written(logits: torch.Tensor, mark: Watermark, count: int, seed: int = 0) -> list[int]:
    """Tokens drawn from one distribution, place after place."""
    chooser = Chooser(Sampling(temperature=1.0, seed=seed), [0], mark=mark)
    return [choose(logits[None], [chooser])[0].token for _ in range(count)]


@pytest.fixture(scope="module")
def network():
    mixer = {"kind": "attention", "heads": 2, "position": "rope"}
    settings = ModelSettings(
        width=16, depth=1, vocabulary=TOKENIZER.size, context=256, block={"mixer": mixer, "channel": "gated"}
    )
    return build(settings, seed=1).eval()


@pytest.mark.parametrize("share, bias", [(0.25, 2.0), (0.5, 1.0)])
def test_z_of_a_bias_grows_as_published(share: float, bias: float) -> None:
    """Of equal scores, γα / (1 + (α − 1)γ) are green, α = exp δ (Kirchenbauer et al. 2023, section 4)."""
    alpha = math.exp(bias)
    green = share * alpha / (1 + (alpha - 1) * share)
    mark = Watermark(key(), "kgw", context=3, share=share, bias=bias)
    ids = written(torch.zeros(64), mark, 1200)
    for count in (150, 1200):
        found = detect(ids[:count], mark)
        per_root = (green - share) / math.sqrt(share * (1 - share))
        spread = math.sqrt(green * (1 - green) / (share * (1 - share)))  # of z
        assert found.z == pytest.approx(per_root * math.sqrt(found.counted), abs=4 * spread)
    assert found.counted > 1150
    assert found.p < 1e-30


def test_z_of_keyed_draws_grows_as_derived() -> None:
    """A token of probability q scores the harmonic number H(1/q) on average, a plain one 1."""
    shares = torch.tensor([0.5, 0.25, 0.125] + [0.125 / 13] * 13)
    mean = float((shares * (torch.digamma(1 / shares + 1) + 0.5772157)).sum())
    mark = Watermark(key())
    found = detect(written(shares.log(), mark, 800), mark)
    assert 200 < found.counted < 797, "some contexts came twice"
    assert found.z == pytest.approx((mean - 1) * math.sqrt(found.counted), abs=5)
    assert found.p < 1e-6


def test_marked_text_needs_the_key() -> None:
    mark = Watermark(key())
    ids = written(torch.zeros(64), mark, 200)
    assert detect(ids, mark).z > 20
    for other in (Watermark(key(1)), Watermark(key(), "kgw"), Watermark(key(), context=3)):
        assert abs(detect(ids, other).z) < 5
    assert detect([*ids[100:150], 1, 2, 3, *ids[20:60]], mark).p < 1e-5, "parts among others are found, too"


@pytest.mark.parametrize("kind", ["gumbel", "kgw"])
def test_without_a_mark_z_is_standard(kind) -> None:
    """Text of few words that repeats itself, which breaks counts that are not independent."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(300):
        part = torch.randint(0, 5, (40,), generator=generator).tolist()
        found.append(detect(part * 3, Watermark(key(number), kind, context=2)))
    z = torch.tensor([one.z for one in found])
    assert abs(float(z.mean())) < 4 / 17
    assert float(z.std()) == pytest.approx(1.0, abs=0.16)
    p = torch.tensor([one.p for one in found])
    for level in (0.05, 0.25, 0.5):
        # of discrete counts p is at most as often small as it says
        low = 0.0 if kind == "kgw" else level - 0.1
        assert low <= float((p <= level).float().mean()) <= level + 0.1


def test_keyed_draws_are_unbiased_over_keys() -> None:
    """Pairs of tokens, over many keys, come as often as their probabilities say."""
    shares = torch.tensor([0.6, 0.3, 0.1])
    scores = shares.log()
    counts = torch.zeros(3, 3)
    runs = 2000
    for number in range(runs):
        step = Watermark(key(number), context=1).begin()
        assert step.apply(scores, []) is scores, "there is no context yet"
        step.accept(9)
        pair = []
        for _ in range(2):
            pair.append(int(step.apply(scores, []).argmax()))
            step.accept(pair[-1])
        counts[pair[0], pair[1]] += 1
        if pair[0] == pair[1]:
            assert step.apply(scores, []) is scores, "a context that came before marks nothing"
    expected = shares[:, None] * shares * runs
    assert float(((counts - expected).square() / expected).sum()) < 26.1  # χ² with 8 degrees, its 0.1 % point


def test_seeds_differ_and_filters_come_before_the_mark() -> None:
    mark = Watermark(key())
    assert written(torch.zeros(64), mark, 12, seed=1) != written(torch.zeros(64), mark, 12, seed=2)
    for kind in ("gumbel", "kgw"):
        strong = Watermark(key(), kind, bias=50.0)
        chooser = Chooser(Sampling(temperature=2.0, top_k=2), [0], mark=strong)
        logits = torch.arange(16.0) / 4
        assert {choose(logits[None], [chooser])[0].token for _ in range(100)} == {14, 15}


@pytest.mark.parametrize("kind", ["gumbel", "kgw"])
def test_guesses_change_nothing(network, kind) -> None:
    requests = [Request((1, 2, 3, seed), DRAWN.derive(seed=seed, top_k=4)) for seed in range(3)]
    mark = Watermark(key(), kind)
    plain = Engine(network, TOKENIZER, mark=mark, keep=False).run(requests)
    drafter = PromptLookup(shortest=1)
    guessed = Engine(network, TOKENIZER, mark=mark, drafter=drafter).run(requests)
    for one, other in zip(plain, guessed, strict=True):
        assert [choice.token for choice in one.choices] == [choice.token for choice in other.choices]
        assert detect([choice.token for choice in one.choices], mark).z > 2
    assert sum(one.accepted for one in guessed) > 0


def test_constrained_answers_stay_valid_and_forced_tokens_do_not_count(network) -> None:
    pytest.importorskip("llguidance")
    grammars = Grammars(TOKENIZER)
    pattern = r"(the same words: [a-z]{8}; ){4}"
    mark = Watermark(key(), "kgw", bias=4.0)
    model = Engine(network, TOKENIZER)
    sampling = Sampling(temperature=1.0, max_new_tokens=200)
    answer = model.run([Request((1, 2), sampling, steps=(grammars.constraint("regex", pattern),), mark=mark)])[0]
    grammars.close()
    ids = [choice.token for choice in answer.choices]
    counted = free(ids, grammars.constraint("regex", pattern), TOKENIZER.size)
    grammars.close()
    assert answer.finish == "end" and sum(counted) == 32
    careful, plain = detect(ids, mark, counted=counted), detect(ids, mark)
    assert careful.counted <= 32 < plain.counted
    assert careful.z > 3
    assert careful.z > plain.z


def test_a_text_a_model_and_a_key_file(network, tmp_path, monkeypatch) -> None:
    model = Model(network, TOKENIZER)
    mark = Watermark(key())
    done = model.generate("the", temperature=1.0, max_new_tokens=64, watermark=mark)
    assert detect(done.ids, mark).p < 1e-5
    assert "secret" not in repr(mark)
    place = tmp_path / "key"
    place.write_bytes(key() + b"\n")
    assert read_key(place) == key()
    monkeypatch.setenv("ARMILLARY_WATERMARK_KEY", "from the environment")
    assert read_key() == b"from the environment"


def test_bad_watermarks(network, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("ARMILLARY_WATERMARK_KEY", raising=False)
    with pytest.raises(InputError, match="16"):
        Watermark(b"short")
    with pytest.raises(InputError, match="kind 'loud'"):
        Watermark(key(), "loud")
    with pytest.raises(InputError, match="no watermark key"):
        read_key()
    with pytest.raises(InputError, match="cannot be read"):
        read_key(tmp_path / "none")
    with pytest.raises(InputError, match="tokenizer"):
        detect("text", Watermark(key()))
    model = Model(network, TOKENIZER)
    with pytest.raises(InputError, match="temperature 0"):
        model.generate("the", temperature=0, watermark=Watermark(key()))
    mine = Engine(network, TOKENIZER, mark=Watermark(key()))
    assert len(mine.run([Request((1, 2), Sampling(temperature=0, max_new_tokens=3))])[0].choices) == 3
    assert detect([1, 2], Watermark(key())).p == 1.0

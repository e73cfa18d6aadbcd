"""The fast n-gram baseline against a slow one written from the formula, and the other baselines' bounds."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.evaluate.baselines import Baseline, ByteNgram, baselines, primed_lzma, uniform

Gram = tuple[int, ...]
START = -1
SOURCE = Path(__file__).read_bytes()


class SlowKneserNey:
    """Interpolated modified Kneser-Ney, term by term as in Chen & Goodman (1998)."""

    def __init__(self, texts: list[bytes], order: int) -> None:
        self.order = order
        self.counts: dict[int, Counter[Gram]] = {order: Counter()}
        for text in texts:
            symbols = (START,) * (order - 1) + tuple(text)
            for end in range(order, len(symbols) + 1):
                self.counts[order][symbols[end - order : end]] += 1
        for length in range(order - 1, 0, -1):
            lefts: dict[Gram, set[int]] = defaultdict(set)
            for gram in self.counts[length + 1]:
                lefts[gram[1:]].add(gram[0])
            self.counts[length] = Counter({gram: len(left) for gram, left in lefts.items()})
        self.discounts = {length: self.estimate(counts) for length, counts in self.counts.items()}

    @staticmethod
    def estimate(counts: Counter[Gram]) -> tuple[float, float, float]:
        n1, n2, n3, n4 = (sum(1 for c in counts.values() if c == times) for times in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return 0.5, 1.0, 1.5
        y = n1 / (n1 + 2 * n2)
        d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        return (d1, d2, d3) if min(d1, d2, d3) > 0 else (0.5, 1.0, 1.5)

    def probability(self, gram: Gram) -> float:
        if not gram:
            return 1 / 256
        lower = self.probability(gram[1:])
        counts, (d1, d2, d3) = self.counts[len(gram)], self.discounts[len(gram)]
        following = [c for other, c in counts.items() if other[:-1] == gram[:-1]]
        total = sum(following)
        if total == 0:
            return lower
        count = counts[gram]
        discount = 0.0 if count == 0 else d1 if count == 1 else d2 if count == 2 else d3
        n1, n2 = following.count(1), following.count(2)
        n3 = len(following) - n1 - n2
        return (count - discount) / total + (d1 * n1 + d2 * n2 + d3 * n3) / total * lower

    def bits(self, text: bytes) -> float:
        symbols = (START,) * (self.order - 1) + tuple(text)
        ends = range(self.order, len(symbols) + 1)
        return -sum(math.log2(self.probability(symbols[end - self.order : end])) for end in ends)


@st.composite
def documents(draw: st.DrawFn) -> list[bytes]:
    """Texts over a small alphabet, so that n-grams repeat and all counts of counts occur."""
    alphabet = draw(st.binary(min_size=1, max_size=5))
    letters = st.sampled_from(sorted(set(alphabet)))
    return draw(st.lists(st.lists(letters, max_size=40).map(bytes), min_size=1, max_size=4))


@settings(max_examples=150, deadline=None)
@given(documents(), st.integers(1, 5), st.binary(max_size=6), st.data())
def test_fast_equals_slow(train: list[bytes], order: int, strange: bytes, data: st.DataObject) -> None:
    train.append(b"a")  # never empty
    text = data.draw(st.sampled_from(train)) + strange
    assert ByteNgram(order).fit(train).bits(text) == pytest.approx(SlowKneserNey(train, order).bits(text), abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_fast_equals_slow_with_estimated_discounts(order: int) -> None:
    train, text = [SOURCE[:1500], SOURCE[1500:2500]], SOURCE[2500:2600]
    slow = SlowKneserNey(train, order)
    if order > 1:
        assert slow.discounts[order] != (0.5, 1.0, 1.5)
    assert ByteNgram(order).fit(train).bits(text) == pytest.approx(slow.bits(text), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(documents(), st.integers(1, 7), st.binary(max_size=8))
def test_probabilities_sum_to_one(train: list[bytes], order: int, strange: bytes) -> None:
    model = ByteNgram(order).fit([*train, SOURCE[:500]])
    for history in (b"", strange, SOURCE[:300], train[0]):
        chances = model.distribution(history)
        assert chances.shape == (256,)
        assert (chances > 0).all()
        assert chances.sum() == pytest.approx(1, abs=1e-12)


def test_bits_follow_the_distribution() -> None:
    model = ByteNgram().fit([SOURCE])
    text = b"def test"
    by_byte = -sum(math.log2(model.distribution(text[:at])[byte]) for at, byte in enumerate(text))
    assert model.bits(text) == pytest.approx(by_byte, abs=1e-9)
    assert model.bits(b"") == 0


def test_documents_do_not_touch() -> None:
    ordered = ByteNgram(3).fit([b"ab", b"cd", b"ab"])
    assert ordered.bits(b"abcd") == ByteNgram(3).fit([b"cd", b"ab", b"", b"ab"]).bits(b"abcd")
    assert ordered.bits(b"cd") < ByteNgram(3).fit([b"abcdab"]).bits(b"cd")


def test_fit_replaces_earlier_counts() -> None:
    assert ByteNgram().fit([b"xyz"]).fit([SOURCE]).bits(b"import") == ByteNgram().fit([SOURCE]).bits(b"import")


def test_uniform_is_eight_bits() -> None:
    assert uniform() == 8


def test_lzma_copies_from_the_training_text() -> None:
    noise = random.Random(0).randbytes(20_000)
    known, new = noise[5_000:9_000], random.Random(1).randbytes(4_000)
    # noise is copied in pieces of at most 273 bytes, each naming its distance
    assert primed_lzma([noise], [known]) < 1
    assert 7.5 < primed_lzma([noise], [new]) < 8.5


def test_lzma_dictionary_reaches_the_oldest_training_byte() -> None:
    # farther back than the 8 MiB dictionary of the preset
    old = random.Random(0).randbytes(4_000)
    assert primed_lzma([old, b"\0" * (9 << 20)], [old]) < 1


def test_baselines_in_order_of_strength() -> None:
    heard: list[str] = []
    results = baselines([SOURCE], [SOURCE[:400], SOURCE[400:900]], heard.append)
    assert [type(r) for r in results] == [Baseline] * 3
    bits = [r.bits_per_byte for r in results]
    assert bits[0] == 8
    assert bits[1] < 4
    assert bits[2] < bits[1]
    assert len(heard) == 3 and "8.000 bits per byte" in heard[0]
    assert all(np.isfinite(r.seconds) and r.seconds >= 0 for r in results)


def test_ngram_figure_weighs_documents_by_bytes() -> None:
    train, heldout = [SOURCE], [b"import math", b"def"]
    model = ByteNgram().fit(train)
    wanted = sum(map(model.bits, heldout)) / 14
    assert baselines(train, heldout)[1].bits_per_byte == pytest.approx(wanted)


@pytest.mark.parametrize("texts", [[], [b""], [b"", b""]])
def test_empty_texts_are_refused(texts: list[bytes]) -> None:
    with pytest.raises(ValueError, match="training text is empty"):
        ByteNgram().fit(texts)
    with pytest.raises(ValueError, match="training text is empty"):
        baselines(texts, [b"x"])
    with pytest.raises(ValueError, match="held-out text is empty"):
        baselines([b"x"], texts)
    with pytest.raises(ValueError, match="held-out text is empty"):
        primed_lzma([b"x"], texts)


@pytest.mark.parametrize("order", [0, -1, 8])
def test_order_out_of_range_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match="order must be from 1 to 7"):
        ByteNgram(order)


def test_scoring_before_fitting_is_refused() -> None:
    with pytest.raises(ValueError, match="call fit first"):
        ByteNgram().bits(b"x")

"""Baselines for held-out bits per byte: what a model of the same text must beat to be worth its training.

All see the same training bytes and are scored on the same held-out documents as the model:

- `uniform`: every byte equally likely, 8 bits;
- `ByteNgram`: an interpolated modified Kneser-Ney model over bytes;
- `primed_lzma`: a general compressor that has already read the training text.

Only NumPy and the standard library are used, so the figures cannot share a mistake with the model.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint64]
Floats = NDArray[np.float64]

BYTES = 256
SYMBOL_BITS = 9  # 256 bytes and one start symbol
SYMBOL_SHIFT = np.uint64(SYMBOL_BITS)
MAX_ORDER = 64 // SYMBOL_BITS
ORDER = 5
START = 0  # pads the beginning of a document; byte b is symbol b + 1
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
LZMA_MAX_DICTIONARY = 3 << 29  # limit of the format


@dataclass(frozen=True)
class Baseline:
    """One baseline's result on the held-out documents."""

    name: str
    bits_per_byte: float
    seconds: float


def uniform() -> float:
    """Bits per byte when all 256 bytes are equally likely."""
    return float(np.log2(BYTES))


@dataclass(frozen=True)
class _Level:
    """The model of one order k: sorted n-grams and contexts with all that interpolation needs.

    grams, contexts: codes of k and k - 1 symbols, ascending.
    share: per gram, its discounted relative frequency; left_over: per context, the weight of order k - 1.
    """

    grams: Codes
    share: Floats
    contexts: Codes
    left_over: Floats

    def interpolate(self, grams: Codes, lower: Floats) -> Floats:
        """Probabilities of `grams` (codes of k symbols), given those of the next lower order."""
        context, known = _find(self.contexts, grams >> SYMBOL_SHIFT)
        gram, seen = _find(self.grams, grams)
        here = np.where(seen, self.share[gram], 0.0) + self.left_over[context] * lower
        # a context never seen says nothing: the lower order speaks alone
        return np.where(known, here, lower)


class ByteNgram:
    """Interpolated modified Kneser-Ney model over bytes.

    After S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language
    Modeling" (1998), with three discounts D1, D2, D3+ per order, estimated from the counts of
    counts; built on R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling" (1995).

    With h' the context h without its oldest symbol and D(c) the discount of count c,

        p_k(w | h) = (c(h w) - D(c(h w))) / c(h .) + (sum over v of D(c(h v))) / c(h .) * p_{k-1}(w | h')

    where c counts occurrences at the highest order and distinct left neighbours below it; p_0 is
    uniform over the 256 bytes. Each document is padded at its start, so that no context reaches
    into another document. Where the counts of counts of an order cannot give positive discounts
    (little text, or bytes alone, of which few are rare), 0.5, 1 and 1.5 are used.
    """

    def __init__(self, order: int = ORDER) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order must be from 1 to {MAX_ORDER}, not {order}")
        self.order = order
        self._levels: list[_Level] = []

    def fit(self, texts: Iterable[bytes]) -> ByteNgram:
        """Count the documents `texts`, replacing what was fitted before; returns the model itself."""
        codes = self._codes(texts)
        if codes.size == 0:
            raise ValueError("the training text is empty: an n-gram model needs at least one byte")
        grams, counts = np.unique(codes, return_counts=True)
        levels = [_level(grams, counts)]
        for length in range(self.order - 1, 0, -1):
            # every shorter gram is the end of a longer one, because documents are padded
            grams, counts = np.unique(grams & _mask(length), return_counts=True)
            levels.append(_level(grams, counts))
        self._levels = levels[::-1]
        return self

    def bits(self, text: bytes) -> float:
        """Bits that the model needs for the whole document `text`."""
        return float(-np.log2(self._probabilities(self._codes([text]))).sum())

    def distribution(self, history: bytes) -> Floats:
        """Probabilities of the 256 bytes that may follow `history`, a document's beginning."""
        ending_in_zero = self._codes([history + b"\0"])[-1:]
        following: Codes = np.add(ending_in_zero, np.arange(BYTES, dtype=np.uint64))
        return self._probabilities(following)

    def _codes(self, texts: Iterable[bytes]) -> Codes:
        """One code per byte: the symbol and the order - 1 before it, the oldest in the highest bits."""
        padding = np.full(self.order - 1, START, dtype=np.uint16)
        parts = [np.zeros(0, dtype=np.uint16)]
        for text in texts:
            parts += [padding, np.frombuffer(text, dtype=np.uint8).astype(np.uint16) + np.uint16(1)]
        symbols = np.concatenate(parts)
        codes = symbols.astype(np.uint64)
        for back in range(1, self.order):
            codes[back:] |= symbols[:-back].astype(np.uint64) << np.uint64(SYMBOL_BITS * back)
        inside: Codes = codes[symbols != START]
        return inside

    def _probabilities(self, codes: Codes) -> Floats:
        if not self._levels:
            raise ValueError("the n-gram model has no counts yet: call fit first")
        # ascending look-ups walk the tables in order, and repeated n-grams are looked up once
        distinct, where = np.unique(codes, return_inverse=True)
        result = np.full(distinct.size, 1.0 / BYTES)
        for length, level in enumerate(self._levels, start=1):
            result = level.interpolate(distinct & _mask(length), result)
        return result[where]


def _mask(length: int) -> np.uint64:
    """Bits of the newest `length` symbols of a code."""
    return np.uint64((1 << (SYMBOL_BITS * length)) - 1)


def _find(table: Codes, wanted: Codes) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Index in the ascending `table` of each code, and whether it is there at all."""
    index = np.minimum(np.searchsorted(table, wanted), table.size - 1)
    return index, table[index] == wanted


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """Discounts to take from counts 0, 1, 2 and 3 or more, estimated as Chen & Goodman (1998) do."""
    one, two, three, four = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    found = FALLBACK_DISCOUNTS
    if one and two and three and four:
        base = one / (one + 2 * two)
        estimate = (1 - 2 * base * two / one, 2 - 3 * base * three / two, 3 - 4 * base * four / three)
        if min(estimate) > 0:
            found = estimate
    return np.array([0.0, *found])


def _level(grams: Codes, counts: NDArray[np.int64]) -> _Level:
    """Turn the sorted grams of one order and their counts into probabilities."""
    discount = _discounts(counts)[np.minimum(counts, 3)]
    context = grams >> SYMBOL_SHIFT
    starts = np.flatnonzero(np.r_[True, context[1:] != context[:-1]])
    totals = np.add.reduceat(counts, starts)
    sizes = np.diff(np.r_[starts, grams.size])
    return _Level(
        grams=grams,
        share=(counts - discount) / np.repeat(totals, sizes),
        contexts=context[starts],
        left_over=np.add.reduceat(discount, starts) / totals,
    )


def primed_lzma(train: Sequence[bytes], heldout: Sequence[bytes]) -> float:
    """Bits per held-out byte of LZMA2 after reading `train`: the growth of the compressed length.

    The dictionary spans both texts, so that any training byte may be copied from.
    """
    primer, text = b"".join(train), b"".join(heldout)
    if not text:
        raise ValueError("the held-out text is empty: bits per byte need at least one byte")
    total = len(primer) + len(text)
    if total > LZMA_MAX_DICTIONARY:
        raise ValueError(f"an LZMA dictionary holds at most {LZMA_MAX_DICTIONARY} bytes, the texts have {total}")
    chain: list[dict[str, int]] = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 6,
            "dict_size": max(total, 4096),
            # text has no alignment: predict from more of the previous byte instead of the position
            "lc": 4,
            "lp": 0,
            "pb": 0,
        }
    ]

    def length(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=chain))

    # compression releases the interpreter lock, so the two run side by side
    with ThreadPoolExecutor(max_workers=2) as pool:
        before, after = pool.map(length, (primer, primer + text))
    return 8 * (after - before) / len(text)


def kneser_ney(train: Iterable[bytes], heldout: Sequence[bytes], order: int = ORDER) -> Baseline:
    """A `ByteNgram` of the order on `heldout`, whose documents count with their bytes."""
    size = sum(map(len, heldout))
    if size == 0:
        raise ValueError("the held-out text is empty: bits per byte need at least one byte")

    def bits() -> float:
        model = ByteNgram(order).fit(train)
        return sum(model.bits(text) for text in heldout) / size

    return _timed(f"byte {order}-gram, modified Kneser-Ney", bits)


def baselines(
    train: Sequence[bytes],
    heldout: Sequence[bytes],
    progress: Callable[[str], None] | None = None,
    *,
    order: int = ORDER,
) -> list[Baseline]:
    """All baselines on `heldout`, whose documents count with their bytes; `progress` hears of each."""
    if not any(heldout):
        raise ValueError("the held-out text is empty: bits per byte need at least one byte")
    if not any(train):
        raise ValueError("the training text is empty: the baselines need at least one byte")
    rows: tuple[Callable[[], Baseline], ...] = (
        lambda: _timed("uniform", uniform),
        lambda: kneser_ney(train, heldout, order),
        lambda: _timed("lzma primed with the training text", lambda: primed_lzma(train, heldout)),
    )
    results: list[Baseline] = []
    for measure in rows:
        results.append(measure())
        if progress is not None:
            progress(f"{results[-1].name}: {results[-1].bits_per_byte:.3f} bits per byte ({results[-1].seconds:.1f} s)")
    return results


def _timed(name: str, measure: Callable[[], float]) -> Baseline:
    begin = time.perf_counter()
    value = measure()
    return Baseline(name, value, time.perf_counter() - begin)

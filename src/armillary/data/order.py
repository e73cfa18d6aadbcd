"""Sample order as a pure function: a keyed permutation of range(size) that is never stored.

Any position of any epoch is computed on its own, so a run resumes anywhere and any number of
workers or ranks sees the same order.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 4  # each updates both halves


class Permutation:
    """position in the epoch -> item, a bijection of range(size) given by (seed, epoch, stream).

    A generalised Feistel network over Z_a x Z_b with a*b >= size, and cycle walking for the few
    values beyond size (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"; the network:
    Luby and Rackoff 1988, "How to Construct Pseudorandom Permutations from Pseudorandom Functions").
    The round function is the SplitMix64 finaliser (Steele, Lea and Flood 2014, "Fast Splittable
    Pseudorandom Number Generators"). Memory is O(1) whatever the size; `stream` separates sources
    that share a seed.
    """

    def __init__(self, size: int, *, seed: int, epoch: int, stream: int = 0) -> None:
        if not 0 < size < 2**62:
            raise ValueError(f"a permutation needs 0 < size < 2^62, found {size}")
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        name = f"armillary order 1|{seed}|{stream}|{epoch}".encode()
        self._keys = np.frombuffer(hashlib.sha512(name).digest(), dtype="<u8")

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Items at `positions` (integers in [0, size), any shape); same shape, int64."""
        given = np.asarray(positions, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.size):
            raise IndexError(f"positions must be in [0, {self.size})")
        values = self._encrypt(given.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:  # a walk that starts inside comes back inside: cycles are finite
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(given.shape)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._left), np.uint64(self._right)
        right, left = np.divmod(values, a)
        for turn in range(ROUNDS):
            left = (left + _mixed(right, self._keys[2 * turn]) % a) % a
            right = (right + _mixed(left, self._keys[2 * turn + 1]) % b) % b
        return right * a + left


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    mixed = values + key  # wraps around modulo 2^64, as everything here
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

"""Fixed heads against every pattern's matrix, written as loops over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.fixed import Fixed, FixedSettings
from armillary.nn.ops import plain_ops, running
from armillary.nn.ops.running import running_mean

T, WIDTH = 23, 14
ALL = ("current", "previous", "next", "left", "right", "start", "end")


def made(order: str = "bidirectional", patterns: tuple[str, ...] = ALL, **settings: Any) -> Fixed:
    mixer = FixedSettings(patterns=patterns, **settings).build(Place(WIDTH, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def matrix(pattern: str, n: int, power: int = 3) -> Tensor:
    """[n, n], as the docstring of the module says it."""
    table = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        looks: dict[str, dict[int, float]] = {
            "current": {i: 1},
            "previous": {i - 1: 1},
            "next": {i + 1: 1},
            "left": {j: (j + 1) ** power for j in range(i)},
            "right": {j: (n - j) ** power for j in range(i + 1, n)},
            "start": {0: 1},
            "end": {n - 1: 1},
        }
        weights = {j: w for j, w in looks[pattern].items() if 0 <= j < n} or {i: 1}
        for j, weight in weights.items():
            table[i, j] = weight / sum(weights.values())
    return table


@pytest.mark.parametrize("chunk", [128, 5])
@pytest.mark.parametrize("power", [3, 0])
def test_patterns_are_their_matrices(chunk: int, power: int, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "CHUNK", chunk)
    mixer = made(power=power).double()
    x = torch.randn(2, T, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, T, WIDTH, dtype=torch.float64)
    tables = torch.stack([matrix(pattern, T, power) for pattern in ALL])
    with torch.no_grad():
        found = mixer.sight(x, Context())
        agree(found, tables.expand(2, -1, -1, -1), 1e-12)
        agree(found.sum(-1), torch.ones(2, len(ALL), T).double(), 1e-12)
        agree(mixer.sight(torch.randn_like(x), Context()), found, 1e-15)  # whatever the tokens are
    dense = torch.einsum("hts,bshk->bthk", tables, mixer.v(x).unflatten(-1, (7, 2))).flatten(2)
    y, expected = mixer(x, Context()), mixer.o(dense)
    agree(y, expected, 1e-10)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((y * weights).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-9)


def test_documents_and_padding_begin_anew(agree: Any) -> None:
    mixer = made()
    x, sizes = torch.randn(2, T, WIDTH), [10, 1, 12]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    padding = torch.arange(T) < torch.tensor([[T], [T - 5]])
    with torch.no_grad():
        found = mixer.sight(x, Context(documents=documents, positions=positions, padding=padding))
    for row, last in ((0, 12), (1, 7)):
        start = 0
        for size in (10, 1, last):
            part = slice(start, start + size)
            expected = torch.stack([matrix(pattern, size) for pattern in ALL]).float()
            agree(found[row, :, part, part], expected, 1e-5)
            start += size


def test_means_of_late_documents_keep_their_digits(agree: Any) -> None:
    """Weights reach 10¹⁰ before the second document begins with a weight of 1: no difference of sums is formed."""
    long, short = 2500, 6
    v = torch.randn(1, long + short, 1, 2)
    steps = torch.cat([torch.arange(long), torch.arange(short)])
    fresh = (steps == 0)[None]
    weights = (steps + 1.0)[None] ** 3
    y, mean, mass = running_mean(v, weights, fresh)
    alone, _, alone_mass = running_mean(v[:, long:], weights[:, long:], fresh[:, long:])
    agree(y[:, long:], alone, 1e-6)
    agree(mean, alone[:, -1], 1e-6)
    assert float(mass) == float(alone_mass) == sum(n**3 for n in range(1, short + 1))
    with plain_ops():
        agree(running_mean(v, weights, fresh)[0], y, 1e-4)


def test_the_state_is_a_few_vectors(agree: Any) -> None:
    mixer = made("causal", ("left", "previous", "current", "start"), head_width=4)
    x = torch.randn(3, T, WIDTH)
    state = mixer.init_state(3, 1000, torch.float32, "cpu")
    with torch.no_grad():
        rows = [mixer.extend(x[:, t : t + 1], state, Context(positions=torch.tensor([[t]]))) for t in range(T)]
        agree(torch.cat(rows, 1), mixer(x, Context()), 1e-5)
    assert state.nbytes == 3 * (3 * 4 * 4 + 4 + 1)


def test_long_sequences_take_linear_work() -> None:
    from armillary.nn.cost import Counter

    flops = []
    for length in (512, 1024):
        with torch.no_grad(), Counter() as counter:
            made("causal", ("left", "current"))(torch.randn(1, length, WIDTH), Context())
        flops.append(counter.flops)
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)


def test_what_cannot_be_is_refused() -> None:
    for pattern in ("next", "right", "end"):
        with pytest.raises(UnsupportedError, match=f"cannot look at '{pattern}'"):
            FixedSettings(patterns=(pattern,)).build(Place(WIDTH))
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        FixedSettings().build(Place(WIDTH))
    with pytest.raises(SettingsError, match="patterns"):
        FixedSettings(patterns=())
    with pytest.raises(SettingsError, match="patterns"):
        FixedSettings(patterns=("sideways",))

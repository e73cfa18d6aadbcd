"""Smart Bird against its formulas as loops, PyTorch's attention, and the sketch's own frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers import smart_bird
from armillary.nn.mixers.smart_bird import SmartBird, SmartBirdSettings
from armillary.nn.training import Training

WIDTH, EACH = 16, 8


def made(order: str = "causal", **settings: Any) -> SmartBird:
    given = {"heads": 2, "keys": 4, "sketch": 4, "position": None} | settings
    mixer = SmartBirdSettings(**given).build(Place(WIDTH, order=order))
    initialise(mixer, 1)
    with torch.no_grad():
        mixer.sketch_q.weight.mul_(3)
    return mixer


def sketched(mixer: SmartBird, x: Tensor) -> Tensor:
    """A [B, T, T], the causal sketch."""
    scores = (x @ mixer.sketch_q.weight.t()) @ (x @ mixer.sketch_k.weight.t()).transpose(1, 2)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return torch.softmax((scores / math.sqrt(mixer.sketch)).masked_fill(later, -torch.inf), -1)


def published(mixer: SmartBird, x: Tensor) -> Tensor:
    """Deterministic top-M heads and the sketch's own head, query by query."""
    sketch = sketched(mixer, x)
    rows = []
    for b in range(x.shape[0]):
        q, k, v = (x[b] @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
        for t in range(x.shape[1]):
            taken = sorted(range(t + 1), key=lambda s: -float(sketch[b, t, s].detach()))[: mixer.keys]
            heads = []
            for h in range(mixer.heads):
                part = slice(EACH * h, EACH * h + EACH)
                weights = torch.softmax(torch.stack([q[t, part] @ k[s, part] for s in taken]) / EACH**0.5, 0)
                heads.append(sum(w * v[s, part] for w, s in zip(weights, taken, strict=True)))
            heads.append(sketch[b, t] @ v[:, WIDTH:])
            rows.append(torch.cat(heads))
    return torch.stack(rows).view(*x.shape[:2], -1) @ mixer.o.weight.t()


@pytest.mark.parametrize("rows", [256, 5])
def test_forward_is_the_formula(rows: int, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smart_bird, "ROWS", rows)
    mixer = made().double()
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64, requires_grad=True)
    weights, wanted = torch.randn(2, 13, WIDTH, dtype=torch.float64), [x, *mixer.parameters()]
    found, expected = mixer(x, Context()), published(mixer, x)
    agree(found, expected, 1e-10)
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-9)
    assert ours[4].abs().max() > 0 and ours[5].abs().max() > 0  # the sketch learns, through its own head


@pytest.mark.parametrize("training", [None, Training.of(4)])
def test_with_every_key_it_is_attention(training: Training | None, agree: Any) -> None:
    mixer = made(keys=20)
    x = torch.randn(2, 20, WIDTH)
    q, k, v = ((x @ part.weight.t()).unflatten(-1, (-1, EACH)).transpose(1, 2) for part in (mixer.q, mixer.k, mixer.v))
    dense = F.scaled_dot_product_attention(q, k, v[:, :2], is_causal=True)
    head = (sketched(mixer, x) @ v[:, 2])[:, None]
    expected = torch.cat([dense, head], 1).transpose(1, 2).flatten(2) @ mixer.o.weight.t()
    agree(mixer(x, Context(training=training)), expected, 1e-5)


def test_no_key_is_later_and_none_comes_twice() -> None:
    mixer = made()
    x = torch.randn(3, 17, WIDTH)
    for training in (None, Training.of(1), Training.of(2)):
        parts = mixer.freeze(x, Context(training=training)).parts
        index, seen = parts["index"], parts["seen"]
        queries = torch.arange(17)[:, None]
        assert bool((index <= queries)[..., :].masked_fill(~seen, True).all())
        assert bool((seen.sum(-1) == torch.minimum(queries[:, 0] + 1, torch.tensor(4))).all())
        for row, real in zip(index.flatten(0, 2).tolist(), seen.flatten(0, 2).tolist(), strict=True):
            taken = [s for s, r in zip(row, real, strict=True) if r]
            assert len(set(taken)) == len(taken)


def test_drawn_keys_follow_the_sketch() -> None:
    """One key a query: its frequency is the sketch's row (χ², and heads draw apart)."""
    mixer = made(keys=1)
    x = torch.randn(1, 8, WIDTH)
    counts = torch.zeros(2, 8)
    both = torch.zeros(8, 8)
    draws = 2000
    for seed in range(draws):
        index = mixer.freeze(x, Context(training=Training.of(seed))).parts["index"][0, :, -1, 0]
        counts[torch.arange(2), index] += 1
        both[index[0], index[1]] += 1
    share = sketched(mixer, x)[0, -1].detach()
    for found, expected in (
        (counts[0], share),
        (counts[1], share),
        (both.flatten(), torch.outer(share, share).flatten()),
    ):
        kept = expected * draws >= 5
        wanted = torch.cat([expected[kept], expected[~kept].sum()[None]]) * draws
        got = torch.cat([found[kept], found[~kept].sum()[None]])
        used = wanted > 0
        chi = float(((got - wanted)[used].square() / wanted[used]).sum())
        degrees = int(used.sum()) - 1
        assert chi < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations


def test_the_state_is_keys_values_and_the_sketch() -> None:
    state = made().init_state(3, 10, torch.bfloat16, "cpu")
    assert state.nbytes == 3 * 10 * (2 * (16 + 24) + 4 * 4)


def test_rows_of_padding_only_are_harmless() -> None:
    mixer = made("bidirectional")
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 3:] = True
    y = mixer(x, Context(padding=padding, training=Training.of(1)))
    assert y.isfinite().all()
    for slope in torch.autograd.grad(y.sum(), [x, *mixer.parameters()]):
        assert slope.isfinite().all()


def test_what_cannot_be_built_says_why() -> None:
    for name in ("heads", "keys", "sketch"):
        with pytest.raises(SettingsError, match=name):
            parse(MixerSettings, {"kind": "smart_bird", name: 0})
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        SmartBirdSettings(heads=3).build(Place(WIDTH))
    with pytest.raises(UnsupportedError, match="takes rotations only"):
        SmartBirdSettings(position="alibi").build(Place(WIDTH))  # type: ignore[arg-type]

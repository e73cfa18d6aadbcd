"""Scatterbrain against D⁻¹(φ(Q)φ(K)ᵀ + S)V with every pair written out (Chen et al. 2021), and its
error against that of either part alone, on random and on trained attention."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.data.batch import Batch
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers import scatterbrain as mixers
from armillary.nn.mixers.scatterbrain import Scatterbrain, ScatterbrainSettings
from armillary.nn.network import build
from armillary.nn.ops import scatter
from armillary.nn.ops.features import log_features, orthogonal_features
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.taps import Taps
from armillary.objectives.base import Vocabulary
from armillary.recipe import Recipe
from armillary.train import Trainer


def made(window: int, order: str = "causal", features: int = 6) -> Scatterbrain:
    mixer = ScatterbrainSettings(heads=2, window=window, features=features).build(Place(8, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return mixer


def matrix(q: Tensor, k: Tensor, omega: Tensor, window: int, causal: bool) -> Tensor:
    """The normalised weights of one head: φ(q)·φ(k) plus S, which on the window holds what is missing
    to exp(q·k/√K). q, k [T, K], omega [m, K]."""
    length, width = q.shape
    turned = [z * width**-0.25 for z in (q, k)]
    phi_q, phi_k = (torch.exp(z @ omega.t() - (z**2).sum(-1, keepdim=True) / 2) / len(omega) ** 0.5 for z in turned)
    low_rank = phi_q @ phi_k.t()
    sparse = torch.zeros_like(low_rank)
    for i in range(length):
        for j in range(length):
            if abs(i - j) < window:
                sparse[i, j] = torch.exp(q[i] @ k[j] / width**0.5) - low_rank[i, j]
    weights = low_rank + sparse
    weights = weights.tril() if causal else weights
    return weights / weights.sum(-1, keepdim=True)


def published(mixer: Scatterbrain, x: Tensor, causal: bool) -> Tensor:
    outputs = []
    for row in x:
        q, k, v = (p(row).unflatten(-1, (2, 4)).unbind(1) for p in (mixer.q, mixer.k, mixer.v))
        heads = [matrix(q[h], k[h], mixer.omega[h].to(x.dtype), mixer.window, causal) @ v[h] for h in range(2)]
        outputs.append(mixer.o(torch.cat(heads, -1)))
    return torch.stack(outputs)


@pytest.fixture(params=[4, 7, 64])
def chunk(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks shorter than the sequence, so that far tokens are summed; and longer."""
    for module in (scatter, mixers):
        monkeypatch.setattr(module, "chunk_for", lambda window: request.param)
    return int(request.param)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("window", [0, 1, 3, 6, 40])
def test_it_is_the_sum_of_both_parts(order: str, window: int, chunk: int, agree: Any) -> None:
    mixer = made(window, order).double()
    x = torch.randn(2, 23, 8, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(2, 23, 8, dtype=torch.float64)
    found, expected = mixer(x, Context()), published(mixer, x, order == "causal")
    agree(found, expected, 1e-10)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * slopes).sum(), wanted)
    theirs = torch.autograd.grad((expected * slopes).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-9)


@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("cuts", [[1] * 23, [9, 1, 13], [23]])
def test_chunks_and_steps_are_the_whole(window: int, cuts: list[int], chunk: int, agree: Any) -> None:
    mixer = made(window).double()
    x = torch.randn(2, 23, 8, dtype=torch.float64)
    with torch.no_grad():
        state, start, pieces = mixer.init_state(2, 4, torch.float64, "cpu"), 0, []
        size = state.nbytes
        for count in cuts:
            pieces.append(mixer.extend(x[:, start : start + count], state, Context()))
            start += count
        agree(torch.cat(pieces, 1), published(mixer, x, True), 1e-10)
        assert state.nbytes == size


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("window", [0, 3])
def test_documents_and_padding_stay_apart(order: str, window: int, chunk: int, agree: Any) -> None:
    """The third document has the first one's number and is still another."""
    mixer = made(window, order)
    x = torch.randn(2, 26, 8)
    documents = torch.repeat_interleave(torch.tensor([4, 2, 4]), torch.tensor([12, 1, 13])).expand(2, -1)
    padding = torch.ones(2, 26, dtype=torch.bool)
    padding[0, :2] = padding[1, 22:] = False
    y = mixer(torch.where(padding[..., None], x, 40.0), Context(documents=documents, padding=padding))
    for row in range(2):
        for part in (slice(0, 12), slice(12, 13), slice(13, 26)):
            kept = torch.arange(26)[part][padding[row, part]]
            agree(y[row : row + 1, kept], mixer(x[row : row + 1, kept], Context()), 1e-5)


def test_large_scores_neither_overflow_nor_vanish(chunk: int, agree: Any) -> None:
    """Features of size e^±300 leave float32; their logarithms do not."""
    mixer = made(3)
    x = 12 * torch.randn(1, 23, 8)
    y = mixer(x, Context())
    assert float(log_features(mixer.k(x).unflatten(-1, (2, 4)).transpose(1, 2), mixer.omega).abs().max()) > 300
    assert bool(y.isfinite().all())
    with torch.no_grad():
        state = mixer.init_state(1, 4, torch.float32, "cpu")
        agree(torch.cat([mixer.extend(x[:, t : t + 1], state, Context()) for t in range(23)], 1), y, 1e-4)


def test_features_are_orthogonal_and_unbiased() -> None:
    omega = orthogonal_features(10, 4, seed=5, heads=2)
    cosines = torch.nn.functional.normalize(omega[0, :4], dim=-1)
    assert torch.allclose(cosines @ cosines.t(), torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert torch.equal(omega, orthogonal_features(10, 4, seed=5, heads=2))
    assert not torch.equal(omega, orthogonal_features(10, 4, seed=6, heads=2))
    q, k = torch.tensor([[0.5, -0.3, 0.8, 0.1]]).double(), torch.tensor([[0.2, 0.4, 0.7, -0.6]]).double()
    exact = float((q @ k.t()).exp())
    errors = []
    for count in (16, 256):
        omegas = torch.cat([orthogonal_features(count, 4, seed, heads=20) for seed in range(40)])
        found = (
            log_features(q.expand(800, 1, -1)[None], omegas) + log_features(k.expand(800, 1, -1)[None], omegas)
        ).exp()
        estimates = found.sum(-1).flatten()
        assert float(estimates.mean()) == pytest.approx(exact, rel=0.02)
        errors.append(float((estimates - exact).square().mean().sqrt()))
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.25)  # falls with the root of their number


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def errors(q: Tensor, k: Tensor, window: int, features: int) -> dict[str, float]:
    """Relative error of causal attention matrices, heads q, k [N, T, K], for both together and alone."""
    length, width = q.shape[1:]
    steps = torch.arange(length)
    later = steps[:, None] < steps
    scores = q @ k.transpose(1, 2) / width**0.5
    exact = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
    far = later | (steps[:, None] - steps >= window)
    found = {"sparse": error(torch.softmax(scores.masked_fill(far, -torch.inf), -1), exact)}
    for name, size in (("low rank", 0), ("both", window)):
        omega = orthogonal_features(features, width, seed=1, heads=len(q)).float()
        logs = [log_features(z[None] * width**-0.25, omega) for z in (q, k)]
        eye = torch.eye(length).expand(1, len(q), -1, -1)
        made = scatter.scatter_attend(q[None], k[None], eye, *logs, window=size, scale=width**-0.5, causal=True)
        found[name] = error(made[0], exact)
    return found


def test_random_attention_is_nearer_than_by_either_part() -> None:
    for size in (0.5, 1.0, 1.5):
        found = errors(size * torch.randn(16, 96, 16), size * torch.randn(16, 96, 16), 24, 64)
        assert found["both"] < min(found["sparse"], found["low rank"]), (size, found)


def test_trained_attention_is_nearer_than_by_either_part() -> None:
    """A small model that has learned the bytes of the standard library."""
    recipe = Recipe.load(
        "llama",
        "tokenizer={kind: byte}",
        "model.width=32",
        "model.depth=2",
        "model.context=96",
        "model.block.mixer.heads=2",
        "model.block.mixer.kv_heads=2",
        "model.block.channel.hidden=64",
        "training.context=96",
        "training.batch=8",
        "training.steps=100",
        "training.compile=no",
        "training.precision=float32",
        "training.optimiser.learning_rate=1e-2",
        "training.schedule={kind: constant, warmup: 0}",
    )
    network = build(recipe.model.derive(vocabulary=256), seed=0)
    trainer = Trainer(network, recipe.training, vocabulary=Vocabulary(256), seed=0)
    text = b"".join(
        (Path(os.__file__).parent / name).read_bytes() for name in ("argparse.py", "typing.py", "shutil.py")
    )
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    rows = trainer.objective.tokens(96)
    losses = []
    for _ in range(100):
        starts = torch.randint(0, len(ids) - rows, (8,), generator=generator)
        losses.append(trainer.step(Batch(ids[starts[:, None] + torch.arange(rows)])))
    assert losses[-1] < 0.6 * losses[0]
    taps = Taps(["*.q", "*.k"])
    with torch.no_grad():
        network(ids[:384].view(4, 96), taps=taps)
    for layer in range(2):
        q, k = (taps.seen[f"blocks.{layer}.mixer.{part}"].transpose(1, 2).flatten(0, 1) for part in "qk")
        found = errors(q, k, 24, 64)
        assert found["both"] < min(found["sparse"], found["low rank"]), (layer, found)


def test_what_it_cannot_do_says_why() -> None:
    with pytest.raises(UnsupportedError, match="takes rotations only"):
        ScatterbrainSettings(position=AlibiSettings()).build(Place(16))
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        ScatterbrainSettings(heads=3).build(Place(16))
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        made(2, "bidirectional").init_state(1, 4, torch.float32, "cpu")
    mixer, edit = made(2), Taps(edits=[("*.weights", torch.clone)])
    state = mixer.init_state(1, 4, torch.float32, "cpu")
    with pytest.raises(UnsupportedError, match="cannot be edited"):
        mixer.extend(torch.randn(1, 3, 8), state, Context(taps=edit))
    for wrong in ({"features": 0}, {"heads": 0}, {"window": -1}):
        with pytest.raises(SettingsError, match="greater than"):
            ScatterbrainSettings(**wrong)


def test_a_row_without_tokens_gives_zeros(chunk: int) -> None:
    for order in ("causal", "bidirectional"):
        padding = torch.tensor([[True] * 9, [False] * 9])
        y = made(2, order)(torch.randn(2, 9, 8), Context(padding=padding))
        assert bool((y[1] == 0).all()) and bool(y.isfinite().all())


def test_both_halves_have_one_scale() -> None:
    """Features of √s · x estimate exp(s q · k), which the window computes: four times s is twice x."""
    mixer = ScatterbrainSettings(heads=2).build(Place(16))
    initialise(mixer, 1)
    x = torch.randn(2, 2, 5, 8)
    with torch.no_grad():
        twice = mixer._logs(2 * x)
        mixer.scale *= 4
        torch.testing.assert_close(mixer._logs(x), twice)

"""LISA against softmax attention among quantised tokens, pair by pair (Wu et al. 2021)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.lisa import Lisa, LisaSettings
from armillary.nn.ops import histogram, plain_ops
from armillary.nn.training import Training


def made(order: str = "causal", **settings: Any) -> Lisa:
    mixer = LisaSettings(**{"heads": 2, "codebooks": 3, "codewords": 5, **settings}).build(Place(8, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return mixer


def encoded(mixer: Lisa, token: Tensor) -> list[int]:
    """The codewords of one token, each the most similar to what is left of it."""
    chosen, rest = [], token
    for codes in mixer.codes:
        chosen.append(int(torch.argmax(torch.stack([rest @ mixer.similarity @ code for code in codes]))))
        rest = rest - codes[chosen[-1]]
    return chosen


def published(mixer: Lisa, x: Tensor, causal: bool, decay: float = 1.0, own: bool = True) -> Tensor:
    """For each codebook and head, softmax over tokens j of the quantised query of t and key of j."""
    outputs = []
    for row in x:
        chosen = [encoded(mixer, token) for token in row]
        lines = []
        for t in range(len(row)):
            seen = [j for j in range(len(row)) if (j <= t or not causal) and (own or j != t)] or [t]
            total = torch.zeros(2, 4, dtype=x.dtype)
            for book in range(len(mixer.codes)):
                query = mixer.q(mixer.codes[book][chosen[t][book]]).view(2, 4)
                keys = [mixer.codes[book][chosen[j][book]] for j in seen]
                faded = torch.tensor([decay ** (t - j) for j in seen], dtype=x.dtype)
                weights = torch.stack([(query * mixer.k(key).view(2, 4)).sum(-1) / 4**0.5 for key in keys]).exp()
                weights = weights * faded[:, None]
                values = torch.stack([mixer.v(key).view(2, 4) for key in keys])
                total = total + (weights[..., None] * values).sum(0) / weights.sum(0)[:, None]
            lines.append(mixer.o(total.flatten()))
        outputs.append(torch.stack(lines))
    return torch.stack(outputs)


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize(
    "order, settings",
    [
        ("causal", {}),
        ("causal", {"decay": 0.7}),
        ("causal", {"own": False}),
        ("causal", {"own": False, "decay": 0.9}),
        ("bidirectional", {}),
        ("bidirectional", {"own": False}),
    ],
)
def test_it_is_attention_among_codewords(
    order: str, settings: dict[str, Any], chunk: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histogram, "CHUNK", chunk)
    mixer = made(order, **settings).double()
    x = 1.5 * torch.randn(2, 11, 8, dtype=torch.float64)
    slopes = torch.randn(2, 11, 8, dtype=torch.float64)
    found, expected = mixer(x, Context()), published(mixer, x, order == "causal", **settings)
    agree(found, expected, 1e-10)
    wanted = [p for name, p in mixer.named_parameters() if name != "similarity"]
    ours = torch.autograd.grad((found * slopes).sum(), wanted)
    theirs = torch.autograd.grad((expected * slopes).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-9)


@pytest.mark.parametrize("assignment", ["hard", "soft"])
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 6]])
def test_without_itself_chunks_are_the_whole(assignment: str, cuts: list[int], agree: Any) -> None:
    mixer = made(own=False, decay=0.9, assignment=assignment)
    x = torch.randn(2, 12, 8)
    state, start, pieces = mixer.init_state(2, 4, torch.float32, "cpu"), 0, []
    for count in cuts:
        pieces.append(mixer.extend(x[:, start : start + count], state, Context()))
        start += count
    agree(torch.cat(pieces, 1), mixer(x, Context()), 1e-5)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_codewords_that_are_the_tokens_make_softmax_attention(order: str, agree: Any) -> None:
    mixer = made(order, codebooks=1, codewords=6)
    words = torch.linalg.qr(torch.randn(8, 8))[0][:6] * 2  # of one length and orthogonal: each most like itself
    with torch.no_grad():
        mixer.codes.copy_(words)
        mixer.similarity.copy_(torch.eye(8))
    x = words[torch.randint(0, 6, (2, 30))]
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (mixer.q, mixer.k, mixer.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=order == "causal")
    agree(mixer(x, Context()), mixer.o(y.transpose(1, 2).flatten(2)))


def test_the_state_is_the_histogram_so_far() -> None:
    mixer = made()
    x = 1.5 * torch.randn(1, 70, 8)
    state = mixer.init_state(1, 4, torch.bfloat16, "cpu")
    size = state.nbytes
    with torch.no_grad():
        for t in range(70):
            mixer.extend(x[:, t : t + 1], state, Context())
    expected = torch.zeros(3, 5)
    for token in x[0]:
        for book, word in enumerate(encoded(mixer, token)):
            expected[book, word] += 1
    assert torch.equal(state.tensors["counts"].view(3, 5), expected)
    assert state.nbytes == size == 3 * 5 * 4


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_running_histograms_are_the_loop(decay: float, agree: Any) -> None:
    added, state = torch.rand(2, 150, 4), torch.rand(2, 4)
    documents = torch.repeat_interleave(torch.tensor([3, 1, 2]), torch.tensor([64, 9, 77])).expand(2, -1)
    live = torch.rand(2, 150) > 0.3
    for fields in ({}, {"documents": documents}, {"live": live}, {"state": state, "live": live}):
        with plain_ops():
            expected = histogram.running_histogram(added, decay, **fields)
        for a, b in zip(histogram.running_histogram(added, decay, **fields), expected, strict=True):
            agree(a, b, 1e-5)


def test_updates_train_the_codes_straight_through() -> None:
    """Outside of an update nothing flows to the similarity or x; in one it does, and the values are the same."""
    mixer = made()
    x = torch.randn(2, 9, 8, requires_grad=True)
    y = mixer(x, Context())
    assert all(g is None for g in torch.autograd.grad(y.sum(), [x, mixer.similarity], allow_unused=True))
    trained = mixer(x, Context(training=Training.of(1)))
    assert torch.equal(trained, y)
    slopes = torch.autograd.grad(trained.square().sum(), [x, mixer.similarity])
    assert all(float(g.abs().max()) > 0 for g in slopes)


def test_the_quantisation_error_falls() -> None:
    """With the auxiliary loss alone, and for real tokens only."""
    mixer = LisaSettings(heads=2, codebooks=2, codewords=8).build(Place(8))
    initialise(mixer, 1)
    x = torch.randn(4, 40, 8)
    padding = torch.arange(40) < torch.tensor([[40], [30], [35], [40]])
    x = torch.where(padding[..., None], x, 1e4)
    ctx = Context(training=Training.of(1), padding=padding)

    def error() -> float:
        return float((mixer._encode(x, ctx)[1] * padding).sum() / padding.sum())

    before = error()
    optimiser = torch.optim.Adam(mixer.parameters(), lr=3e-2)
    for _ in range(60):
        optimiser.zero_grad()
        (mixer(x, ctx) * 0).sum().backward()
        optimiser.step()
    assert error() < 0.7 * before


def test_a_choice_does_not_depend_on_other_rows() -> None:
    mixer = LisaSettings(heads=2, codebooks=4, codewords=32).build(Place(64))
    initialise(mixer, 1)
    x = torch.randn(40, 25, 64)
    whole = mixer._encode(x, Context())[0]
    for part in (x[:1, :1], x[7:9, 3:20], x[:, :5]):
        rows = 0 if part.shape[0] == 1 else 7 if part.shape[0] == 2 else 0
        start = 3 if part.shape[0] == 2 else 0
        expected = whole[rows : rows + part.shape[0], start : start + part.shape[1]]
        assert torch.equal(mixer._encode(part, Context())[0], expected)


def test_what_it_cannot_do_says_why() -> None:
    with pytest.raises(UnsupportedError, match="forgets in one direction only"):
        made("bidirectional", decay=0.9)
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        made(heads=3)
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        made("bidirectional").init_state(1, 4, torch.float32, "cpu")
    for wrong in ({"codewords": 0}, {"codebooks": 0}, {"decay": 0.0}, {"temperature": 0.0}):
        with pytest.raises(SettingsError, match="greater than 0"):
            LisaSettings(**wrong)


def test_a_row_without_tokens_gives_zeros() -> None:
    for order in ("causal", "bidirectional"):
        padding = torch.tensor([[True] * 9, [False] * 9])
        y = made(order)(torch.randn(2, 9, 8), Context(padding=padding, training=Training.of(1)))
        assert bool((y[1] == 0).all()) and bool(y.isfinite().all())

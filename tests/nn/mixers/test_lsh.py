"""LSH attention against the Reformer's text as loops over tokens: rounds with their normalisers and counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.banded import BandMixer
from armillary.nn.mixers.lsh import LSHSettings
from armillary.nn.mixers.lsh_local import LSHLocalSettings

LENGTH = 40
SETTINGS = [
    LSHSettings(heads=2, rounds=1, buckets=4, window=3),
    LSHSettings(heads=2, rounds=3, buckets=4, window=5),
    LSHSettings(heads=2, rounds=2, buckets=(2, 4), window=4),
    LSHLocalSettings(heads=2, rounds=2, buckets=4, window=3, local=4),
]


def made(settings: MixerSettings, width: int = 16) -> BandMixer:
    mixer = settings.build(Place(width))
    initialise(mixer, 3)
    return mixer  # type: ignore[return-value]


def bucket(mixer: Any, settings: Any, q: Tensor, head: int, number: int) -> int:
    """argmax [xR; −xR] of one query in one round; several factors are digits of one number."""
    columns = sum(one // 2 for one in settings.factors)
    directions = mixer.rotations.directions[head, :, number * columns : (number + 1) * columns]
    turned, found, radix, start = q @ directions.double(), 0, 1, 0
    for factor in settings.factors:
        part = turned[start : start + factor // 2]
        found += radix * int(torch.cat([part, -part]).argmax())
        start, radix = start + factor // 2, radix * factor
    return found


def published(mixer: Any, settings: Any, x: Tensor) -> Tensor:
    """Each round attends alone, with scores less log c for pairs that c rounds have; rounds are summed
    with weights exp(z − logsumexp z). A token's own score is −10⁵."""
    rows = []
    for row in x:
        heads = []
        for h in range(mixer.heads):
            part = slice(h * mixer.width, (h + 1) * mixer.width)
            q = row @ mixer.q.weight[part].t()
            v = row @ mixer.v.weight[part].t()
            k = q / (q.square().sum(-1, keepdim=True) + 1e-6 * mixer.width).sqrt()
            buckets = [[bucket(mixer, settings, one.detach(), h, r) for one in q] for r in range(settings.rounds)]
            outputs = []
            for t in range(len(row)):
                rounds = []
                for each in buckets:
                    rounds.append([s for s in range(t) if each[s] == each[t]][-settings.window :])
                if isinstance(settings, LSHLocalSettings):
                    rounds.append(list(range(t))[-settings.local :])
                count = {s: sum(s in seen for seen in rounds) for s in range(t)} | {t: len(rounds)}
                logs, parts = [], []
                for seen in rounds:
                    scores = [q[t] @ k[s] - math.log(count[s]) for s in seen]
                    scores.append(torch.tensor(-1e5 - math.log(count[t]), dtype=x.dtype))
                    joint = torch.stack(scores)
                    logs.append(joint.logsumexp(0))
                    parts.append(joint.softmax(0) @ v[[*seen, t]])
                z = torch.stack(logs)
                outputs.append((z - z.logsumexp(0)).exp() @ torch.stack(parts))
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, -1) @ mixer.o.weight.t())
    return torch.stack(rows)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: f"{one.kind}-{one.rounds}")
def test_forward_is_the_papers(settings: Any, agree: Any) -> None:
    """The loops in float64: beside −10⁵ a logarithm of a count is lost in float32."""
    mixer, twin = made(settings), made(settings).double()
    x = torch.randn(2, LENGTH, 16, requires_grad=True)
    y = x.detach().double().requires_grad_()
    weights = torch.randn(2, LENGTH, 16)
    found, expected = mixer(x, Context()), published(twin, settings, y)
    agree(found, expected.float(), 2e-5)
    ours = torch.autograd.grad((found * weights).sum(), [x, *mixer.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [y, *twin.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b.float(), 1e-4)


def test_more_rounds_and_wider_windows_find_more_of_the_attention() -> None:
    """The share of full shared-QK attention's weight on the pairs that are seen."""
    x = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(2))
    whole = made(LSHSettings(heads=2, rounds=1, buckets=1, window=200), 32).sight(x, Context())
    found = []
    for rounds, window in ((1, 8), (4, 8), (4, 24), (16, 200)):
        mixer = made(LSHSettings(heads=2, rounds=rounds, buckets=8, window=window), 32)
        seen = mixer.sight(x, Context()) > 0
        found.append(float((whole * seen)[:, :, 100:].sum(-1).mean().detach()))
    assert found == sorted(found)
    assert found[0] < 0.6 < 0.9 < found[-1]


def test_alike_tokens_share_a_bucket() -> None:
    """The probability of meeting falls with the angle, as hashing is for."""
    mixer = made(LSHSettings(heads=1, rounds=200, buckets=8), 16)
    generator = torch.Generator().manual_seed(5)
    a = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    b = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    b = torch.nn.functional.normalize(b - (a @ b) * a, dim=0)
    meets = []
    for angle in (0.0, 0.2, 0.6, 1.5):
        pair = torch.stack([a, math.cos(angle) * a + math.sin(angle) * b])[None, :, None]
        buckets = mixer.groups(pair, Context(), None)
        meets.append(float((buckets[..., 0] == buckets[..., 1]).float().mean()))
    assert meets[0] == 1.0 and meets == sorted(meets, reverse=True) and meets[-1] < 0.3


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=lambda one: f"{one.kind}-{one.rounds}")
def test_long_chunks_and_short_ones_go_on_alike(settings: Any, agree: Any) -> None:
    """Chunks that sort their rings and chunks that gather them, with groups that overflow their rings."""
    mixer, x = made(settings), torch.randn(2, 120, 16)
    with torch.no_grad():
        expected = mixer(x, Context())
        for cuts in ([50, 51, 52, 120], [1, 90, 93, 120], [120]):
            state, start, pieces = mixer.init_state(2, 4, torch.float32, "cpu"), 0, []
            size = state.nbytes
            for stop in cuts:
                pieces.append(mixer.extend(x[:, start:stop], state, Context()))
                start = stop
            agree(torch.cat(pieces, 1), expected, 2e-5)
            assert state.nbytes == size  # however many tokens it has seen


def test_gradients_flow_through_long_chunks(agree: Any) -> None:
    """Chunks that sort their rings, whose orders leave out what an order has lost."""
    mixer, x = made(SETTINGS[1]), torch.randn(1, 90, 16, requires_grad=True)
    weights = torch.randn(1, 90, 16)
    state = mixer.init_state(1, 4, torch.float32, "cpu")
    pieces = [mixer.extend(x[:, start:stop], state, Context()) for start, stop in ((0, 30), (30, 31), (31, 90))]
    wanted = [x, *mixer.parameters()]
    found = torch.autograd.grad((torch.cat(pieces, 1) * weights).sum(), wanted)
    for a, b in zip(found, torch.autograd.grad((mixer(x, Context()) * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-4)


def test_tokens_that_are_not_there_are_seen_by_nobody(agree: Any) -> None:
    mixer, x = made(SETTINGS[1]), torch.randn(2, 30, 16)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[0, 10:] = True
    with torch.no_grad():
        y = mixer(x, Context(padding=padding))
        assert y.isfinite().all()  # the second row is padding from end to end
        agree(y[:1, 10:], mixer(x[:1, 10:], Context()), 2e-5)


def test_layers_and_seeds_hash_differently_and_repeatably() -> None:
    x = torch.randn(1, 60, 16)
    built = [
        LSHSettings(heads=2, buckets=8, window=2, seed=seed).build(Place(16, layer=layer))
        for seed, layer in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    for mixer in built:
        initialise(mixer, 1)
    outputs = [mixer(x, Context()) for mixer in built]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[3])
    directions = built[0].rotations.directions  # type: ignore[attr-defined]
    built[0].to(torch.bfloat16)
    assert built[0].rotations.directions is directions  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"buckets": 5}, "must be even"),
        ({"buckets": [4, 3]}, "must be even"),
        ({"buckets": 0}, "must be even"),
        ({"heads": 0}, "greater than 0"),
        ({"window": 0}, "greater than 0"),
        ({"rounds": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(MixerSettings, {"kind": "lsh", **data})


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        LSHSettings().build(Place(18))
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        LSHSettings().build(Place(16, order="bidirectional"))
    mixer = made(LSHSettings(window=10**6))
    with pytest.raises(UnsupportedError, match="too large to sort"), torch.device("meta"):
        mixer.to("meta")(torch.empty(1, 50_000, 16), Context())

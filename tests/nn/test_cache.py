"""Caches that drop tokens or keep them in 8 bits: against the whole cache, and against their definitions."""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.cache import (
    HeavyHitters,
    Int8,
    Int8State,
    KeptState,
    Salient,
    Sinks,
    decode,
    encode,
    read_policy,
)
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.network import ModelSettings, build
from armillary.nn.positions.rope import RopeSettings

POLICIES = [Sinks, HeavyHitters, Salient]


def network_of(mixer=None, **settings):
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"} if mixer is None else mixer
    given = {"width": 16, "depth": 2, "vocabulary": 20, "context": 64, "block": {"mixer": mixer, "channel": "gated"}}
    return build(ModelSettings(**(given | settings)), seed=4).eval()


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(1))


def chunked(network, ids, sizes, **options) -> torch.Tensor:
    state = network.init_state(len(ids), **options)
    with torch.no_grad():
        return torch.cat([network.extend(part, state) for part in ids.split(sizes, 1)], 1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("extra", [{}, {"position": "alibi", "softcap": 3.0, "sinks": True}], ids=["rope", "alibi"])
def test_a_budget_of_all_tokens_is_the_whole_cache(policy, extra) -> None:
    network = network_of({"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"} | extra)
    ids = ids_of(2, 17)
    with torch.no_grad():
        whole = network(ids)
    found = chunked(network, ids, [5, 1, 1, 7, 1, 2], cache=policy(17))
    assert torch.allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_do_as_they_would_alone(policy) -> None:
    """Chunks of different lengths, none among them; a row without tokens keeps its state bit for bit."""
    network, ids = network_of(), ids_of(3, 12)
    state = network.init_state(3, cache=policy(6))
    alone = [network.init_state(1, cache=policy(6)) for _ in range(3)]
    at = [0, 0, 0]
    with torch.no_grad():
        for lengths in ([5, 3, 0], [1, 0, 1], [1, 1, 0], [4, 1, 7], [1, 1, 1]):
            chunk = torch.zeros(3, max(lengths), dtype=torch.int64)
            for row, count in enumerate(lengths):
                chunk[row, :count] = ids[row, at[row] : at[row] + count]
            before = state.snapshot()
            found = network.extend(chunk, state, lengths=torch.tensor(lengths))
            for row, count in enumerate(lengths):
                if count == 0:
                    for (_, _, new), (_, _, old) in zip(state.each(), before.each(), strict=True):
                        assert all(torch.equal(new.tensors[n][row], t[row]) for n, t in old.tensors.items())
                    continue
                expected = network.extend(ids[row : row + 1, at[row] : at[row] + count], alone[row])
                assert torch.allclose(found[row, :count], expected[0], atol=1e-5)
                at[row] += count


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [3, 9, 1, 11]], ids=str)
def test_sinks_are_attention_under_a_mask(sizes) -> None:
    network, ids = network_of(depth=1), ids_of(2, 24)
    rows, columns = torch.arange(24)[:, None], torch.arange(24)
    seen = (columns <= rows) & ((columns < 2) | (rows - columns < 5))
    mixer = next(iter(network.blocks)).mixer.inner

    def masked(q, k, v, how):
        scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3)) * mixer.scale
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)

    found = chunked(network, ids, sizes, cache=Sinks(7, sinks=2))
    mixer._attend = masked
    with torch.no_grad():
        expected = network(ids)
    assert torch.allclose(found, expected, atol=1e-5)


def by_the_book(mixer, x, budget: int, prompt: int, window: int | None) -> torch.Tensor:
    """One token after another, what is kept in lists: heavy hitters for each key head (window None), or salient
    tokens for all heads."""
    batch, length, _ = x.shape
    q, k = mixer.position.rotate(mixer._queries(x, Context()), mixer._keys(x, Context()), torch.arange(length)[None])
    v = mixer.v(x).unflatten(-1, (2, mixer.width))
    out = torch.zeros(batch, length, 4, mixer.width)
    for row in range(batch):
        mass = torch.zeros(2, length)
        kept: list[list[int]] = [[], []]
        for t in range(length):
            got = torch.zeros(2, length)
            for head in range(4):
                group = head // 2
                keys = [*kept[group], t]
                weights = torch.softmax(k[row, keys, group] @ q[row, t, head] * mixer.scale, 0)
                out[row, t, head] = weights @ v[row, keys, group]
                got[group, keys] += weights / 2
            if window is not None:  # one memory for both groups
                got = got.mean(0, keepdim=True).expand(2, -1)
                if t >= prompt:
                    mass = mass * (1 - 1 / window)
                elif t < prompt - window:
                    got = torch.zeros(2, length)
            mass = mass + got
            for group in range(2):
                kept[group].append(t)
                if t >= prompt - 1:
                    while len(kept[group]) > budget:
                        old = [s for s in kept[group] if s < t + 1 - budget // 2]
                        kept[group].remove(min(old, key=lambda s: float(mass[group, s])))
    return mixer.o(out.flatten(2))


@pytest.mark.parametrize("policy, window", [(HeavyHitters(6), None), (Salient(6, window=3), 3)])
@pytest.mark.parametrize("prompt", [1, 11])
def test_what_is_kept_is_what_the_definition_keeps(policy, window, prompt) -> None:
    settings = AttentionSettings(heads=4, kv_heads=2, position=RopeSettings())
    mixer = settings.build(Place(16, "mixer"))
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    x = torch.randn(2, 22, 16)
    state = KeptState(mixer.init_state(2, 4, torch.float32, "cpu"), policy)
    with torch.no_grad():
        expected = by_the_book(mixer, x, 6, prompt, window)
        found = []
        for part in x.split([prompt, *[1] * (22 - prompt)], 1):
            positions = torch.arange(int(state.lengths[0]), int(state.lengths[0]) + part.shape[1])[None]
            found.append(mixer.extend(part, state, Context(positions=positions)))
            index = state.tensors["index"]
            assert int((index >= 0).sum(2).max()) <= 6
            newest = range(max(0, int(state.lengths[0]) - 3), int(state.lengths[0]))
            assert all(bool((index == token).any(2).all()) for token in newest), "the nearest stay"
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-5)


def test_memory_is_bounded_and_states_are_handled_like_others() -> None:
    network, ids = network_of(), ids_of(2, 60)
    full, small = network.init_state(2, 60), network.init_state(2, 60, cache=Salient(19))
    with torch.no_grad():
        network.extend(ids, full)
        network.extend(ids, small)
        assert full.nbytes > 2.5 * small.nbytes  # heads of 4 features: the indices weigh much here
        again = small.select(torch.tensor([1, 0, 1]))
        swapped = network.extend(ids[[1, 0, 1], :1], again)
        joined = type(small).join([small, small])
        held = small.snapshot()
        first = network.extend(ids[:, :1], small)
        small.restore(held)
        assert torch.equal(network.extend(ids[:, :1], small), first)
        assert torch.allclose(swapped, first[[1, 0, 1]], atol=1e-5)
        assert torch.allclose(network.extend(ids[[0, 1, 0, 1], :1], joined), first[[0, 1, 0, 1]], atol=1e-5)
    with pytest.raises(UnsupportedError, match="truncated"):
        small.truncate(torch.tensor([3, 3]))


def test_gradients_pass_through_what_is_kept() -> None:
    network, ids = network_of(depth=1), ids_of(1, 9)
    state = network.init_state(1, cache=Sinks(4, sinks=1))
    x = network.embed.weight
    for part in ids.split(1, 1):
        logits = network.extend(part, state)
    logits.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_what_cannot_drop_tokens_is_left_or_refused() -> None:
    blocks = {
        "look": {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"},
        "near": {"mixer": {"kind": "window", "heads": 2, "window": 4}, "channel": "ffn"},
        "state": {"mixer": "retention", "channel": "gated"},
    }
    mixed = network_of(depth=3, block=None, blocks=blocks, pattern=["look", "near", "state"])
    kinds = [state.kind for _, _, state in mixed.init_state(1, cache=Sinks(8)).each()]
    assert kinds == ["scored", "window", "fixed"]
    with pytest.raises(UnsupportedError, match="no mixer here"):
        network_of("retention").init_state(1, cache=Sinks(8))
    with pytest.raises(UnsupportedError, match="one by one"):
        network_of({"kind": "attention", "heads": 2, "diagonal": False}).init_state(1, cache=Sinks(8))
    with pytest.raises(UnsupportedError, match="driver"):
        network_of(driver={"kind": "transformer_xl"}).init_state(1, cache=Sinks(8))
    for wrong in (lambda: Sinks(1), lambda: Sinks(4, sinks=4), lambda: HeavyHitters(4, recent=5)):
        with pytest.raises(InputError, match="budget"):
            wrong()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_off_by_half_a_step_at_most(dtype) -> None:
    x = (torch.randn(2, 3, 50, 64) * torch.logspace(-6, 4, 50)[:, None]).to(dtype)
    x[0, 0, 0] = 0
    coded, scale = encode(x)
    largest = x.float().abs().amax(-1, keepdim=True)
    error = (decode(coded, scale, torch.float32) - x.float()).abs()
    assert bool((error <= largest / 254 * 1.01).all())
    assert x.nbytes / (coded.nbytes + scale.nbytes) > 1.93 * dtype.itemsize / 2


def test_a_network_with_keys_and_values_in_eight_bits() -> None:
    network, ids = network_of(), ids_of(2, 30)
    with torch.no_grad():
        whole = network(ids)
    found = chunked(network, ids, [30], cache=Int8())
    assert torch.allclose(found, chunked(network, ids, [4, 1, 1, 20, 4], cache=Int8()), atol=1e-5), "chunks matter"
    assert 0 < float((found - whole).abs().max()) < 0.02 * float(whole.abs().max())
    state = network.init_state(2, cache=Int8())
    assert all(type(each) is Int8State and each.kind == "span" and each.divisible for _, _, each in state.each())
    with torch.no_grad():
        network.extend(ids, state)
        state.truncate(torch.tensor([11, 7]))
        network.extend(ids[:, :1], state)
    with pytest.raises(UnsupportedError, match="gradient"):
        network.extend(ids, network.init_state(2, cache=Int8()))


@pytest.mark.parametrize(
    "text, policy",
    [
        ("sinks:512", Sinks(512)),
        ("sinks:512,sinks=8", Sinks(512, sinks=8)),
        ("heavy_hitters:64,recent=16", HeavyHitters(64, recent=16)),
        ("salient:64,window=4,recent=60", Salient(64, recent=60, window=4)),
    ],
)
def test_a_policy_is_read_from_a_line(text, policy) -> None:
    assert read_policy(text) == policy


@pytest.mark.parametrize(
    "text, message",
    [
        ("salent:64", "no cache policy 'salent'"),
        ("int8", "no cache policy 'int8'"),
        ("", "no cache policy ''"),
        ("salient", "'' in 'salient' is no number of tokens"),
        ("salient:many", "'many' in 'salient:many' is no number"),
        ("salient:64,window", "'' in 'salient:64,window' is no number"),
        ("salient:64,width=4", "'width' in 'salient:64,width=4' is no setting of 'salient'"),
        ("salient:64,budget=4", "'budget' in 'salient:64,budget=4'"),
        ("salient:64,window=4,window=5", "or a second one"),
        ("sinks:4,sinks=4", "4 sinks in a budget of 4"),
        ("sinks:1", "a budget of 1"),
    ],
)
def test_a_line_that_is_no_policy_is_refused(text, message) -> None:
    with pytest.raises(InputError, match=message):
        read_policy(text)

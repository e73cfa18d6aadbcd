"""Memory tokens against the recurrence written out over calls of the plain stack, and their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import ArmillaryError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.network import ModelSettings, Network, build

IDS = torch.randint(0, 24, (2, 22), generator=torch.Generator().manual_seed(3))
ROPE = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}


def network(driver: dict[str, Any] | None, **more: Any) -> Network:
    data = {"width": 16, "depth": 2, "vocabulary": 24, "block": ROPE, "driver": driver}
    return build(parse(ModelSettings, data | more))


def written_out(net: Network, x: Tensor, segment: int) -> Tensor:
    """[memory; segment; memory] through the plain stack; its last rows are the next memory."""
    memory = net.driver.memory.expand(len(x), -1, -1)
    count, outputs = memory.shape[1], []
    for begin in range(0, x.shape[1], segment):
        part = x[:, begin : begin + segment]
        n = part.shape[1]
        places = [0] * count + list(range(n)) + [n - 1] * count
        y = net.blocks(torch.cat([memory, part, memory], 1), Context(positions=torch.tensor([places])))
        outputs.append(y[:, count : count + n])
        last = y[:, -count:]
        memory = last / (last.square().mean(-1, keepdim=True) + torch.finfo(last.dtype).eps).sqrt()
    return torch.cat(outputs, 1)


def test_the_recurrence_is_that_of_the_paper(agree: Any) -> None:
    net = network({"kind": "memory_tokens", "tokens": 3, "segment": 5})
    found, expected = net.driver(net.blocks, net.embed(IDS), Context()), written_out(net, net.embed(IDS), 5)
    agree(found, expected)
    wanted = [net.embed.weight, net.driver.memory, *net.blocks.parameters()]
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        agree(a, b, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["decoder", "encoder"])
def test_without_memory_it_is_the_plain_stack(form: str, agree: Any) -> None:
    """m = 0, and in a decoder one segment for all."""
    net = network({"kind": "memory_tokens", "tokens": 0, "segment": 22}, form=form)
    plain = network(None, form=form)
    plain.load_state_dict(net.state_dict())
    agree(net(IDS), plain(IDS))


@torch.no_grad()
def test_only_the_memory_goes_from_segment_to_segment(agree: Any) -> None:
    net = network({"kind": "memory_tokens", "tokens": 2, "segment": 5})
    changed = IDS.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 24
    assert bool((net(changed)[:, 20:] != net(IDS)[:, 20:]).any())
    alone = network({"kind": "memory_tokens", "tokens": 0, "segment": 5})
    alone.load_state_dict({k: v for k, v in net.state_dict().items() if k != "driver.memory"})
    assert torch.equal(alone(changed)[:, 5:], alone(IDS)[:, 5:])
    agree(alone(IDS)[:, 5:10], alone(IDS[:, 5:10]))


@torch.no_grad()
def test_it_drives_mixers_of_any_kind(agree: Any) -> None:
    """A recurrent mixer in chunks, ragged: only states and their contract are used."""
    block = {"mixer": {"kind": "retention", "heads": 2}, "channel": "gated"}
    net = network({"kind": "memory_tokens", "tokens": 2, "segment": 4}, block=block)
    whole, state = net(IDS), net.init_state(2)
    first = net.extend(IDS[:, :7], state, lengths=torch.tensor([7, 3]))
    rest = torch.stack([torch.cat([IDS[0, 7:], IDS[0, :4]]), IDS[1, 3:]])
    second = net.extend(rest, state, lengths=torch.tensor([15, 19]))
    agree(torch.cat([first[0], second[0, :15]]), whole[0])
    agree(torch.cat([first[1, :3], second[1]]), whole[1])


@torch.no_grad()
def test_in_a_bottleneck_tokens_meet_only_in_the_memory() -> None:
    """In one layer, whose memory rows are the learned ones, no token sees another; in two, through the memory."""
    for depth, felt in ((1, False), (2, True)):
        net = network({"kind": "memory_tokens", "tokens": 3, "bottleneck": True}, form="encoder", depth=depth)
        changed = IDS.clone()
        changed[:, 4] = (changed[:, 4] + 1) % 24
        moved = (net(changed) != net(IDS)).any(-1)
        moved[:, 4] = False
        assert bool(moved.any()) is felt
    free = network({"kind": "memory_tokens", "tokens": 3}, form="encoder", depth=1)
    assert bool((free(changed)[:, 5:] != free(IDS)[:, 5:]).any())


@torch.no_grad()
@pytest.mark.parametrize("control", [False, True])
def test_padding_stays_out_of_the_bottleneck(control: bool, agree: Any) -> None:
    net = network({"kind": "memory_tokens", "tokens": 3, "bottleneck": True, "control": control}, form="encoder")
    real = torch.arange(22) < torch.tensor([[22], [9]])
    found = net.hidden(torch.where(real, IDS, 0), padding=real)
    agree(found[:1], net.hidden(IDS[:1]))
    agree(found[1:, :9], net.hidden(IDS[1:, :9]))


@torch.no_grad()
def test_control_moves_the_memory_with_its_own_weights(agree: Any) -> None:
    """One layer: memory rows through the control block, tokens through the stack's, which sees them moved."""
    net = network({"kind": "memory_tokens", "tokens": 3, "control": True}, form="encoder", depth=1)
    x = net.embed(IDS)
    memory = net.driver.memory.expand(2, -1, -1)
    where = torch.tensor([[0, 0, 0, *range(22)]])
    moved = net.driver.control(torch.cat([memory, x], 1), Context(positions=where))[:, :3]
    expected = net.blocks(torch.cat([moved, x], 1), Context(positions=where))[:, 3:]
    agree(net.driver(net.blocks, x, Context()), expected)
    assert any(name.startswith("driver.control.0.") for name, _ in net.named_parameters())


@torch.no_grad()
def test_inserted_rows_are_on_no_tap() -> None:
    for form in ("decoder", "encoder"):
        net = network({"kind": "memory_tokens", "tokens": 3, "segment": 64}, form=form)
        from armillary.nn.taps import Taps

        taps = Taps(["*"])
        net(IDS, taps=taps)
        for name, value in taps.seen.items():
            shape = value.shape
            assert shape[2 if name.endswith("weights") else 1] == 22, (name, shape)
        assert taps.seen["blocks.0.mixer.weights"].shape == (2, 2, 22, 22)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UnsupportedError, match="'control' is for encoders"):
        network({"kind": "memory_tokens", "control": True})
    with pytest.raises(UnsupportedError, match="need some"):
        network({"kind": "memory_tokens", "tokens": 0, "bottleneck": True}, form="encoder")
    net = network({"kind": "memory_tokens"}, form="encoder")
    with pytest.raises(UnsupportedError, match="no state"):
        net.driver.init_state(net.blocks, 1, 1, torch.float32, "cpu")
    cross = {**ROPE, "cross": {"kind": "attention", "heads": 2}}
    with pytest.raises(ArmillaryError, match="decoder or an encoder"):
        network({"kind": "memory_tokens"}, form="encoder_decoder", block=cross, encoder={"block": ROPE})
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        network({"kind": "memory_tokens"}, form="prefix")

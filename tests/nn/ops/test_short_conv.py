"""The short causal convolution against `torch.nn.functional.conv1d`, and its chunks against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.cost import count
from armillary.nn.ops.short_conv import next_tail, short_conv, short_conv_flops, short_conv_plain

B, T, C = 2, 19, 21


def tensors(taps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [torch.randn(B, T, C), torch.randn(C, taps), torch.randn(C), torch.randn(B, taps - 1, C)]
    return [x.to(dtype).requires_grad_() for x in made]


def published(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, silu: bool) -> Tensor:
    line = torch.cat([tail, x], 1).transpose(1, 2)
    y = F.conv1d(line, weight[:, None], bias, groups=C).transpose(1, 2)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("form", [short_conv, short_conv_plain])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_it_is_a_depthwise_convolution(taps: int, silu: bool, form: Any, agree: Any) -> None:
    x, weight, bias, tail = parts = tensors(taps)
    slopes = torch.randn(B, T, C)
    y, expected = form(x, weight, bias, silu=silu, tail=tail), published(x, weight, bias, tail, silu)
    agree(y, expected, 2e-6)
    found = torch.autograd.grad((y * slopes).sum(), parts, allow_unused=True)
    wanted = torch.autograd.grad((expected * slopes).sum(), parts, allow_unused=True)
    for part, a, b in zip(parts, found, wanted, strict=True):
        if part.numel():
            agree(a, b, 1e-5)


@pytest.mark.parametrize("form", [short_conv, short_conv_plain])
@pytest.mark.parametrize("sizes", [[5, 1, 13], [1, 1, 1, 16], [19]])
def test_documents_are_alone(sizes: list[int], form: Any, agree: Any) -> None:
    x, weight, bias, _ = tensors(4)
    ids = torch.repeat_interleave(torch.tensor([3, 8, 3, 8][: len(sizes)]), torch.tensor(sizes)).expand(B, T)
    y = form(x, weight, bias, documents=ids)
    alone = torch.cat([form(part, weight, bias) for part in x.split(sizes, 1)], 1)
    agree(y, alone, 1e-6)
    slopes = torch.randn(B, T, C)
    for a, b in zip(
        torch.autograd.grad((y * slopes).sum(), (x, weight, bias)),
        torch.autograd.grad((alone * slopes).sum(), (x, weight, bias)),
        strict=True,
    ):
        agree(a, b, 1e-5)


@pytest.mark.parametrize("form", [short_conv, short_conv_plain])
def test_fewer_tokens_than_taps(form: Any, agree: Any) -> None:
    x, weight, bias, tail = tensors(7)
    agree(form(x[:, :3], weight, bias, tail=tail), published(x[:, :3], weight, bias, tail, True), 2e-6)
    ids = torch.tensor([[1, 1, 2]]).expand(B, 3)
    alone = torch.cat([form(x[:, :2], weight, bias), form(x[:, 2:3], weight, bias)], 1)
    agree(form(x[:, :3], weight, bias, documents=ids), alone, 1e-6)


@pytest.mark.parametrize("cuts", [[1] * T, [2, 1, 9, 7], [T]])
def test_chunks_are_the_whole(cuts: list[int], agree: Any) -> None:
    x, weight, bias, tail = tensors(4)
    expected, pieces = short_conv(x, weight, bias, tail=tail), []
    for part in x.split(cuts, 1):
        pieces.append(short_conv(part, weight, bias, tail=tail))
        tail = next_tail(part, tail)
    agree(torch.cat(pieces, 1), expected, 1e-6)


def test_tails_of_ragged_rows() -> None:
    x, tail = torch.randn(4, 5, 3), torch.randn(4, 3, 3)
    found = next_tail(x, tail, torch.tensor([0, 1, 3, 5]))
    assert torch.equal(found[0], tail[0])
    assert torch.equal(found[1], torch.cat([tail[1, 1:], x[1, :1]]))
    assert torch.equal(found[2], x[2, :3])
    assert torch.equal(found[3], x[3, 2:])
    assert torch.equal(next_tail(x, tail), x[:, 2:])
    assert next_tail(x, tail[:, :0]).shape == (4, 0, 3)  # one tap holds nothing


def test_bf16_sums_in_float32(agree: Any) -> None:
    x, weight, bias, tail = (t.detach().bfloat16() for t in tensors(4))
    y = short_conv(x, weight, bias, tail=tail)
    assert y.dtype == torch.bfloat16
    expected = short_conv_plain(x.float(), weight.float(), bias.float(), tail=tail.float())
    agree(y.float(), expected, 2**-8)


def test_flops() -> None:
    x, weight, bias, _ = (t.detach() for t in tensors(4))
    assert count(lambda: short_conv(x, weight, bias)) == short_conv_flops(C, 4, B * T)
    assert count(lambda: short_conv(x, weight, silu=False)) == short_conv_flops(C, 4, B * T, bias=False, silu=False)

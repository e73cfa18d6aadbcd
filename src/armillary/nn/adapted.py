"""Networks with adapters: the same parameters, and products to which an adapter adds something.

What an adapter is made of is a `Change` for each product that it touches, by the product's path. An adapted
network is a rewrite at the linear seam: modules of its own over the very tensors of the network that it was
made from. So both can be used at once, by any threads, and no call of one alters what the other computes; states
go with either. Who trains or casts one does so to both.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import UnsupportedError, nearest
from armillary.nn.linear import Linear
from armillary.nn.network import Network


class Change(Protocol):
    """What an adapter does to one product y = x Wᵀ + b, W [outputs, inputs]; both forms say the same."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the product that it fits."""
        ...

    def added(self, x: Tensor) -> Tensor:
        """x [..., inputs] → what is added to y, [..., outputs] in the dtype of x."""
        ...

    def merged(self, weight: Tensor) -> Tensor:
        """The W of a plain product that computes the same, in W's dtype."""
        ...

    def digest(self) -> bytes:
        """Equal for changes that are the same number for number, and for no others."""
        ...

    def to(self, device: torch.device) -> Change: ...


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """W + scale · B A with A [r, inputs], B [outputs, r] (Hu et al. 2021, LoRA: Low-Rank Adaptation of Large
    Language Models)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + self.scale * (self.b.to(wide) @ self.a.to(wide))).to(weight.dtype)

    def digest(self) -> bytes:
        made = hashlib.sha256(repr((self.scale, *self.a.shape, *self.b.shape)).encode())
        for part in (self.a, self.b):
            made.update(part.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
        return made.digest()

    def to(self, device: torch.device) -> LowRankChange:
        return LowRankChange(self.a.to(device), self.b.to(device), self.scale)


class Adapted(Linear):
    """A product with a change. Who reads `weight` past `forward` finds the merged one, so that no mechanism
    can leave an adapter out; a native step it has none (see `Linear.record`)."""

    plain: tuple[Linear]  # in a tuple, so that it is no module below this one
    change: Change

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.change.merged(self.plain[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain[0](x)
        return y + self.change.added(x)


def check_plain(network: Network) -> None:
    """Raises UnsupportedError where there is an adapter, which the parameters alone do not hold."""
    if any(isinstance(module, Adapted) for module in network.modules()):
        raise UnsupportedError(
            "a network with an adapter cannot be written as one", hint="keep the adapter's folder beside the model"
        )


def adapted(network: Network, changes: Mapping[str, Change]) -> Network:
    """The network with these changes, by the paths of its products; it shares every tensor.

    Raises UnsupportedError for a path that is no plain product, and for a change of another shape.
    """
    modules = dict(network.named_modules())
    for path, change in changes.items():
        module = modules.get(path)
        if module is None:
            known = [name for name, one in modules.items() if type(one) is Linear]
            raise UnsupportedError(f"there is no '{path}' in this network", hint=nearest(path, known))
        if isinstance(module, Adapted):
            raise UnsupportedError(f"'{path}' has an adapter already")
        if type(module) is not Linear:
            raise UnsupportedError(f"'{path}' is a {type(module).__name__}, which adapters cannot change")
        if change.shape != (module.outputs, module.inputs):
            raise UnsupportedError(
                f"an adapter changes '{path}' as if it were {list(change.shape)}, and it is "
                f"{[module.outputs, module.inputs]}"
            )
    shared: dict[int, Any] = {id(network.settings): network.settings}
    for tensor in (*network.parameters(), *network.buffers()):
        shared[id(tensor)] = tensor
    twin = copy.deepcopy(network, shared)
    for path, change in changes.items():
        product, plain = twin.get_submodule(path), modules[path]
        assert isinstance(plain, Linear)
        # the class is changed in place: whoever holds this module, by whatever name, holds the adapted one
        product.__class__ = Adapted
        product.__dict__ |= {"plain": (plain,), "change": change.to(plain.weight.device)}
    return twin

"""How initialisation and learning rates follow width and depth, so that what is best for a small model stays best.

A recipe names base sizes; at them nothing changes. Every parameter is compared with the one of the
same name in a network of the base width: the axes that grow tell what it is, whatever mechanism holds
it. r is by how much its inputs grow, d = depth / base depth. Rates are factors on AdamW's.

`maximal_update` (Yang et al. 2022, Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
Hyperparameter Transfer): matrices learn at 1/r; embeddings, biases and gains at 1; logits are divided
by r, their weight starting as at the base width; products from width to a fixed size (a router, say)
start smaller by √r and learn at 1/r; scores are scaled by 1/K where they were by 1/√K (by the attributes
that `Mixer.scaled` names). With a base depth, whatever lies in blocks learns at 1/√d and what writes to the
residual stream at 1/d (Yang et al. 2023, Tensor Programs VI: Feature Learning in Infinite-Depth Neural
Networks; there as multipliers of branches, here, where such products start smaller by √depth, as rates).

`kernel` (after Dinan, Yaida & Zhang 2023, Effective Theory of Transformers at Initialization): every
group's part of the neural tangent kernel of AdamW's sign-like steps stays as it is: matrices n^(−3/2),
vectors and embeddings n^(−1/2), the products of logits 1/n. Those exponents are derived from that
criterion here; the paper's own table may differ. It is the lazy regime: features move less as n grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from armillary.base.errors import ArmillaryError, SettingsError
from armillary.base.settings import Settings
from armillary.nn.heads.language_model import LanguageModelHead
from armillary.nn.linear import OUTPUT_ROLES, Embedding, ExpertLinear, Linear
from armillary.nn.mechanism import Mixer

if TYPE_CHECKING:
    from armillary.nn.network import Network

Rule = Literal["maximal_update", "kernel"]


class ScalingSettings(Settings):
    """Base sizes, and the rule by which a network of other sizes differs from one of these."""

    rule: Rule = Field("maximal_update", description="maximal_update: rates transfer; kernel: the lazy regime")
    width: int = Field(128, gt=0, description="the base width, at which nothing changes")
    depth: int | None = Field(None, gt=0, description="the base depth (maximal_update); null: rates ignore depth")

    @model_validator(mode="after")
    def _coherent(self) -> ScalingSettings:
        if self.rule == "kernel" and self.depth is not None:
            raise ValueError("the kernel rule says nothing of depth: leave depth out, or use rule: maximal_update")
        return self


@dataclass(frozen=True)
class Growth:
    """inputs: factor on how many values a product sums over; axes: of a parameter that grow with the width."""

    inputs: float
    axes: int


def scale(network: Network) -> dict[str, float]:
    """Set starting deviations and factors of a network just built; returns the rates by parameter name."""
    settings = network.settings.scaling
    if settings is None:
        return {}
    base = _base(network, settings.width)
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    depth = network.settings.depth / settings.depth if settings.depth is not None else 1.0
    rates: dict[str, float] = {}
    for name, parameter in network.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        growth = _growth(owner, leaf, parameter.shape, shapes[name])
        if settings.rule == "kernel":
            rate = _kernel(growth, network.settings.width / settings.width)
        else:
            rate = _maximal(network, base, path, growth)
        if ".blocks." in f".{name}":
            rate *= depth**-1.0 if getattr(owner, "role", "") in OUTPUT_ROLES else depth**-0.5
        rates[name] = rate
    if settings.rule == "maximal_update":
        _factors(network, base)
    elif isinstance(network.head, LanguageModelHead) and network.head.tied:
        rates["embed.weight"] = settings.width / network.settings.width  # of its two rates the smaller
    return rates


def _base(network: Network, width: int) -> Network:
    try:
        with torch.device("meta"):
            return type(network)(network.settings.derive(width=width, scaling=None))
    except ArmillaryError as error:
        raise SettingsError(
            f"a network of the base width {width} cannot be built: {error.what}",
            path=("model", "scaling", "width"),
            hint=error.hint,
        ) from None


def _growth(owner: nn.Module, leaf: str, shape: torch.Size, base: torch.Size) -> Growth:
    """Products hold [outputs, inputs]; a vector or a table sums over nothing."""
    axes = sum(a != b for a, b in zip(shape, base, strict=True))
    product = leaf == "weight" and isinstance(owner, (Linear, ExpertLinear))
    return Growth(shape[-1] / base[-1] if product or axes > 1 else 1.0, axes)


def _maximal(network: Network, base: Network, path: str, growth: Growth) -> float:
    """The rate; the deviation that the owner starts with is set."""
    owner = network.get_submodule(path)
    if isinstance(owner, Embedding) or _logits(network, path):
        owner.deviation = base.get_submodule(path).deviation
        return 1.0
    if growth.axes == 1 and growth.inputs != 1 and isinstance(owner, (Linear, ExpertLinear)):
        owner.deviation *= growth.inputs**-0.5
    return 1.0 / growth.inputs


def _logits(network: Network, path: str) -> bool:
    return isinstance(network.head, LanguageModelHead) and path == "head.product"


def _factors(network: Network, base: Network) -> None:
    """Logits over the growth of what they sum over; scores by s·s/s_base, 1/K where s is 1/√K."""
    if isinstance(network.head, LanguageModelHead):
        network.head.scale *= base.settings.width / network.settings.width
        assert isinstance(base.head, LanguageModelHead)
        network.head.product.deviation = base.head.product.deviation  # a tied weight starts as the head says
    for name, mixer in network.named_modules():
        if not isinstance(mixer, Mixer):
            continue
        if mixer.scaled is None:
            raise SettingsError(
                f"'{mixer.kind}' ({mixer.path}) does not say how its scores grow with the width, so that "
                "maximal_update cannot scale it",
                path=("model", "scaling", "rule"),
                hint="use another mixer, or rule: kernel",
            )
        for attribute in mixer.scaled:
            factor: float = getattr(mixer, attribute)
            before: float = getattr(base.get_submodule(name), attribute)
            setattr(mixer, attribute, factor * (factor / before))


def _kernel(growth: Growth, width: float) -> float:
    if growth.axes == 0:
        return 1.0
    if growth.axes == 1:
        return 1.0 / math.sqrt(width) if growth.inputs == 1.0 else 1.0 / width
    return 1.0 / math.sqrt(width**3)

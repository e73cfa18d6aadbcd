"""Adapters from folders: LoRA as `peft` publishes it, adapter_config.json beside adapter_model.safetensors.

Names of products are those of the open layout that the model was published in, or our own paths. A setting
that changes what is computed and is not understood is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.base.errors import CheckpointError, UnsupportedError, nearest
from armillary.checkpoints.assemble import wanted
from armillary.checkpoints.table import Bound, PermuteHalfInterleaved, Split, SplitByHead, Transpose, each
from armillary.checkpoints.tensors import FLOATS, Stored, inside, raise_for, read_file, read_json
from armillary.nn.adapted import Change, LowRankChange
from armillary.nn.linear import Linear
from armillary.nn.network import Network

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<product>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# about training, or about how tensors were chosen that are then there by name
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # how the base stores its weights; A and B stand the same way
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the weights of the base, too

OurProduct = tuple[str, Callable[[Tensor], Tensor]]  # our path, and its rows of a B


def read_adapter(folder: str | Path, network: Network) -> dict[str, Change]:
    """What the adapter in a folder does to this network, by the paths of our products.

    Raises CheckpointError naming tensors that are missing, too many or of another shape, UnsupportedError
    naming a setting or a product that is not understood.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError("there is no such folder", where=str(root))
    scale = _scaling(read_json(inside(root, CONFIG)), str(root / CONFIG))
    if not (root / WEIGHTS).exists():
        pickled = (root / "adapter_model.bin").exists()
        what = "the adapter here is a pickle, which can run code when read: refused" if pickled else f"no {WEIGHTS}"
        raise CheckpointError(what, where=str(root), hint="have peft save it as safetensors" if pickled else None)
    found = read_file(inside(root, WEIGHTS))
    pairs: dict[str, dict[str, str]] = {}
    strange = []
    for name in found:
        match = _NAME.fullmatch(name)
        if match is None:
            strange.append(name)
        elif pairs.setdefault(match["product"], {}).setdefault(match["part"], name) != name:
            raise CheckpointError(f"'{name}' is there twice", where=str(root))
    if strange:
        raise UnsupportedError(
            f"not understood: {', '.join(map(repr, sorted(strange)[:8]))}",
            where=str(root / WEIGHTS),
            hint="lora_A and lora_B of linear products can be read",
        )
    if not pairs:
        raise CheckpointError("there is no adapter in this file", where=str(root / WEIGHTS))
    products = _products(network, list(pairs), str(root / WEIGHTS))
    problems, changes = list[str](), dict[str, Change]()
    for theirs, parts in pairs.items():
        missing = [part for part in "AB" if part not in parts]
        if missing:
            problems.append(f"missing: lora_{missing[0]} of '{theirs}'")
            continue
        problems += _misfits(network, products[theirs], {part: (name, found[name]) for part, name in parts.items()})
        if not problems:
            a, b = (found[parts[part]].read() for part in "AB")
            for part, tensor in zip("AB", (a, b), strict=True):
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"'{parts[part]}' holds numbers that are not finite", where=str(root))
            changes |= {ours: LowRankChange(a, rows(b), scale(len(a))) for ours, rows in products[theirs]}
    raise_for(problems, root, hint="the adapter must have been made for this model")
    return changes


def _scaling(config: Mapping[str, Any], where: str) -> Callable[[int], float]:
    """adapter_config.json → the scale of a product by its rank."""
    known = {"peft_type", "r", "lora_alpha", "bias", "init_lora_weights", "use_rslora"} | _NEUTRAL
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"'peft_type' is {kind!r}", where=where, hint="LORA can be read")
    strange = sorted(key for key, value in config.items() if key not in known and value not in (None, False, {}, []))
    if config.get("bias", "none") != "none":
        strange.append("bias")
    if config.get("init_lora_weights") not in _STARTS:
        strange.append("init_lora_weights")
    if strange:
        raise UnsupportedError(
            f"not understood: {', '.join(f'{key!r} ({config[key]!r})'[:120] for key in strange)}",
            where=where,
            hint="plain LoRA can be read: no DoRA, no biases, one rank and alpha for all products",
        )
    numbers = {}
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise CheckpointError(f"'{key}' is {value!r}", where=where, hint="a number above 0")
        numbers[key] = value
    rank, alpha, root = numbers["r"], float(numbers["lora_alpha"]), config.get("use_rslora", False)
    if type(root) is not bool:
        raise CheckpointError(f"'use_rslora' is {root!r}", where=where, hint="true or false")

    def scale(found: int) -> float:
        if found != rank:
            raise CheckpointError(f"'r' is {rank}, but a product has rank {found}", where=where)
        return alpha / sqrt(found) if root else alpha / found

    return scale


def _products(network: Network, theirs: list[str], where: str) -> dict[str, list[OurProduct]]:
    """Their products → ours. The names are our own paths, or of the first family in which all are known."""
    own: dict[str, list[OurProduct]] = {
        name: [(name, _whole)] for name, module in network.named_modules() if type(module) is Linear
    }
    best = own
    for known in (own, *_layouts(network)):
        if all(name in known for name in theirs):
            return {name: known[name] for name in theirs}
        if sum(name in known for name in theirs) > sum(name in best for name in theirs):
            best = known
    unknown = next(name for name in theirs if name not in best)
    raise UnsupportedError(
        f"this model has no product '{unknown}' that an adapter can change", where=where, hint=nearest(unknown, best)
    )


def _layouts(network: Network) -> Iterator[dict[str, list[OurProduct]]]:
    """Of each family whose layout can hold this network."""
    shapes = wanted(network)
    for family in each():
        try:
            family.config(network.settings)
        except UnsupportedError:
            continue
        yield _layout(family.bind(network.settings, shapes), family.prefix)


def _layout(bound: list[Bound], prefix: str) -> dict[str, list[OurProduct]]:
    """The products of one family's layout, under the names of a whole model and of its bare body."""
    found: dict[str, list[OurProduct]] = {}
    for one in bound:
        steps = [step for step in one.steps if not isinstance(step, Transpose)]
        if any(isinstance(step, Transpose) for step in one.steps[len(one.steps) - len(steps) :]):
            continue  # only those that come first can be told from the shapes that follow
        rows = all(type(step) in (Split, SplitByHead, PermuteHalfInterleaved) for step in steps)
        rows = rows and all(step.axis == 0 for step in steps if isinstance(step, Split))
        if len(one.theirs) > 1 or not rows or not all(name.endswith(".weight") for name in (*one.theirs, *one.ours)):
            continue
        heights = [[part.shape[0] for part in stage] for stage in one.stages[1:]]
        heights = heights[len(one.steps) - len(steps) :]
        products: list[OurProduct] = []
        for place, name in enumerate(one.ours):

            def part(b: Tensor, place: int = place, steps: Any = steps, heights: Any = heights) -> Tensor:
                parts = [b]
                for step, sizes in zip(steps, heights, strict=True):
                    parts = step.apply(parts, [torch.empty(size, b.shape[1], device="meta") for size in sizes])
                return parts[place]

            products.append((name.removesuffix(".weight"), part))
        name = one.theirs[0].removesuffix(".weight")
        found[name] = products
        if prefix and name.startswith(prefix):
            found.setdefault(name.removeprefix(prefix), products)
    return found


def _whole(b: Tensor) -> Tensor:
    return b


def _misfits(network: Network, products: list[OurProduct], parts: Mapping[str, tuple[str, Stored]]) -> list[str]:
    """What is wrong with a product's A and B, a line for each."""
    (a_name, a), (b_name, b) = parts["A"], parts["B"]
    problems = [f"wrong type: '{name}' holds {one.kind}" for name, one in parts.values() if one.dtype not in FLOATS]
    modules = [network.get_submodule(ours) for ours, _ in products]
    plain = [module for module in modules if type(module) is Linear]
    if len(plain) < len(modules):
        return [f"not a plain product here: '{products[0][0]}', which '{a_name}' changes"]
    rank = a.shape[0] if a.shape else 0
    for name, one, like in (
        (a_name, a, (rank, plain[0].inputs)),
        (b_name, b, (sum(module.outputs for module in plain), rank)),
    ):
        if one.shape != like:
            what = ", ".join(f"'{ours}' {[m.outputs, m.inputs]}" for (ours, _), m in zip(products, plain, strict=True))
            problems.append(f"wrong shape: '{name}' is {list(one.shape)}, and {what} asks for {list(like)}")
    return problems

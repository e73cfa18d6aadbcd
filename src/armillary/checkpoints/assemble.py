"""A network put together from stored tensors: built without storage, then each tensor put in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError
from armillary.nn.network import ModelSettings, Network, build
from armillary.objectives import objectives
from armillary.recipe import Recipe, TrainingSettings
from armillary.text import Tokenizer, TokenizerSettings

DTYPES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Loaded:
    """What a model folder holds. tokenizer, recipe: None when it has none."""

    network: Network
    tokenizer: Tokenizer | None
    recipe: Recipe | None


def pick_device(name: str | torch.device) -> torch.device:
    """`auto` is an accelerator when there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the device '{name}' cannot be used ({reason})", hint="auto, cpu, cuda, cuda:1, mps"
        ) from None
    if device.type == "meta":
        raise InputError("weights cannot be loaded onto the device 'meta'", hint="auto, cpu, cuda, cuda:1, mps")
    return device


def pick_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """`auto` (None) keeps every tensor as it is stored."""
    if isinstance(name, torch.dtype):
        if name in DTYPES.values():
            return name
    elif name == "auto":
        return None
    elif name in DTYPES:
        return DTYPES[name]
    raise InputError(f"weights cannot have the dtype '{name}'", hint=f"auto, {', '.join(DTYPES)}")


def blank(settings: ModelSettings) -> Network:
    """The network without storage."""
    return build(settings, device="meta")


def wanted(network: Network) -> dict[str, Tensor]:
    """Everything that is stored of a network, by name: parameters and buffers, without second names."""
    second = network.tied_names()
    return {name: tensor for name, tensor in network.state_dict().items() if name not in second}


def fill(
    network: Network,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Network:
    """Put tensors in place of those without storage, tie what is tied, and move the rest to the device.

    One tensor at a time is held besides the network. Activations will flow in `dtype`, or in the
    dtype that most of the parameters have.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        cast = dtype if tensor.is_floating_point() else None
        ready = tensor.to(device=device, dtype=cast)
        if leaf in module._parameters:
            sizes[ready.dtype] += ready.numel()
            old = module._parameters[leaf]
            assert old is not None
            module._parameters[leaf] = nn.Parameter(ready, requires_grad=old.requires_grad)
        else:
            module._buffers[leaf] = ready
    network.tie()
    left = [name for name, part in (*network.named_parameters(), *network.named_buffers()) if part.is_meta]
    assert not left, f"nothing was loaded into {', '.join(left)}"
    network.to(device)  # what is neither parameter nor buffer, such as the frequencies of positions
    network.check_ties()
    return network.compute(dtype or sizes.most_common(1)[0][0])


def recipe_around(settings: ModelSettings, tokenizer: Tokenizer | None, name: str) -> Recipe | None:
    """The recipe of a model that came without one: data and training at their defaults.

    None where no recipe can say it: no objective fits the model's form.
    """
    assert settings.vocabulary is not None
    size = settings.vocabulary if tokenizer is None else tokenizer.size
    # The first is for models with its own mixers, one of the others fits each form; all would be more to import.
    for usual in ("adversarial", "causal", "masked", "prefix"):
        objective = objectives.get(usual)
        try:
            training = TrainingSettings(objective=objective(), context=min(512, settings.context))
            objective().check(settings)
        except SettingsError:
            continue
        return Recipe(
            name=_plain(name),
            model=settings,
            tokenizer=TokenizerSettings(size=min(size, settings.vocabulary)),
            training=training,
        )
    return None


def _plain(name: str) -> str:
    kept = "".join(letter for letter in name if letter.isprintable() and letter not in "/\\").lstrip(".")
    return kept or "model"

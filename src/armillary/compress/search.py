"""From a search to a recipe: the blocks that a super-network of choices ended with, as an ordinary model.

Mandava, Migacz & Florea 2020, Pay Attention when Required. Train a recipe whose blocks are `choice`
mixers (recipes/par-search.yaml), then write what it found and train that from the start:

    run = arm.train(arm.Recipe.load("par-search"))
    found_recipe(run.recipe, arm.load(run.folder).network).save("found.yaml")
    arm.train(arm.Recipe.load("found.yaml"))
"""

from __future__ import annotations

from typing import Any

from armillary.base.errors import UnsupportedError
from armillary.nn.block import BlockSettings
from armillary.nn.mixers.choice import Choice, ChoiceSettings
from armillary.nn.network import ModelSettings, Network
from armillary.recipe import Recipe


def found_order(network: Network) -> list[str]:
    """What each block that is a choice came to, in order: mixer, channel or nothing."""
    return [module.found() for module in network.modules() if isinstance(module, Choice)]


def found_model(network: Network) -> ModelSettings:
    """An ordinary model in the found order: `look` blocks with a mixer, `think` blocks with a channel.

    Blocks that came to nothing are left out. Raises UnsupportedError when a block of the network is
    not a single choice, when choices differ in their settings, or when nothing is left.
    """
    given = network.settings
    layers = [_choice(block, index) for index, block in enumerate(given.layers())]
    if any(branch != layers[0] for branch in layers):
        raise UnsupportedError("the choices of the blocks differ", hint="search with one kind of block")
    branch = layers[0]
    mixer = branch.mixer
    assert isinstance(mixer, ChoiceSettings)
    around = {"norm": branch.norm, "norm_at": branch.norm_at, "dropout": branch.dropout}
    kinds: dict[str, Any] = {
        "mixer": ("look", BlockSettings(mixer=mixer.mixer, **around)),
        "channel": ("think", BlockSettings(channel=mixer.channel, **around)),
    }
    order = [kinds[option] for option in found_order(network) if option != "nothing"]
    if not order:
        raise UnsupportedError("every block came to nothing", hint="a smaller penalty")
    blocks = dict(sorted(dict(order).items()))
    pattern = tuple(name for name, _ in order)
    return given.derive(block=None, blocks=blocks, pattern=pattern, depth=len(order), overrides={})


def found_recipe(recipe: Recipe, network: Network) -> Recipe:
    """The recipe of the search with the found model in it; `.save(path)` writes it."""
    found = found_model(network)
    return recipe.derive(model=found.derive(vocabulary=recipe.model.vocabulary), name=f"{recipe.name}-found")


def _choice(block: BlockSettings, index: int) -> Any:
    branches = block.all()
    if len(branches) != 1 or not isinstance(branches[0].mixer, ChoiceSettings):
        raise UnsupportedError(f"block {index} is not a single choice", hint="block: {mixer: {kind: choice, …}}")
    return branches[0]

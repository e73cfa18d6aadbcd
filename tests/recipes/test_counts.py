"""Published systems as recipes: parameters as the papers' arithmetic has them, and sharing that is only sharing."""

from __future__ import annotations

import torch

from armillary.nn.describe import describe
from armillary.nn.network import ModelSettings, build
from armillary.recipe import Recipe


def model(name: str, *words: str, vocabulary: int = 50000) -> ModelSettings:
    return Recipe.load(name, *words).model.derive(vocabulary=vocabulary)


def parameters(settings: ModelSettings) -> int:
    return sum(p.numel() for p in build(settings, device="meta").parameters())


def test_one_wide_feed_forward_network() -> None:
    """Pires et al. 2023: twelve networks of 2 · 1024 · 4096 become one of 2 · 1024 · 49152, at no more parameters;
    without the widening there are 41 % fewer."""
    wide = model("one-wide-ffn")
    width, hidden, encoder = wide.width, 4096, wide.encoder
    assert encoder is not None and encoder.block is not None and wide.block is not None
    own = {"kind": "ffn", "hidden": hidden, "activation": "relu"}
    narrow = model("one-wide-ffn", f"model.encoder.block.channel.hidden={hidden}")
    dense = encoder.block.derive(channel=own)
    big = wide.derive(share={}, block=wide.block.derive(channel=own), encoder=encoder.derive(block=dense))
    norms = 6 * 2 * width  # of the decoder's networks
    shared = parameters(wide)
    assert shared == parameters(big) - norms
    assert parameters(big) - parameters(narrow) == 11 * 2 * width * hidden + norms
    assert round(1 - parameters(narrow) / parameters(big), 2) == 0.41
    assert describe(wide, length=64).parameters == shared
    network = build(wide, device="meta")
    assert sum(p.numel() for n, p in network.named_parameters() if ".channel.inner." in n) == 2 * width * 12 * hidden


def test_a_shared_network_is_copies_of_one() -> None:
    small = ("model.width=16", "model.block.mixer.heads=2", "model.block.cross.heads=2")
    small += ("model.encoder.block.mixer.heads=2", "model.encoder.block.channel.hidden=40", "model.encoder.depth=3")
    settings = model("one-wide-ffn", *small, "model.depth=2", vocabulary=20)
    shared, apart = build(settings), build(settings.derive(share={}))
    apart.load_state_dict(shared.state_dict())
    ids = torch.randint(0, 20, (2, 7))
    assert torch.equal(shared(ids, source=ids), apart(ids, source=ids))
    assert shared.encoder.get_parameter("2.channel.inner.up.weight") is shared.encoder.get_parameter(
        "0.channel.inner.up.weight"
    )
    assert "channel" not in dict(shared.blocks.named_children())


def test_partialformer() -> None:
    """Zheng et al. 2023: by the count of the released code, 24 blocks of 30 heads of 45 made from 8."""
    settings = model("partialformer")
    assert settings.encoder is not None and settings.encoder.depth == 24

    def layer(heads: int, ratio: int, width: int = 360, each: int = 45, scored: int = 8) -> int:
        def product(inputs: int, outputs: int) -> int:
            return outputs * (inputs + 1)

        turned = 2 * product(width, scored * each) + 2 * product(width, heads * each) + product(heads * each, width)
        small = product(each, ratio * each) + product(ratio * each, each)
        return turned + small + product(scored, heads) + product(heads, heads) + 2 * width  # and its norm

    last = 2 * 2 * 360  # norms at the end of both sides
    assert parameters(settings) == 24 * layer(30, 4) + 6 * 2 * layer(16, 2) + last + 50000 * 360

"""Side tensors: made from text by `model.side`, given by the call, or missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.describe import describe
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.side import SideSettings
from armillary.nn.sides.text_graph import TextGraphSettings


def encoder(mixer: dict[str, Any], side: dict[str, Any] | None = None) -> Network:
    data = {
        "form": "encoder",
        "width": 16,
        "depth": 2,
        "vocabulary": 12,
        "block": {"mixer": mixer, "channel": "ffn"},
        "side": side or {},
    }
    return build(parse(ModelSettings, data))


# -- the graph of a text


def test_neighbours_and_equal_tokens_are_tied() -> None:
    ids = torch.tensor([[5, 7, 5, 5, 7]])
    edges = TextGraphSettings(typed=True, neighbours=2).make(ids, None)
    found = {tuple(edge) for edge in edges[0].tolist() if min(edge) >= 0}
    assert found == {
        *((t, t + 1, 0) for t in range(4)),
        *((t, t + 2, 0) for t in range(3)),
        *((0, 2, 1), (2, 3, 1), (1, 4, 1)),
    }


def test_padding_has_no_edges() -> None:
    ids = torch.tensor([[0, 0, 5, 7, 5], [5, 7, 5, 0, 0]])
    padding = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    expected = {tuple(e) for e in TextGraphSettings().make(torch.tensor([[5, 7, 5]]), None)[0].tolist() if min(e) >= 0}
    for row in TextGraphSettings().make(ids, padding).tolist():
        assert {tuple(edge) for edge in row if min(edge) >= 0} == expected == {(0, 1), (1, 2), (0, 2)}


def test_shortest_paths_of_a_text() -> None:
    found = TextGraphSettings(hops=2).make(torch.tensor([[1, 2, 3, 4, 1]]), None)
    assert found[0, 0].tolist() == [0, 1, 2, 2, 1]
    assert found[0, 2].tolist() == [2, 1, 0, 1, 2]
    single = TextGraphSettings(hops=2).make(torch.tensor([[1]]), None)
    assert single.tolist() == [[[0]]]


@pytest.mark.parametrize("typed", [False, True])
def test_a_token_alone_has_no_edges(typed: bool) -> None:
    made = TextGraphSettings(same=False, typed=typed).make(torch.tensor([[1], [2]]), None)
    assert made.shape == (2, 0, 2 + typed) and made.dtype == torch.int64
    assert TextGraphSettings(same=False, hops=2).make(torch.tensor([[1]]), None).tolist() == [[[0]]]
    network = encoder({"kind": "focal_graph", "heads": 2}, {"edges": {"kind": "text_graph", "same": False}})
    assert bool(network(torch.tensor([[3]])).isfinite().all())


@pytest.mark.parametrize("width", [0, -3, 2])
def test_a_frame_has_a_middle(width: int) -> None:
    with pytest.raises(SettingsError, match=f"widths must be odd and above 0, .* not {width}"):
        parse(SideSettings, {"kind": "scales", "widths": [3, width]})


def test_a_graph_needs_edges() -> None:
    with pytest.raises(SettingsError, match="has no edges"):
        TextGraphSettings(neighbours=0, same=False)
    with pytest.raises(SettingsError, match="give typed or hops"):
        TextGraphSettings(typed=True, hops=2)


# -- in a network


def test_the_network_makes_what_the_call_does_not_give() -> None:
    graph = {"kind": "text_graph", "same": False}
    network = encoder({"kind": "focal_graph", "heads": 2, "hops": 1}, {"edges": graph})
    ids = torch.randint(12, (2, 6))
    made = TextGraphSettings(same=False).make(ids, None)
    assert torch.equal(network(ids), network(ids, side={"edges": made}))
    other = network(ids, side={"edges": torch.full((2, 1, 2), -1)})
    assert not torch.equal(network(ids), other)


def test_what_is_missing_or_unneeded_says_so() -> None:
    network = encoder({"kind": "focal_graph", "heads": 2})
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="needs the side tensor 'edges'") as error:
        network(ids)
    assert error.value.hint is not None and "model.side.edges" in error.value.hint
    with pytest.raises(InputError, match="no mechanism here needs the side tensor 'distances'"):
        network(ids, side={"edges": torch.zeros(1, 0, 2).long(), "distances": ids})
    with pytest.raises(SettingsError, match="no mechanism here needs the side tensor 'edges'"):
        encoder({"kind": "attention", "heads": 2}, {"edges": "text_graph"})


@pytest.mark.parametrize("mixer", [{"kind": "focal_graph", "types": 2}, {"kind": "focal_graph", "graph": "distances"}])
def test_taps_and_description_need_no_side_tensors(mixer: dict[str, Any]) -> None:
    network = encoder({**mixer, "heads": 2})
    assert "blocks.0.mixer.weights" in network.taps()
    assert describe(network.settings, length=8).parameters == sum(p.numel() for p in network.parameters())


GRAPH = {"kind": "text_graph", "hops": 2}
SCALES = {"kind": "scales", "widths": [1, 3], "features": 4}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "edges": ({"kind": "focal_graph", "types": 2}, {"edges": {"kind": "text_graph", "typed": True}}),
    "distances": ({"kind": "focal_graph", "graph": "distances"}, {"distances": GRAPH}),
    "coordinates": ({"kind": "self_positioning", "features": 8, "neighbours": 3}, {"coordinates": "helix"}),
    "channels": (
        {"kind": "multi_channel", "features": 4, "padded": True},
        {"channels": SCALES, "channels_padding": {**SCALES, "gives": "padding"}},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_texts_side_by_side_are_what_they_are_alone(name: str) -> None:
    """A shorter text, padded on either side, and one that is all padding."""
    network = encoder(*MODELS[name])
    ids, padding = torch.randint(12, (4, 7)), torch.ones(4, 7, dtype=torch.bool)
    padding[1, :3], padding[2, 5:], padding[3] = False, False, False
    with torch.no_grad():
        y = network.hidden(ids, padding=padding)
        for row in range(3):
            alone = network.hidden(ids[row : row + 1, padding[row]])
            assert torch.allclose(y[row : row + 1, padding[row]], alone, atol=1e-5)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize(
    "mixer, named",
    [
        ({"kind": "focal_graph", "heads": 2}, "edges"),
        ({"kind": "attention", "heads": 2, "position": {"kind": "transformer_xl", "segments": True}}, "segments"),
    ],
)
def test_the_source_of_an_encoder_decoder_brings_none(mixer: dict[str, Any], named: str) -> None:
    look = {"kind": "attention", "heads": 2}
    data = {
        "form": "encoder_decoder",
        "width": 16,
        "depth": 1,
        "vocabulary": 12,
        "encoder": {"depth": 1, "block": {"mixer": mixer, "channel": "ffn"}},
        "block": {"mixer": look, "cross": look, "channel": "ffn"},
    }
    with pytest.raises(UnsupportedError, match=rf"model\.encoder\.blocks\.0\.mixer: .*side tensors \({named}\)"):
        build(parse(ModelSettings, data))

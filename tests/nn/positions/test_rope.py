"""Rotary positions against the frequencies and rotations of other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.mechanism import Place
from armillary.nn.positions.rope import Rope, RopeScaling, RopeSettings

WIDTH = 16


def theirs(kind: str, seq_len: int | None = None, **parameters: Any) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=2 * WIDTH,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "scaling, kind, parameters",
    [
        (RopeScaling(kind="linear", factor=4.0), "linear", {"factor": 4.0}),
        (
            RopeScaling(kind="llama3", factor=8.0, trained_length=512, low=1.0, high=4.0),
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
        (
            RopeScaling(kind="yarn", factor=4.0, trained_length=512),
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            RopeScaling(kind="yarn", factor=4.0, trained_length=512, beta_fast=8.0, beta_slow=2.0, temperature=1.3),
            "yarn",
            {
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
            },
        ),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(
    scaling: RopeScaling, kind: str, parameters: dict[str, Any]
) -> None:
    expected, factor = theirs(kind, **parameters)
    found, ours = RopeSettings(scaling=scaling).frequencies(WIDTH)
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-6, atol=0)
    assert ours == pytest.approx(factor, rel=1e-6)
    plain, _ = RopeSettings().frequencies(WIDTH)
    assert found != plain, "the scaling changed nothing"


def test_ntk_is_the_dynamic_rule_at_its_longest() -> None:
    """The dynamic rule grows the base by (f·L/L₀ − (f − 1))^(K/(K−2)); at factor 1 and L = 4·L₀ that is 4^(K/(K−2))."""
    expected, _ = theirs("dynamic", seq_len=4 * 512, factor=1.0)
    found, _ = RopeSettings(scaling=RopeScaling(kind="ntk", factor=4.0)).frequencies(WIDTH)
    torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_interleaved_pairs_are_gptjs(fraction: float) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    turning = int(WIDTH * fraction)
    rope = RopeSettings(pairing="interleaved", fraction=fraction).build(Place(WIDTH), 2, WIDTH)
    q, k = torch.randn(2, 9, 3, WIDTH), torch.randn(2, 9, 1, WIDTH)
    positions = torch.arange(4, 13)[None]
    sin, cos = create_sinusoidal_positions(20, turning)[positions].chunk(2, -1)
    for found, given in zip(rope.rotate(q, k, positions), (q, k), strict=True):
        expected = torch.cat([apply_rotary_pos_emb(given[..., :turning], sin, cos), given[..., turning:]], -1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_distance_only() -> None:
    for pairing in ("half", "interleaved"):
        rope = RopeSettings(pairing=pairing).build(Place(WIDTH), 1, WIDTH)
        q, k = torch.randn(1, 1, 1, WIDTH), torch.randn(1, 1, 1, WIDTH)

        def score(at: int, to: int, rope: Rope = rope, q: Any = q, k: Any = k) -> float:
            turned = rope.rotate(q, k, torch.tensor([[at]]))[0]
            return float((turned * rope.rotate(q, k, torch.tensor([[to]]))[1]).sum())

        assert score(9, 5) == pytest.approx(score(104, 100), abs=1e-4)
        assert score(9, 5) != pytest.approx(score(30, 5), abs=1e-2)


def test_angles_stay_exact_when_the_module_is_cast() -> None:
    """bf16 angles would be off by whole turns; the table of speeds must not follow the weights' type."""
    rope = RopeSettings().build(Place(WIDTH), 1, WIDTH)
    q = torch.randn(1, 1, 1, WIDTH)
    where = torch.tensor([[4097]])
    expected = rope.rotate(q, q, where)[0]
    cast = rope.to(torch.bfloat16)
    torch.testing.assert_close(cast.rotate(q, q, where)[0], expected, rtol=0, atol=0)
    assert cast.rotate(q.bfloat16(), q.bfloat16(), where)[0].dtype == torch.bfloat16
    assert not list(rope.state_dict()), "speeds are not to be stored"


def test_what_cannot_turn_says_why() -> None:
    with pytest.raises(UnsupportedError, match="rope turns pairs, but 5 of 5"):
        RopeSettings().build(Place(10), 2, 5)
    with pytest.raises(UnsupportedError, match="more than one pair"):
        RopeSettings(scaling=RopeScaling(kind="ntk", factor=2.0)).build(Place(4), 2, 2)
    with pytest.raises(SettingsError, match="low must be below"):
        RopeSettings(scaling=RopeScaling(kind="llama3", factor=2.0, low=4.0, high=4.0))

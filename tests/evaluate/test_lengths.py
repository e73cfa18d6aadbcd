"""Bits per byte at several context lengths: the figures of `evaluate` at each, and refusals that are told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from armillary.base.errors import InputError
from armillary.base.settings import parse
from armillary.evaluate import evaluate, evaluate_lengths
from armillary.nn.network import ModelSettings, Network, build
from armillary.recipe import Recipe
from armillary.text.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

TEXTS = [f"Chapter {i}: the wind blew {i * i} times over hill {i}.\n" * 4 for i in range(8)]


@dataclass
class Model:
    network: Network
    tokenizer: Tokenizer
    recipe: Recipe | None = None


def model(position: str | None = None) -> Model:
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    data = {"width": 16, "depth": 1, "vocabulary": tokenizer.size, "context": 32, "position": position}
    return Model(build(parse(ModelSettings, data)), tokenizer)


def test_each_length_is_what_evaluate_says() -> None:
    made = model()
    found = evaluate_lengths(made, TEXTS, [16, 64])
    assert [one.length for one in found] == [16, 32, 64] and [one.trained for one in found] == [False, True, False]
    for one in found:
        expected = evaluate(made, TEXTS, context=one.length)
        assert one.bits_per_byte is not None
        assert one.bits_per_byte.value == pytest.approx(expected.bits_per_byte.value, rel=1e-6)
    assert found[1].change is None and found[0].change is not None
    assert found[1].bits_per_byte is not None and found[0].bits_per_byte is not None
    apart = found[0].bits_per_byte.value - found[1].bits_per_byte.value
    assert found[0].change.value == pytest.approx(apart, abs=1e-9)


def test_a_length_that_the_model_refuses_is_told() -> None:
    found = evaluate_lengths(model("learned"), TEXTS, [16, 64])
    assert found[-1].bits_per_byte is None and found[-1].refused is not None and "32" in found[-1].refused
    assert found[0].refused is None


def test_lengths_that_predict_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to predict from"):
        evaluate_lengths(model(), TEXTS, [1])

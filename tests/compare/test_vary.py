"""What is varied: values, names, grids, and mistakes that are found before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from armillary.base.errors import ArmillaryError, InputError, SettingsError, UnsupportedError
from armillary.compare.budget import CLOSE, Budget, forward_flops, parameters
from armillary.compare.plan import settle
from armillary.compare.vary import split, variants
from armillary.recipe import Recipe

Make = Callable[..., Recipe]
BYTES = 256


def names(base: Recipe, vary: Any) -> list[str]:
    return [variant.name for variant in variants(base, vary)]


def test_values_split_outside_of_brackets_and_quotes() -> None:
    assert split("a, {b: 1, c: [2, 3]},'d, e'") == ["a", "{b: 1, c: [2, 3]}", "'d, e'"]
    assert split("a,") == ["a"]
    with pytest.raises(InputError, match="} is missing"):
        split("{a: 1")


def test_variants_have_readable_names(recipe: Make) -> None:
    base = recipe()
    assert names(base, ["model.block.mixer=retention,one:{kind: attention, heads: 1}"]) == ["base", "retention", "one"]
    assert names(base, ["model.width=32,64"]) == ["base", "width=32", "width=64"]
    found = names(base, ["model.width=32,64", "model.block.mixer=a name:retention,attention"])
    assert found == [
        "base",
        "width=32, a name",
        "width=32, mixer=attention",
        "width=64, a name",
        "width=64, mixer=attention",
    ]
    assert names(base, {"model.width": {"wide": 64}, "model.depth": [2]}) == ["base", "wide, depth=2"]
    assert names(base, {"model.block.mixer": [{"kind": "retention", "heads": 2}, "retention"]})[1] == (
        '"kind": "retention", "heads": 2'
    )


def test_what_equals_the_base_is_the_base(recipe: Make) -> None:
    assert names(recipe(), ["model.width=16,32"]) == ["base", "width=32"]
    with pytest.raises(InputError, match="nothing to compare"):
        variants(recipe(), ["model.width=16"])


def test_a_default_block_keeps_its_other_parts() -> None:
    """A recipe without a block has attention and a gated channel; varying the mixer leaves the channel."""
    _, other = variants(Recipe.load({"model": {"width": 32}}), ["model.block.mixer=retention"])
    block = other.recipe.model.layers()[0]
    assert block.mixer is not None and block.mixer.kind == "retention" and block.channel is not None


@pytest.mark.parametrize(
    "vary, what, hint",
    [
        (["model.blok.mixer=attention"], "unknown key 'blok'", "did you mean 'block'?"),
        (["model.block.mixer=atention"], "the variant 'atention' cannot be built: unknown mixer", "attention"),
        (["model.width"], "varies nothing", "KEY=VALUE"),
        (["model.width="], "no values", ""),
        (["model.width=1", "model.width=2"], "varied twice", ""),
        (["model.width=base:32"], "'base' is taken", ""),
        (["model.width=x:8,x:4"], "two variants are called", ""),
        (["training.steps=3"], "the budget decides", ""),
        (["data.heldout=0.5"], "the same text", ""),
        (["seed=3"], "--seeds", ""),
        (["training.schedule={kind: cosine, warmup: 5.5}"], "cannot be built", ""),
    ],
)
def test_mistakes_say_what_is_wrong(recipe: Make, vary: list[str], what: str, hint: str) -> None:
    with pytest.raises(ArmillaryError) as found:
        variants(recipe(), vary)
    assert what in str(found.value) and hint in str(found.value)


def test_named_blocks_are_not_dropped(recipe: Make) -> None:
    data = recipe().to_data()
    block = data["model"].pop("block")
    data["model"] |= {"blocks": {"a": block}, "pattern": ["a"]}
    with pytest.raises(InputError, match="named blocks"):
        variants(Recipe.load(data), ["model.block.mixer=retention"])
    assert len(variants(Recipe.load(data), ["model.blocks.a.mixer=retention"])) == 2


@pytest.mark.parametrize(
    "text, amount, kind",
    [
        ("2e13flops", 2e13, "flops"),
        ("3 TFLOPs", 3e12, "flops"),
        ("90s", 90, "seconds"),
        ("20min", 1200, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("5Mparams", 5e6, "params"),
        ("200k parameters", 2e5, "params"),
        ("3e6tokens", 3e6, "tokens"),
        ("500steps", 500, "steps"),
    ],
)
def test_budgets_are_read(text: str, amount: float, kind: str) -> None:
    found = Budget.parse(text)
    assert (found.amount, found.kind) == (pytest.approx(amount), kind)


@pytest.mark.parametrize(
    "text, what", [("200", "no unit"), ("5parsecs", "'parsecs'"), ("0s", "nothing"), ("many", "not")]
)
def test_budgets_are_refused(text: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as found:
        Budget.parse(text)
    assert "2e13flops" in str(found.value)


def test_what_a_budget_means(recipe: Make) -> None:
    base = recipe()
    each = base.training.batch * base.training.context
    one = 3 * forward_flops(base, BYTES) * each
    assert Budget(7.9 * one, "flops").settle(base, BYTES).training.steps == 7
    assert Budget(5 * each + 1, "tokens").settle(base, BYTES).training.steps == 5
    assert Budget(9, "steps").settle(base, BYTES).training.steps == 9
    timed = Budget(60, "seconds").settle(base, BYTES).training
    assert (timed.seconds, timed.steps) == (60, base.training.steps)
    with pytest.raises(InputError, match="does not pay for one step"):
        Budget(0.9 * one, "flops").settle(base, BYTES)


@pytest.mark.parametrize("mixer", ["{kind: attention, heads: 2}", "retention"])
@pytest.mark.parametrize("target", [2.0e4, 6.0e4, 3.0e5])
def test_widths_meet_a_number_of_parameters(recipe: Make, mixer: str, target: float) -> None:
    base = recipe(f"model.block.mixer={mixer}", "model.depth=3", "model.block.channel=gated")
    model = Budget(target, "params").settle(base, BYTES).model
    assert abs(parameters(model, BYTES) / target - 1) <= CLOSE
    block, old = model.layers()[0], base.model.layers()[0]
    assert model != base.model and block.mixer == old.mixer and model.depth == base.model.depth


def test_a_number_of_parameters_that_no_width_gives(recipe: Make) -> None:
    with pytest.raises(SettingsError, match="no width gives"):
        Budget(50, "params").settle(recipe(), BYTES)


def test_every_variant_is_tried_before_anything_is_trained(recipe: Make) -> None:
    budget = Budget(2, "steps")
    with pytest.raises(UnsupportedError, match="the variant 'heads=3' cannot be built: a width of 16"):
        settle(variants(recipe(), ["model.block.mixer.heads=3"]), budget, 1, vocabulary=BYTES)
    with pytest.raises(InputError, match="0 seeds"):
        settle(variants(recipe(), ["model.width=32"]), budget, 0, vocabulary=BYTES)
    with pytest.raises(InputError, match="at least 5"):
        settle(variants(recipe(), ["model.width=32"]), budget, 4, vocabulary=BYTES, equal_loss=True)
    long = recipe(steps=100, schedule={"kind": "cosine", "warmup": 50})
    with pytest.raises(SettingsError, match="'base' cannot be built: 50 steps do not fit"):
        settle(variants(long, ["model.width=32"]), budget, 1, vocabulary=BYTES)


def test_the_control_has_half_the_width_and_the_reference_s_steps(recipe: Make) -> None:
    budget = Budget(40 * 3 * forward_flops(recipe(), BYTES) * 96, "flops")
    plan = settle(variants(recipe(), ["model.block.mixer=retention"]), budget, 5, vocabulary=BYTES, equal_loss=True)
    control = plan.variants[-1]
    assert (control.name, control.role) == ("half width", "control")
    assert (
        control.recipe.model.width == 8 and control.recipe.training.steps == plan.reference.recipe.training.steps == 40
    )
    assert control not in plan.others and plan.seeds == (3, 4, 5, 6, 7)

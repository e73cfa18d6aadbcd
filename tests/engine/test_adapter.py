"""Laws of adapters in one engine, for every mixer and driver that decodes.

The oracle is a network with merged weights, W + (alpha / r) · B A by the formula, on an engine of its own; scores
are compared within 1e-4 and greedy tokens up to where two come closer than that (`engine_parts.alike`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from engine_parts import ASKED, PROMPTS, alike, causal, in_pieces, network_of

from armillary.base.errors import ArmillaryError, InputError, UnsupportedError
from armillary.engine import Request, Sampling
from armillary.engine.core import Engine
from armillary.engine.drafts import PromptLookup
from armillary.native import available
from armillary.nn.adapted import LowRankChange, adapted
from armillary.nn.driver import drivers
from armillary.nn.linear import Linear
from armillary.nn.mechanism import mixers
from armillary.nn.network import Network

BLOCK = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}
LONG = Sampling(max_new_tokens=24, temperature=0)


def changes_of(network: Network, seed: int, rank: int = 3, scale: float = 2.0) -> dict[str, LowRankChange]:
    """Of every plain product, as large as to change what is said."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    return {
        path: LowRankChange(drawn(rank, module.inputs), drawn(module.outputs, rank), scale)
        for path, module in network.named_modules()
        if type(module) is Linear
    }


def merged(network: Network, changes: dict[str, LowRankChange]) -> Network:
    found = copy.deepcopy(network)
    with torch.no_grad():
        for path, change in changes.items():
            product = found.get_submodule(path)
            weight = product.weight.double() + change.scale * change.b.double() @ change.a.double()
            product.weight = torch.nn.Parameter(weight.float())  # of a tied head: no longer the embedding's
    return found


def laws(network: Network) -> None:
    changes = {name: changes_of(network, seed) for seed, name in enumerate(("one", "two"))}
    engine = Engine(network, slots=4)
    for name, change in changes.items():
        engine.adapters.load(name, change)
    expected = {
        name: Engine(merged(network, change), slots=1, keep=False).run([Request(one, ASKED) for one in PROMPTS])
        for name, change in changes.items()
    }
    expected[None] = Engine(network, slots=1, keep=False).run([Request(one, ASKED) for one in PROMPTS])
    for name in changes:
        both = zip(expected[name], expected[None], strict=True)
        assert all(one.choices[0].logprob != other.choices[0].logprob for one, other in both), "they do something"
    asked = [(row, name) for row in range(len(PROMPTS)) for name in (None, "one", "two")]
    for again in range(2):  # the second time prefixes are at hand, of the same adapter only
        found = engine.run([Request(PROMPTS[row], ASKED, adapter=name) for row, name in asked])
        for (row, name), answer in zip(asked, found, strict=True):
            alike(answer, expected[name][row], f"prompt {row} with {name}, time {again}")


@pytest.mark.parametrize("mixer", causal(mixers))
def test_mixers(mixer) -> None:
    laws(network_of(block={"mixer": mixer, "channel": "gated"}))


@pytest.mark.parametrize("driver", causal(drivers))
def test_drivers(driver) -> None:
    laws(network_of(block={"mixer": {"kind": "attention", "heads": 2}, "channel": "gated"}, driver=driver))


def test_base_rows_are_what_they_are_without_adapters() -> None:
    """Bit for bit, on the tape as ever, while others have adapters in the same steps."""
    network = network_of(block=BLOCK)
    alone = Engine(network, slots=4, keep=False)
    expected = alone.run([Request(prompt, LONG) for prompt in PROMPTS[:2]])
    engine = Engine(network, slots=4, keep=False)
    assert engine.slots.replay is not None, "there is a tape to stay on"
    steps = []
    inner = engine.slots.replay.extend
    engine.slots.replay.extend = lambda rows, *args, **more: (steps.append(list(rows)), inner(rows, *args, **more))[1]
    engine.adapters.load("one", changes_of(network, 1))
    requests = [*(Request(prompt, LONG) for prompt in PROMPTS[:2]), Request(PROMPTS[2], LONG, adapter="one")]
    found = engine.run(requests)
    for one, other in zip(found[:2], expected, strict=True):
        assert [(c.token, c.logprob) for c in one.choices] == [(c.token, c.logprob) for c in other.choices]
    assert [0, 1] in steps and not any(2 in rows for rows in steps)
    assert found[2].finish == "length"


def test_prefixes_go_by_numbers_and_not_by_names() -> None:
    network = network_of(block=BLOCK)
    engine = Engine(network, slots=2)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        engine.adapters.load(name, changes_of(network, seed))
    reused = {
        name: engine.run([Request(PROMPTS[2], ASKED, adapter=name)])[0].reused for name in ("one", "other", "same")
    }
    assert reused["one"] == reused["other"] == 0 < reused["same"]


def test_guesses_are_checked_with_the_adapter() -> None:
    network = network_of(block=BLOCK)
    changes = changes_of(network, 1)
    engine = Engine(network, slots=2, drafter=PromptLookup(shortest=1))
    engine.adapters.load("one", changes)
    prompt = (1, 2, 3, 4) * 4
    found = engine.run([Request(prompt, LONG, adapter="one"), Request(prompt, LONG)])
    assert sum(one.drafted for one in found) > 0
    for one, plain in zip(found, (merged(network, changes), network), strict=True):
        other = Engine(plain, slots=1, keep=False).run([Request(prompt, LONG)])[0]
        assert [choice.token for choice in one.choices] == [choice.token for choice in other.choices]


def test_a_state_that_cannot_be_cut_goes_back_with_its_adapter() -> None:
    blocks = {"look": BLOCK, "state": {"mixer": "retention", "channel": "gated"}}
    laws(network_of(blocks=blocks, pattern=["look", "state"]))
    network = network_of(blocks=blocks, pattern=["look", "state"])
    changes = changes_of(network, 1)
    prompt = (1, 2, 3, 4) * 4
    engine = Engine(network, slots=2, drafter=PromptLookup(shortest=1))
    engine.adapters.load("one", changes)
    one = engine.run([Request(prompt, LONG, adapter="one")])[0]
    assert one.drafted > one.accepted
    other = Engine(merged(network, changes), slots=1, keep=False).run([Request(prompt, LONG)])[0]
    assert [choice.token for choice in one.choices] == [choice.token for choice in other.choices]


def test_prefixes_belong_to_the_numbers_of_an_adapter() -> None:
    network = network_of(block=BLOCK)
    engine = Engine(network, slots=2)
    engine.adapters.load("one", changes_of(network, 1))
    engine.adapters.load("two", changes_of(network, 2))

    def reused(adapter: str | None) -> int:
        return engine.run([Request(PROMPTS[2], ASKED, adapter=adapter)])[0].reused

    assert [reused(name) for name in (None, "one", "two")] == [0, 0, 0]
    assert all(reused(name) > 0 for name in (None, "one", "two"))
    engine.adapters.load("one", changes_of(network, 3))
    assert reused("one") == 0, "another one of the same name"
    engine.adapters.load("one", changes_of(network, 1))
    assert reused("one") > 0, "the same numbers again"
    less = {path: LowRankChange(one.a, one.b, one.scale * 1.5) for path, one in changes_of(network, 1).items()}
    engine.adapters.load("one", less)
    assert reused("one") == 0, "another scale"


def test_loading_and_unloading_leave_answers_under_way_alone() -> None:
    network = network_of(block=BLOCK)
    changes = changes_of(network, 1)
    expected = Engine(merged(network, changes), slots=1, keep=False).run([Request(PROMPTS[0], LONG)])[0]
    plain = Engine(network, slots=1, keep=False).run([Request(PROMPTS[1], LONG)])[0]
    engine = Engine(network, slots=3)
    engine.adapters.load("one", changes)
    under_way = engine.submit(Request(PROMPTS[0], LONG, adapter="one"))
    base = engine.submit(Request(PROMPTS[1], LONG))
    waiting = engine.submit(Request(PROMPTS[0], LONG, adapter="one"))
    for _ in range(6):
        engine.step()
    engine.adapters.load("one", changes_of(network, 2))
    engine.step()
    engine.adapters.unload("one")
    assert engine.adapters.names() == []
    for answer in (under_way, waiting):
        assert [choice.token for choice in answer.wait().choices] == [choice.token for choice in expected.choices]
    assert [choice.token for choice in base.wait().choices] == [choice.token for choice in plain.choices]
    with pytest.raises(InputError, match="no adapter 'one'"):
        engine.submit(Request(PROMPTS[0], ASKED, adapter="one"))
    with pytest.raises(InputError, match="no adapter 'one'"):
        engine.adapters.unload("one")


def test_an_adapted_network_shares_its_tensors_and_leaves_the_other_alone() -> None:
    network = network_of(block=BLOCK)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = network(ids)
        twin = adapted(network, changes_of(network, 1))
        found = twin(ids)
        assert torch.equal(network(ids), before)
        torch.testing.assert_close(found, merged(network, changes_of(network, 1))(ids), atol=1e-4, rtol=1e-4)
    assert {id(one) for one in twin.parameters()} == {id(one) for one in network.parameters()}
    assert not torch.allclose(found, before, atol=1e-2)


@pytest.mark.parametrize(
    "path, shape, message",
    [
        ("blocks.0.mixer.inner.w", (16, 16), "no 'blocks.0.mixer.inner.w'"),
        ("blocks.0", (16, 16), "'blocks.0' is a Block"),
        ("blocks.0.mixer.inner.q", (16, 8), r"\[16, 8\], and it is \[16, 16\]"),
    ],
)
def test_changes_that_do_not_fit_are_refused(path, shape, message) -> None:
    change = LowRankChange(torch.zeros(2, shape[1]), torch.zeros(shape[0], 2), 1.0)
    with pytest.raises(UnsupportedError, match=message):
        adapted(network_of(block=BLOCK), {path: change})


def test_where_adapters_cannot_be() -> None:
    network = network_of(block=BLOCK)
    with pytest.raises(ArmillaryError, match="int8"):
        Engine(network, slots=1, weights="int8").adapters.load("one", changes_of(network, 1))
    with pytest.raises(InputError, match="no name of an adapter"):
        Engine(network, slots=1).adapters.load("a:b", {})


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_a_prompt_that_waits_with_an_adapter_changes_no_piece() -> None:
    network = network_of(block=BLOCK)
    engine = Engine(network, slots=2, keep=False)
    engine.adapters.load("one", changes_of(network, 1))
    pieces = in_pieces(engine)
    most, inner = [], pieces.budget
    pieces.budget = lambda answers, context=0, taken=0: (most.append(taken), inner(answers, context, taken))[1]
    first = engine.submit(Request(PROMPTS[0], LONG))
    while not first.choices:
        engine.step()
    second = engine.submit(Request(PROMPTS[2], LONG))
    engine.step()
    del most[:]
    engine.submit(Request(PROMPTS[1], LONG, adapter="one"))
    while not second.choices:
        engine.step()
    assert most and min(most) > 0


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
def test_prompts_beside_answers_with_adapters_only_fail_alone() -> None:
    network = network_of(block=BLOCK)
    engine = Engine(network, slots=3, keep=False)
    engine.adapters.load("one", changes_of(network, 1))
    in_pieces(engine)
    first = engine.submit(Request(PROMPTS[0], LONG, adapter="one"))
    while not first.choices:
        engine.step()
    bad, inner = PROMPTS[2], engine.slots.extend

    def extend(rows, chunks, **how):
        if any(list(chunk) == list(bad[-len(chunk) :]) for chunk in chunks):  # its last piece
            raise RuntimeError("not this one")
        return inner(rows, chunks, **how)

    engine.slots.extend = extend
    good, poor = (engine.submit(Request(prompt, ASKED)) for prompt in (PROMPTS[1], bad))
    while engine.step():
        pass
    assert [one.finish for one in (first, good, poor)] == ["length", "length", "error"]

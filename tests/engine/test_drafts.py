"""Guesses against what is known: a network's own greedy continuation, computed from the first token on, and a search
through the text place by place."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
import torch
from engine_parts import ASKED, PROMPTS, VOCABULARY, network_of

from armillary.base.errors import InputError
from armillary.engine import odds
from armillary.engine.core import Engine
from armillary.engine.drafts import DraftModel, Manner, PromptLookup
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.engine.slots import Slots
from armillary.native import available
from armillary.nn.network import ModelSettings, Network, build

LOOK = {"kind": "attention", "heads": 2, "position": "rope"}


def mixed(seed: int) -> Network:
    """States that can be cut beside such that cannot."""
    blocks = {"look": {"mixer": LOOK, "channel": "gated"}, "state": {"mixer": "retention", "channel": "gated"}}
    settings = ModelSettings(
        width=16, depth=2, vocabulary=VOCABULARY, context=64, blocks=blocks, pattern=["look", "state"]
    )
    return build(settings, seed=seed).eval()


def alone(mixer) -> Network:
    return network_of(block={"mixer": mixer, "channel": "gated"})


@torch.no_grad()
def continued(network: Network, text: list[int], count: int) -> list[int]:
    """The likeliest tokens, each after all before."""
    found: list[int] = []
    for _ in range(count):
        found.append(int(network(torch.tensor([text + found]))[0, -1].argmax()))
    return found


@pytest.mark.parametrize("weights", ["float32", "plain"])
@pytest.mark.parametrize("make", [lambda: alone(LOOK), lambda: mixed(3)], ids=["attention", "hybrid"])
def test_a_draft_writes_on_whatever_became_of_its_guesses(make, weights) -> None:
    network, draw = make(), random.Random(7)
    drafter = DraftModel(network, count=3, sure=0.0, rows=2, weights=weights)
    texts = [list(prompt) for prompt in PROMPTS]  # more than it has rows for
    for _ in range(24):
        text = draw.choice(texts)
        most = draw.randint(1, 4)
        expected = continued(network, text, min(most, 3))
        assert drafter.propose(text, most) == expected
        right = draw.randint(0, len(expected))
        text += [*expected[:right], draw.randrange(VOCABULARY)]
        if len(text) > 56:
            del text[draw.randrange(4, 9) :]  # a new one that begins as an old one did


def test_a_draft_stops_where_it_is_not_sure_and_where_its_context_ends() -> None:
    network = alone(LOOK)
    text = list(PROMPTS[0])
    assert DraftModel(network, sure=1.1).propose(text, 4) == []
    whole = [token % VOCABULARY for token in range(62)]
    drafter = DraftModel(network, count=4, sure=0.0)
    assert len(drafter.propose(whole, 3)) == 3  # the third is not read, and 64 are
    assert drafter.propose(whole, 4) == []
    assert drafter.propose(text, 0) == []


@pytest.mark.parametrize("make", [lambda: alone(LOOK), lambda: mixed(3)], ids=["attention", "hybrid"])
def test_a_network_guesses_itself(make) -> None:
    network = make()
    requests = [Request(prompt, ASKED) for prompt in PROMPTS]
    plain = Engine(network, slots=3, keep=False).run(requests)
    drafter = DraftModel(network, count=3, sure=0.0, weights="float32")
    engine = Engine(network, slots=3, keep=False, drafter=drafter)
    guessed = engine.run(requests)
    for found, expected in zip(guessed, plain, strict=True):
        assert [one.token for one in found.choices] == [one.token for one in expected.choices]
        assert found.accepted == found.drafted > 0
    # 8 tokens: one after the prompt, then 4 and 3 with 3 and 2 guesses
    assert all(found.drafted == 5 for found in guessed)


@pytest.mark.parametrize("weights", ["float32", "plain"])
@pytest.mark.parametrize("make", [lambda: alone(LOOK), lambda: mixed(3)], ids=["attention", "hybrid"])
@pytest.mark.parametrize(
    "asked",
    [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 4, "temperature": 2.0}, {"min_p": 0.1}],
    ids=["drawn", "cool", "nucleus", "few", "near"],
)
def test_a_network_guesses_its_own_draws(make, weights, asked) -> None:
    """By the same numbers it draws the same tokens, whatever the filters."""
    network = make()
    drawn = Sampling(**{"max_new_tokens": 16, "temperature": 1.0, "seed": 5, **asked})
    requests = [Request(prompt, drawn, stream=row) for row, prompt in enumerate(PROMPTS)]
    plain = Engine(network, slots=3, keep=False, weights=weights).run(requests)
    drafter = DraftModel(network, count=3, sure=0.0, weights=weights)
    guessed = Engine(network, slots=3, keep=False, weights=weights, drafter=drafter).run(requests)
    for found, expected in zip(guessed, plain, strict=True):
        assert [one.token for one in found.choices] == [one.token for one in expected.choices]
    assert sum(one.accepted for one in guessed) == sum(one.drafted for one in guessed) > 20


def test_native_and_plain_drafts_stop_in_the_same_places() -> None:
    """Where a token is not sure, or all of them together are too unlikely: two ways to write the same."""
    network, draw, lengths = alone(LOOK), random.Random(3), set[int]()
    for _ in range(40):
        text = [draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 40))]
        sure, least = draw.choice([(0.0, 0.0), (0.06, 0.0), (0.0, 0.003), (0.05, 0.001)])
        asked = Sampling(temperature=draw.choice([0.0, 0.7, 1.0]))
        manner = Manner(asked, [draw.random() for _ in range(5)], least, power=draw.choice([0.5, 1.0]))
        found = [
            DraftModel(network, 5, sure, rows=1, weights=weights).write(text, 5, manner)
            for weights in ("float32", "plain")
        ]
        assert found[0][0] == found[1][0]
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
        lengths.add(len(found[0][0]))
    assert {0, 5} < lengths, "or this test says little"


def test_another_network_changes_no_draw() -> None:
    network, draft = mixed(3), mixed(4)
    drawn = Sampling(max_new_tokens=24, temperature=1.0, seed=3)
    requests = [Request(prompt, drawn, stream=row) for row, prompt in enumerate(PROMPTS)]
    plain = Engine(network, slots=3, keep=False).run(requests)
    guessed = Engine(network, slots=3, keep=False, drafter=DraftModel(draft, count=4, sure=0.0)).run(requests)
    assert [[one.token for one in found.choices] for found in guessed] == [
        [one.token for one in found.choices] for found in plain
    ]
    assert 0 < sum(one.accepted for one in guessed) < sum(one.drafted for one in guessed)


class Wrong:
    """Slow, and never right."""

    count = 5

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        self.asked += 1
        time.sleep(0.005)
        return [(token + 1) % VOCABULARY for token in ids[-1:]] * most


def test_who_is_never_right_is_not_asked_for_long() -> None:
    network, drafter = padded(VOCABULARY, 5), Wrong()
    network_alone = Engine(network, slots=1, keep=False)
    engine = Engine(network, slots=1, keep=False, drafter=drafter)
    asked = Sampling(max_new_tokens=56, temperature=1.0)
    for number in range(8):
        request = Request((1, 2, 3), asked, stream=number)
        (found,), (expected,) = engine.run([request]), network_alone.run([request])
        assert [one.token for one in found.choices] == [one.token for one in expected.choices]
    assert odds.TRIED <= drafter.asked < 2 * odds.TRIED


@pytest.mark.skipif(not available(), reason="there is no C compiler here")
@torch.no_grad()
def test_guesses_are_taken_back_before_the_states_hear_of_them() -> None:
    """The scores after it are those of a sequence in which they never were, and so are the states."""
    network = alone(LOOK)
    texts = [[3, 1, 4, 1, 5], [2, 7, 1]]
    kept, fresh = (Slots(network, 2, 32) for _ in range(2))
    for slots in (kept, fresh):
        slots.extend([0, 1], texts)
    kept.extend([0, 1], [[9, 2, 6], [8, 2, 8]], last=False)
    assert kept.replay is not None and kept.replay.go_back(0, 6) and kept.replay.go_back(1, 3)
    fresh.extend([0], [[9]])
    for slots in (kept, fresh):
        slots.found = slots.extend([0, 1], [[5], [1]]).clone()  # type: ignore[attr-defined]
    assert torch.equal(kept.found, fresh.found)  # type: ignore[attr-defined]
    for slots in (kept, fresh):
        slots.settle()
        assert slots.state.lengths.tolist() == [7, 4]
    for (index, name, one), (_, _, other) in zip(kept.state.each(), fresh.state.each(), strict=True):
        for row, length in ((0, 7), (1, 4)):
            for part in one.tensors:
                pair = (state.tensors[part][row, :, :length] for state in (one, other))
                assert torch.equal(*pair), (index, name, part)
    assert not kept.replay.go_back(0, 2), "whoever looks at the states counts in them"


def test_only_decoders_guess() -> None:
    network = network_of(form="prefix", block={"mixer": LOOK, "channel": "gated"})
    with pytest.raises(InputError, match="form 'prefix' cannot guess"):
        DraftModel(network)


def searched(ids: list[int], lookup: PromptLookup, most: int) -> list[int]:
    """What `PromptLookup` promises, place by place."""
    for size in range(min(lookup.longest, len(ids) - 1), lookup.shortest - 1, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                return ids[start + size : start + size + min(lookup.count, most)]
    return []


def test_prompt_lookup_is_a_search() -> None:
    draw = random.Random(1)
    lookup, some = PromptLookup(count=3, longest=3, shortest=1), 0
    for _ in range(300):
        # numbers whose bytes also agree across the borders of tokens
        ids = [draw.choice([0, 1, 256, 257, 1 << 32]) for _ in range(draw.randint(1, 24))]
        found = lookup.propose(ids, 2)
        assert found == searched(ids, lookup, 2)
        some += bool(found)
    assert 100 < some < 300


def padded(entries: int, seed: int) -> Network:
    """Greedy choices of it fall anywhere in its vocabulary."""
    block = {"mixer": LOOK, "channel": "gated"}
    settings = ModelSettings(width=16, depth=1, vocabulary=entries, context=64, block=block)
    return build(settings, seed=seed).eval()


def test_a_draft_with_more_entries_than_the_model_guesses_none_of_them() -> None:
    small, text = padded(4 * VOCABULARY, 5), [1, 2, 3]
    guesses = [DraftModel(small, sure=0.0, vocabulary=most).propose(text, 4) for most in (None, VOCABULARY)]
    assert max(guesses[0]) >= VOCABULARY, "or this test says nothing"
    assert len(guesses[1]) == 4 and max(guesses[1]) < VOCABULARY
    with torch.no_grad():
        assert guesses[1][0] == int(small(torch.tensor([text]))[0, -1, :VOCABULARY].argmax())


def test_a_draft_with_fewer_entries_guesses_nothing_after_one_that_it_lacks() -> None:
    drafter = DraftModel(padded(VOCABULARY, 5), sure=0.0)
    known = [1, 2, 3]
    before = drafter.propose(known, 4)
    assert drafter.propose([*known, VOCABULARY + 1], 4) == []
    assert drafter.propose(known, 4) == before


def test_states_of_a_draft_are_part_of_the_memory() -> None:
    block = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}
    settings = ModelSettings(width=16, depth=1, vocabulary=VOCABULARY, context=64, block=block)
    network, draft = (build(settings, seed=seed).eval() for seed in (1, 2))
    drafter = DraftModel(draft, rows=2, weights="plain")
    # keys and values of 16 numbers of 4 bytes for each of 64 tokens in 2 rows
    assert drafter.nbytes == 2 * 2 * 16 * 4 * 64
    engine = Engine(network, slots=2, drafter=drafter, memory=drafter.nbytes + 100_000)
    assert engine.memory.total == 100_000
    with pytest.raises(InputError, match="the draft's states can come to 16384 bytes"):
        Engine(network, slots=2, drafter=drafter, memory=drafter.nbytes)

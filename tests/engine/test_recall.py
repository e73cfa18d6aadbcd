"""What later answers go on from, through the engine. Expected counts are the tokens that two prompts have in common,
as far as they were computed; expected scores are those of an engine that has seen nothing."""

from __future__ import annotations

import pytest
from engine_parts import ASKED, PROMPTS, alike, network_of

from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.nn.network import Network

SPANS = {"mixer": {"kind": "attention", "heads": 2}, "channel": "gated"}
FIXED = {"mixer": {"kind": "linear", "heads": 2}, "channel": "gated"}
PROMPT = PROMPTS[2]


@pytest.fixture(params=[SPANS, FIXED], ids=["spans", "fixed"])
def network(request: pytest.FixtureRequest) -> Network:
    return network_of(block=request.param)


def test_a_prompt_is_there_for_others_while_its_own_answer_goes_on(network: Network) -> None:
    engine = Engine(network)
    first = engine.submit(Request(PROMPT, Sampling(max_new_tokens=20, temperature=0)))
    while not first.choices:
        engine.step()
    longer = engine.submit(Request((*PROMPT, 3, 1), ASKED)).wait()
    assert first.finish is None and longer.reused == len(PROMPT)
    alike(longer, Engine(network).run([Request((*PROMPT, 3, 1), ASKED)])[0], "after another's prompt")


def test_a_prompt_that_parts_at_a_boundary_goes_on_from_there(network: Network) -> None:
    boundary = 10
    other = (*PROMPT[:boundary], *(token + 1 for token in PROMPT[boundary:-2]))
    engine = Engine(network)
    engine.run([Request(PROMPT, ASKED, boundaries=(boundary,))])
    (found,) = engine.run([Request(other, ASKED)])
    assert found.reused == boundary
    alike(found, Engine(network).run([Request(other, ASKED)])[0], "from a boundary")


def test_without_a_boundary_only_divisible_states_are_gone_on_from() -> None:
    other = (*PROMPT[:10], *(token + 1 for token in PROMPT[10:-2]))
    for block, reused in ((SPANS, 10), (FIXED, 0)):
        engine = Engine(network_of(block=block))
        engine.run([Request(PROMPT, ASKED)])
        assert engine.run([Request(other, ASKED)])[0].reused == reused


def test_tokens_whose_own_scores_are_asked_for_are_computed(network: Network) -> None:
    engine = Engine(network)
    engine.run([Request(PROMPT, ASKED)])
    (found,) = engine.run([Request(PROMPT, ASKED, prompt_logprobs=True)])
    assert found.reused == 0
    assert [choice.token for choice in found.prompt_choices] == list(PROMPT[1:])

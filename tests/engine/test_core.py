"""The engine beside its laws: a thread that nothing ends, and prompts that are scored once."""

from __future__ import annotations

import pytest
import torch

from armillary.engine import Engine, GenerationError, Request, Sampling
from armillary.nn.network import ModelSettings, build

BLOCK = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


@pytest.fixture(scope="module")
def network():
    return build(ModelSettings(width=16, depth=1, vocabulary=24, context=64, block=BLOCK), seed=5).eval()


def test_a_fault_outside_the_network_ends_answers_and_not_the_thread(network) -> None:
    class Broken:
        faults = 1

        def propose(self, ids, most):
            if self.faults:
                self.faults -= 1
                raise RuntimeError("no guess")
            return []

    asked = Sampling(max_new_tokens=5, temperature=0)
    engine = Engine(network, drafter=Broken()).start()
    try:
        with pytest.raises(GenerationError, match="no guess"):
            engine.submit(Request(PROMPT, asked)).wait()
        assert engine.failures == 1
        again = engine.submit(Request(PROMPT, asked)).wait()
        assert len(again.choices) == 5
        assert engine.memory.held == 0
    finally:
        engine.close()


def test_a_prompt_is_scored_once_whoever_goes_first(network) -> None:
    """Expected values: one pass over the whole prompt."""
    engine = Engine(network, slots=1)
    engine._budget = lambda: 3  # type: ignore[method-assign]
    asked = Sampling(max_new_tokens=2, temperature=0)
    low = engine.submit(Request(PROMPT, asked, prompt_logprobs=True))
    engine.step()
    engine.step()
    assert low.prompt_choices
    engine.submit(Request(PROMPT[::-1], asked, priority=1)).wait()
    found = low.wait().prompt_choices
    with torch.no_grad():
        own = torch.log_softmax(network(torch.tensor([PROMPT]))[0, :-1], -1)
    assert [choice.token for choice in found] == list(PROMPT[1:])
    expected = own.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    assert [choice.logprob for choice in found] == pytest.approx(expected, abs=1e-4)

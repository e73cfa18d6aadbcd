"""The prefix objective: only what lies behind the cut is asked for, in both forms of model."""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, build
from armillary.objectives.base import Vocabulary
from armillary.objectives.prefix import PrefixSettings

SHAPE = {"width": 16, "depth": 1, "vocabulary": 50}
IDS = torch.randint(0, 50, (3, 21), generator=torch.Generator().manual_seed(0))


def prepared(seed: int = 0):
    return PrefixSettings().build(Vocabulary(50)).prepare(Batch(IDS), torch.Generator().manual_seed(seed))


def test_the_cut_stays_in_its_bounds() -> None:
    cuts = {int(prepared(seed).inputs["side"]["prefix"][0]) for seed in range(200)}
    assert cuts == set(range(5, 16))  # a quarter to three quarters of 20


def test_weights_begin_at_the_cut() -> None:
    found = prepared()
    cut = int(found.inputs["side"]["prefix"][0])
    assert found.weights.sum(1).tolist() == [20 - cut + 1.0] * 3
    assert torch.equal(found.targets[:, cut - 1], IDS[:, cut])  # the first thing asked for


def test_prefix_model_loss_is_the_sum_of_its_log_likelihoods() -> None:
    network = build(parse(ModelSettings, SHAPE | {"form": "prefix", "block": {"mixer": "attention"}}))
    found = prepared()
    loss = PrefixSettings().build(Vocabulary(50)).loss(network, found)
    scores = torch.log_softmax(network(found.ids, **found.inputs), -1)
    expected = -(scores.gather(2, found.targets[..., None])[..., 0] * found.weights).sum()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)


def test_encoder_decoder_sees_the_source_once_and_predicts_the_rest() -> None:
    block = {"mixer": "attention", "cross": "attention", "channel": "ffn"}
    settings = SHAPE | {"form": "encoder_decoder", "encoder": {"depth": 1}, "block": block}
    network = build(parse(ModelSettings, settings))
    found = prepared()
    cut = int(found.inputs["side"]["prefix"][0])
    loss = PrefixSettings().build(Vocabulary(50)).loss(network, found)
    scores = torch.log_softmax(network(IDS[:, cut - 1 : -1], source=IDS[:, :cut]), -1)
    assert loss.sum.item() == pytest.approx(-scores.gather(2, IDS[:, cut:, None]).sum().item(), rel=1e-5)
    assert loss.weight.item() == IDS[:, cut:].numel()


def test_other_forms_are_refused() -> None:
    with pytest.raises(SettingsError, match="needs a prefix model"):
        PrefixSettings().check(parse(ModelSettings, SHAPE))

"""The masked objective against the shares that were published for BERT, and its loss against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, build
from armillary.objectives.base import Vocabulary
from armillary.objectives.masked import MaskedSettings

SIZE, MASK, SPECIAL = 200, 197, (197, 198, 199)
VOCABULARY = Vocabulary(SIZE, MASK, SPECIAL)
ENCODER = {"form": "encoder", "width": 16, "depth": 1, "vocabulary": SIZE, "block": {"mixer": "attention"}}


def ids(rows: int = 64, length: int = 256) -> torch.Tensor:
    found = torch.randint(0, 197, (rows, length), generator=torch.Generator().manual_seed(0))
    found[:, 0] = 198
    return found


def test_shares_are_those_of_bert() -> None:
    """Of 15% chosen, 80% become the mask, 10% another token, 10% stay (Devlin et al. 2019, section 3.1)."""
    original = ids()
    found = MaskedSettings().build(VOCABULARY).prepare(Batch(original), torch.Generator().manual_seed(1))
    chosen = found.weights.bool()
    count = int(chosen.sum())
    # three standard deviations of a binomial count
    assert abs(count / (64 * 255) - 0.15) < 3 * (0.15 * 0.85 / (64 * 255)) ** 0.5
    masked = chosen & (found.ids == MASK)
    other = chosen & (found.ids != MASK) & (found.ids != original)
    for part, share in ((masked, 0.8), (other, 0.1 * 196 / 197)):  # a drawn token may be the same by chance
        assert abs(int(part.sum()) / count - share) < 3 * (share * (1 - share) / count) ** 0.5
    assert torch.equal(found.targets, original)
    assert torch.equal(found.ids[~chosen], original[~chosen])  # what is not asked for is not touched
    assert not chosen[:, 0].any() and not torch.isin(found.ids[other], torch.tensor(SPECIAL)).any()


def test_every_row_is_asked_something() -> None:
    found = MaskedSettings(share=0.001).build(VOCABULARY).prepare(Batch(ids(50, 4)), torch.Generator().manual_seed(0))
    assert found.weights.sum(1).min() >= 1


def test_the_same_generator_hides_the_same_tokens() -> None:
    one, two = (
        MaskedSettings().build(VOCABULARY).prepare(Batch(ids(2)), torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one.ids, two.ids) and torch.equal(one.weights, two.weights)


def test_the_loss_is_pytorchs_over_the_hidden_tokens() -> None:
    network = build(parse(ModelSettings, ENCODER))
    objective = MaskedSettings().build(VOCABULARY)
    found = objective.prepare(Batch(ids(3, 40)), torch.Generator().manual_seed(2))
    loss = objective.loss(network, found)
    chosen = found.weights.bool()
    logits = network(found.ids, **found.inputs)[chosen]
    expected = torch.nn.functional.cross_entropy(logits, found.targets[chosen], reduction="sum")
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.weight.item() == chosen.sum()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs an encoder"):
        MaskedSettings().check(parse(ModelSettings, ENCODER | {"form": "decoder"}))
    with pytest.raises(SettingsError, match="must not exceed 1"):
        MaskedSettings(replaced=0.8, random=0.3)
    with pytest.raises(SettingsError, match=r"no <\|mask\|> token"):
        MaskedSettings().build(Vocabulary(SIZE))

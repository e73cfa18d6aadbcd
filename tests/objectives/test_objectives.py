"""What all objectives share: forms that fit, and borders that neither documents nor targets may cross."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network, build
from armillary.objectives import objectives
from armillary.objectives.base import Vocabulary
from armillary.objectives.masked import MaskedSettings
from armillary.objectives.prefix import PrefixSettings

V, MASK = 50, 49
WORDS = Vocabulary(size=V, mask=MASK, special=(0, 1, MASK))


def network(form: str = "decoder", **more: Any) -> Network:
    return build(parse(ModelSettings, {"width": 16, "depth": 1, "vocabulary": V, "form": form, **more}))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_rows_of_special_tokens_are_asked_nothing() -> None:
    objective = MaskedSettings(share=0.001, replaced=1.0, random=0.0).build(WORDS)
    ids = torch.full((3, 8), 5)
    ids[1, :3] = 0  # its first ordinary token is the fourth
    ids[2] = 1  # nothing but special tokens
    prepared = objective.prepare(Batch(ids), generator(3))
    assert prepared.weights[:2].sum(1).tolist() == [1, 1]
    assert prepared.weights[1, :3].tolist() == [0, 0, 0]
    assert prepared.weights[2].sum() == 0
    assert torch.equal(prepared.ids == MASK, prepared.weights > 0)


def test_masked_documents_are_kept_apart() -> None:
    objective, model = MaskedSettings(share=0.3).build(WORDS), network("encoder")
    ids = torch.randint(2, MASK, (2, 20))
    documents = torch.tensor([[1] * 12 + [2] * 8, [3] * 20])
    prepared = objective.prepare(Batch(ids, documents), generator())
    asked = prepared.weights > 0
    loss = objective.loss(model, prepared)
    logits = model(prepared.ids, documents=documents)
    agree(loss.sum, F.cross_entropy(logits[asked], ids[asked], reduction="sum"))
    assert float(loss.weight) == int(asked.sum())


def test_what_is_asked_cannot_be_seen() -> None:
    """Changing any target, and all behind it, leaves the logits that predict it untouched."""
    objective, model = PrefixSettings().build(WORDS), network("prefix")
    ids = torch.randint(2, MASK, (1, 13))
    prepared = objective.prepare(Batch(ids), generator())
    base = model(prepared.ids, **prepared.inputs)
    for t in range(12):
        if prepared.weights[0, t]:
            changed = prepared.ids.clone()
            changed[:, t + 1 :] = 5
            assert torch.allclose(model(changed, **prepared.inputs)[:, t], base[:, t], atol=1e-6)


def test_each_objective_fits_its_forms_only() -> None:
    fits = {"causal": {"decoder"}, "masked": {"encoder"}, "prefix": {"prefix", "encoder_decoder"}}
    block = {"mixer": "attention", "cross": "attention", "channel": "ffn"}
    # adversarial goes around another, skip_gram has no blocks: they have tests of their own
    assert set(objectives.names()) == {*fits, "adversarial", "skip_gram"}
    for kind, settings in ((kind, objectives.get(kind)) for kind in fits):
        for form in ("decoder", "encoder", "prefix", "encoder_decoder"):
            more = {"block": block, "encoder": {"depth": 1}} if form == "encoder_decoder" else {}
            model = parse(ModelSettings, {"form": form, **more})
            if form in fits[kind]:
                settings().check(model)
            else:
                with pytest.raises(SettingsError, match=f"model.form is {form}"):
                    settings().check(model)

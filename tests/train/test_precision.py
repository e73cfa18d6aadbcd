"""What `precision: auto` comes to: bf16 where the processor computes it, and a run keeps what it began with."""

from __future__ import annotations

import pytest

from armillary.recipe.training import TrainingSettings
from armillary.train import precision


@pytest.mark.parametrize("computes, expected", [(True, "bf16"), (False, "float32")])
def test_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch, computes: bool, expected: str) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda: computes)
    assert precision.settled(TrainingSettings(device="cpu")).precision == expected
    for given in ("bf16", "float32"):
        assert precision.settled(TrainingSettings(device="cpu", precision=given)).precision == given

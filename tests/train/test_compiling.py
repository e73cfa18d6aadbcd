"""When blocks are compiled, and what happens when they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from armillary.base.errors import TrainingError
from armillary.base.settings import parse
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.stack import Stack
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer, compiling


def network() -> Network:
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": "gated"}
    return build(parse(ModelSettings, {"width": 16, "depth": 2, "vocabulary": 31, "block": block}), seed=0)


def training(**changes: Any) -> TrainingSettings:
    return parse(TrainingSettings, {"context": 12, "batch": 2, "precision": "float32"} | changes)


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a compiler and Python's headers."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling.Path, "is_file", lambda path: True)
    return monkeypatch


def test_auto_compiles_long_runs_on_machines_that_can(equipped: pytest.MonkeyPatch) -> None:
    long = training(steps=10**9)
    assert compiling.choose(network(), long).on
    assert "too short" in compiling.choose(network(), training(steps=10)).why
    assert "several processes" in compiling.choose(network(), long, ranks=2).why
    equipped.setattr(compiling.Path, "is_file", lambda path: False)
    assert "headers of Python" in compiling.choose(network(), long).why
    equipped.setattr(compiling.shutil, "which", lambda name: None)
    assert "no C++ compiler" in compiling.choose(network(), long).why


def test_a_named_compiler_must_be_there(equipped: pytest.MonkeyPatch) -> None:
    equipped.setenv("CXX", "mine")
    equipped.setattr(compiling.shutil, "which", lambda name: None if name == "mine" else name)
    assert "no C++ compiler" in compiling.choose(network(), training(steps=10**9)).why


def test_yes_and_no_are_obeyed() -> None:
    assert compiling.choose(network(), training(compile="yes")).on
    assert not compiling.choose(network(), training(compile="no", steps=10**9)).on


def _broken(self: Stack, **options: Any) -> None:
    def call(*args: Any) -> Any:
        raise BackendCompilerFailed(lambda: None, RuntimeError("no assembler"), None)

    self._compiled = call


def test_a_compiler_that_fails_leaves_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(26).reshape(2, 13)
    expected = Trainer(network(), training(compile="no")).step(ids)
    monkeypatch.setattr(Stack, "compile_blocks", _broken)
    monkeypatch.setattr(compiling, "choose", lambda *args, **options: compiling.CompileChoice(True, ""))
    said: list[str] = []
    trainer = Trainer(network(), training(compile="auto"), notice=said.append)
    assert trainer.step(ids) == expected
    assert len(said) == 1 and "eagerly after all" in said[0] and not trainer.compiled.on
    with pytest.raises(TrainingError, match="cannot be compiled"):
        Trainer(network(), training(compile="yes")).step(ids)


def test_compiled_blocks_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `aot_eager`, which traces and differentiates as the compiler does, without building code."""
    real = Stack.compile_blocks
    monkeypatch.setattr(Stack, "compile_blocks", lambda self, **options: real(self, backend="aot_eager"))
    ids = torch.arange(26).reshape(2, 13)
    plain, compiled = Trainer(network(), training(compile="no")), Trainer(network(), training(compile="yes"))
    for _ in range(3):
        assert compiled.step(ids) == pytest.approx(plain.step(ids), rel=1e-5)

"""Two processes under torchrun train as one does, and their checkpoints are anyone's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest
from safetensors.torch import load_file

import armillary
from armillary.recipe import Recipe
from armillary.train import Run, resume, train

HERE = Path(__file__).parent


def together(*arguments: object, processes: int = 2) -> None:
    """Run `_two.py` in several processes; a failure shows what they wrote."""
    source = str(Path(armillary.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(HERE / "_two.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """Over 50 float32 steps within 1e-4; the oracle is the same trainer in this process."""
    together("losses", tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    spec = util.spec_from_file_location("_two", HERE / "_two.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(two["plain"]) == 50
    for case, found in two.items():
        assert found == pytest.approx(module.losses(case, len(found)), rel=1e-4), case


def test_a_checkpoint_of_two_goes_on_in_one_and_back(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Dropout's noise differs between ranks, so the run compared with has none."""
    block = {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1}, "channel": "gated"}
    plain = recipe(model={"block": block})
    plain.save(tmp_path / "recipe.yaml")
    alone = train(plain, tmp_path / "one")
    together("run", tmp_path / "recipe.yaml", tmp_path / "two", 5)
    folder = tmp_path / "two" / "checkpoints" / "step-000005"
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.checkpoints[-1].iterdir()}
    shutil.copytree(tmp_path / "two", tmp_path / "back")
    on = resume(tmp_path / "two")
    together("go_on", tmp_path / "back")
    back = Run.open(tmp_path / "back")
    for run in (on, back):
        assert run.step == 12 and not run.stopped
        assert [line["step"] for line in run.metrics] == [line["step"] for line in alone.metrics]
        for name in ("loss", "grad_norm", "heldout_loss"):
            found = [line[name] for line in run.metrics if name in line]
            assert found == pytest.approx([line[name] for line in alone.metrics if name in line], rel=1e-4)
        # sums are taken in another order, and AdamW magnifies that where gradients are near zero
        expected = load_file(alone.checkpoints[-1] / "model.safetensors")
        got = load_file(run.checkpoints[-1] / "model.safetensors")
        assert expected.keys() == got.keys()
        assert all(float((expected[name] - got[name]).abs().max()) < 1e-3 for name in expected)
    assert [entry["processes"] for entry in back.ledger.events if "processes" in entry] == [2, 2]

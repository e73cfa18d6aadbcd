"""`armillary compress` from a trained run to a pruned model, through the installed entry point."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from armillary.checkpoints import load
from armillary.cli.main import main

TINY = (
    "tokenizer.kind=byte",
    "model.width=16",
    "model.depth=1",
    "model.context=32",
    "model.block.mixer.heads=2",
    "model.block.mixer.kv_heads=1",
    "training.context=32",
    "training.batch=2",
    "training.steps=4",
    "training.sample_prompts=[]",
    "training.compile=no",
    "data.workers=1",
    "data.heldout=0.3",
)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["armillary", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_is_pruned_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"The {number} rings turn, and turn again. " * 30, encoding="utf-8")
    source = "data.sources=[{path: text}]"
    assert run(monkeypatch, "train", "llama", "--run", "run", source, *TINY) == 0
    capsys.readouterr()
    words = ("compress", "run", "small", "--prune-attention", "0.25")
    assert run(monkeypatch, *words, "--rows", "5", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["removed"] == pytest.approx(0.25, abs=0.02)
    assert facts["bits_per_byte_before"] > 0 and facts["bits_per_byte_after"] > 0
    assert load("small").network.settings.layers()[0].all()[0].mixer.kind == "pruned"  # type: ignore[union-attr]
    assert run(monkeypatch, *words) == 2
    assert "already there" in capsys.readouterr().err
    assert run(monkeypatch, "compress", "small", "again", "--prune-attention", "0.5", "--data", "text/1.txt") == 2
    assert "no dense attention" in capsys.readouterr().err

    words = ("compress", "run", "experts", "--experts", "4")
    assert run(monkeypatch, *words, "--top", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    found = facts["bits_per_byte_by_experts"]
    assert list(found) == ["100%", "75%", "50%", "25%"]
    assert found["100%"] == pytest.approx(facts["bits_per_byte_before"], rel=1e-4) and found["25%"] != found["100%"]
    channel = load("experts").network.get_submodule("blocks.0.channel.inner")
    assert (channel.top, channel.settings.experts) == (2, 4)
    for wrong in (
        words[:3],
        (*words, "--scope", "head"),
        ("compress", "run", "x", "--prune-attention", "0", "--top", "1"),
    ):
        assert run(monkeypatch, *wrong) == 2
        assert re.search("what is to be done|no part in this", capsys.readouterr().err)

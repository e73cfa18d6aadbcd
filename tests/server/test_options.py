"""Options of `armillary serve` that reach into the engine, and folders that are checked before any weights are read.

Expected answers are those of the Python face on the same folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
from server_parts import hosted
from typer.testing import CliRunner

import armillary
from armillary.base.errors import ArmillaryError
from armillary.cli.main import app
from armillary.model import Model
from armillary.nn.cache import Sinks
from armillary.text import TokenizerSettings, train_tokenizer

SOURCE = str(Path(armillary.__file__).parent.parent)
BLOCK = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """tiny; sharp: the same, sure of what it says; draft: another with its vocabulary; other: with another; broken: cut
    off in the middle of its weights."""
    place = tmp_path_factory.mktemp("served")
    one = hosted()
    one.engine.close()
    armillary.save(Model(one.network, one.tokenizer), place / "tiny")
    with torch.no_grad():
        one.network.embed.weight *= 30  # of the head, too
    armillary.save(Model(one.network, one.tokenizer), place / "sharp")
    settings = {"width": 16, "depth": 1, "vocabulary": one.tokenizer.size, "context": 256, "block": BLOCK}
    armillary.save(Model(armillary.build(settings, seed=9).network, one.tokenizer), place / "draft")
    other = train_tokenizer(TokenizerSettings(kind="bpe", size=270), ["import this and that"] * 9)
    network = armillary.build(settings | {"vocabulary": other.size}, seed=9).network
    armillary.save(Model(network, other), place / "other")
    armillary.save(Model(network, other), place / "broken", layout="open")
    weights = place / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return place


@contextmanager
def serving(*words: str) -> Iterator[tuple[str, str]]:
    """Address, and what was said before."""
    environment = {key: value for key, value in os.environ.items() if key != "ARMILLARY_API_KEYS"}
    environment["PYTHONPATH"] = SOURCE
    command = [sys.executable, "-m", "armillary", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        said = line = process.stderr.readline()
        while not line.startswith("serving "):
            assert line, f"the server ended before it served: {said}"
            line = process.stderr.readline()
            said += line
        yield line.split(" on ")[1].strip(), said
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


def text(url: str, model: str, **more) -> str:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    return client.completions.create(model=model, prompt="ab", max_tokens=30, temperature=0, **more).choices[0].text


def test_a_draft_guesses_for_the_model_it_is_given_to(folders) -> None:
    words = [f"a={folders / 'sharp'}", f"b={folders / 'sharp'}", "--guesses", "3", "--kv", "int8"]
    with serving(*words, "--draft", f"b={folders / 'sharp'}") as (url, _):  # its own draft, so guesses are right
        found = [text(url, name) for name in "ab"]
        metrics = httpx.get(url.removesuffix("/v1") + "/metrics").text
    counted = {
        (name, kind): float(amount)
        for kind, name, amount in re.findall(r'guesses_total\{kind="(\w+)",model="(\w)"\} (\S+)', metrics)
    }
    assert found[0] == found[1]
    assert not counted.get(("a", "checked"))
    assert counted["b", "checked"] >= counted["b", "right"] > 0


def test_a_lossy_cache_is_said_to_be_one(folders) -> None:
    with serving(str(folders / "draft"), "--cache", "sinks:8,sinks=2") as (url, said):
        found = text(url, "draft")
    assert "--cache sinks:8,sinks=2 is lossy" in said
    model = armillary.load(folders / "draft")
    given = {"max_new_tokens": 30, "temperature": 0}
    assert found == model.generate("ab", cache=Sinks(8, sinks=2), **given).text
    assert found != model.generate("ab", **given).text, "or this test says nothing"


@pytest.mark.parametrize(
    "words, message",
    [
        (["a={tiny}", "a={draft}"], "two models are called 'a'"),
        (["{tiny}", "{broken}"], "broken"),
        (["{tiny}", "--draft", "{other}"], "a vocabulary of"),
        (["{tiny}", "--draft", "{tiny}/nowhere"], "no such folder"),
        (["a={tiny}", "b={tiny}", "--draft", "{tiny}"], "does not say of which model"),
        (["a={tiny}", "--draft", "b={tiny}"], "no model 'b' for --draft"),
        (["a={tiny}", "--draft", "a={tiny}", "--draft", "{draft}"], "'a' has two drafts"),
        (["{tiny}", "--adapter", "x={tiny}"], "adapter_config.json"),
        (["a={tiny}", "b={tiny}", "--adapter", "x={tiny}"], "does not say of which model"),
        (["{tiny}", "--draft", "{draft}", "--cache", "sinks:9"], "--cache sinks:9 does not go with --draft"),
        (["{tiny}", "--draft", "{draft}", "--guess"], "--guess and --draft"),
        (["{tiny}", "--guesses", "3"], "--guesses would do nothing"),
        (["--upstream", "http://x/v1", "--draft", "x", "--cache", "y"], "--draft, --cache would do nothing"),
    ],
)
def test_what_is_wrong_is_said_before_any_weights_are_read(folders, monkeypatch, words, message) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("armillary.model.load_checkpoint", loaded)
    names = {name: str(folders / name) for name in ("tiny", "draft", "other", "broken")}
    found = CliRunner().invoke(app, ["serve", *(word.format(**names) for word in words)])
    assert isinstance(found.exception, ArmillaryError), found.output
    assert re.search(message, str(found.exception))

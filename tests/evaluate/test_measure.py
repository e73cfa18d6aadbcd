"""evaluate(): the same text by every way in gives the same figures, which equal a direct sum."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import armillary
from armillary.base.errors import DataError, InputError
from armillary.base.settings import parse
from armillary.data.corpus import Corpus
from armillary.data.prepare import prepare
from armillary.data.settings import DataSettings, SourceSettings
from armillary.evaluate import baselines, evaluate, kneser_ney
from armillary.evaluate.throughput import throughput
from armillary.nn.network import ModelSettings, Network, build
from armillary.recipe import Recipe
from armillary.text.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

TEXTS = [f"Chapter {i}: the wind — naïve or not — blew {i * i} times over hill {i}.\n" * 3 for i in range(30)]


@dataclass
class Model:
    network: Network
    tokenizer: Tokenizer
    recipe: Recipe | None = None


def model(tokenizer: Tokenizer, context: int = 256) -> Model:
    data = {"width": 16, "depth": 1, "vocabulary": tokenizer.size, "context": context}
    return Model(build(parse(ModelSettings, {**data, "block": {"mixer": "attention", "channel": "ffn"}})), tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a corpus in `data`."""
    folder = tmp_path_factory.mktemp("run")
    source = tmp_path_factory.mktemp("source")
    for number, text in enumerate(TEXTS):
        (source / f"{number:02}.txt").write_text(text, encoding="utf-8")
    settings = DataSettings(sources=(SourceSettings(path=str(source)),), heldout=0.3, workers=1)
    prepare(settings, TokenizerSettings(kind="bpe", size=320), folder / "data")
    return folder


@pytest.fixture(scope="module")
def corpus(run: Path) -> Corpus:
    return Corpus.open(run / "data")


@pytest.fixture(scope="module")
def trained(corpus: Corpus) -> Model:
    return model(corpus.tokenizer)


def heldout(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(corpus.heldout.document(i).tolist()) for i in range(len(corpus.heldout))]


def test_figures_equal_a_direct_sum(trained: Model, corpus: Corpus) -> None:
    nats = tokens = size = 0.0
    for text in heldout(corpus):
        assert text in TEXTS
        ids = torch.tensor([[trained.tokenizer.eos, *trained.tokenizer.encode(text)]])
        with torch.no_grad():
            logits = trained.network(ids[:, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens, size = tokens + ids.shape[1] - 1, size + len(text.encode())
    found = evaluate(trained, corpus)
    assert found.bits_per_byte.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert (found.documents, found.bytes, found.tokens) == (len(corpus.heldout), size, tokens)
    assert found.bits_per_byte.low < found.bits_per_byte.value < found.bits_per_byte.high
    assert found.tokens_per_second > 0 and found.writing_speed > 0 and not found.truncated
    assert found.peak_memory > 10_000_000


def test_every_way_in_gives_the_same(trained: Model, corpus: Corpus, run: Path, tmp_path: Path) -> None:
    texts = heldout(corpus)
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    expected = evaluate(trained, corpus)
    for data in (run, str(run), run / "data", texts, tmp_path):
        found = evaluate(trained, data)
        assert found.bits_per_byte.value == pytest.approx(expected.bits_per_byte.value, rel=1e-6)
        assert found.fingerprints["documents"] == expected.fingerprints["documents"]
    assert armillary.evaluate(trained, texts).bytes == expected.bytes


def test_a_corpus_of_another_tokenizer_is_encoded_again(corpus: Corpus) -> None:
    other = model(train_tokenizer(TokenizerSettings(kind="byte"), []))
    found = evaluate(other, corpus)
    assert found.bytes == int(corpus.heldout.document_bytes.sum()) == found.tokens  # one token per byte
    assert found.bits_per_byte.value == pytest.approx(evaluate(other, heldout(corpus)).bits_per_byte.value, rel=1e-6)


def test_baselines_see_the_same_documents(trained: Model, corpus: Corpus) -> None:
    held = heldout(corpus)
    train = [text for text in TEXTS if text not in held]
    found = evaluate(trained, corpus, baselines=True)
    direct = baselines([text.encode() for text in train], [text.encode() for text in held])
    assert [b.name for b in found.baselines] == [b.name for b in direct]
    assert [b.bits_per_byte for b in found.baselines] == pytest.approx([b.bits_per_byte for b in direct])
    again = evaluate(trained, held, baselines=corpus, order=3)
    third = kneser_ney([text.encode() for text in train], [text.encode() for text in held], 3)
    assert again.baselines[1].bits_per_byte == pytest.approx(third.bits_per_byte) != direct[1].bits_per_byte
    assert again.baselines[1].name == "byte 3-gram, modified Kneser-Ney"
    with pytest.raises(InputError, match="order 9"):
        evaluate(trained, held, baselines=corpus, order=9)
    with pytest.raises(InputError, match="learn from training text"):
        evaluate(trained, held, baselines=True)


def test_a_limit_takes_some_documents_and_says_so(trained: Model, corpus: Corpus) -> None:
    whole, part = evaluate(trained, corpus), evaluate(trained, corpus, limit=3)
    assert part.truncated and part.documents == 3 < whole.documents
    assert evaluate(trained, corpus, limit=3).fingerprints == part.fingerprints
    every = [score.nats for score in whole.scores]
    assert all(any(score.nats == pytest.approx(nats, rel=1e-5) for nats in every) for score in part.scores)
    assert not evaluate(trained, corpus, limit=whole.documents).truncated
    with pytest.raises(InputError, match="limit"):
        evaluate(trained, corpus, limit=0)


def test_differences_are_paired(trained: Model, corpus: Corpus) -> None:
    first, other = evaluate(trained, corpus), evaluate(model(corpus.tokenizer, 128), corpus)
    found = first.difference(other)
    assert found.value == pytest.approx(first.bits_per_byte.value - other.bits_per_byte.value, abs=1e-9)
    with pytest.raises(InputError, match="different documents"):
        first.difference(evaluate(trained, corpus, limit=2))


def test_context_comes_from_the_recipe_or_the_model(trained: Model, corpus: Corpus) -> None:
    assert evaluate(trained, corpus).context == 256
    recipe = Recipe.load({"training": {"context": 32}, "model": {"context": 64}})
    assert evaluate(Model(trained.network, trained.tokenizer, recipe), corpus).context == 32
    assert evaluate(trained, corpus, context=16).context == 16


def test_results_are_plain_json(trained: Model, corpus: Corpus, tmp_path: Path) -> None:
    stages: list[str] = []
    found = evaluate(trained, corpus, baselines=True, progress=lambda stage, fraction: stages.append(stage))
    data = json.loads(found.save(tmp_path).read_text())
    assert data == found.to_data() | {"baselines": data["baselines"]}
    assert data["bits_per_byte"]["value"] == found.bits_per_byte.value
    assert len(data["baselines"]) == 3 and data["environment"]["torch"] == torch.__version__
    assert "scores" not in data and data["fingerprints"]["corpus"] == corpus.fingerprint
    assert stages[0] == "scoring" and stages[-1].startswith("baselines: lzma")


def test_nothing_to_evaluate_is_said_clearly(trained: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        evaluate(trained, [])
    with pytest.raises(DataError, match="no text"):
        evaluate(trained, ["", ""])
    with pytest.raises(DataError, match="no such file"):
        evaluate(trained, tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"no text in it.*binary"):
        evaluate(trained, tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(DataError, match="no prepared corpus"):
        evaluate(trained, tmp_path)
    with pytest.raises(InputError, match="text 1 is int"):
        evaluate(trained, ["a", 1])  # type: ignore[list-item]
    with pytest.raises(InputError, match="UTF-8"):
        evaluate(trained, ["\ud800"])


def test_throughput_counts_what_it_writes(trained: Model) -> None:
    found = throughput(trained.network, prompt=500, tokens=5)
    assert (found.prompt, found.written) == (128, 5)  # the prompt fills at most half of the context
    assert throughput(trained.network, tokens=100, seconds=0.0).written == 1
    assert found.reading > 0 and found.writing > 0


def test_the_package_is_callable_and_lazy() -> None:
    package = importlib.import_module("armillary.evaluate")
    assert callable(package)
    code = "import armillary.evaluate, sys; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(armillary.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = package.nothing_here

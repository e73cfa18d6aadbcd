"""Damaged tokenizer configurations: each is read, or refused in one message that names the file and the key."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.base.errors import TokenizerError
from armillary.text import Tokenizer, TokenizerSettings, train_tokenizer
from armillary.text.declared import ENDS, LISTS, NAMED

BYTE = train_tokenizer(TokenizerSettings(kind="byte"), [])
WORDS = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n"
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FAULTS: dict[str, tuple[str, Any, str]] = {
    "no object": (CONFIG, [1], "expected a JSON object"),
    "text": (CONFIG, "a", "expected a JSON object"),
    "a role that is a number": (CONFIG, {"eos_token": 3}, "'eos_token' is 3"),
    "a role without content": (MAP, {"pad_token": {"id": 1}}, "'pad_token' is {'id': 1}"),
    "a role that is a list": (MAP, {"unk_token": ["[UNK]"]}, "'unk_token' is"),
    "half a character": (CONFIG, {"cls_token": "\ud800"}, "'cls_token' is"),
    "specials that are text": (CONFIG, {"additional_special_tokens": "<a>"}, "'additional_special_tokens' is '<a>'"),
    "specials that are numbers": (MAP, {"extra_special_tokens": [1]}, "'extra_special_tokens' is 1"),
    "added as a list": (CONFIG, {"added_tokens_decoder": ["a"]}, "'added_tokens_decoder' is"),
    "added by name": (CONFIG, {"added_tokens_decoder": {"a": {"content": "b"}}}, "'added_tokens_decoder' is 'a'"),
    "added below zero": (CONFIG, {"added_tokens_decoder": {"-1": {"content": "b"}}}, "is '-1'"),
    "added as text": (CONFIG, {"added_tokens_decoder": {"9": "b"}}, "'added_tokens_decoder.9' is 'b'"),
    "added without content": (CONFIG, {"added_tokens_decoder": {"9": {}}}, "'added_tokens_decoder.9' is {}"),
    "ids that are text": (ADDED, {"<a>": "9"}, "'<a>' is '9', expected an id"),
    "ids that are objects": (ADDED, {"<a>": {}}, "'<a>' is {}, expected an id"),
    "a flag that is text": (CONFIG, {"add_bos_token": "yes"}, "'add_bos_token' is 'yes', expected true or false"),
    "case as a number": (CONFIG, {"do_lower_case": 1}, "'do_lower_case' is 1"),
    "a class that is a number": (CONFIG, {"tokenizer_class": 4}, "'tokenizer_class' is 4"),
    "ends that are text": (CONFIG, {ENDS: ["</s>"]}, f"'{ENDS}' is"),
    "a template that is a number": (CONFIG, {"chat_template": 1}, "'chat_template' is 1"),
    "a template that is nought": (CONFIG, {"chat_template": 0}, "'chat_template' is 0"),
    "a template that is empty": (CONFIG, {"chat_template": {}}, "'chat_template' is {}"),
    "ends that are false": (CONFIG, {ENDS: False}, f"'{ENDS}' is False"),
    "templates without names": (CONFIG, {"chat_template": ["a"]}, "'chat_template' is ['a']"),
}


def _folder(folder: Path, older: bool) -> Path:
    if older:
        (folder / "vocab.txt").write_text(WORDS)
    else:
        BYTE.save(folder)
    return folder


@pytest.mark.parametrize("older", [False, True], ids=["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(tmp_path: Path, fault: str, older: bool) -> None:
    name, data, message = FAULTS[fault]
    (_folder(tmp_path, older) / name).write_text(json.dumps(data))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value) and f"{tmp_path / name}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"a": ' + "[" * 100_000, "nul", '{"a": ' + "9" * 5000 + "}", "\ufeff{}"])
@pytest.mark.parametrize("name", [CONFIG, MAP, ADDED])
def test_what_is_no_json_is_named(tmp_path: Path, name: str, text: str) -> None:
    (_folder(tmp_path, False) / name).write_text(text)
    with pytest.raises(TokenizerError, match="not valid JSON") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "needed"),
    [({"tokenizer_class": "BertTokenizer"}, "vocab.txt"), ({"tokenizer_class": "GPT2TokenizerFast"}, "merges.txt")],
)
def test_a_vocabulary_that_is_missing(tmp_path: Path, given: dict[str, Any], needed: str) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(given))
    with pytest.raises(TokenizerError, match=needed):
        Tokenizer.load(tmp_path)


KEYS = (
    *NAMED,
    *LISTS,
    ENDS,
    "added_tokens_decoder",
    "chat_template",
    "tokenizer_class",
    "add_bos_token",
    "strip_accents",
)
TOKEN = st.sampled_from(["[UNK]", "a", "<|end|>", "<new>", "", "261", "7", "-1", "content", "BertTokenizer", "\udc80"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TOKEN | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TOKEN, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(data=st.data(), older=st.booleans(), name=st.sampled_from([CONFIG, MAP, ADDED]))
def test_anything_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, older: bool, name: str
) -> None:
    folder = _folder(tmp_path_factory.mktemp("odd"), older)
    keys = TOKEN if name == ADDED else st.sampled_from(KEYS)
    (folder / name).write_text(json.dumps(data.draw(st.dictionaries(keys, VALUES, max_size=3))))
    tokenizer = _loaded(folder)
    if isinstance(tokenizer, str):
        assert str(folder) in tokenizer
        return
    with contextlib.suppress(TokenizerError):  # a vocabulary without these letters
        tokenizer.decode(tokenizer.encode("a bc"))
    with contextlib.suppress(TokenizerError):  # no template, or a broken one
        tokenizer.chat([{"role": "user", "content": "a"}])
    tokenizer.save(folder)
    assert Tokenizer.load(folder).ends == tokenizer.ends


@settings(max_examples=100)
@given(data=st.data())
def test_broken_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = _folder(tmp_path_factory.mktemp("broken"), False)
    path = folder / data.draw(st.sampled_from([CONFIG, "tokenizer.json"]))
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        held[data.draw(st.integers(0, len(held) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(held[: data.draw(st.integers(0, len(held)))] if data.draw(st.booleans()) else held)
    tokenizer = _loaded(folder)
    if isinstance(tokenizer, str):
        assert str(folder) in tokenizer
        return
    with contextlib.suppress(TokenizerError):  # a vocabulary without these letters
        tokenizer.encode("a bc")


def _loaded(folder: Path) -> Tokenizer | str:
    """The tokenizer, or in what words it was refused."""
    try:
        return Tokenizer.load(folder)
    except TokenizerError as error:
        return str(error)

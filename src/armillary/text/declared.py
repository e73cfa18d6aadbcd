"""What tokenizer_config.json and the files beside it may say of a tokenizer: read and checked, key by key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armillary.base.errors import TokenizerError
from armillary.base.files import explained

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
ADDED, ENDS = "added_tokens_decoder", "end_token_ids"  # the latter is ours: the layout has it in a file of the model's
_FLAGS = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy"),
    *("strip_accents", "tokenize_chinese_chars"),
)


def read_declared(folder: Path) -> dict[str, Any]:
    """What the files of a folder say together, tokenizer_config.json before the older ones; raises TokenizerError
    naming the file and the key of what is damaged."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = _object(folder / name)
        check(found, str(folder / name))
        config |= {key: value for key, value in found.items() if value is not None}
    if added := _object(folder / "added_tokens.json"):
        for token, index in added.items():
            if type(index) is not int or index < 0 or not _sound(token):
                _wrong(token, index, "an id", str(folder / "added_tokens.json"))
        config[ADDED] = {
            **{str(index): {"content": token, "special": False} for token, index in added.items()},
            **config.get(ADDED, {}),
        }
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = text_of(folder / "chat_template.jinja")
    return config


def check(config: Mapping[str, Any], where: str | None = None) -> None:
    """Raises TokenizerError that names the key with a value of another kind than it must have."""
    for key in NAMED:
        if config.get(key) is not None and name_of(config[key]) is None:
            _wrong(key, config[key], "a token, as text or as an object with 'content'", where)
    for key in LISTS:
        many = config.get(key)
        if many is None:
            continue
        if not isinstance(many, (list, Mapping)):
            _wrong(key, many, "a list of tokens", where)
        for token in many.values() if isinstance(many, Mapping) else many:
            if name_of(token) is None:
                _wrong(key, token, "a list of tokens", where)
    added = config.get(ADDED)
    if added is not None and not isinstance(added, Mapping):
        _wrong(ADDED, added, "tokens by id", where)
    for index, token in (added or {}).items():
        if not (isinstance(index, str) and index.isascii() and index.isdigit()):
            _wrong(ADDED, index, "tokens by id", where)
        if not isinstance(token, Mapping) or name_of(token) is None:
            _wrong(f"{ADDED}.{index}", token, "an object with 'content'", where)
    for key in _FLAGS:
        if config.get(key) is not None and type(config[key]) is not bool:
            _wrong(key, config[key], "true or false", where)
    if config.get("tokenizer_class") is not None and not _sound(config["tokenizer_class"]):
        _wrong("tokenizer_class", config["tokenizer_class"], "a name", where)
    ids = config.get(ENDS)
    ids = [] if ids is None else ids
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
        _wrong(ENDS, ids, "a list of ids", where)
    template = config.get("chat_template")
    alone = {"name": "default", "template": "" if template is None else template}
    named = template if isinstance(template, list) else [alone]
    for one in named:
        if not (isinstance(one, Mapping) and _sound(one.get("name")) and _sound(one.get("template"))):
            _wrong("chat_template", template, "text, or a list of objects with 'name' and 'template'", where)


def name_of(token: Any) -> str | None:
    """The text of a token that a configuration writes as a string or as an object; None for anything else."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if _sound(token) else None


def text_of(file: Path) -> str:
    """What a file of text holds, each end of a line as \\n."""
    try:
        with explained("reading", file):
            return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"not UTF-8 text: {error}", where=str(file)) from None
    except FileNotFoundError:
        raise TokenizerError("there is no such file", where=str(file)) from None


def json_of(file: Path) -> Any:
    """What a file of JSON holds."""
    try:
        return json.loads(text_of(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"not valid JSON: {error}", where=str(file)) from None


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one when there is no such file."""
    if not file.is_file():
        return {}
    found = json_of(file)
    if not isinstance(found, dict):
        raise TokenizerError("expected a JSON object", where=str(file))
    return found


def _sound(value: Any) -> bool:
    """Whether it is text that UTF-8 can hold."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _wrong(key: str, value: Any, expected: str, where: str | None) -> None:
    said = ascii(value)
    said = said if len(said) <= 80 else f"{said[:77]}…"
    raise TokenizerError(f"{key if _sound(key) else ascii(key)!r} is {said}, expected {expected}", where=where)

"""Chat templates: conversations to text, rendered in a sandbox as `transformers` renders them.

Templates come with models and are not trusted: they cannot reach Python's internals, change what
they are given, or see anything but plain data.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from armillary.base.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

ROLES = ("system", "user", "assistant")
# Control tokens alone stand between the messages, so that ids can be put together message by message.
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{%- elif message['content'] is not string -%}"
    "{{ raise_exception('the content of a message should be text') }}"
    "{%- endif -%}"
    "{{ '<|' ~ message['role'] ~ '|>' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] ~ '<|end|>' }}{% endgeneration %}"
    "{%- else -%}"
    "{{ message['content'] ~ '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
_PRIVATE = range(0xE000, 0xF900)  # code points that no standard gives a meaning


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    generate: bool,
    special: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The conversation as text; special: names such as bos_token that the template may use; tools: what
    it is told of them (see `tools.speaks`).

    Raises TokenizerError for a broken template, a role that it refuses, or a message without role.
    """
    data = plain_messages(messages)
    compiled = compile_template(template)
    try:
        return compiled.render(
            messages=data,
            tools=_plain(tools, 0) if tools else None,
            documents=None,
            add_generation_prompt=generate,
            **(special or {}),
        )
    except Exception as error:  # a template can fail in any way that Python can
        raise _explained(error) from None


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as plain data; keys whose value is None are left out, as `transformers` does."""
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"message {index} has no role", hint='write {"role": "user", "content": "…"}')
        found.append({key: _plain(value, index) for key, value in message.items() if value is not None})
    return found


def broken(messages: Sequence[Mapping[str, Any]], tokens: Iterable[str], template: str) -> tuple[list[Any], str]:
    """The messages with a mark behind every letter of the `tokens` typed inside them, and the mark.

    A rendered text that is split at the mark holds none of these tokens but the template's own,
    however the template cut and moved what the messages say. Raises TokenizerError for a token of
    one letter, which cannot be broken.
    """
    data = plain_messages(messages)
    present = {*json.dumps(data, ensure_ascii=False), *template}
    mark = next(chr(code) for code in _PRIVATE if chr(code) not in present)
    any_token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def split(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise TokenizerError(f"the special token {found[0]!r} cannot be kept apart from text in messages")
        return "".join(letter + mark for letter in found[0])

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return any_token.sub(split, value)
        if isinstance(value, list):
            return [walk(item) for item in value]
        return {key: walk(item) for key, item in value.items()} if isinstance(value, dict) else value

    return [walk(message) for message in data], mark


@functools.lru_cache(maxsize=64)
def compile_template(template: str) -> Template:
    """The template, ready to render. Raises TokenizerError with the line of a mistake."""
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template is broken: {error.message}", where=f"line {error.lineno}") from None
    except Exception as error:  # constant expressions are computed while compiling
        raise _explained(error) from None


@functools.cache
def _environment() -> Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}` marks the model's own words; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 - the name and form that jinja2 asks for

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _explained(error: Exception) -> TokenizerError:
    from jinja2.exceptions import SecurityError

    if isinstance(error, SecurityError):
        return TokenizerError(f"the chat template tries what is not allowed: {error}")
    return TokenizerError(f"the chat template refuses this conversation: {error}")


def _plain(value: Any, index: int) -> Any:
    """Text, numbers, lists and mappings only: objects would bring methods that no sandbox knows."""
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, index) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, index) for item in value]
    raise TokenizerError(
        f"message {index} holds a {type(value).__name__}", hint="use text, numbers, lists and mappings"
    )


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

"""Chat templates: conversations to text, rendered in a sandbox.

Templates come with models and are not trusted: they can neither reach Python's internals nor loop
without end over what they were not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from armillary.base.errors import TokenizerError

ROLES = ("system", "user", "assistant")
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{%- endif -%}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    generate: bool,
    special: Mapping[str, str] | None = None,
) -> str:
    """The conversation as text; special: names such as bos_token that the template may use.

    Raises TokenizerError for a broken template, a role that it refuses, or a message without role and content.
    """
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise TokenizerError(f"message {index} has no role", hint='write {"role": "user", "content": "…"}')
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=generate, **(special or {}))
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template is broken: {error.message}", where=f"line {error.lineno}") from None
    except SecurityError as error:
        raise TokenizerError(f"the chat template tries what is not allowed: {error}") from None
    except (TemplateError, TypeError, OverflowError) as error:
        raise TokenizerError(f"the chat template refuses this conversation: {error}") from None


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)

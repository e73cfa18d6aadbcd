"""How a conversation speaks of tools: what the model is told of them, and the form of its calls.

Calls have one form, Hermes' (NousResearch 2024, as Qwen and others took it over): a line `<tool_call>`,
a line of JSON with name and arguments, a line `</tool_call>`. A template that speaks this form is given
the tools as they are. Any other is told in words that it understands: the tools stand in the system's
message, calls and their results in the text of messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD, MIDDLE, TAIL = OPEN + '\n{"name": "', '", "arguments": ', "}\n" + CLOSE
RESULT, RESULT_END = "<tool_response>\n", "\n</tool_response>"
BETWEEN = "\n"  # from one call to the next


def speaks(template: str) -> bool:
    """Whether a chat template takes tools and writes calls in our form."""
    return "tools" in template and OPEN in template and "<function" not in template


def call_text(name: str, arguments: Any) -> str:
    """A call as a model writes it; arguments: a mapping, or JSON already."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{HEAD}{name}{MIDDLE}{written}{TAIL}"


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The conversation with its tools, calls and results as words of system, assistant and user."""
    found: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if message.get("role") == "assistant" and message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            parts = [content] if content else []
            parts += [call_text(call["name"], call["arguments"]) for call in calls]
            found.append({"role": "assistant", "content": BETWEEN.join(parts)})
        elif message.get("role") == "tool":
            result = f"{RESULT}{content}{RESULT_END}"
            if found and found[-1].get("results"):  # the results of one turn are one message
                found[-1]["content"] += "\n" + result
            else:
                found.append({"role": "user", "content": result, "results": True})
        else:
            found.append(dict(message))
    for message in found:
        message.pop("results", None)
    if tools:
        first = found[0].get("content") if found and found[0]["role"] == "system" else None
        words = _words(tools)
        if isinstance(first, str):
            found[0]["content"] = f"{first}\n\n{words}" if first else words
        else:
            found.insert(0, {"role": "system", "content": words})
    return found


def _words(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return (
        f"These tools can be called:\n{lines}\n"
        f"A call is written like this, and its result comes back in {RESULT.strip()}:\n"
        + call_text("NAME", '{"PARAMETER": "VALUE"}')
    )

"""Conversations among the records of a file or data set, written as text by the model's own chat template.

Read are the formats that trainers read: `messages` (OpenAI, TRL), `conversations` with `from` and `value` (ShareGPT), a
`prompt` with its `completion` or its `chosen` answer (TRL; the rejected answer is passed over), `instruction`, `input`
and `output` (Alpaca). `tools` and `system` beside them are handed on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["FIELDS", "Chat", "as_messages", "chat_of", "render"]

FIELDS = (
    "messages", "conversations", "conversation", "prompt", "chosen", "completion", "instruction", "input", "output",
    "system", "tools",
)  # fmt: skip
"""Of a record, all that a conversation is read from."""

_WHOLE = ("messages", "conversations", "conversation")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
_OPENING = ("system", "developer", "user", "human")


class Chat(NamedTuple):
    """Messages as a chat template takes them, and the tools that are on offer."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def chat_of(record: Mapping[str, Any]) -> Chat | str | None:
    """The conversation that a record holds, empty where its field is; a prompt with its answer in plain strings as one text.

    Raises:
        ValueError: a message without a role, or with something else than text.
    """
    lists = [as_messages(record[name]) for name in _WHOLE if name in record]
    for messages in filter(None, lists):
        return Chat(_led(record, messages), _tools(record))
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        given = [record[name] for name in ("instruction", "input") if isinstance(record.get(name), str)]
        asked = {"role": "user", "content": "\n\n".join(filter(None, given))}
        pair = [asked, {"role": "assistant", "content": record["output"]}]
        return Chat(_led(record, pair), _tools(record))
    return _answered(record) or (Chat([]) if [] in lists else None)


def _answered(record: Mapping[str, Any]) -> Chat | str | None:
    """A prompt with its answer, or alone where it is a list of messages."""
    answer = next((record[name] for name in ("chosen", "completion") if name in record), None)
    prompt = record.get("prompt")
    if isinstance(answer, str) and (prompt is None or isinstance(prompt, str)):
        return (prompt or "") + answer
    asked, answered = (_spoken(value, role) for value, role in ((prompt, "user"), (answer, "assistant")))
    if not answered and isinstance(prompt, str):
        return None  # a column of strings: text, where it is named as such
    if answered and answered[0]["role"] in _OPENING:
        asked = []  # the answer repeats the prompt
    return Chat(_led(record, asked + answered), _tools(record)) if asked or answered else None


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """A list of messages with `role` and `content`, from any spelling of one; None where `value` is none.

    Raises:
        ValueError: a message without a role, or with something else than text.
    """
    if isinstance(value, Mapping) and value and all(isinstance(each, list) for each in value.values()):
        value = [
            dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)
        ]  # struct of lists
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        return None
    return [_message(one) for one in value]


def _spoken(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else as_messages(value) or []


def _message(one: Mapping[str, Any]) -> dict[str, Any]:
    """A message without nulls, which Arrow puts where another message has a field, and its text in one piece."""
    role = one.get("role") or one.get("from")
    if not isinstance(role, str):
        raise ValueError(f"a message has no role (its fields: {', '.join(sorted(map(str, one)))})")  # noqa: TRY004
    rest = {name: _without_nulls(each) for name, each in one.items() if each is not None}
    content = rest.pop("content", rest.pop("value", ""))
    message = rest | {"role": _ROLES.get(role, role), "content": _joined(content, role)}
    message.pop("from", None)
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return message


def _joined(content: Any, role: str) -> str:
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "dict") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a message of the role {role!r} holds something else than text ({kind})")  # noqa: TRY004
        texts.append(text)
    return "".join(texts)


def _call(call: Any) -> Any:
    """A tool call whose arguments are a dict, as templates expect; OpenAI's are JSON in a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _led(record: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the record's own system message, where that is beside them."""
    system = record.get("system")
    if not isinstance(system, str) or not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("its field 'tools' is no JSON") from None
    return _without_nulls(tools) if isinstance(tools, list) and tools else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def render(chat: Chat, tokenizer: Any) -> str:
    """The conversation as the model's chat template writes it, with every special token, and no answer begun.

    Raises:
        ValueError: the template refuses the conversation.
    """
    from jinja2 import TemplateError  # torch depends on it

    try:
        return tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the model's chat template refuses it ({reason})") from error

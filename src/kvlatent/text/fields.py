"""Take the text out of a record of JSON, Parquet or a data set: a field's text, or a conversation written as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvlatent.text.chat import Chat, as_messages, chat_of, render

__all__ = ["Document", "documents"]


class Document(NamedTuple):
    """A text; `is_rendered` where a chat template wrote it, with the special tokens that begin and end it."""

    text: str
    is_rendered: bool = False


def documents(
    records: Iterator[tuple[int, Any]], name: str, text_field: str, tokenizer: Any
) -> Iterator[Document]:
    """Yield the text of numbered records; a record without any (null, or no messages) is passed over.

    The field `text_field` comes first; where a record lacks it, or it is null, conversations are looked for.

    Args:
        name: of the source, for what is refused.
        text_field: holds text, or a list of messages.
        tokenizer: has the chat template; None where conversations cannot be read.

    Raises:
        ValueError: a record with neither, text that is not Unicode, or a conversation that no template writes.
    """
    for number, record in records:
        found = _content(record, text_field, f"record {number} of {name}")
        if isinstance(found, Chat):
            found = _rendered(found, tokenizer, f"record {number} of {name}")
        if found is not None and found.text:
            _check_unicode(found.text, number, name)
            yield found


def _content(record: Any, text_field: str, where: str) -> Document | Chat | None:
    """What a record holds; None for nothing."""
    if isinstance(record, list) and record and all(isinstance(one, Mapping) for one in record):
        record = {"messages": record}  # a line that is a list of messages
    if not isinstance(record, Mapping):
        raise ValueError(  # noqa: TRY004 - a mistake in a file, not in a call
            f"every record needs the field {text_field!r}: {where} has {type(record).__name__}; write each as an "
            "object with a field of text"
        )
    value = record.get(text_field)
    if isinstance(value, str) and value:
        return Document(value)
    try:
        found = chat_of(record) if not value else _named(value)
    except ValueError as error:
        raise ValueError(f"{where} is no conversation: {error}; repair or remove it") from None
    if isinstance(found, str):
        return Document(found)
    if found is not None:
        return found if found.messages else None
    if text_field not in record:
        names = ", ".join(sorted(map(str, record)))
        raise ValueError(
            f"every record needs the field {text_field!r}: {where} has {names}; {_advice(record)}"
        )
    if value in (None, "", []):
        return None
    raise ValueError(
        f"the field {text_field!r} must hold text: {where} holds a {type(value).__name__}; {_advice(record)}"
    )


def _named(value: Any) -> Chat | None:
    """The conversation in the field that was named as the text's; None where it holds something else."""
    messages = as_messages(value) if isinstance(value, (list, Mapping)) else None
    return None if messages is None else Chat(messages)


def _rendered(chat: Chat, tokenizer: Any, where: str) -> Document:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{where} is a conversation, and the model's tokenizer has no chat template to write it with; put a template "
            "into the model's directory as chat_template.jinja, or give the conversations as text"
        )
    try:
        return Document(render(chat, tokenizer), True)
    except ValueError as error:
        raise ValueError(f"{where} cannot be written as text: {error}; repair or remove it") from error


def _advice(record: Mapping[str, Any]) -> str:
    """Name the option that reads another field: one of messages, else the longest text."""
    talks = [name for name, value in record.items() if value and _is_talk(value)]
    strings = {name: value for name, value in record.items() if isinstance(value, str) and value.strip()}
    best = next(iter(talks or sorted(strings, key=lambda name: -len(strings[name]))), None)
    if best is None:
        return "write the text of each record into a field of its own"
    name = shlex.quote(str(best))
    return f"name the field to read, e.g. --set data.text_field={name} (kvlatent eval: --text-field {name})"


def _is_talk(value: Any) -> bool:
    try:
        return _named(value) is not None
    except ValueError:
        return False


def _check_unicode(text: str, number: int, name: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"record {number} of {name} is not valid Unicode (half a surrogate pair, character {error.start + 1}); "
            "repair or remove it"
        ) from error

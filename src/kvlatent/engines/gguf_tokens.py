"""A checkpoint's tokenizer as llama.cpp reads it, so that a GGUF file chats: tokens, merges, types, names, template.

llama.cpp splits text by rules of its own, chosen by name. A tokenizer whose rules have no name there is refused, and what was
written is asked for the ids of hard strings before it counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from kvlatent.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer

__all__ = ["Vocabulary", "add_vocabulary", "read_vocabulary"]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", True)  # GPT-2's own expression
_PLAIN_BYTES = ("ByteLevel", False)
_SPLITTING = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", _WORDS % ""), _PLAIN_BYTES): "qwen2",
    (("Split", _WORDS % "{1,3}"), _PLAIN_BYTES): "llama-bpe",
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_NEVER = -1e6  # score of a token that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Args:
        model: "gpt2" (byte-level BPE) or "llama" (sentencepiece).
        splitting: llama.cpp's name for how text is split before merging.
        tokens, types, scores: one a row of the embedding; scores for "llama" alone.
        merges: for "gpt2" alone.
        special: ids by name ("bos", "eos", "unk", "pad").
        adds: whether "bos" and "eos" are put around a text.
        adds_space: whether a text gets a space in front.
        composes: letters with combining marks are composed first (NFC), which llama.cpp does not do.
        template: of a chat, one or several by name; None: the model does not chat.
    """

    model: str
    splitting: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    adds: dict[str, bool]
    adds_space: bool = False
    composes: bool = False
    template: Any = field(default=None)


def read_vocabulary(source: Path, config: Any) -> Vocabulary:
    """The tokenizer of a checkpoint for a GGUF file.

    Raises:
        ValueError: there is none; or it is of a kind that llama.cpp does not know, was never trained, or knows more tokens
            than the embedding has rows.
        FileNotFoundError: it does not load.
    """
    if not has_tokenizer(source):
        raise ValueError(
            f"a GGUF file carries its tokenizer, and {source} has none; put the original's tokenizer files beside the weights"
        )
    tokenizer = load_tokenizer(source, config)
    state = _state_of(tokenizer, source)
    model, is_bytes = state["model"], _splits_into_bytes(state)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"a GGUF file has one token a row of the embedding: got {len(tokenizer)} tokens and {config.vocab_size} rows; "
            "resize the embedding of the original before it is converted"
        )
    merges = [merge if isinstance(merge, str) else _merge(merge) for merge in model["merges"]]
    tokens, types = _tokens(tokenizer, state, config.vocab_size)
    plain, marked = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    special = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    return Vocabulary(
        model="gpt2" if is_bytes else "llama",
        splitting=_splitting(state, source) if is_bytes else "default",
        tokens=tokens,
        types=types,
        scores=[] if is_bytes else _scores(tokens, model["merges"]),
        merges=merges if is_bytes else [],
        special=special,
        adds={
            "bos": len(marked) > len(plain) and marked[0] == special.get("bos"),
            "eos": len(marked) > len(plain) and marked[-1] == special.get("eos"),
        },
        adds_space=not is_bytes
        and _SPACE in json.dumps(state.get("normalizer") or state.get("pre_tokenizer"), ensure_ascii=False),
        composes=state.get("normalizer") == {"type": "NFC"},
        template=tokenizer.chat_template,
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write it into the metadata of a GGUF file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for name, is_added in vocabulary.adds.items():
        getattr(writer, f"add_add_{name}_token")(is_added)
    if (template := vocabulary.template) is not None:
        named = isinstance(template, dict)
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()] if named else template
        )


def _state_of(tokenizer: Any, source: Path) -> dict[str, Any]:
    """The tokenizer's inside, known to be a trained BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the tokenizer of {source} is {type(tokenizer).__name__}, which is not of the tokenizers library; save it as a "
            "tokenizer.json first"
        )
    state = json.loads(backend.to_str())
    kind = state["model"].get("type", "BPE")
    if kind != "BPE":
        raise ValueError(
            f"llama.cpp reads tokenizers that merge pairs (BPE): the one of {source} is a {kind}; export with --to stock or "
            "--to openvino instead"
        )
    if not state["model"]["merges"]:
        raise ValueError(
            f"the tokenizer of {source} was never trained: it has {len(state['model']['vocab'])} tokens and 0 merges; put the "
            "original's tokenizer files beside the weights"
        )
    return state


def _parts(state: dict[str, Any], name: str, inside: str) -> list[dict[str, Any]]:
    """The steps of a part of the pipeline, one after the other."""
    part = state.get(name)
    return [] if part is None else part.get(inside, [part])


def _splits_into_bytes(state: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _parts(state, "pre_tokenizer", "pretokenizers"))


def _splitting(state: dict[str, Any], source: Path) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    steps = []
    for step in _parts(state, "pre_tokenizer", "pretokenizers"):
        says = {"ByteLevel": "use_regex", "Digits": "individual_digits"}.get(step["type"])
        pattern = (step.get("pattern") or {}).get("Regex")
        steps.append((step["type"], step.get(says, True) if says else pattern))
    name = _SPLITTING.get(tuple(steps))
    if name is None or state.get("normalizer") not in (None, {"type": "NFC"}):
        kinds = " + ".join(kind for kind, _ in steps)
        raise ValueError(
            f"the tokenizer of {source} splits text in a way ({kinds}) that has no name in llama.cpp among those we know "
            f"({', '.join(_SPLITTING.values())}); export with --to stock or --to openvino instead"
        )
    return name


def _tokens(tokenizer: Any, state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of the token of every row of the embedding."""
    added = {token["id"]: token for token in state["added_tokens"]}
    known = {number: text for text, number in tokenizer.get_vocab().items()}
    unknown = state["model"].get("unk_token")
    tokens, types = [], []
    for row in range(rows):
        text = known.get(row, f"[PAD{row}]")
        if row not in known:
            kind = TokenType.UNUSED
        elif text == unknown:
            kind = TokenType.UNKNOWN
        elif row in added:
            kind = TokenType.CONTROL if added[row]["special"] else TokenType.USER_DEFINED
        else:
            kind = TokenType.BYTE if _BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """sentencepiece's scores, from the order of the merges that make the tokens: what merges first scores highest."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), number)
    return [-float(rank[token]) if token in rank else _NEVER for token in tokens]


def _merge(pair: list[str]) -> str:
    """A merge in the file's form, in which a space inside a token is written as llama.cpp's own converter does."""
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)

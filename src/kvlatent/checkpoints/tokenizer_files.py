"""A checkpoint's tokenizer: loaded with what is wrong named, and written so that it makes the same ids.

A tokenizer that nobody changed is carried over file by file: saving it anew would rewrite its class to one that older
transformers do not know, and add what its files never said. What was written is loaded again from beside the config it
will be found with, and must encode hard strings as the source does, since upstream chooses the class by both.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvlatent.checkpoints.gguf_files import open_gguf
from kvlatent.checkpoints.weight_files import first_line
from kvlatent.jobs.fingerprints import tokenizer_state

__all__ = ["HARD_STRINGS", "has_tokenizer", "load_tokenizer", "write_tokenizer"]

_CONFIG = "tokenizer_config.json"
_FILES = (
    *("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
_LOADING_FAILS = (
    Exception  # the tokenizers library raises bare ones, transformers whatever a wrong field leads to
)
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
_PLAIN_CLASS = "PreTrainedTokenizerFast"  # what 5.x calls TokenizersBackend and 4.x knows
HARD_STRINGS = (
    "The cat, and 'the dog'.",
    "  two spaces  inside\tand\n\n\nlines \r\n ",
    "naïve café 東京 🙂 e\u0301 \u00a0",
    "0123456789 1,000.50 x**2 != y//3",
    "<s> </s> <unk> <pad> <|endoftext|> [INST] <|im_start|>user",
)


def load_tokenizer(path_or_id: str | Path, config: Any) -> Any:
    """Load a tokenizer, a GGUF file's own where that is the model; warn where it knows tokens that the embedding lacks.

    Raises:
        FileNotFoundError: there is none, or none that loads; where a package is missing, the sentence names it.
    """
    gguf = open_gguf(path_or_id)
    place, more = str(path_or_id), {}
    if gguf is not None:
        place, name = gguf.loading()
        more = {"gguf_file": name}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **more)
    except _LOADING_FAILS as error:
        lacking = _lacking_packages(str(path_or_id))
        if lacking:
            raise FileNotFoundError(
                f"{path_or_id} has a sentencepiece tokenizer only (no tokenizer.json), and {' and '.join(lacking)} "
                f"{'is' if len(lacking) == 1 else 'are'} not installed; pip install {' '.join(lacking)}"
            ) from error
        raise FileNotFoundError(f"{path_or_id} has no tokenizer that loads: {first_line(error)}") from error
    if gguf is not None:
        tokenizer = _without_tokens_from(gguf.num_tokens, tokenizer)
        tokenizer.name_or_path = str(gguf.path)  # not its directory, whose files may be another tokenizer's
    if len(tokenizer) > config.vocab_size:
        warnings.warn(
            f"the tokenizer knows {len(tokenizer)} tokens and the embedding has {config.vocab_size} rows: a text that "
            "makes one of the others will be refused",
            stacklevel=1,
        )
    return tokenizer


def _without_tokens_from(number: int, tokenizer: Any) -> Any:
    """The tokenizer without added tokens from an id on: transformers gives every GPT-2 vocabulary an <|endoftext|>."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < number]
    if len(kept) == len(state["added_tokens"]):
        return tokenizer
    backend = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept}))
    special = tokenizer.special_tokens_map
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's directory holds a tokenizer of any kind."""
    return any(_files_in(folder))


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer beside the config in `folder`: the source's own files where nothing was changed.

    Its configuration gets the class where the source names none or upstream would choose another one here; a tokenizer
    that was changed is saved anew.

    Raises:
        ValueError: what was written does not encode as the tokenizer does.
    """
    source = _unchanged_source(tokenizer)
    if source is not None:
        for file in _files_in(source):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        if _says_its_class(folder) and _encodes_alike(tokenizer, folder):
            return
        _name_class(tokenizer, folder)
        if _encodes_alike(tokenizer, folder):
            return
    tokenizer.save_pretrained(folder)
    _name_class(tokenizer, folder)
    if not _encodes_alike(tokenizer, folder):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} gives other ids once saved with transformers' own "
            f"save_pretrained ({type(tokenizer).__name__}); save without it and copy its files beside the weights"
        )


def _unchanged_source(tokenizer: Any) -> Path | None:
    """Local directory of the files that the tokenizer was loaded from, or None where it has changed since."""
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    folder = _local_folder(name)
    if folder is None or not any(_files_in(folder)):
        return None
    try:
        fresh = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except _LOADING_FAILS:  # the files have changed or gone since
        return None
    return folder if _state(fresh) == _state(tokenizer) else None


def _local_folder(name: str) -> Path | None:
    """The directory of a local checkpoint, or of a hub id's tokenizer files in the cache."""
    if not name or Path(name).is_file():
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError):  # no such id, no network and not in the cache
        return None


def _files_in(folder: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from sorted(file for file in folder.glob(pattern) if file.is_file())


def _lacking_packages(name: str) -> list[str]:
    """Packages without which a checkpoint's tokenizer, a sentencepiece model alone, cannot be read."""
    folder = _local_folder(name)
    if folder is None or (folder / "tokenizer.json").is_file() or not any(folder.glob("*.model")):
        return []
    return [package for module, package in _SENTENCEPIECE.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def _state(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer is, without what its last call left behind."""
    names = ("special_tokens_map", "chat_template", "model_max_length", "padding_side", "truncation_side")
    return {
        "inside": tokenizer_state(tokenizer),
        "class": type(tokenizer),
        **{name: getattr(tokenizer, name, None) for name in names},
    }


def _says_its_class(folder: Path) -> bool:
    """Whether the tokenizer's own config says how it is loaded, so that no loader asks the model's config."""
    settings = _settings(folder)
    return bool(settings.get("tokenizer_class")) and "auto_map" not in settings


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _name_class(tokenizer: Any, folder: Path) -> None:
    """Write the class that the tokenizer was loaded as into its config, by the name that every release knows."""
    name = type(tokenizer).__name__
    settings = _settings(folder) | {"tokenizer_class": _PLAIN_CLASS if name == "TokenizersBackend" else name}
    settings.pop("auto_map", None)
    (folder / _CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _encodes_alike(tokenizer: Any, folder: Path) -> bool:
    """Whether what lies in `folder` makes the ids of `tokenizer`, with and without its special tokens, and back."""
    try:
        written: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _LOADING_FAILS:
        return False
    strings = [*HARD_STRINGS, " ".join(map(str, tokenizer.all_special_tokens))]
    for special in (True, False):
        wanted, found = (
            [each(text, add_special_tokens=special, verbose=False)["input_ids"] for text in strings]
            for each in (tokenizer, written)
        )
        if wanted != found or [written.decode(ids) for ids in found] != [
            tokenizer.decode(ids) for ids in wanted
        ]:
            return False
    return written.chat_template == tokenizer.chat_template and len(written) == len(tokenizer)

"""A teacher that is not in memory: the original's likeliest tokens at every position of the training text, on disk.

Why: a large original costs a forward pass a step, and its weights, for as long as a stage trains; what it says of a text
never changes. A store holds, for every position of the packed blocks, the log-probabilities of the k likeliest tokens in
float16, their ids, and in float32 what all others share. `teacher.json` says which tokenizer, text, blocks and original
they are of, and a stage is refused that trains on anything else.

T positions of a block, k tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvlatent.jobs.atomic import read_json, write_atomically
from kvlatent.jobs.fingerprints import blocks_fingerprint, differences, tokenizer_fingerprint
from kvlatent.jobs.recipe import Recipe
from kvlatent.jobs.record import Provenance, Result, complaint
from kvlatent.model.divergences import TopTokens
from kvlatent.model.families import head_dim_of, key_value_heads_of
from kvlatent.text.tokenise import frame_of
from kvlatent.training.placement import SAME, check_teacher

__all__ = [
    "RECORD",
    "StoreRecord",
    "TaughtBlocks",
    "TeacherStore",
    "check_takes_store",
    "facts_of",
    "is_store",
    "row_bytes",
    "write_shard",
]

RECORD = "teacher.json"
_ANEW = "make the store again with kvlatent teach"
_SMALL_IDS = 1 << 16  # of a vocabulary, whose ids then take two bytes


class Shard(Result):
    """One file of a store: whole blocks, in their order; by its hash, `teacher.json` identifies the whole store."""

    file: str
    blocks: int = Field(ge=1)
    bytes: int
    sha256: str


class StoreRecord(Provenance):
    """`teacher.json`.

    `text_blocks` are those of the whole training part, of which the first `blocks` are stored; `original` are the facts
    of `facts_of`; `data` is the recipe's section, as the blocks depend on it and on `seed`.
    """

    kind: Literal["teacher-store"]
    format: Literal[1]
    fingerprint: str
    top_k: int = Field(ge=1)
    temperature: float = Field(gt=0)
    block_size: int
    blocks: int
    text_blocks: int
    bytes_per_token: int
    blocks_fingerprint: str
    tokenizer: str
    seed: int
    data: dict[str, Any]
    original: dict[str, Any]
    sha256: dict[str, str | None]
    shards: list[Shard]


def is_store(path: str | Path | None) -> bool:
    """Whether there is a store at that place, be it whole or damaged."""
    return path is not None and (Path(path) / RECORD).is_file()


def check_takes_store(stage: int) -> None:
    """Raise `ValueError` for a stage that looks at more of the original than its logits."""
    if stage == 1:
        raise ValueError(
            "stage I compares layers, and a teacher store holds logits alone: got one for stage 1; pass the original as the "
            "teacher"
        )


def facts_of(config: Any) -> dict[str, Any]:
    """What of an original's config says whether a student can be its own."""
    names = ("model_type", *SAME)
    heads = {"num_key_value_heads": key_value_heads_of(config), "head_dim": head_dim_of(config)}
    return {name: getattr(config, name) for name in names} | heads


def row_bytes(count: int, vocabulary: int) -> int:
    """Bytes a token: ids, log-probabilities, the rest."""
    return count * ((2 if vocabulary <= _SMALL_IDS else 4) + 2) + 4


def write_shard(path: Path, found: TopTokens, vocabulary: int) -> None:
    """Write blocks of likeliest tokens ([blocks, T, k] and [blocks, T, k + 1]) in one atomic file."""
    ids = found.ids.to(torch.uint16 if vocabulary <= _SMALL_IDS else torch.int32)
    top, rest = found.log_shares[..., :-1], found.log_shares[..., -1]
    least = torch.finfo(torch.float16).min
    tensors = {"ids": ids, "top": top.clamp(min=least).half(), "rest": rest.float()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(tensors, file))


class TeacherStore:
    """A store that is read, its files there and as long as they were written.

    Args:
        path: its directory.

    Raises:
        ValueError: it is damaged, or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        document = read_json(self.path / RECORD, _ANEW)
        try:
            self.record = StoreRecord.model_validate(document)
        except ValidationError as error:
            raise ValueError(f"{self.path / RECORD} is damaged ({complaint(error)}); {_ANEW}") from error
        for shard in self.record.shards:
            file = self.path / shard.file
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise ValueError(f"the store {self.path} is damaged: {shard.file} is missing or cut; {_ANEW}")
        stored = sum(shard.blocks for shard in self.record.shards)
        if stored != self.record.blocks:
            raise ValueError(
                f"the store {self.path} is damaged: it is said to hold {self.record.blocks} blocks and holds {stored}; {_ANEW}"
            )

    @property
    def tokens(self) -> int:
        """That are stored."""
        return self.record.blocks * self.record.block_size

    def check(self, student: Any, tokenizer: Any, recipe: Recipe, sha256: Mapping[str, str | None]) -> None:
        """Raise `ValueError` unless stage II of this recipe can be trained from the store.

        Args:
            student: config of the model that is trained; tokenizer: its own.
            recipe: resolved.
            sha256: what identifies the sources of the run, of which "data" is compared.
        """
        known, section = self.record, recipe.stage2
        check_teacher(student, SimpleNamespace(**known.original))
        if tokenizer_fingerprint(tokenizer, frame_of(tokenizer)) != known.tokenizer:
            raise ValueError(
                f"the teacher store {self.path} was made with another tokenizer than the model's, so its tokens are not the "
                f"model's; {_ANEW} from the original of this model"
            )
        if recipe.data.block_size != known.block_size:
            raise ValueError(
                f"a teacher store is of one block size: got data.block_size={recipe.data.block_size}, {self.path} has "
                f"{known.block_size}; pass --set data.block_size={known.block_size}, or {_ANEW}"
            )
        if section.temperature != known.temperature:
            raise ValueError(
                f"a teacher store is of one temperature: got stage2.temperature={section.temperature:g}, {self.path} has "
                f"{known.temperature:g}; pass --set stage2.temperature={known.temperature:g}, or {_ANEW}"
            )
        self._check_text(recipe, sha256)
        if known.blocks < known.text_blocks and section.tokens > self.tokens:
            raise ValueError(
                f"stage II wants more tokens than the teacher store {self.path} holds: got {section.tokens}, it has "
                f"{self.tokens} of the text's {known.text_blocks * known.block_size}; pass --set "
                f"stage2.tokens={self.tokens}, or call kvlatent teach with --tokens {section.tokens}"
            )

    def _check_text(self, recipe: Recipe, sha256: Mapping[str, str | None]) -> None:
        known = self.record
        if sha256["data"] != known.sha256["data"]:
            raise ValueError(
                f"the teacher store {self.path} is of another text: got {str(sha256['data'])[:12]}, it has "
                f"{str(known.sha256['data'])[:12]} (SHA-256); train on the text that it was made of, or {_ANEW}"
            )
        now = {"seed": recipe.seed, "data": recipe.data.model_dump(mode="json")}
        if changed := differences({"seed": known.seed, "data": known.data}, now):
            raise ValueError(
                f"the teacher store {self.path} was made with another {', '.join(changed)}, and the blocks depend on it; "
                f"train with the same, or {_ANEW}"
            )

    def join(self, blocks: Any) -> TaughtBlocks:
        """The blocks that are stored, each with what the original says there.

        Args:
            blocks: of the training text, as they were when the store was made.

        Raises:
            ValueError: they are not.
        """
        count = self.record.blocks
        kept = blocks.select(range(count)) if isinstance(blocks, Dataset) and count < len(blocks) else blocks
        if len(kept) < count or blocks_fingerprint(kept) != self.record.blocks_fingerprint:
            raise ValueError(
                f"the blocks of the text are not those that the teacher store {self.path} was made of (it has {count}, got "
                f"{len(kept)}); {_ANEW}"
            )
        return TaughtBlocks(kept, self)

    def rows(self, index: int) -> TopTokens:
        """Of one block: ids [T, k], and log-probabilities [T, k + 1] in fp32, which sum to 1 again behind the rounding.

        Raises:
            ValueError: its file is damaged.
        """
        for shard in self.record.shards:
            if index < shard.blocks:
                break
            index -= shard.blocks
        file = self.path / shard.file
        try:
            with safe_open(file, framework="pt") as read:
                ids, top, rest = (read.get_slice(name)[index] for name in ("ids", "top", "rest"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error}); {_ANEW}") from error
        log_shares = torch.cat([top.float(), rest.unsqueeze(-1)], dim=-1)
        return TopTokens(ids.long(), log_shares.log_softmax(-1))


class TaughtBlocks(torch.utils.data.Dataset):
    """Blocks to train on, with "teacher_ids" [T, k] and "teacher_log_shares" [T, k + 1]."""

    def __init__(self, blocks: Any, store: TeacherStore) -> None:
        self.blocks, self.store = blocks, store

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, log_shares = self.store.rows(index)
        return {**self.blocks[index], "teacher_ids": ids, "teacher_log_shares": log_shares}

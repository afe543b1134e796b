"""What all cells of `benchmarks/conversion.py` share: model, texts, statistics and the original's perplexity.

Everything here is made once and kept in the work folder, so that a killed run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import conversion_baselines as rules
import torch
from conversion_cells import Cell

import kvlatent
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.perplexity import Perplexity, perplexity
from kvlatent.jobs.atomic import write_text
from kvlatent.jobs.fingerprints import identity
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.statistics import Statistics
from kvlatent.text.corpus import evaluation_blocks, prepare
from kvlatent.text.standard_library import MODEL_PATH, stdlib_documents

COLUMNS = ("input_ids", "position_ids", "labels")


def source_hash() -> str:
    """Of the library's code, so that figures of different versions are not taken for one run's."""
    folder = Path(kvlatent.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Setting:
    """Model and texts of one results folder.

    Args:
        args: the parsed command line of `conversion.py`.

    Raises:
        SystemExit: the folder holds results of another model, text or size.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.work = args, args.out, args.work or args.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.path = args.model or MODEL_PATH
        self.files = self._files()
        self.model = load_model(self.path, dtype="float32").requires_grad_(False).eval()
        self.tokenizer = load_tokenizer(self.path, self.model.config)
        self.head_dim = self.model.model.layers[0].self_attn.head_dim
        self.size = min(args.block_size, self.model.config.max_position_embeddings)
        self._claim()

    def _files(self) -> dict[str, Path | None]:
        """Texts by use; without --model those of the standard library."""
        if self.args.model is not None:
            return {"data": self.args.data, "eval": self.args.eval, "other": self.args.other_data}
        files = {}
        for use, split in (("data", "train"), ("eval", "held_out")):
            files[use] = self.work / f"stdlib_{split}.jsonl"
            lines = [json.dumps({"text": text}) + "\n" for text in stdlib_documents(split)]
            write_text(files[use], "".join(lines))
        return files | {"other": self.args.other_data}

    def _claim(self) -> None:
        """Write down, or compare with, what the results of the folder are of."""
        about = {
            "model": identity(self.path),
            "data": identity(self.files["data"]),
            "eval": identity(self.files["eval"]),
            "eval_tokens": self.args.eval_tokens,
            "block_size": self.size,
            "blocks": self.args.blocks,
            "align": self.args.align,
        }
        path = self.work / "about.json"
        if path.is_file() and json.loads(path.read_text()) != about:
            raise SystemExit(f"{self.out} holds results of another model, text or size: give another --out")
        write_text(path, json.dumps(about, indent=1))
        self.about = about

    @cached_property
    def eval_blocks(self) -> Any:
        """Blocks to measure on, about `--eval-tokens` of them from the start."""
        found = evaluation_blocks(
            self.files["eval"],
            self.tokenizer,
            self.size,
            cache_dir=self.work / "blocks",
            vocab_size=self.model.config.vocab_size,
        )
        return found.select(range(min(len(found), max(1, self.args.eval_tokens // self.size))))

    def calibration_blocks(self, text: str, share: float, seed: int, number: int | None = None) -> Any:
        """Random blocks of a text; the share of a seed is the start of its own random order."""
        corpus = prepare(
            self.files[text],
            self.tokenizer,
            block_size=self.size,
            held_out=0.0,
            cache_dir=self.work / "blocks",
            vocab_size=self.model.config.vocab_size,
        ).train
        number = round(share * (number or self.args.blocks))
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))[:number]
        if len(order) < number:
            raise SystemExit(f"{text} has {len(corpus)} blocks of {self.size} tokens, {number} are asked for")
        return corpus.select(order.sort().values.tolist())

    def statistics(self, cell: Cell) -> tuple[Statistics, float]:
        """Of the cell's text, with the seconds they took; loaded where they were gathered before."""
        name = f"{cell.text}-{round(cell.share * self.args.blocks)}-seed{cell.seed}"
        path, timing = (self.work / f"{name}.{end}" for end in ("safetensors", "seconds"))
        if path.is_file() and timing.is_file():
            return Statistics.load(path), float(timing.read_text())
        blocks = self.calibration_blocks(cell.text, cell.share, cell.seed)
        start = time.perf_counter()
        found = calibrate(self.model, blocks, seed=cell.seed)
        seconds = time.perf_counter() - start
        found.save(path, overwrite=True)
        write_text(timing, str(seconds))
        return found, seconds

    def pairs(self, cell: Cell, d_qk: int) -> Any:
        """Kept pairs by the cell's own rule."""
        path = self.work / f"{cell.rule}-{cell.text}-{cell.share}-seed{cell.seed}.pt"
        if path.is_file():
            found = torch.load(path, weights_only=True)
        else:
            picked = self.calibration_blocks(cell.text, cell.share, cell.seed)[:]
            blocks = {name: torch.as_tensor(picked[name]) for name in COLUMNS}
            if cell.rule == "fisher":
                found = rules.fisher_scores(self.model, blocks)
            else:
                found = rules.score_grams(self.model, blocks, seed=cell.seed)
            torch.save(found, path)
        if cell.rule == "fisher":
            return rules.top_pairs(found, d_qk)
        return rules.score_pairs(found, self.model.config.num_key_value_heads, d_qk)

    @cached_property
    def original(self) -> Perplexity:
        """The original's perplexity, measured once."""
        path = self.work / "original.json"
        if not path.is_file():
            write_text(path, json.dumps(asdict(perplexity(self.model, self.eval_blocks))))
        data = json.loads(path.read_text())
        return Perplexity(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})

    def widths(self, cell: Cell) -> tuple[int, int]:
        """The cell's widths for this model's heads, the key width even; the sum keeps the cell's share."""
        if self.head_dim == 64:
            return cell.widths
        d_qk = max(2, 2 * round(cell.widths[0] * self.head_dim / 128))
        total = round(sum(cell.widths) * self.head_dim / 64)
        return d_qk, max(1, min(self.head_dim, total - d_qk))

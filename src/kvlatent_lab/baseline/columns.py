"""The columns of the baseline tables: what is measured of a model, each by itself, so that a set that turns up later
costs its own column and nothing else.

D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.evaluation.checks.fidelity import compare_tokens
from kvlatent.evaluation.checks.needle import needle
from kvlatent.evaluation.checks.tasks import run_tasks
from kvlatent.evaluation.checks.word_order import order
from kvlatent.evaluation.perplexity import ratio_error, summarise
from kvlatent.evaluation.scored_text import read_documents
from kvlatent.evaluation.sequences import context_limit, evaluation_mode
from kvlatent.evaluation.speed.caches import make_cache
from kvlatent.evaluation.speed.memory import held_bytes
from kvlatent.model.head import IGNORED, Head, token_losses
from kvlatent.text.corpus import evaluation_blocks
from kvlatent_lab.baseline.question_files import write_tasks

__all__ = ["TEXTS", "Columns", "Sizes"]

TEXTS = {
    "fineweb": "fineweb_valid.jsonl",
    "wikitext": "wikitext2_test.txt",
    "tinystories": "tinystories_valid.txt",
}
"""Files by the name of the text; the divergence from the original is that on the first."""

CONTEXTS = (512, 1024, 2048, 4096)
PASS_KEY = "The pass key of the {key} is {value}. Remember it: {value} is the pass key."
_DEPTHS = (0.1, 0.5, 0.9)
_BATCH_TOKENS = 4096

Measure = Callable[[PreTrainedModel], dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        blocks, block_size: of each text.
        questions: of each set, from its start.
        needle_tokens: read at every context length, for the needle and for the pass key: at least one trial is.
        order_trials: windows whose spans are shuffled.
        seed: of needles, order and whatever a task draws.
    """

    blocks: int = 16
    block_size: int = 1024
    questions: int = 200
    needle_tokens: int = 6144
    order_trials: int = 8
    seed: int = 0


class Columns:
    """Everything that is measured of a model, by name.

    Args:
        tokenizer, vocab_size, context: of the original.
        texts, tasks: folders of the texts and of the question sets; what is not there is not measured.
        work: for blocks and for what the original predicts.
        sizes: how much.
    """

    def __init__(
        self, tokenizer: Any, config: Any, texts: Path, tasks: Path, work: Path, sizes: Sizes
    ) -> None:
        self.tokenizer, self.config, self.work, self.sizes = tokenizer, config, work, sizes
        self.texts = {name: texts / file for name, file in TEXTS.items() if (texts / file).is_file()}
        if "fineweb" not in self.texts:
            raise ValueError(f"the tables need {TEXTS['fineweb']}: {texts} holds none; give another --texts")
        self.sets = write_tasks(tasks, work / f"tasks-{sizes.questions}", sizes.questions)

    def measures(self, original: Callable[[], Path]) -> dict[str, Measure]:
        """What measures each column, in order.

        Args:
            original: of `write_states`, where its file is.
        """
        found: dict[str, Measure] = {}
        for name in self.texts:
            reference = original if name == "fineweb" else None
            found[f"text {name}"] = partial(self.text, name=name, original=reference)
        found |= {f"task {name}": partial(self.task, name=name) for name in self.sets}
        limit = context_limit(self.config) or max(CONTEXTS)
        for context in (context for context in CONTEXTS if context <= limit):
            found[f"pass key {context}"] = partial(self.needle, context=context, template=PASS_KEY)
            found[f"needle {context}"] = partial(self.needle, context=context, template=None)
        return found | {"order": self.order}

    def blocks(self, name: str) -> Any:
        """Blocks of a text, documents apart, evenly spread over it: one long and odd document must not decide a figure."""
        size, wanted = self.sizes.block_size, self.sizes.blocks
        blocks = evaluation_blocks(
            self.texts[name],
            self.tokenizer,
            size,
            cache_dir=self.work / "blocks",
            vocab_size=self.config.vocab_size,
        )
        step = max(1, len(blocks) // wanted)
        return blocks.select(range(0, step * min(wanted, len(blocks)), step))

    def _states(self, model: Any, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """What the head reads [B, T, D] and the labels [B, T], a few blocks at a time."""
        blocks, at_once = self.blocks(name), max(1, _BATCH_TOKENS // self.sizes.block_size)
        with evaluation_mode(model):
            for first in range(0, len(blocks), at_once):
                columns = blocks[first : first + at_once]
                ids, positions, labels = (
                    torch.as_tensor(columns[key]).to(model.device)
                    for key in ("input_ids", "position_ids", "labels")
                )
                states = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
                yield states.last_hidden_state, labels

    def write_states(self, model: Any, path: Path) -> None:
        """Keep what the original's head reads of the first text."""
        states = torch.cat([states.flatten(0, 1).cpu() for states, _ in self._states(model, "fineweb")])
        save_file(
            {"states": states, "head": model.get_output_embeddings().weight.detach().cpu().clone()}, path
        )

    def text(self, model: Any, *, name: str, original: Callable[[], Path] | None) -> dict[str, Any]:
        """Perplexity with what pairs it block by block; and the divergence from the original."""
        losses: list[float] = []
        counts: list[int] = []
        divergences: list[float] = []
        agreed: list[int] = []
        known = None if original is None else load_file(original())
        head = Head.of_model(model)
        for states, labels in self._states(model, name):
            losses += token_losses(states, head, labels).double().sum(1).tolist()
            for own, row in zip(states, labels, strict=True):
                counted = row != IGNORED
                if known is not None:
                    at = len(counts) * len(row)
                    theirs = known["states"][at : at + len(row)].to(own.device)[counted]
                    heads = [Head.of(known["head"].to(own.device)), head]
                    divergence, same = compare_tokens(heads, [theirs, own[counted]])
                    divergences.append(divergence)
                    agreed.append(same)
                counts.append(int(counted.sum()))
        found = asdict(summarise(losses, counts))
        if known is not None:
            found |= {
                "kl": sum(divergences) / sum(counts),
                "kl_standard_error": ratio_error(divergences, counts),
                "top1_agreement": sum(agreed) / sum(counts),
                "block_divergences": divergences,
                "block_agreed": agreed,
            }
        return found

    def cache(self, model: Any, kind: str) -> dict[str, Any]:
        """Bytes of a token in the cache, and of one in 16 bits without quantisation."""
        blocks = torch.as_tensor(self.blocks("fineweb")[0:1]["input_ids"])[:, :96].to(model.device)
        sizes = {}
        for name in {"dynamic", kind}:
            cache = make_cache(name, model.config, blocks.shape[1])
            with evaluation_mode(model):
                model(input_ids=blocks, past_key_values=cache, use_cache=True, logits_to_keep=1)
            sizes[name] = held_bytes(cache) / blocks.numel()
        in_16_bits = sizes["dynamic"] * 2 / model.dtype.itemsize
        return {
            "bytes_per_token": in_16_bits if kind == "dynamic" else sizes[kind],
            "bytes_per_token_in_16_bits": in_16_bits,
        }

    def task(self, model: Any, *, name: str) -> dict[str, Any]:
        """Accuracy on a set of questions, and the answer to each."""
        task, folder = f"local_{name}", self.work / f"tasks-{self.sizes.questions}"
        found = run_tasks(
            model, self.tokenizer, [task], include_path=folder, seed=self.sizes.seed, answers=True
        )
        return found["tasks"][task] | {"answers": found["answers"][task], "lm_eval": found["lm_eval"]}

    def needle(self, model: Any, *, context: int, template: str | None) -> dict[str, Any]:
        """How often a planted number or string is reproduced."""
        trials = max(1, self.sizes.needle_tokens // (context * len(_DEPTHS)))
        documents = list(read_documents(self.texts["fineweb"]))
        found = needle(
            model, self.tokenizer, haystack=documents, contexts=[context], trials=trials, depths=_DEPTHS,
            needle_tokens=7 if template else 8, template=template, seed=self.sizes.seed,
        )  # fmt: skip
        return {
            name: found[name] for name in ("trials", "depths", "exact", "rank", "trial_exact", "trial_rank")
        }

    def order(self, model: Any) -> dict[str, Any]:
        """How much likelier true orders are than shuffled ones."""
        found = order(
            model, read_documents(self.texts["fineweb"]), self.tokenizer,
            depths=(0.5,), trials=self.sizes.order_trials, seed=self.sizes.seed,
        )  # fmt: skip
        names = (
            "spans",
            "trials",
            "margin",
            "preferred",
            "after_margin",
            "trial_margin",
            "trial_after_margin",
        )
        return {name: found[name] for name in names}

"""Pretrain the embedded model: a small Llama on the Python standard library, on a CPU, resumable.

Two thirds of the training text are windows of the standard library's source (tests included, the modules
of ``kvlatent.text.standard_library.HELD_OUT`` left out). One third asks for copying - repeated random strings, strings
planted twice in code, key-value look-ups - because a model whose attention hardly matters would flatter
every cache compression. Tokens that nothing could predict carry no loss.

Item i of the training data depends on (seed, i) alone and the learning rate stays constant until the last
quarter, so a run can be killed at any time and resumed, with another ``--tokens`` too while the rate is
still constant; the command is the same as the first time. Run from the repository root:

    python benchmarks/pretrain_embedded.py --work build/embedded --tokens 28700000 --threads 2

Keeping freed memory in the process is worth a third of the speed with glibc's allocator:
``MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000``. The last step exports fp16 weights,
tokenizer and model card to ``--out`` and measures them; ``--evaluate`` does only the measuring.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from kvlatent.evaluation.checks.text_perplexity import measure_documents
from kvlatent.evaluation.copying import copy_accuracy, window_hiding
from kvlatent.evaluation.sequences import ordinary_ids
from kvlatent.jobs.record import environment
from kvlatent.text.standard_library import HELD_OUT, MODEL_PATH, stdlib_documents

CONTEXT = 1024
VOCABULARY = 2048
END = "<|endoftext|>"
BATCH = 8
WARMUP_STEPS = 200
DECAY_SHARE = 0.22
PEAK_RATE = 3e-3
EARLY_ITEMS = 8000  # the first items hold more copy text: induction heads form early or late, not gradually
IGNORED = -100
WINDOW = 48  # the ablation: how many tokens back keys stay visible
RESULTS = Path(__file__).resolve().parent / "results" / "embedded_model.json"

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: code
tags:
- python
- llama
- kv-cache
---

# stdlib-llama

A Llama of {parameters} parameters (4 layers, hidden size 256, 4 query heads on 2 key-value heads of size
64, context 1,024, vocabulary 2,048, tied embeddings; {megabytes} MB of fp16 safetensors), pretrained on
the source text of the Python standard library. It ships with `kvlatent` so that compressing a cache can
be tried and tested on a trained model without a download. It is of no use as a programming assistant.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from kvlatent.text.standard_library import model_path

model = AutoModelForCausalLM.from_pretrained(model_path())
tokenizer = AutoTokenizer.from_pretrained(model_path())
```

## Figures

Measured in fp32 on the exported fp16 weights. Perplexity is per token, over whole held-out modules in
windows of 1,024 tokens. Copy accuracy is the share of teacher-forced argmax hits at positions 3 to 16 of
the second occurrence of a random 16-token string in held-out code, tokens uniform over all ordinary ids,
500 trials a distance, seed 0. The last column hides all keys more than {window} tokens back, in every
layer: the model needs its distant cache, so losing that cache shows.

| | whole context | {window} tokens back |
| --- | --- | --- |
| held-out perplexity | {perplexity} | {near} (+{increase} %) |

| copy distance | whole context | {window} tokens back |
| --- | --- | --- |
{rows}

## Training

{tokens} M tokens in {steps} steps of 8 x 1,024 took {minutes} minutes on a shared machine of {cores}
cores ({processor}): fp32 weights under bf16 autocast, AdamW, constant rate 3e-3 after 200 warm-up steps,
linear decay over the last 22 %. About two thirds of the items are windows of a stream of {stream} M
tokens: the `.py` files of the standard library that ran the script, tests included, without `encodings`,
`lib2to3` and `pydoc_data`. One third (half of the first 8,000 items) is copy text made on the fly:
repeated random strings, random strings planted twice in code, key-value look-ups. The exact command,
from the repository root:

```
{command}
```

{note}

Versions: {versions}.

Held out by name, with their tests: {modules}.

## Licence

The weights and this card are under Apache-2.0 like `kvlatent`. The training text is the Python standard
library, copyright Python Software Foundation and contributors, under the PSF License Version 2; none of
it is included here except as the vocabulary's fragments, but the model may reproduce short pieces of it.
"""


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 tokens, trained on the training text; kept in ``folder``."""
    if not (folder / "tokenizer.json").is_file():
        bpe = ByteLevelBPETokenizer()
        documents = stdlib_documents("train", include_tests=True)
        bpe.train_from_iterator(documents, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END])
        PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token=END,
            eos_token=END,
            pad_token=END,
            model_max_length=CONTEXT,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def token_stream(tokenizer: PreTrainedTokenizerFast, path: Path) -> np.ndarray:
    """The training text as one uint16 stream on disk; every document is led by the end-of-text token."""
    if not path.is_file():
        documents = stdlib_documents("train", include_tests=True)
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)
        ids = [[tokenizer.eos_token_id, *row] for row in encoded["input_ids"]]
        partial = path.with_suffix(".partial")
        np.array([token for row in ids for token in row], dtype=np.uint16).tofile(partial)
        partial.rename(path)
    return np.memmap(path, dtype=np.uint16, mode="r")


class MixedText(torch.utils.data.Dataset):
    """Endless training items of `context` tokens; item i is a function of (seed, i)."""

    def __init__(
        self,
        stream: np.ndarray,
        ids: np.ndarray,
        tokenizer: Any,
        seed: int,
        share: float,
        context: int = CONTEXT,
    ) -> None:
        self.stream, self.ids, self.seed, self.share = stream, ids, seed, share
        self.context = context
        layouts = ((" = ", "\n", "\n"), (": ", ", ", "\n\n"), ("=", " ", "\n"), (" -> ", "\n    ", "\n\n"))
        self.layouts = [tuple(tokenizer.encode(part) for part in layout) for layout in layouts]

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, index])
        share = max(self.share, 0.5) if index < EARLY_ITEMS else self.share
        if rng.random() >= share:
            tokens = self._code(rng, self.context)
            labels, is_copy = tokens, False
        else:
            make = (self._repeated, self._planted, self._lookup)[rng.choice(3, p=(0.35, 0.5, 0.15))]
            (tokens, labels), is_copy = make(rng), True
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "is_copy": torch.tensor(is_copy),
        }

    def _code(self, rng: np.random.Generator, length: int) -> np.ndarray:
        at = rng.integers(0, len(self.stream) - length)
        return self.stream[at : at + length].astype(np.int64)

    def _repeated(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One to four random strings, each whole at first, then pieces of them in any order, with gaps."""
        length = int(np.exp(rng.uniform(np.log(8), np.log(self.context // 4))))
        pool = [
            rng.choice(self.ids, size=length)
            for _ in range(rng.integers(1, 1 + min(4, self.context // 2 // length)))
        ]
        gap = int(rng.choice((0, 4, 64)))
        pieces, targets, size, emitted = [], [], 0, 0
        while size < self.context:
            if emitted < len(pool):
                piece = pool[emitted]
                target = np.full(len(piece), IGNORED)
            else:
                source = pool[rng.integers(len(pool))]
                start = rng.integers(0, len(source) - 4) if rng.random() < 0.5 else 0
                piece = source[start : rng.integers(start + 4, len(source) + 1)]
                target = piece.copy()
                target[0] = IGNORED
            noise = rng.choice(self.ids, size=rng.integers(0, gap + 1))
            pieces += [piece, noise]
            targets += [target, np.full(len(noise), IGNORED)]
            size += len(piece) + len(noise)
            emitted += 1
        return np.concatenate(pieces)[: self.context], np.concatenate(targets)[: self.context]

    def _planted(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Code text with random strings of 16 to 64 tokens, each planted twice, 20 to 900 tokens apart."""
        tokens = np.full(self.context, -1, dtype=np.int64)
        labels = tokens.copy()
        for _ in range(rng.integers(1, 9)):
            length = int(rng.integers(16, 65)) if rng.random() < 0.6 else 16
            distance = int(rng.integers(max(20, length), self.context - 123))
            first = int(rng.integers(0, max(1, self.context - distance - length)))
            second = first + distance
            places = (slice(first, first + length), slice(second, second + length))
            if second + length > self.context or any((tokens[place] >= 0).any() for place in places):
                continue
            string = rng.choice(self.ids, size=length)
            for place in places:
                tokens[place] = string
            labels[places[0]] = IGNORED
            labels[places[1]] = string
            labels[second] = IGNORED
        free = tokens < 0
        tokens[free] = self._code(rng, int(free.sum()))
        return tokens, np.where(free, tokens, labels)

    def _lookup(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random keys with random values, listed once and then asked for in another order."""
        equals, separator, turn = self.layouts[rng.integers(len(self.layouts))]
        key_size, value_size = int(rng.integers(1, 3)), int(rng.integers(1, 5))
        entry = key_size + value_size + len(equals) + len(separator)
        count = int(rng.integers(4, max(5, self.context // 2 // entry)))
        keys = self.ids[rng.permutation(len(self.ids))[: count * key_size]].reshape(count, key_size)
        values = rng.choice(self.ids, size=(count, value_size))
        tokens: list[int] = []
        labels: list[int] = []
        for round_ in range(1 + self.context // (count * entry)):
            for item in rng.permutation(count):
                value = values[item].tolist()
                tokens += [*keys[item].tolist(), *equals, *value, *separator]
                shown = value if round_ else [IGNORED] * value_size
                labels += [IGNORED] * key_size + equals + shown + separator
            tokens += turn
            labels += [IGNORED] * len(turn)
        tokens += [0] * self.context
        labels += [IGNORED] * self.context
        return np.array(tokens[: self.context]), np.array(labels[: self.context])


class PretrainTrainer(Trainer):
    """Items in order, loss per labelled token, and the losses of both kinds of text in the log."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        labels = inputs["labels"][:, 1:].reshape(-1)
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        with torch.no_grad():
            copy = inputs["is_copy"][:, None].expand(-1, CONTEXT - 1).reshape(-1)
            seen = labels != IGNORED
            for name, mask in (("code", seen & ~copy), ("copy", seen & copy)):
                self._sums[name] += np.array([float(losses[mask].sum()), float(mask.sum())])
        return losses.sum() / seen.sum()

    _sums: ClassVar[dict[str, np.ndarray]] = {"code": np.zeros(2), "copy": np.zeros(2)}
    _clock = (time.monotonic(), 0)

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        step, now = self.state.global_step, time.monotonic()
        if "loss" not in logs:
            return
        speed = (step - self._clock[1]) * BATCH * CONTEXT / (now - self._clock[0]) if self._clock[1] else 0.0
        code, copy = (total / max(count, 1) for total, count in self._sums.values())
        print(
            f"{datetime.now(UTC):%H:%M:%S} step {step} tokens {step * BATCH * CONTEXT / 1e6:.2f}M "
            f"loss {logs['loss']:.3f} code {code:.3f} copy {copy:.3f} rate {logs['learning_rate']:.2e} "
            f"norm {logs.get('grad_norm', 0):.2f} {speed:.0f} tokens/s",
            flush=True,
        )
        for sums in self._sums.values():
            sums[:] = 0
        minutes = (self.state.log_history or [{}])[-1].get("minutes", 0.0) + (now - self._clock[0]) / 60
        self._clock = (now, step)
        self.state.log_history = [{**logs, "step": step, "minutes": minutes}]


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer state is written last)."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda item: -int(item.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            torch.load(path / "optimizer.pt", weights_only=True, mmap=True)
        except (OSError, ValueError, RuntimeError):
            continue
        return path
    return None


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train to ``args.tokens`` tokens from the newest checkpoint, or from nothing; ends with a checkpoint."""
    stream = token_stream(tokenizer, args.work / "train.u16")
    print(f"{len(stream)} training tokens in the stream", flush=True)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(configuration())
    steps = args.tokens // (BATCH * CONTEXT)
    decay = int(steps * DECAY_SHARE)
    matrices = [value for value in model.parameters() if value.dim() > 1]
    vectors = [value for value in model.parameters() if value.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)

    def rate(step: int) -> float:
        return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay))

    trainer = PretrainTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.work / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            use_cpu=True,
            bf16=True,
            max_grad_norm=1.0,
            logging_steps=20,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=args.seed,
        ),
        train_dataset=MixedText(
            stream, ordinary_ids(tokenizer, VOCABULARY), tokenizer, args.seed, args.copy_share
        ),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
    )
    checkpoint = newest_checkpoint(args.work / "checkpoints")
    print(f"{steps} steps, resuming from {checkpoint}", flush=True)
    if checkpoint is None or int(checkpoint.name.split("-")[1]) < steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def export(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the newest checkpoint to ``args.out`` as fp16 safetensors, with the tokenizer."""
    checkpoint = newest_checkpoint(args.work / "checkpoints")
    if checkpoint is None:
        raise SystemExit(f"no complete checkpoint in {args.work / 'checkpoints'}")
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.config.use_cache = True  # the trainer switched it off
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.out)
    # Only what every transformers release reads: 5.x writes its own class name and loading flags here.
    settings = json.loads((args.out / "tokenizer_config.json").read_text())
    kept = {
        key: value
        for key, value in settings.items()
        if key not in ("backend", "is_local", "local_files_only")
    }
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    (args.out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2) + "\n")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    command = (
        f"python benchmarks/pretrain_embedded.py --work build/embedded --tokens {args.tokens} "
        f"--threads {args.threads} --seed {args.seed} --copy-share {args.copy_share}"
    )
    record = {
        "command": command,
        "seed": args.seed,
        "steps": state["global_step"],
        "tokens": state["global_step"] * BATCH * CONTEXT,
        "stream_tokens": (args.work / "train.u16").stat().st_size // 2,
        "minutes": round(state["log_history"][-1].get("minutes", 0.0), 1),
        "note": args.note,
    }
    (args.work / "training.json").write_text(json.dumps(record))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the exported model, on fp32 arithmetic, and write the results file."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    started = time.monotonic()
    whole, near = (perplexity(model, tokenizer, window) for window in (None, WINDOW))
    copy, copy_near = (copy_accuracy(model, tokenizer, window=window) for window in (None, WINDOW))
    weights = args.out / "model.safetensors"
    training = args.work / "training.json"
    previous = json.loads(RESULTS.read_text())["training"] if RESULTS.is_file() else None
    results = {
        "model": {
            "parameters": model.num_parameters(),
            "safetensors_bytes": weights.stat().st_size,
            "safetensors_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "held_out_modules": list(HELD_OUT),
        },
        "held_out_perplexity": round(whole, 4),
        f"held_out_perplexity_window_{WINDOW}": round(near, 4),
        "perplexity_increase_percent": round(100 * (near / whole - 1), 2),
        "copy_accuracy": {str(distance): round(value, 4) for distance, value in copy.items()},
        f"copy_accuracy_window_{WINDOW}": {
            str(distance): round(value, 4) for distance, value in copy_near.items()
        },
        "copy_trials": 500,
        "evaluation_seconds": round(time.monotonic() - started, 1),
        "training": json.loads(training.read_text()) if training.is_file() else previous,
        **environment("cpu"),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    return results


def perplexity(model: Any, tokenizer: Any, window: int | None) -> float:
    """Of the held-out modules in contexts of 1024 tokens; keys more than `window` tokens back are hidden."""
    with window_hiding(model, window):
        return measure_documents(model, tokenizer, stdlib_documents("held_out"), window=1024)[0]["perplexity"]


def write_card(folder: Path, results: dict[str, Any]) -> None:
    """The model card, from the measured figures."""
    copy, near = results["copy_accuracy"], results[f"copy_accuracy_window_{WINDOW}"]
    rows = "\n".join(f"| {key} | {100 * copy[key]:.1f} % | {100 * near[key]:.1f} % |" for key in copy)
    training, model, machine = (results[key] for key in ("training", "model", "machine"))
    versions = {"python": results["python"], **results["versions"]}
    (folder / "README.md").write_text(
        CARD.format(
            parameters=f"{model['parameters']:,}",
            megabytes=f"{model['safetensors_bytes'] / 1e6:.2f}",
            perplexity=f"{results['held_out_perplexity']:.2f}",
            near=f"{results[f'held_out_perplexity_window_{WINDOW}']:.2f}",
            increase=f"{results['perplexity_increase_percent']:.1f}",
            window=WINDOW,
            rows=rows,
            tokens=f"{training['tokens'] / 1e6:.1f}",
            steps=f"{training['steps']:,}",
            stream=f"{training['stream_tokens'] / 1e6:.1f}",
            minutes=f"{training['minutes']:.0f}",
            cores=machine["cores"],
            processor=machine["processor"],
            command=training["command"],
            note=training.get("note", ""),
            modules=", ".join(f"`{name}`" for name in model["held_out_modules"]),
            versions=", ".join(f"{name} {version}" for name, version in versions.items() if version),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and tokenised text")
    parser.add_argument("--tokens", type=int, default=28_700_000, help="training tokens in all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=MODEL_PATH, help="folder of the exported model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy-share", type=float, default=0.33, help="share of copy text among the items")
    parser.add_argument(
        "--save-steps", type=int, default=250, help="steps between checkpoints (two are kept)"
    )
    parser.add_argument("--note", default="", help="a sentence on this run for the model card")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.evaluate:
        tokenizer = train_tokenizer(args.work / "tokenizer")
        train(args, tokenizer)
        export(args, tokenizer)
    results = evaluate(args)
    write_card(args.out, results)
    print(json.dumps(results, indent=2), flush=True)


if __name__ == "__main__":
    main()

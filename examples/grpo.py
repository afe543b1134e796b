"""Reinforcement learning of a latent model with TRL's GRPO: it writes answers through its narrow cache, and right ones pay.

    python examples/grpo.py --model tuned --data questions.jsonl --out rewarded --num_generations 8 --max_completion_length 32

A line of the file is {"prompt": ..., "answer": ...}; the prompt is a text or a list of messages. The reward is 1 where the
answer's words stand in what the model wrote, less a tenth for a reply of more than twice as many words. Every option of TRL's
GRPOConfig is one of this script. Generation is transformers'; TRL's vLLM backend does not know these classes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, TrlParser

import kvlatent


@dataclass
class Places:
    """Where the model and the questions are, and where the result goes."""

    model: str = field(metadata={"help": "a latent checkpoint"})
    data: str = field(metadata={"help": "a .jsonl file of prompts and answers"})
    out: str = field(metadata={"help": "a directory that does not exist yet"})


def answer_is_there(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward of each completion."""
    rewards = []
    for said, right in zip(completions, answer, strict=True):
        text = said if isinstance(said, str) else said[-1]["content"]
        long = len(text.split()) > 2 * len(right.split())
        rewards.append(float(right.lower() in text.lower()) - 0.1 * long)
    return rewards


def main() -> None:
    """Train and save."""
    parser = TrlParser((Places, GRPOConfig))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # TRL expects a GPU unless told
    places, settings = parser.parse_args_and_config()
    model = kvlatent.load_model(
        places.model, dtype="float32"
    )  # steps are too small for 16 bits; --bf16 computes in them
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=answer_is_there,
        args=settings,
        train_dataset=load_dataset("json", data_files=places.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(places.model),
    )
    trainer.train()
    kvlatent.save(model, places.out, tokenizer=AutoTokenizer.from_pretrained(places.model))


if __name__ == "__main__":
    main()

"""Supervised fine-tuning of a latent model with TRL: what comes out is a latent checkpoint as before.

    pip install "kvlatent[tuning]"
    python examples/sft.py --model smaller --data chats.jsonl --out tuned --learning_rate 2e-5 --num_train_epochs 1

A line of the file is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. Every option of TRL's SFTConfig
is one of this script. All weights learn; examples/lora.py trains adapters instead.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

import kvlatent


@dataclass
class Places:
    """Where the model and the chats are, and where the result goes."""

    model: str = field(metadata={"help": "a latent checkpoint"})
    data: str = field(metadata={"help": "a .jsonl file of chats"})
    out: str = field(metadata={"help": "a directory that does not exist yet"})


def main() -> None:
    """Train and save."""
    parser = TrlParser((Places, SFTConfig))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # TRL expects a GPU unless told
    places, settings = parser.parse_args_and_config()
    model = kvlatent.load_model(
        places.model, dtype="float32"
    )  # steps are too small for 16 bits; --bf16 computes in them
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=load_dataset("json", data_files=places.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(places.model),
    )
    trainer.train()
    # The trainer has set pads in its tokenizer; the checkpoint gets the one that the model came with.
    kvlatent.save(model, places.out, tokenizer=AutoTokenizer.from_pretrained(places.model))


if __name__ == "__main__":
    main()

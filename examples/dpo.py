"""Direct preference optimisation of a latent model with TRL, against itself as it was.

    python examples/dpo.py --model tuned --data pairs.jsonl --out preferred --learning_rate 1e-6 --beta 0.1

A line of the file is {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages. Every option of TRL's
DPOConfig is one of this script. The reference's log-probabilities are computed before the first step (unless
`--precompute_ref_log_probs false`), so that one model is in memory.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, TrlParser

import kvlatent


@dataclass
class Places:
    """Where the model and the pairs are, and where the result goes."""

    model: str = field(metadata={"help": "a latent checkpoint"})
    data: str = field(metadata={"help": "a .jsonl file of preferences"})
    out: str = field(metadata={"help": "a directory that does not exist yet"})


def main() -> None:
    """Train and save."""
    parser = TrlParser((Places, DPOConfig))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # TRL expects a GPU unless told
    parser.set_defaults(precompute_ref_log_probs=True)
    places, settings = parser.parse_args_and_config()
    model = kvlatent.load_model(
        places.model, dtype="float32"
    )  # steps are too small for 16 bits; --bf16 computes in them
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=load_dataset("json", data_files=places.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(places.model),
    )
    trainer.train()
    kvlatent.save(model, places.out, tokenizer=AutoTokenizer.from_pretrained(places.model))


if __name__ == "__main__":
    main()

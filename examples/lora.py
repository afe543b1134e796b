"""LoRA of a latent model with peft and TRL; the adapters are merged, so that engines need to know nothing of them.

    python examples/lora.py --model smaller --data chats.jsonl --out tuned --rank 16 --learning_rate 2e-4

The file is that of examples/sft.py, and every option of TRL's SFTConfig is one of this script. `all-linear` finds the narrow
projections by itself: their names are the original's. Adapters that were trained on the original do not fit: a narrow
projection has fewer rows. Without `merge_and_unload` they could be kept apart: `model.save_pretrained(DIR)` of a PeftModel.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

import kvlatent


@dataclass
class Places:
    """Where the model and the chats are, where the result goes, and how large the adapters are."""

    model: str = field(metadata={"help": "a latent checkpoint"})
    data: str = field(metadata={"help": "a .jsonl file of chats"})
    out: str = field(metadata={"help": "a directory that does not exist yet"})
    rank: int = field(default=16, metadata={"help": "of the adapters"})
    targets: str = field(default="all-linear", metadata={"help": "names of layers, with commas between"})


def main() -> None:
    """Train, merge and save."""
    parser = TrlParser((Places, SFTConfig))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # TRL expects a GPU unless told
    places, settings = parser.parse_args_and_config()
    targets = places.targets if places.targets == "all-linear" else places.targets.split(",")
    trainer = SFTTrainer(
        model=kvlatent.load_model(places.model),  # frozen, so its own dtype does; the adapters are float32
        args=settings,
        train_dataset=load_dataset("json", data_files=places.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(places.model),
        peft_config=LoraConfig(
            r=places.rank, lora_alpha=2 * places.rank, target_modules=targets, task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload()
    kvlatent.save(merged, places.out, tokenizer=AutoTokenizer.from_pretrained(places.model))


if __name__ == "__main__":
    main()

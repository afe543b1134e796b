"""A random Llama of two layers with the embedded model's tokenizer, and a text: what every command takes, in milliseconds."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvlatent.text.standard_library import model_path, stdlib_documents

HEAD_DIM, LAYERS = 16, 2
_VOCABULARY = 2048  # of the tokenizer
_DOCUMENTS, _CHARACTERS = 60, 2_000


def make_toy(folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint of grouped-query heads, and a text of documents; both paths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=HEAD_DIM, max_position_embeddings=128, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model, text = folder / "model", folder / "text.txt"
    LlamaForCausalLM(config).save_pretrained(model)
    for file in model_path().glob("tokenizer*"):
        shutil.copyfile(file, model / file.name)
    documents = [document[:_CHARACTERS] for document in stdlib_documents("train")[:_DOCUMENTS]]
    text.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return model, text

"""Language models whose answers are known beforehand, called as transformers' are."""

from types import SimpleNamespace

import torch
from torch import nn


class FakeModel(nn.Module):
    """`rule` maps ids [B, T] to logits [B, T, V]; what the model was asked is kept in `seen`."""

    device = torch.device("cpu")

    def __init__(self, rule, vocab_size=300, context=256):
        super().__init__()
        self.rule, self.seen = rule, []
        self.config = SimpleNamespace(
            vocab_size=vocab_size, max_position_embeddings=context, num_hidden_layers=1,
            num_attention_heads=1, head_dim=1,
        )  # fmt: skip
        self.dtype, self.embedding = torch.float32, nn.Embedding(1, 1)
        self.eval()

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache, logits_to_keep):
        assert not self.training and not use_cache
        self.seen += input_ids.tolist()
        return SimpleNamespace(logits=self.rule(input_ids)[:, -logits_to_keep:])

"""What a stage of training will take on so many cards: bytes on each, floating-point operations, hours.

Counted, not timed: parameters of the model that a config describes (nothing is allocated), what FSDP2 leaves of them on a card,
activations by the shapes that a layer's backward pass needs, operations by the products. What is assumed is named: the share of
a card's peak that training reaches. `benchmarks/predicted_costs.py` holds both against measured runs of small models.

Legend: `B` sequences a card, `T` positions, `D` model width, `L` layers, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kvlatent.jobs.recipe import Recipe, Stage2
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import attention_layers_of, family_of, head_dim_of, key_value_heads_of
from kvlatent.model.logit_loss import needs_teacher
from kvlatent.training.stages import settings_of
from kvlatent.training.trainable import trainable_names

__all__ = ["Card", "StageCost", "predict_stage"]

_LOGITS_AT_ONCE = 4  # student's and teacher's logits of a chunk, their softmax, and the slope
_COPIES = 3.0  # of what learns, in float32, beside itself: its gradient, and two moments of Adam


@dataclass(frozen=True)
class Card:
    """What runs a process: `flops` a second of dense products in the recipe's dtype, of which training reaches a share.

    The default is a card of 80 GB with 312e12 (an A100; an H100 has 989e12), and the share that training of such models by
    FSDP2 is reported to reach; not measured here.
    """

    memory_bytes: float = 80e9
    flops: float = 312e12
    reached: float = 0.35
    context_bytes: float = 2e9  # of the driver and the libraries, and what the allocator cannot use


@dataclass(frozen=True)
class StageCost:
    """One stage on `cards` cards.

    Args:
        stage, cards, tokens: of the run.
        card_bytes: what one card holds at its fullest, by part.
        flops_per_token: of the whole run's products.
        hours: of the steps alone; calibration, checkpoints and measuring are not in it.
    """

    stage: int
    cards: int
    tokens: int
    card_bytes: dict[str, float]
    flops_per_token: float
    hours: float

    @property
    def total_bytes(self) -> float:
        """On one card."""
        return sum(self.card_bytes.values())

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class _Sizes:
    """Parameters: of the layers without the attention (whose widths differ), of both attentions, of LoRA, of embedding and head."""

    rest: int
    original_attention: int
    latent_attention: int
    lora: int
    embedding: int
    head: int


def predict_stage(
    config: PretrainedConfig,
    recipe: Recipe,
    stage: int,
    *,
    kv: float = 0.5,
    cards: int = 1,
    card: Card | None = None,
) -> StageCost:
    """Cost of one stage, whole on every card or sharded, as `recipe.scale` says.

    Args:
        config: of the original, or of a latent model, whose widths then count.
        recipe: "auto" of its dtype counts as bfloat16.
        kv: share of the cache that is kept, where the config is an original's.
    """
    card = card or Card()
    settings = settings_of(recipe, stage)
    sizes = _sizes(config, kv, recipe.lora.rank)
    width = 4 if recipe.dtype == "float32" else 2
    teacher = needs_teacher(settings)
    shards = cards if recipe.scale.sharding == "fsdp2" else 1
    parts = _weights(sizes, width, shards, teacher=teacher)
    if shards > 1:  # the layer at work and the next one are whole
        layers = (
            sizes.rest
            + sizes.lora
            + sizes.latent_attention
            + teacher * (sizes.rest + sizes.original_attention)
        )
        parts["gathered layers"] = 2 * width * layers / config.num_hidden_layers
    length, batch = recipe.data.block_size, max(1, settings.batch_size // cards)
    parts["activations"] = width * batch * length * _elements(config, kv, settings, stage)
    if isinstance(settings, Stage2):
        parts["logits"] = _LOGITS_AT_ONCE * card.memory_bytes / 64
    parts["context"] = card.context_bytes
    flops = _flops_per_token(config, sizes, settings, stage, length, teacher=teacher)
    seconds = settings.tokens * flops / (cards * card.flops * card.reached)
    return StageCost(stage, cards, settings.tokens, parts, flops, seconds / 3600)


def _weights(sizes: _Sizes, width: int, shards: int, *, teacher: bool) -> dict[str, float]:
    """Bytes of weights and of what belongs to them, on one card."""
    trained = sizes.latent_attention + sizes.lora
    layers = sizes.rest + sizes.original_attention
    parts: dict[str, float] = {
        "frozen": width * sizes.rest / shards,
        "trained": 4 * trained / shards,
        "gradients and optimizer": 4 * _COPIES * trained / shards,
        # Outside the shards: the head of both, and the embedding while it is used.
        "embedding and head": width * (sizes.embedding + sizes.head),
    }
    if shards == 1:  # what both share is there once
        return parts | {"teacher": width * sizes.original_attention if teacher else 0.0}
    parts["teacher"] = width * (layers / shards + sizes.embedding) if teacher else 0.0
    return parts


def _sizes(config: PretrainedConfig, kv: float, rank: int) -> _Sizes:
    """Counted on a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = set(trainable_names(model))
    attention = sum(p.numel() for name, p in model.named_parameters() if name in names)
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    rest = sum(p.numel() for p in model.parameters()) - attention - embedding - (0 if tied else head)
    latent: LatentConfig | None = _latent_of(config)
    share = kv if latent is None else _share(latent, config)
    targets = family_of(config).ffn_modules
    lora = sum(
        rank * (module.in_features + module.out_features)
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in targets and hasattr(module, "in_features")
    )
    original = attention if latent is None else round(attention / share)
    narrow = round(attention * share) if latent is None else attention
    return _Sizes(rest, original, narrow, lora, embedding, 0 if tied else head)


def _latent_of(config: PretrainedConfig) -> LatentConfig | None:
    return latent_config_of(config) if getattr(config, "kv_latent", None) else None


def _share(latent: LatentConfig, config: PretrainedConfig) -> float:
    return latent.widths.share(latent.original_head_dim, len(attention_layers_of(config)))


def _elements(config: PretrainedConfig, kv: float, settings: Any, stage: int) -> float:
    """Numbers a token that the backward pass needs of all layers at once."""
    layers, width = config.num_hidden_layers, config.hidden_size
    latent = _latent_of(config)
    share = kv if latent is None else _share(latent, config)
    head_dim = head_dim_of(config) if latent is None else latent.original_head_dim
    heads, shared = config.num_attention_heads, key_value_heads_of(config)
    attention = (
        share * head_dim * (3 * heads + 4 * shared)
    )  # queries and keys before and after rotation, values, output
    inner = getattr(config, "intermediate_size", 4 * width)
    layer = 7 * width + attention + 4 * inner
    whole = layers * width + layer if settings.activation_checkpointing else layers * layer
    whole += layer  # the gradients of the layer that is gone back through
    captured = (layers + 1) * width + layers * width if stage == 1 else 2 * width
    return whole + captured


def _flops_per_token(
    config: PretrainedConfig, sizes: _Sizes, settings: Any, stage: int, length: int, *, teacher: bool
) -> float:
    """Two for each weight of a product: forward, back to the activations, and to the weights where they learn."""
    student = sizes.rest + sizes.latent_attention + sizes.lora
    scores = (
        2.0 * length * config.num_attention_heads * head_dim_of(config) * config.num_hidden_layers
    )  # causal: half
    again = 2 if settings.activation_checkpointing else 0
    total = (4 + again) * student + 2.0 * (sizes.latent_attention + sizes.lora) + (3 + again / 2) * scores
    if teacher:
        total += 2.0 * (sizes.rest + sizes.original_attention) + scores
    if stage == 2:
        total += (6.0 if teacher else 4.0) * (sizes.head or sizes.embedding)
    return total

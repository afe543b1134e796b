"""Texts, realistic random models and slow attention for the tests of the calibrated conversion."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import linear

from kvlatent.model.families import effective_table, family_of
from tiny import HEAD_DIM, VOCAB, tiny_model

PAIRS = HEAD_DIM // 2


def text(blocks=4, length=64, seed=0, packed=True) -> dict[str, torch.Tensor]:
    """Random tokens [blocks, length]; every second block holds several documents, if `packed`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (blocks, length), generator=generator)
    positions = torch.arange(length).repeat(blocks, 1)
    for block in range(1, blocks if packed else 0, 2):
        for start in sorted(torch.randint(1, length, (2,), generator=generator).tolist()):
            positions[block, start:] = torch.arange(length - start)
    return {"input_ids": ids, "position_ids": positions}


def realistic_model(name, **overrides):
    """A tiny model whose W_Q, W_K, W_V have decaying spectra and whose pairs differ in energy, head by head."""
    model = tiny_model(name, **overrides)
    generator = torch.Generator().manual_seed(1)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            fused = hasattr(attention, "qkv_proj")
            rows = [n * HEAD_DIM for n in (heads, kv_heads, kv_heads)]
            q, k, v = (
                attention.qkv_proj.weight.split(rows)
                if fused
                else (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            )
            strengths = torch.stack([_strengths(generator) for _ in range(kv_heads)]).repeat(1, 2)
            for weight, sizes in (
                (q, strengths.repeat_interleave(heads // kv_heads, 0)),
                (k, strengths),
                (v, None),
            ):
                for head, part in enumerate(weight.unflatten(0, (-1, HEAD_DIM))):
                    u, s, vh = torch.linalg.svd(part, full_matrices=False)
                    part.copy_((u * (s[0] * torch.exp(-torch.arange(HEAD_DIM) / 6))) @ vh)
                    if sizes is not None:
                        part.copy_(part / part.norm(dim=1, keepdim=True) * 0.6 * sizes[head][:, None])
    return model


def _strengths(generator) -> torch.Tensor:
    """Relative sizes of the pairs of one head, decaying in random order: [PAIRS]."""
    order = torch.randperm(PAIRS, generator=generator)
    return torch.exp(-order / 5.0) * 3


@contextmanager
def short_descent():
    """A few steps of the descent of value bases instead of a hundred, where the last digits do not matter."""

    class Short(torch.optim.LBFGS):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **{**options, "max_iter": 8})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "LBFGS", Short)
        yield


def digest(model) -> dict[str, str]:
    """Hash of the bytes of every tensor of the state dict."""
    state = model.state_dict()
    return {n: hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest() for n, t in state.items()}


@dataclass
class Row:
    """One query row of one head, by hand and in float64.

    Args:
        block, head, position: where; seen: the positions it sees, S of them.
        weights: [S], attention; pairs: [S, P], what each pair adds to the logits; values: [S, d].
        query: [P], complex; layer input and so on are not kept.
    """

    block: int
    head: int
    position: int
    seen: list[int]
    weights: torch.Tensor
    pairs: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor


def layer_inputs(model, batch, layer) -> torch.Tensor:
    """What enters the attention of `layer` in the original: [blocks, T, D]."""
    caught = []
    hook = model.model.layers[layer].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            model.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    hook.remove()
    return torch.cat(caught)


def projected(model, hidden, layer):
    """Unrotated q [T, N, d], k [T, K, d], v [T, K, d] of one block in float64, from the original's own tensors."""
    attention, config = model.model.layers[layer].self_attn, model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    state = {name: tensor.double() for name, tensor in attention.state_dict().items()}
    if "qkv_proj.weight" in state:
        sizes = [n * HEAD_DIM for n in (heads, kv_heads, kv_heads)]
        for name, part in zip("qkv", state.pop("qkv_proj.weight").split(sizes), strict=True):
            state[f"{name}_proj.weight"] = part
    q, k, v = (
        linear(hidden.double(), state[f"{name}_proj.weight"], state.get(f"{name}_proj.bias"))
        .unflatten(-1, (-1, HEAD_DIM))
        for name in "qkv"
    )  # fmt: skip

    def normed(x, name):
        if f"{name}_norm.weight" not in state:
            return x
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * state[f"{name}_norm.weight"]

    return normed(q, "q"), normed(k, "k"), v


def turned(x, positions, table) -> torch.Tensor:
    """Rotated pairs of x [T, H, d] as complex numbers [T, H, P]; pass-through pairs last, as they are."""
    half, rest = table.rotary_dim // 2, (HEAD_DIM - table.rotary_dim) // 2
    long = table.long is not None and int(positions.max()) + 1 > table.switch
    angles = positions.double()[:, None] * torch.tensor(table.long if long else table.short).double()
    rotated = torch.complex(x[..., :half], x[..., half : 2 * half])
    rotated = rotated * torch.polar(torch.full_like(angles, table.attention_factor), angles)[:, None]
    passed = x[..., 2 * half :]
    return torch.cat([rotated, torch.complex(passed[..., :rest], passed[..., rest:])], -1)


def slow_rows(model, batch, layer) -> Iterator[Row]:
    """Every row of every head of the original's attention, one at a time."""
    config, table = model.config, effective_table(model.config)
    window = family_of(config).sliding_window(config, layer)
    groups = config.num_attention_heads // config.num_key_value_heads
    hidden = layer_inputs(model, batch, layer)
    for block, positions in enumerate(batch["position_ids"]):
        q, k, v = projected(model, hidden[block], layer)
        q, k = turned(q, positions, table), turned(k, positions, table)
        for t in range(len(positions)):
            start = t - int(positions[t])  # of the document
            seen = [s for s in range(start, t + 1) if window is None or t - s < window]
            for head in range(q.shape[1]):
                keys, values = k[seen, head // groups], v[seen, head // groups]
                pairs = (q[t, head] * keys.conj()).real * HEAD_DIM**-0.5
                yield Row(block, head, t, seen, pairs.sum(1).softmax(0), pairs, values, q[t, head])


def output_weights(model, layer) -> torch.Tensor:
    """W_O by query head, [N, D, d] in float64."""
    weight = model.model.layers[layer].self_attn.o_proj.weight.detach().double()
    return weight.unflatten(1, (-1, HEAD_DIM)).transpose(0, 1)


def attention_errors(model, latents, batch) -> torch.Tensor:
    """Relative squared error of the attention output, on the original's inputs: [latents, layers]."""
    layers = model.config.num_hidden_layers
    wrong, energy = torch.zeros(len(latents), layers, dtype=torch.float64), torch.zeros(layers).double()

    def compare(layer):
        def hook(module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            wanted = output[0].double()
            energy[layer] += wanted.square().sum()
            for row, latent in enumerate(latents):
                rotary = latent.model.rotary_emb(hidden, kwargs["position_ids"])
                given = latent.model.layers[layer].self_attn(
                    hidden_states=hidden, **{**_plain(kwargs), "position_embeddings": rotary}
                )
                wrong[row, layer] += (given[0].double() - wanted).square().sum()

        return hook

    hooks = [
        each.self_attn.register_forward_hook(compare(i), with_kwargs=True)
        for i, each in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            model.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return wrong / energy


def _plain(kwargs):
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}


def divergence(model, latent, batch) -> float:
    """Mean KL(original, latent) of the next-token distributions, nats a token."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        p, q = (m(**inputs, use_cache=False).logits.double().log_softmax(-1) for m in (model, latent))
    return float((p.exp() * (p - q)).sum(-1).mean())

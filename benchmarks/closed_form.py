"""What decides a conversion before anything is tuned, as the divergence of the whole model from the original.

    python benchmarks/closed_form.py tempering --data FILE [--model smollm2]   weights of the Gram matrices: softmax(t x logits)
    python benchmarks/closed_form.py metric --data FILE [--model smollm2]      values under what the loss feels of the output
    python benchmarks/closed_form.py widths --data FILE [--model smollm2]      a budget's widths: uniform, predicted, measured
    python benchmarks/closed_form.py lengths --data FILE --block-size 2048 --blocks 32   length of the blocks calibrated on

The text is calibrated on, and the blocks behind it are measured on: KL(original || converted), nats a token, with the
standard error over the blocks. One JSON document goes to stdout.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from costs import load, read_blocks, timed
from torch import Tensor

from kvlatent.conversion import convert_model, value_weights
from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.narrow_divergences import narrow_divergences
from kvlatent.jobs.devices import faster_dtype, precision
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Stage2
from kvlatent.jobs.record import environment
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.model.widths import Widths
from kvlatent.planning.predicted_errors import measured_errors
from kvlatent.planning.width_plan import plan
from kvlatent.selection import moment_sums
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import resolve_choices
from kvlatent_cli.named_models import model_argument

Blocks = dict[str, Tensor]
CLOSED = {"align": 0, "refit": False}
_EDGES = (0, 512, 1024, 1536)


def measure_tempering(model: Any, text: Blocks, held_out: Blocks, args: argparse.Namespace) -> dict[str, Any]:
    """Keys alone at half their width, by scope of the table and temper."""
    half, figures = model.model.layers[0].self_attn.head_dim // 2, {}
    for temper in args.tempers:
        with patch.object(moment_sums, "_TEMPER", temper):
            seen = calibrate(model, text)
        for table in args.tables:
            latent = convert(model, d_qk=half, statistics=seen, table=table, **CLOSED)
            figures[f"table {table}, temper {temper:g}"] = divergence(model, latent, held_out)
    return figures


def measure_metric(model: Any, text: Blocks, held_out: Blocks, args: argparse.Namespace) -> dict[str, Any]:
    """Values alone at half their width: their error in W_O's own metric, and in that of the gradients behind it."""
    half, seen = model.model.layers[0].self_attn.head_dim // 2, calibrate(model, text)
    roots = [root_of(moment) for moment in gradient_moments(model, text)]
    basis, weights = value_weights.value_basis, convert_model.attention_weights
    current = 0

    def of_layer(source: Any, family: Any, config: Any, latent: Any, layer: int, **given: Any) -> Any:
        nonlocal current
        current = layer
        return weights(source, family, config, latent, layer, **given)

    def by_gradients(w_o: Tensor, moments: Tensor, d_vo: int) -> Tensor:
        return basis(roots[current] @ w_o, moments, d_vo)

    plain = divergence(model, convert(model, d_vo=half, statistics=seen, **CLOSED), held_out)
    with (
        patch.object(value_weights, "value_basis", by_gradients),
        patch.object(convert_model, "attention_weights", of_layer),
    ):
        latent = convert(model, d_vo=half, statistics=seen, **CLOSED)
    return {"output weights alone": plain, "times gradient moments": divergence(model, latent, held_out)}


def measure_widths(model: Any, text: Blocks, held_out: Blocks, args: argparse.Namespace) -> dict[str, Any]:
    """Every share of the cache with the widths of four plans."""
    seen, choices, figures = calibrate(model, text), resolve_choices("calibrated"), {}
    found, seconds = timed(lambda: narrow_divergences(model, seen, choices, progress=Progress()))
    errors = measured_errors(found, seen.head_dim, choices.table)
    for share in args.shares:
        plans = {
            "the same everywhere, measured": plan(seen, share, measured=errors),
            "per layer, measured": plan(seen, share, per_layer=True, measured=errors),
            "three groups, measured": plan(
                seen, share, per_layer=True, measured=errors, engine="transformers"
            ),
            "three groups, predicted": plan(seen, share, per_layer=True),
        }
        for name, chosen in plans.items():
            latent = convert(model, d_qk=chosen.d_qk, d_vo=chosen.d_vo, statistics=seen, **CLOSED)
            widths = Widths(chosen.d_qk, chosen.d_vo).to_dict()
            figures[f"{share:g}: {name}"] = divergence(model, latent, held_out) | {
                "widths": widths,
                "share": chosen.share,
            }
    return figures | {"narrow_divergences": found, "narrow_divergences_seconds": seconds}


def measure_lengths(model: Any, text: Blocks, held_out: Blocks, args: argparse.Namespace) -> dict[str, Any]:
    """Half the cache from the same tokens cut into blocks of several lengths, by how far into its document a token is."""
    half, figures = model.model.layers[0].self_attn.head_dim // 2, {}
    for length in args.lengths:
        cut = {name: column.reshape(-1, length) for name, column in text.items()}
        seen = calibrate(model, cut)
        for table in args.tables:
            latent = convert(model, d_qk=half, d_vo=half, statistics=seen, table=table, align=0)
            figures[f"table {table}, blocks of {length}"] = divergence_by_position(model, latent, held_out)
    return figures


@torch.no_grad()
def divergence_by_position(model: Any, latent: Any, blocks: Blocks) -> dict[str, dict[str, float]]:
    """Mean divergence of the tokens that lie so far into their document, and how many they are."""
    head, sums = model.get_output_embeddings(), {edge: [0.0, 0] for edge in _EDGES}
    for ids, positions in zip(
        *(blocks[name].split(1) for name in ("input_ids", "position_ids")), strict=True
    ):
        call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with precision("cpu", faster_dtype(model.config, "cpu")):
            hidden, goal = (each.get_decoder()(**call).last_hidden_state for each in (latent, model))
        for edge, end in zip(_EDGES, (*_EDGES[1:], 1 << 30), strict=True):
            rows = ((positions[0] >= edge) & (positions[0] < end)).nonzero().squeeze(1)
            if len(rows):
                some = (x[:, rows].to(head.weight.dtype) for x in (hidden, goal))
                loss = stage2_loss(next(some), head, ids[:, rows], Stage2(objective="kl"), next(some), head)
                sums[edge] = [sums[edge][0] + float(loss) * len(rows), sums[edge][1] + len(rows)]
    return {
        f"from {edge}": {"kl": total / count, "tokens": count}
        for edge, (total, count) in sums.items()
        if count
    }


@torch.no_grad()
def divergence(model: Any, latent: Any, blocks: Blocks) -> dict[str, float]:
    """Mean over the blocks of the divergence a token, and its standard error."""
    head, found = model.get_output_embeddings(), []
    for ids, positions in zip(
        *(blocks[name].split(1) for name in ("input_ids", "position_ids")), strict=True
    ):
        call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with precision("cpu", faster_dtype(model.config, "cpu")):
            hidden, goal = (each.get_decoder()(**call).last_hidden_state for each in (latent, model))
            found.append(stage2_loss(hidden, head, ids, Stage2(objective="kl"), goal, head))
    values = torch.stack(found)
    return {"kl": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}


def gradient_moments(model: Any, text: Blocks, number: int = 16) -> list[Tensor]:
    """E g g^T a layer, g the gradient of the loss by the attention output, under tokens drawn from the model itself."""
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    moments = [torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64) for _ in decoder.layers]
    for ids, positions in zip(
        *(text[name][:number].split(4) for name in ("input_ids", "position_ids")), strict=True
    ):
        outputs: list[Tensor] = []
        hooks = [
            layer.self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))  # noqa: B023
            for layer in decoder.layers
        ]
        embedded = decoder.embed_tokens(ids).clone().requires_grad_(True)
        hidden = decoder(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        slopes = torch.empty_like(hidden).flatten(0, 1)
        for part in torch.arange(len(slopes)).split(256):
            chances = (hidden.detach().flatten(0, 1)[part] @ head.detach().T).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
            chances[torch.arange(len(part)), drawn] -= 1
            slopes[part] = chances @ head.detach()
        for moment, slope in zip(
            moments, torch.autograd.grad(hidden, outputs, slopes.view_as(hidden)), strict=True
        ):
            moment += (flat := slope.flatten(0, 1).double()).T @ flat
    return moments


def root_of(moment: Tensor) -> Tensor:
    """Square root of a moment, scaled to a mean eigenvalue of 1."""
    values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def main() -> None:
    """Measure one of them and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "tempering": measure_tempering,
        "metric": measure_metric,
        "widths": measure_widths,
        "lengths": measure_lengths,
    }
    parser.add_argument("what", choices=measures)
    parser.add_argument("--model", type=model_argument, default="smollm2", help="or smollm2, the default")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=64, help="of calibration")
    parser.add_argument("--held-out", type=int, default=16, help="blocks to measure on")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--tempers", type=float, nargs="+", default=(1.0, 0.5))
    parser.add_argument("--tables", nargs="+", default=("head", "model"))
    parser.add_argument("--lengths", type=int, nargs="+", default=(512, 1024, 2048))
    parser.add_argument("--shares", type=float, nargs="+", default=(0.75, 0.5, 0.28125))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, _ = load(args)
    blocks = read_blocks(args, model, args.blocks + args.held_out)
    text, held_out = (
        {name: column[part] for name, column in blocks.items()}
        for part in (slice(args.blocks), slice(args.blocks, None))
    )
    document = {
        "benchmark": f"closed form: {args.what}",
        "blocks": args.blocks,
        "held_out_tokens": held_out["input_ids"].numel(),
        "figures": measures[args.what](model, text, held_out, args),
        "sha256": {"model": identity(args.model), "data": identity(args.data)},
    }
    json.dump({**document, **environment("cpu")}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()

"""The identity table: every family at full width against the original, and at half width against itself.

    python benchmarks/identity.py --out benchmarks/results/identity.json

Random models of `tests/tiny.py` (norms and biases perturbed), fp32, seed 0. Columns are maximum absolute logit
differences: full width against the original (eager, sdpa); at (16, 8) of 32: saved and loaded against memory, cached
against uncached, left-padded against unpadded, eager against sdpa; and how much the last token changes past logits.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.record import environment
from kvlatent.selection.choices import PAPER
from tiny import FAMILIES, HEAD_DIM, logits, padded, tiny_model, tokens


def measure_family(name: str) -> dict[str, float]:
    """All differences of one family."""
    model, x, figures = tiny_model(name), tokens(), {}

    def compare(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        figures[what] = (a - b).abs().max().item()

    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        same = convert(model, d_qk=HEAD_DIM, d_vo=HEAD_DIM)
        compare(f"full width, {implementation}", logits(same, x), logits(model, x))
    latent = convert(model, d_qk=16, d_vo=8, choices=PAPER)
    expected = logits(latent, x)
    with tempfile.TemporaryDirectory() as folder:
        save(latent, Path(folder) / "m")
        compare("saved, loaded", logits(load_model(Path(folder) / "m"), x), expected)
    # Token by token a longrope model turns early keys by its short table, as the original does: compare before.
    part = x[:, :32] if name == "phi3-longrope" else x
    cache, steps = None, []
    with torch.no_grad():
        for at, piece in enumerate(part.split(1, 1)):
            positions = torch.tensor([[at]])
            out = latent(piece, past_key_values=cache, position_ids=positions, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    compare("cached", torch.cat(steps, 1), logits(latent, part))
    ids, mask = padded(x)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    compare("left-padded", logits(latent, ids, attention_mask=mask, position_ids=positions)[:, 5:], expected)
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100 + 3
    compare("future token", logits(latent, changed)[:, :-1], expected[:, :-1])
    latent.set_attn_implementation("eager")
    compare("eager against sdpa", logits(latent, x), expected)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure_family(name) for name in FAMILIES}
    columns = list(next(iter(rows.values())))
    print("| family |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, figures in rows.items():
        print(f"| {name} |", " | ".join(f"{figures[column]:.1g}" for column in columns), "|")
    if args.out:
        command = "python benchmarks/identity.py"
        args.out.write_text(
            json.dumps({"command": command, "rows": rows, **environment("cpu")}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

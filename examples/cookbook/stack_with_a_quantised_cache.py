"""Put fewer bits on top of fewer numbers: a halved model under a quantised cache of transformers.

The first half of each text fills the cache, the second half is predicted from what can be read back of it. The two savings
multiply; so, about, do the losses. Fewer bits alone stand beside it, as the honest rival. It needs `pip install "kvlatent[quantized]"`.
"""

import json
import math

import torch
from ingredients import halve, options, ready, say
from transformers import AutoTokenizer

import kvlatent
from kvlatent.evaluation.speed.caches import make_cache
from kvlatent.evaluation.speed.memory import held_bytes
from kvlatent_cli.named_models import resolve_model


def blocks_of(args, tokenizer, number: int, length: int) -> torch.Tensor:
    """Ids [number, length] of the held-out text."""
    text = "\n\n".join(
        json.loads(line)["text"] for line in (args.folder / "held_out.jsonl").open(encoding="utf-8")
    )
    ids = tokenizer(text[: 12 * number * length])["input_ids"]
    return torch.tensor(ids[: number * length]).view(number, length)


@torch.no_grad()
def behind_a_cache(model, ids: torch.Tensor, kind: str) -> tuple[float, float]:
    """Perplexity of the second halves, and the bytes that a token of the first takes."""
    half = ids.shape[1] // 2
    cache = make_cache(kind, model.config, ids.shape[1])
    model(ids[:, :half], past_key_values=cache, logits_to_keep=1)
    size = held_bytes(cache) / ids[:, :half].numel()
    logits = model(ids[:, half:], past_key_values=cache).logits[:, :-1].flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[:, half + 1 :].flatten()).item()), size


def main() -> None:
    """Halve, then measure both models under both caches."""
    parser = options(__doc__)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    args = ready(parser)
    latent = halve(args)
    source = resolve_model(args.model)
    ids = blocks_of(args, AutoTokenizer.from_pretrained(source), args.texts, args.length)
    say(f"{'':10}{'cache':18}{'bytes a token':>14}{'perplexity':>12}")
    for name, place in (("original", source), ("halved", latent)):
        model = kvlatent.load_model(place, dtype="bfloat16")
        for kind in ("dynamic", "quantized-int4"):
            perplexity, size = behind_a_cache(model, ids, kind)
            say(f"{name:10}{kind:18}{size:14,.0f}{perplexity:12.2f}")


if __name__ == "__main__":
    main()

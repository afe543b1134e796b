"""Whether a model looks ahead: a model that does has a perplexity too good to be true, and cannot generate."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvlatent.checkpoints.load import check_block_size
from kvlatent.evaluation import check
from kvlatent.evaluation.check import CheckRequest, Levels, Settings
from kvlatent.evaluation.evidence import Figures, Sign, figure, figure_of
from kvlatent.evaluation.sequences import evaluation_mode
from kvlatent.jobs.progress import Step

__all__ = ["CHECK", "LEAK", "causality"]

LEAK = 1e-3
"""Change of a past logit under another future. A causal model repeats its bits; a leak moves logits by far more."""

_TOKENS = 32
_ROWS = 10  # that it reads: five cuts, twice


def causality(model: PreTrainedModel, *, length: int = _TOKENS, seed: int = 0) -> float:
    """Largest change of any logit of the past when the tokens after it change; of a causal model 0.

    Random tokens are read twice, the second time with every token after a cut exchanged; cuts lie behind the first
    token, at a quarter, half and three quarters, and before the last token. Both readings have the same shape, so that
    a causal model does the same arithmetic and gives the same bits.

    Args:
        model: original or latent; it is left as it was.
        length: tokens of a sequence, 2 or more; a window that hides nothing from them is not tested.
        seed: of the tokens.

    Raises:
        ValueError: fewer than 2 tokens, more than the context, or logits that are not finite.
    """
    if length < 2:
        raise ValueError(f"a past and a future need 2 tokens: got length={length}; try 32")
    check_block_size(model.config, length)
    cuts = sorted({1, length // 4, length // 2, 3 * length // 4, length - 1} - {0})
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vocab_size
    ids = torch.randint(size, (length,), generator=generator).expand(len(cuts), -1)
    others = (ids + torch.randint(1, size, ids.shape, generator=generator)) % size  # everywhere another token
    past = torch.arange(length) < torch.tensor(cuts)[:, None]
    with evaluation_mode(model):
        readings = [
            model(input_ids=x.to(model.device), use_cache=False).logits
            for x in (ids, torch.where(past, ids, others))
        ]
    if not all(bool(torch.isfinite(logits).all()) for logits in readings):
        raise ValueError(
            f"logits must be finite: the model gave NaN or infinity over {length} tokens; its weights are broken or "
            "its dtype overflows, try float32"
        )
    return float((readings[0] - readings[1])[past.to(model.device)].float().abs().max())


def _length(request: CheckRequest) -> int:
    return min(_TOKENS, request.limit or _TOKENS)


def _measure(model: PreTrainedModel, request: CheckRequest, _: Step, options: Settings) -> float:
    return causality(model, length=_length(request), **options)


def _extents(request: CheckRequest) -> Levels:
    return [({}, request.seconds(_length(request), _ROWS))]


def _sign(figures: Figures, missing: list[str]) -> Sign:
    """The logits of the past change with the future."""
    change, before = (figure_of(figures, side, "causality") for side in ("latent", "original"))
    if change is None:
        missing.append("causality: needs the causality of the latent model")
        return Sign({})
    evidence = {"causality": figure(change, LEAK) | {"original": before}}
    if change <= LEAK:
        return Sign(evidence)
    if (before or 0.0) > LEAK:
        return Sign(evidence, "The original looks ahead as well: convert a decoder-only model.")
    advice = (
        "The causal mask is lost, so every perplexity is too good: load the checkpoint with kvlatent.load_model, pass no "
        "attention_mask of your own, and use attention sdpa or eager."
    )
    return Sign(evidence, advice)


CHECK = check.Check(
    name="causality",
    arguments=(),
    refuse=lambda *_: None,  # nobody chooses anything
    run=check.run_each("causality", _measure),
    extents=_extents,
    rows=lambda _: {"past logits moved by the future": lambda f: f"{f['causality']:.3g}"},
    signs={"non-causal": _sign},
)

"""Whether a model looks ahead: a model that does has a perplexity too good to be true, and cannot generate."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvlatent.checkpoints.load import check_block_size

__all__ = ["causality"]


@torch.no_grad()
def causality(model: PreTrainedModel, *, length: int = 32, seed: int = 0) -> float:
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
    training = model.training
    model.eval()
    try:
        given = [
            model(input_ids=x.to(model.device), use_cache=False).logits
            for x in (ids, torch.where(past, ids, others))
        ]
    finally:
        model.train(training)
    if not all(bool(torch.isfinite(logits).all()) for logits in given):
        raise ValueError(
            f"logits must be finite: the model gave NaN or infinity over {length} tokens; its weights are broken or "
            "its dtype overflows, try float32"
        )
    return float((given[0] - given[1])[past.to(model.device)].float().abs().max())

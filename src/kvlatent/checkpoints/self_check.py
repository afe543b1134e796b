"""What a latent model says to one prompt, kept beside its weights, so that an engine can show that it runs that model.

An engine that gets a rotary table, a scale or a weight wrong answers fluently and wrongly; no error says so. `save`
writes the vector, the vLLM plugin compares at start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvlatent.checkpoints.registration import SELF_CHECK
from kvlatent.model.classes import latent_config_of

__all__ = ["SELF_CHECK", "SelfCheck", "allowed_difference"]

_TOKENS = 64
_POSITIONS = 8
_LARGEST = 8
_AGAIN = f"save the model again with kvlatent, or delete {SELF_CHECK} to go without the check"
# Of log-probabilities. In 16 bits the logits themselves are rounded, to 1/8 at 16 to 32 in bfloat16. What a dropped
# rotary table makes of them is 3 to 10.
_ALLOWED = {"float32": 2e-3, "float16": 0.25, "bfloat16": 1.0}
_QUANTISED = 3.0


def allowed_difference(*dtypes: str, quantised: bool = False) -> float:
    """How far log-probabilities may lie apart where weights or cache have these dtypes, the coarsest of them counting.

    Args:
        dtypes: names such as "float32"; others than the three known ones count as bfloat16.
        quantised: weights or cache are quantised, which changes the answers by design.
    """
    return max(
        _QUANTISED if quantised else 0, *(_ALLOWED.get(dtype, _ALLOWED["bfloat16"]) for dtype in dtypes)
    )


@dataclass(frozen=True)
class SelfCheck:
    """One prompt, and the likeliest next tokens after some of its prefixes.

    Args:
        input_ids: the prompt.
        positions: of the prompt; the answers are to what ends there.
        top_ids: at each position, the likeliest tokens, the likeliest first.
        log_probabilities: theirs, of the model in `dtype`.
        dtype: of the weights that answered.

    Raises:
        ValueError: lists that do not belong together, or numbers that are none of a distribution.
    """

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    log_probabilities: tuple[tuple[float, ...], ...]
    dtype: str

    def __post_init__(self) -> None:
        rows = list(zip(self.top_ids, self.log_probabilities, strict=False))
        if not len(self.positions) == len(self.top_ids) == len(self.log_probabilities) > 0:
            self._refuse(f"{len(self.positions)} positions for {len(rows)} answers")
        if not all(0 <= position < len(self.input_ids) for position in self.positions):
            self._refuse(f"positions up to {max(self.positions)} in {len(self.input_ids)} tokens")
        for ids, values in rows:
            if len(ids) != len(values) or not ids:
                self._refuse(f"{len(ids)} tokens with {len(values)} log-probabilities")
            if not all(math.isfinite(value) and value <= 1e-3 for value in values):
                self._refuse(f"a log-probability of {max(values):g}")

    @staticmethod
    def _refuse(found: str) -> None:
        raise ValueError(f"{SELF_CHECK} is damaged: it holds {found}; {_AGAIN}")

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> SelfCheck | None:
        """What a latent causal model answers, computed with the weights as they are; None where it is not finite.

        A trainer leaves its mixed precision in the model that it trained (accelerate puts it around `forward`), and an
        answer in 16 bits is not that of weights in 32; so the class's own forward is run, outside of any autocast.

        The prompt is the same for models of one vocabulary. It is no longer than the shorter of two rotary tables
        serves, since what takes over beyond that differs between engines.
        """
        limits = [
            table.switch
            for layer in latent_config_of(model.config).tables
            for table in layer
            if table.switch is not None
        ]
        length = min(_TOKENS, model.config.max_position_embeddings, *limits)
        vocabulary = model.config.vocab_size
        ids = [(7919 * i + 104729) % vocabulary for i in range(1, length + 1)]
        positions = sorted({(length * (i + 1)) // _POSITIONS - 1 for i in range(_POSITIONS)} - {-1})
        was_training = model.training
        model.eval()
        try:
            with torch.autocast(model.device.type, enabled=False):
                inputs = torch.tensor([ids], device=model.device)
                logits = type(model).forward(model, inputs, use_cache=False).logits[0, positions]
        finally:
            model.train(was_training)
        values, top = logits.float().log_softmax(-1).topk(min(_LARGEST, vocabulary))
        if not values.isfinite().all():
            return None
        rows = tuple(tuple(round(value, 6) for value in row) for row in values.tolist())
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(tuple(ids), tuple(positions), tuple(map(tuple, top.tolist())), rows, dtype)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it stands in the file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SelfCheck:
        """Inverse of `to_dict`.

        Raises:
            ValueError: fields are missing, or see the class.
        """
        if not isinstance(data, Mapping):
            cls._refuse(f"a {type(data).__name__}, no JSON object")
        try:
            fields = (
                tuple(int(token) for token in data["input_ids"]),
                tuple(int(position) for position in data["positions"]),
                tuple(tuple(int(token) for token in row) for row in data["top_ids"]),
                tuple(tuple(float(value) for value in row) for row in data["log_probabilities"]),
                str(data["dtype"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{SELF_CHECK} is damaged ({type(error).__name__}: {error}); {_AGAIN}"
            ) from error
        return cls(*fields)

    def difference(self, logits: Tensor) -> float:
        """Largest distance of a log-probability from the stored one.

        Args:
            logits: [T, V] of the prompt's first T tokens; answers to longer prefixes are left out.

        Raises:
            ValueError: a stored token is none of the vocabulary, or T reaches no stored position.
        """
        length, vocabulary = logits.shape
        kept = [index for index, position in enumerate(self.positions) if position < length]
        if not kept:
            raise ValueError(
                f"{SELF_CHECK} needs a context of {self.positions[0] + 1} tokens: got {length}; allow a longer one"
            )
        top = [self.top_ids[index] for index in kept]
        if (largest := max(map(max, (*top, self.input_ids)))) >= vocabulary:
            self._refuse(f"token {largest} of a vocabulary of {vocabulary}")
        rows = logits[[self.positions[index] for index in kept]].float().log_softmax(-1).cpu()
        stored = [self.log_probabilities[index] for index in kept]
        distances = [
            (row[list(ids)] - torch.tensor(values)).abs().max().item()
            for row, ids, values in zip(rows, top, stored, strict=True)
        ]
        return math.inf if any(map(math.isnan, distances)) else max(distances)

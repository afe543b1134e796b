"""The dtype of the products of calibration and conversion: chosen by device and model, checked, and close to float32."""

import pytest
import torch

from calibration_setup import realistic_model, short_descent, text
from kvlatent.conversion.convert_model import convert
from kvlatent.selection.calibrate import calibrate
from tiny import tiny_model
from tolerances import assert_close_to_scale

WITH, WITHOUT = {"avx512_bf16": True}, {"avx512_f": True}


def test_bfloat16_without_units_and_unknown_names_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: WITHOUT)
    model = tiny_model("llama")
    for work in (
        lambda p: calibrate(model, text(), precision=p),
        lambda p: convert(model, d_qk=16, precision=p),
    ):
        with pytest.raises(ValueError, match="bfloat16 needs a cpu device with units for it"):
            work("bfloat16")
        with pytest.raises(ValueError, match="unknown precision 'half'; choose one of float32, bfloat16"):
            work("half")


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_bfloat16_products_change_little(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: WITH)
    model, batch = realistic_model(name), text(blocks=8)
    found = {p: calibrate(model, batch, precision=p) for p in ("float32", "bfloat16")}
    for ours, theirs in zip(found["bfloat16"].layers, found["float32"].layers, strict=True):
        for field, tensor in vars(theirs).items():
            assert_close_to_scale(getattr(ours, field), tensor, 0.03)
            assert getattr(ours, field).dtype == torch.float64
    options = {"d_qk": 16, "d_vo": 16, "statistics": found["float32"], "align": 10, "global_steps": 0}
    with short_descent():
        latents = {p: convert(model, precision=p, **options) for p in ("float32", "bfloat16")}
    assert all(parameter.dtype == torch.float32 for parameter in latents["bfloat16"].parameters())
    with torch.no_grad():
        logits = {p: latent(input_ids=batch["input_ids"]).logits for p, latent in latents.items()}
        original = model(input_ids=batch["input_ids"]).logits
    apart, lost = (
        float((one - two).square().mean())
        for one, two in (
            (logits["bfloat16"], logits["float32"]),
            (logits["float32"], original),
        )
    )
    assert 0 < apart < 0.2 * lost

"""Which precision a device can run: bfloat16 only where its units multiply it."""

import pytest
import torch

from kvlatent.jobs.devices import check_precision, has_bfloat16_units


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_a_processor_has_the_units_that_torch_reports(monkeypatch, unit):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, unit: True})
    assert has_bfloat16_units("cpu") and has_bfloat16_units(torch.device("cpu"))
    check_precision("bfloat16", "cpu")


@pytest.mark.parametrize("reported", [{}, {"avx512_f": True}, {"avx512_bf16": False, "amx_tile": True}])
def test_bfloat16_is_refused_where_a_processor_imitates_it(monkeypatch, reported):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported)
    assert not has_bfloat16_units("cpu")
    with pytest.raises(ValueError, match=r"bfloat16 needs a cpu device.*avx512_bf16.*use --dtype float32$"):
        check_precision("bfloat16", "cpu")
    check_precision("float32", "cpu")


@pytest.mark.parametrize("supported", [True, False])
def test_a_card_is_asked_for_its_own_units_not_the_processor(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not supported})
    asked = []
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation: asked.append(including_emulation) or supported,
    )
    assert has_bfloat16_units("cuda:0") is supported and asked == [False]
    if not supported:
        with pytest.raises(ValueError, match=r"bfloat16 needs a cuda device.*compute capability 8\.0"):
            check_precision("bfloat16", "cuda")

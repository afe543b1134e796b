"""Which precision a device can run: bfloat16 only where its units multiply it."""

from types import SimpleNamespace

import pytest
import torch

import kvlatent
from kvlatent.evaluation.speed.bench_run import bench
from kvlatent.jobs import devices
from kvlatent.jobs.devices import check_precision, has_bfloat16_units, resolve_precision, working_dtype
from kvlatent.jobs.recipe import Recipe
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint, plan_checkpoint
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.generate import continue_text
from kvlatent.workflows.run_plan import plan_run
from kvlatent.workflows.train_checkpoint import train
from kvlatent_lab.study.running import study
from on_disk import write_checkpoint, write_text


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_a_processor_has_the_units_that_torch_reports(monkeypatch, unit):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, unit: True})
    assert has_bfloat16_units("cpu") and has_bfloat16_units(torch.device("cpu"))
    check_precision("bfloat16", "cpu")


@pytest.mark.parametrize("reported", [{}, {"avx512_f": True}, {"avx512_bf16": False, "amx_tile": True}])
def test_bfloat16_is_refused_where_a_processor_imitates_it(monkeypatch, reported):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported)
    assert not has_bfloat16_units("cpu")
    with pytest.raises(ValueError, match=r"bfloat16 needs a cpu device.*avx512_bf16.*use dtype float32$"):
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


@pytest.mark.parametrize(
    ("units", "width", "dtype"), [(True, 512, "bfloat16"), (True, 511, "float32"), (False, 512, "float32")]
)
def test_auto_is_the_faster_precision_of_the_device(monkeypatch, units, width, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    automatic, config = Recipe(dtype="auto", seed=3), SimpleNamespace(hidden_size=width)
    assert resolve_precision(automatic, config, "cpu") == Recipe(dtype=dtype, seed=3)
    exact = Recipe(dtype="float32")
    assert resolve_precision(exact, config, "cpu") is exact


@pytest.fixture
def place(tmp_path, tiny_tokenizer):
    """A checkpoint and a text, and nothing else."""
    write_checkpoint(tmp_path / "model", tiny_tokenizer)
    write_text(tmp_path / "text.txt")
    return tmp_path


@pytest.mark.parametrize(
    "work",
    [
        lambda place, **given: compress(place / "model", place / "text.txt", place / "out", **given),
        lambda place, **given: convert_checkpoint(
            place / "model", place / "out", data=place / "text.txt", **given
        ),
        lambda place, **given: calibrate_checkpoint(
            place / "model", data=place / "text.txt", out=place / "out.safetensors", **given
        ),
        lambda place, **given: plan_checkpoint(place / "model", data=place / "text.txt", **given),
        lambda place, dtype, **given: study(
            "widths",
            place / "model",
            data=place / "text.txt",
            out=place / "out",
            overrides=[f"dtype={dtype}"],
            **given,
        ),
        lambda place, **given: train(
            place / "model",
            stage=2,
            data=place / "text.txt",
            out=place / "out",
            teacher=place / "model",
            **given,
        ),
        lambda place, **given: kvlatent.teach(
            place / "model", data=place / "text.txt", out=place / "out", **given
        ),
        lambda place, **given: kvlatent.evaluate(place / "model", place / "text.txt", **given),
        lambda place, **given: bench(place / "model", **given),
        lambda place, **given: continue_text(place / "model", "once", **given),
    ],
    ids=["compress", "convert", "calibrate", "plan", "study", "train", "teach", "eval", "bench", "generate"],
)
def test_every_command_refuses_bfloat16_before_it_writes(monkeypatch, place, work):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ValueError, match=r"bfloat16 needs a cpu device with units for it.*float32$"):
        work(place, dtype="bfloat16", device="cpu")
    assert {path.name for path in place.iterdir()} == {"model", "text.txt"}


@pytest.mark.parametrize(("units", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_plan_names_the_precision_that_runs_not_auto(monkeypatch, place, units, dtype):
    """The recipe is saved beside the weights, and a resume on another machine is another run."""
    monkeypatch.setattr(devices, "_WIDE", 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    for given in ({}, {"tokens": 5_000}):  # both ways to the number of tokens
        plan = plan_run(place / "model", dtype="auto", device="cpu", stages="both", **given)
        assert plan.recipe.dtype == plan.summary()["dtype"] == dtype


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "held"),
    [
        ("bfloat16", "cpu", torch.bfloat16, "float32"),
        ("bfloat16", "cuda", torch.float32, "float32"),
        ("bfloat16", "cuda", torch.float16, "bfloat16"),
        ("float32", "cuda", torch.bfloat16, "float32"),
    ],
)
def test_weights_are_never_held_narrower_than_a_float32_checkpoint(dtype, device, stored, held):
    assert working_dtype(dtype, device, stored) == held

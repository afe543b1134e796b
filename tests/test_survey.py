"""calibrate and plan on checkpoints: one file of statistics, a plan from a text or from that file, and what cannot be."""

import importlib.util

import pytest
import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.conversion.narrow_divergences import narrow_divergences
from kvlatent.planning import width_plan as planning
from kvlatent.planning.predicted_errors import MEASURED, measured_errors
from kvlatent.selection.choices import resolve_choices
from kvlatent.selection.statistics import Statistics
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint, plan_checkpoint
from on_disk import write_checkpoint, write_text

OPTIONS = {"overrides": ["data.block_size=32", "calibration.rows=8"], "blocks": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("survey")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    calibrate_checkpoint(folder / "model", folder / "text.txt", folder / "s.safetensors", **OPTIONS)
    return folder


def equal(a: Statistics, b: Statistics) -> bool:
    """Whether two calibrations agree, bit for bit."""
    same_text = torch.equal(a.input_ids, b.input_ids) and torch.equal(a.position_ids, b.position_ids)
    layers = zip(a.layers, b.layers, strict=True)
    return same_text and all(torch.equal(x.output_gram, y.output_gram) for x, y in layers)


def test_statistics_are_one_file_that_depends_on_text_and_seed(place, tmp_path):
    events = []
    document = calibrate_checkpoint(
        place / "model", place / "text.txt", tmp_path / "s.safetensors",
        progress=lambda *event: events.append(event[:3]), **OPTIONS,
    )  # fmt: skip
    saved = Statistics.load(tmp_path / "s.safetensors")
    assert (document["blocks"], document["tokens"]) == (6, saved.tokens)
    assert saved.input_ids.shape == (6, 32) and document["fingerprint"] == saved.fingerprint
    assert document["bytes"] == (tmp_path / "s.safetensors").stat().st_size
    assert events[0] == ("load", 0, 0) and events[-1] == ("calibrate", 6, 6)
    assert equal(saved, Statistics.load(place / "s.safetensors"))
    calibrate_checkpoint(
        place / "model", place / "text.txt", tmp_path / "s.safetensors", seed=1, overwrite=True, **OPTIONS
    )
    assert not equal(saved, Statistics.load(tmp_path / "s.safetensors"))


def test_a_plan_is_the_same_from_the_text_and_from_its_statistics(place):
    saved = plan_checkpoint(place / "model", statistics=place / "s.safetensors", **OPTIONS)
    fresh = plan_checkpoint(place / "model", data=place / "text.txt", **OPTIONS)
    assert saved["plan"] == fresh["plan"] and saved["curve"] == fresh["curve"]
    assert saved["calibration"]["seconds"] == 0 < fresh["calibration"]["seconds"]
    model, statistics = load_model(place / "model"), Statistics.load(place / "s.safetensors")
    found = narrow_divergences(model, statistics, resolve_choices("calibrated"), per_layer=False)
    expected = planning.plan(statistics, 0.5, measured=measured_errors(found, 16, "head"))
    plan = saved["plan"]
    assert (plan["d_qk"], plan["d_vo"], plan["head_dim"]) == (expected.d_qk, expected.d_vo, 16)
    assert plan["predicted_error"]["total"] == pytest.approx(expected.error, rel=1e-3)
    assert plan["predicted_error"]["unit"] == MEASURED and plan["engines"]["head"] == [
        "transformers",
        "openvino",
    ]
    assert saved["serving"]["cache_bytes_per_token"] == {"original": 512, "latent": 256, "share": 0.5}
    assert [row["kv"] for row in saved["curve"]] == sorted(row["kv"] for row in saved["curve"])
    assert all(row["error"] <= row["symmetric_error"] + 1e-12 for row in saved["curve"])
    assert saved["figure"] is None and "maximum_context" not in saved["serving"]


def test_options_of_a_plan_reach_it(place):
    saved = {"statistics": place / "s.safetensors", **OPTIONS}
    small = plan_checkpoint(place / "model", kv=0.25, memory_bytes=1e9, **saved)
    assert (small["plan"]["d_qk"], small["plan"]["d_vo"]) == (4, 4)
    context = small["serving"]["maximum_context"][0]
    assert context["latent"] == pytest.approx(4 * context["original"], rel=0.01)
    engine = plan_checkpoint(place / "model", engine="mlx", **saved)["plan"]
    assert (engine["d_qk"], engine["d_vo"], engine["table"], engine["engine"]) == (8, 8, "model", "mlx")
    layers = plan_checkpoint(place / "model", kv=0.4, per_layer=True, table="layer", **saved)["plan"]
    assert layers["table"] == "layer" and layers["share"] <= 0.4
    wider = plan_checkpoint(place / "model", kv=0.5, **saved)["plan"]
    assert wider["predicted_error"]["keys"] < small["plan"]["predicted_error"]["keys"]


def test_a_picture(place, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("kvlatent.workflows.calibrate_and_plan.check_picture", lambda path, overwrite: "svg")
    monkeypatch.setattr(
        "kvlatent.workflows.calibrate_and_plan.draw_error_curve",
        lambda curve, path, overwrite: drawn.append((len(curve), path)),
    )
    figure = tmp_path / "curve.svg"
    document = plan_checkpoint(place / "model", statistics=place / "s.safetensors", figure=figure, **OPTIONS)
    assert drawn == [(len(document["curve"]), figure)] and document["figure"] == str(figure)


def test_a_picture_that_cannot_be_is_refused_before_any_work(place, tmp_path):
    def call(figure):
        plan_checkpoint(place / "model", statistics=tmp_path / "none.safetensors", figure=figure, **OPTIONS)

    with pytest.raises(ValueError, match="the picture is one of svg, png, pdf: got 'a.gif'"):
        call(tmp_path / "a.gif")
    (tmp_path / "a.svg").write_text("mine")
    with pytest.raises(FileExistsError, match="a.svg exists; choose another name or pass overwrite"):
        call(tmp_path / "a.svg")
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ValueError, match="needs matplotlib; pip install"):
            call(tmp_path / "b.svg")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, ValueError, "looks at one text, or at the statistics of one: got neither; give --data FILE or"),
        ({"data": "text.txt", "statistics": "s.safetensors"}, ValueError, "got both; give --data FILE or"),
        ({"statistics": "none.safetensors"}, FileNotFoundError, "no statistics at .*kvlatent calibrate"),
        ({"statistics": "text.txt"}, ValueError, "text.txt is damaged"),
        ({"data": "none.txt"}, FileNotFoundError, "none.txt"),
        ({"kv": 0.1}, ValueError, "smallest widths are d_qk=4 and d_vo=4; try 0.25"),
        ({"kv": 1.5}, ValueError, "got 1.5"),
        ({"engine": "vlm"}, ValueError, "unknown engine 'vlm'"),
        ({"engine": "mlx", "per_layer": True}, ValueError, "the same widths in every layer"),
        ({"memory_bytes": 1000.0}, ValueError, "the memory must hold the weights"),
        ({"table": "all"}, ValueError, "unknown table 'all'"),
        ({"device": "tpu"}, ValueError, "got 'tpu'"),
    ],
)
def test_mistakes_of_a_plan(place, options, error, sentence):
    files = {name: place / value for name, value in options.items() if name in ("data", "statistics")}
    with pytest.raises(error, match=sentence):
        plan_checkpoint(place / "model", **{**OPTIONS, **options, **files})


def test_mistakes_of_a_calibration(place, tmp_path, tiny_tokenizer):
    def call(out, data=place / "text.txt", model=place / "model", **options):
        return calibrate_checkpoint(model, data, out, **{**OPTIONS, **options})

    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="mine exists; choose another name or pass overwrite"):
        call(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a directory; give the name of a file"):
        call(tmp_path)
    with pytest.raises(ValueError, match="cannot create .*nowhere is not a directory"):
        call(tmp_path / "nowhere" / "s")
    with pytest.raises(
        ValueError, match="needs at least .* = 64 tokens.*got 32; give more text or more blocks"
    ):
        call(tmp_path / "s", blocks=1)
    short = tmp_path / "short.txt"
    short.write_text("A cat.")
    with pytest.raises(ValueError, match="the text must fill a block"):
        call(tmp_path / "s", short)
    with pytest.raises(FileNotFoundError, match="neither a local directory or GGUF file nor"):
        call(tmp_path / "s", model=tmp_path / "no-model")
    other = write_checkpoint(tmp_path / "other", tiny_tokenizer, initializer_range=0.1)
    with pytest.raises(ValueError, match="the statistics are of another model"):
        plan_checkpoint(other, statistics=place / "s.safetensors", **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other", "short.txt"]
    assert (tmp_path / "mine").read_text() == "mine"

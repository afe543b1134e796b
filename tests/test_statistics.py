"""Statistics on disk, and whose they are."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from calibration_setup import short_descent, text
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.fingerprints import model_fingerprint
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.statistics import LayerStatistics, Statistics
from tiny import FAMILIES, logits, tiny_model, tokens


@pytest.fixture(scope="module")
def gathered():
    return calibrate(tiny_model("llama"), text())


@pytest.fixture
def path(gathered, tmp_path):
    gathered.save(tmp_path / "llama.safetensors")
    return tmp_path / "llama.safetensors"


def rewrite(path, change):
    """The file with its tensors and metadata changed by `change`."""
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, metadata=about)


def test_a_round_trip_keeps_every_bit(gathered, path):
    found = Statistics.load(path)
    assert len(found.layers) == len(gathered.layers) == 3
    for ours, theirs in zip(found.layers, gathered.layers, strict=True):
        for field in dataclasses.fields(LayerStatistics):
            tensor = getattr(ours, field.name)
            assert tensor.dtype == torch.float64 and torch.equal(tensor, getattr(theirs, field.name))
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(found, name), getattr(gathered, name))
    for name in ("fingerprint", "num_key_value_heads", "head_dim", "tokens", "num_heads"):
        assert getattr(found, name) == getattr(gathered, name)
    assert (found.num_key_value_heads, found.head_dim, found.num_heads, found.tokens) == (2, 32, 4, 256)


def test_one_pass_serves_any_widths_after_loading(gathered, path):
    model, loaded = tiny_model("llama"), Statistics.load(path)
    for d_qk, d_vo in ((16, 32), (32, 8), ([8, 16, 32], 12)):
        with short_descent():
            ours, theirs = (
                convert(model, d_qk=d_qk, d_vo=d_vo, align=2, statistics=s) for s in (loaded, gathered)
            )
        assert torch.equal(logits(ours, tokens()), logits(theirs, tokens()))


def test_a_file_of_before_with_tensors_that_nothing_reads_is_read(gathered, path):
    wanted = Statistics.load(path)
    rewrite(
        path,
        lambda about, tensors: tensors.update({f"layers.{n}.gram": torch.ones(4, 16, 16) for n in range(3)}),
    )
    found = Statistics.load(path)
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        assert all(torch.equal(tensor, vars(theirs)[name]) for name, tensor in vars(ours).items())
    assert found.fingerprint == wanted.fingerprint and torch.equal(found.input_ids, wanted.input_ids)


def test_views_are_saved_and_folders_made(gathered, tmp_path):
    batch = {name: value.int() for name, value in text(packed=False).items()}
    batch["position_ids"] = batch["position_ids"][:1].expand(4, -1)  # one row, seen four times
    batch["input_ids"] = batch["input_ids"].T.contiguous().T
    made = calibrate(tiny_model("llama"), batch)
    made.save(tmp_path / "new" / "folder" / "s.safetensors")
    assert torch.equal(
        Statistics.load(tmp_path / "new/folder/s.safetensors").position_ids, batch["position_ids"]
    )


def test_an_existing_file_is_replaced_on_demand_only(gathered, path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name or pass overwrite"):
        gathered.save(path)
    assert path.read_bytes() == before
    dataclasses.replace(gathered, fingerprint="other").save(path, overwrite=True)
    assert Statistics.load(path).fingerprint == "other"


def test_a_failed_write_leaves_nothing_and_keeps_the_old(gathered, path, monkeypatch):
    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr("kvlatent.selection.statistics.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        gathered.save(path, overwrite=True)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path):
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no statistics at {missing}; make them with"):
            Statistics.load(missing)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_file_is_damaged(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="llama.safetensors is damaged .*; calibrate the model again"):
        Statistics.load(path)


def test_other_files_are_not_statistics(path, tmp_path):
    path.write_bytes(b"not safetensors at all, but long enough")
    with pytest.raises(ValueError, match="is damaged"):
        Statistics.load(path)
    for about in (None, {"format": "pt"}, {"format": "1"}):
        save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "other", metadata=about)
        with pytest.raises(ValueError, match="other is not a file of statistics; make one with"):
            Statistics.load(tmp_path / "other")


DAMAGE = [
    lambda about, tensors: tensors.pop("layers.1.output_gram"),
    lambda about, tensors: tensors.pop("input_ids"),
    lambda about, tensors: about.pop("fingerprint"),
    lambda about, tensors: about.pop("sizes"),
    lambda about, tensors: about.update(sizes="[2"),
    lambda about, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("layers.")],
    lambda about, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("layers.0.")],
    lambda about, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("layers.2.")],
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_with_something_missing_is_damaged(path, damage):
    rewrite(path, damage)
    with pytest.raises(ValueError, match="llama.safetensors is damaged .*; calibrate the model again"):
        Statistics.load(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_checkpoint_loaded_again_has_the_same_fingerprint(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_fingerprint(again) == model_fingerprint(model)


def test_another_model_has_another_fingerprint(gathered):
    model = tiny_model("llama")
    gathered.check(model)
    others = [tiny_model("llama-mha"), tiny_model("llama-3.1"), tiny_model("llama").bfloat16()]
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        other = tiny_model("llama")
        with torch.no_grad():
            other.get_parameter(name).mul_(1 + 1e-5)
        others.append(other)
    for other in others:
        with pytest.raises(
            ValueError,
            match=f"of another model, .* than {str(other.dtype)[6:]}: .* calibrate",
        ):
            gathered.check(other)
        with pytest.raises(ValueError, match="statistics are of another model"):
            convert(other, d_qk=16, d_vo=16, statistics=gathered)


def test_the_window_and_the_norm_belong_to_the_fingerprint():
    plain = tiny_model("mistral")
    for name, value in (("sliding_window", 7), ("rms_norm_eps", 1e-3)):
        other = tiny_model("mistral")
        setattr(other.config, name, value)
        assert model_fingerprint(other) != model_fingerprint(plain)


def test_the_rotation_belongs_to_the_fingerprint():
    plain, scaled = (tiny_model("llama-mha", rope_parameters={"rope_type": "default", "rope_theta": t})
                     for t in (1e4, 5e5))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert model_fingerprint(plain) != model_fingerprint(scaled)

"""Conversions that hold one layer at a time: the numbers of those in memory, and what survives kills and full disks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlatent.checkpoints import shard_output
from kvlatent.checkpoints.resident_layers import ResidentLayers
from kvlatent.checkpoints.sharded import open_sharded
from kvlatent.conversion import convert_model
from kvlatent.jobs.fingerprints import model_fingerprint
from kvlatent.model.families import attention_layers_of
from kvlatent.selection.choices import NO_DATA
from kvlatent.workflows import streamed_conversion, streamed_plan
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from on_disk import snapshot, write_checkpoint, write_text
from tiny import FAMILIES, MORE_FAMILIES, tiny_model

RECIPE = ["data.block_size=32", "conversion.align=3", "calibration.blocks=8", "conversion.global_steps=0"]
HALF = {"d_qk": 8, "d_vo": 8, "device": "cpu"}
CALIBRATED = {**HALF, "overrides": RECIPE}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    """model of three layers in shards of 20 kB, and text.txt."""
    folder = tmp_path_factory.mktemp("streaming")
    write_sharded(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    return folder


def write_sharded(folder: Path, tokenizer, **overrides) -> Path:
    write_checkpoint(folder, tokenizer, num_hidden_layers=3, **overrides)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "LICENSE").write_text("ours")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def difference(one: Path, other: Path) -> float:
    """Largest, relative to the tensor's largest entry; of checkpoints with the same names, dtypes and config."""
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)


def convert_both(model: Path, folder: Path, **options) -> tuple[Path, Path]:
    for name, stream in (("resident", False), ("streamed", True)):
        convert_checkpoint(model, folder / name, stream=stream, **options)
    return folder / "resident", folder / "streamed"


@pytest.mark.filterwarnings("ignore:.*looks at no text|no text to calibrate|nothing is measured")
@pytest.mark.parametrize("name", FAMILIES | MORE_FAMILIES)
def test_without_text_every_family_is_that_in_memory(name, tmp_path, tiny_tokenizer):
    model = tiny_model(name, vocab_size=320)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert difference(*convert_both(tmp_path / "model", tmp_path, d_qk=16, d_vo=16, device="cpu")) == 0


@pytest.mark.filterwarnings("ignore:.*looks at no text|no text to calibrate|nothing is measured")
@pytest.mark.parametrize(
    "options",
    [{"preset": "paper"}, {"preset": "own-frequency"}, {"table": "model"}, {"d_qk": (8, 16, 4)}, {"d_qk": 16, "d_vo": 16}],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_without_text_every_choice_is_that_in_memory(options, place, tmp_path):
    assert difference(*convert_both(place / "model", tmp_path, **{**HALF, **options})) == 0


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2-window", "qwen3", "phi3-longrope"])
def test_calibrated_families_are_those_in_memory(name, place, tmp_path, tiny_tokenizer):
    tiny_model(name, vocab_size=320).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = {**CALIBRATED, "d_qk": 16, "d_vo": 16, "data": place / "text.txt"}
    assert difference(*convert_both(tmp_path / "model", tmp_path, **options)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("qwen3.5", "gpt-neox") else pytest.mark.nightly)
        for name in MORE_FAMILIES
    ],
)
def test_calibrated_families_with_other_layers_are_those_in_memory(name, place, tmp_path, tiny_tokenizer):
    """Experts are stacked, layers without attention passed by, and whatever stands around an attention is upstream's."""
    tiny_model(name, vocab_size=320).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    recipe = ["data.block_size=32", "conversion.align=1", "calibration.blocks=4", "conversion.global_steps=0"]
    options = {"d_qk": 16, "d_vo": 16, "device": "cpu", "overrides": recipe, "data": place / "text.txt"}
    resident, streamed = convert_both(tmp_path / "model", tmp_path, **options)
    assert difference(resident, streamed) < 1e-5
    tuned = json.loads((streamed / "run.json").read_text())["conversion"]["tuned"]
    assert tuple(row["layer"] for row in tuned) == attention_layers_of(tiny_model(name).config)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3.5", "gpt-neox"])
def test_a_streamed_fingerprint_is_that_in_memory(name, tmp_path):
    """Of experts, whose entries are read out of the parts that they are stored in."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    layers = ResidentLayers(open_sharded(tmp_path, model.config), model.config, torch.float32, "cpu")
    assert streamed_conversion._fingerprint(layers) == model_fingerprint(model)
    changed = tiny_model(name, vocab_size=130)
    assert model_fingerprint(changed) != model_fingerprint(model)


@pytest.mark.parametrize(
    "options",
    [{"table": "layer"}, {"table": "model"}, {"d_qk": (8, 16, 4), "d_vo": 16}, {"align": 0}, {"d_qk": 16}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_calibrated_choices_are_those_in_memory(options, place, tmp_path):
    options = {**CALIBRATED, "data": place / "text.txt", **options}
    assert difference(*convert_both(place / "model", tmp_path, **options)) < 1e-5


def test_with_products_in_bfloat16_the_statistics_keep_their_own_states(place, tmp_path, monkeypatch):
    for module in (convert_model, streamed_conversion):
        monkeypatch.setattr(module, "faster_dtype", lambda config, device: "bfloat16")
    assert difference(*convert_both(place / "model", tmp_path, **CALIBRATED, data=place / "text.txt")) < 1e-5


def test_a_model_of_one_layer_and_one_head_has_the_table_of_its_layer(place, tmp_path, tiny_tokenizer):
    write_checkpoint(tmp_path / "model", tiny_tokenizer, num_hidden_layers=1, num_key_value_heads=1)
    assert (
        difference(*convert_both(tmp_path / "model", tmp_path, **CALIBRATED, data=place / "text.txt")) < 1e-5
    )


def test_statistics_of_an_earlier_calibration_serve(place, tmp_path, tiny_tokenizer):
    calibrate_checkpoint(place / "model", place / "text.txt", tmp_path / "s", overrides=RECIPE, device="cpu")
    assert (
        difference(*convert_both(place / "model", tmp_path, **CALIBRATED, statistics=tmp_path / "s")) < 1e-5
    )
    write_checkpoint(tmp_path / "model", tiny_tokenizer, dtype=torch.float32, initializer_range=0.1)
    with pytest.raises(ValueError, match="the statistics are of another model"):
        convert_checkpoint(
            tmp_path / "model", tmp_path / "out", stream=True, statistics=tmp_path / "s", **CALIBRATED
        )
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="module")
def streamed(place) -> dict:
    return convert_checkpoint(
        place / "model", place / "streamed", stream=True, data=place / "text.txt", **CALIBRATED
    )


def test_what_is_written_loads_and_says_how_it_was_made(place, streamed):
    out = place / "streamed"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    assert len(AutoTokenizer.from_pretrained(out)) == 300
    assert (out / "LICENSE").read_text() == "ours"
    source = json.loads((place / "model" / "generation_config.json").read_text())
    assert json.loads((out / "generation_config.json").read_text()) == source
    assert json.loads((out / "run.json").read_text()) == streamed
    assert "--stream" in streamed["command"] and streamed["figures"] == {}
    assert "nothing is measured" in streamed["plan"]["notes"][0]
    assert [row["layer"] for row in streamed["conversion"]["tuned"]] == [0, 1, 2]
    assert streamed["plan"]["choices"]["global_steps"] == 0
    assert "global_steps: 0" in (out / "recipe.yaml").read_text()
    assert not (place / "streamed.partial").exists()


def test_a_share_is_split_evenly_and_says_so(place, tmp_path):
    options = {"overrides": RECIPE[:-1], "device": "cpu", "data": place / "text.txt", "stream": True}
    plan = convert_checkpoint(place / "model", tmp_path / "out", kv=0.5, dry_run=True, **options)["plan"]
    assert (plan["d_qk"], plan["d_vo"], plan["calibration_blocks"]) == (8, 8, 8)
    assert any("split evenly" in note for note in plan["notes"])
    assert plan["notes"][-1].startswith("predicted: 0.6 GB of memory, 0.0 GB on the disk of the output")
    assert list(tmp_path.iterdir()) == []


def test_it_is_chosen_where_the_model_does_not_fit(place, tmp_path, monkeypatch):
    asked = {**HALF, "dry_run": True}
    plan = convert_checkpoint(place / "model", tmp_path / "out", **asked)["plan"]
    assert plan["notes"][0] == NO_DATA and not any("streamed" in note for note in plan["notes"])
    monkeypatch.setattr(streamed_plan, "free_memory", lambda device: 100_000)
    notes = convert_checkpoint(place / "model", tmp_path / "out", **asked)["plan"]["notes"]
    assert any("streamed, layer by layer, as it takes about 0.0 GB at once" in note for note in notes)


def test_experts_that_do_not_fit_together(tmp_path, tiny_tokenizer):
    """One is missing, or has another shape: what they become is named."""
    model = tmp_path / "model"
    tiny_model("mixtral", vocab_size=320).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    shard, name = model / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    stored = load_file(shard)
    for tensors in (
        {key: tensor for key, tensor in stored.items() if key != name},
        stored | {name: torch.zeros(3, 64)},
    ):
        save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="1 mismatched tensors, e.g. model.layers.1.mlp.experts.gate_up"):
            convert_checkpoint(model, tmp_path / "out", stream=True, preset="own-frequency", **HALF)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_conversion_that_was_killed_ends_as_one_that_was_not(tmp_path, tiny_tokenizer):
    write_sharded(tmp_path / "model", tiny_tokenizer)
    write_text(tmp_path / "text.txt")
    before = snapshot(tmp_path / "model")
    worker = Path(__file__).with_name("streaming_worker.py")
    subprocess.run(
        [sys.executable, worker, tmp_path, "4"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert [status for status, _ in kills].count(-9) >= 2
    whole, killed = (
        {name: data for name, data in snapshot(tmp_path / each).items() if name.endswith(".safetensors")}
        for each in ("whole", "killed")
    )
    assert whole == killed and len(whole) == 5
    assert not (tmp_path / "killed.partial").exists()
    assert snapshot(tmp_path / "model") == before


def test_a_full_disk_leaves_finished_layers_to_go_on_from(place, streamed, tmp_path, monkeypatch):
    save_file, calls = shard_output.save_file, []

    def full_at_the_third(tensors, path, **more):
        calls.append(path)
        if len(calls) == 3:
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        save_file(tensors, path, **more)

    monkeypatch.setattr(shard_output, "save_file", full_at_the_third)
    call = {"stream": True, "data": place / "text.txt", **CALIBRATED}
    with pytest.raises(OSError, match="cannot write the weights .*No space left"):
        convert_checkpoint(place / "model", tmp_path / "out", **call)
    assert not (tmp_path / "out").exists()
    left = [file.name for file in (tmp_path / "out.partial" / "out").iterdir()]
    assert sorted(left) == ["model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"]
    with pytest.raises(ValueError, match="another conversion.align"):
        convert_checkpoint(place / "model", tmp_path / "out", **{**call, "align": 2})
    calls.clear()
    monkeypatch.setattr(shard_output, "save_file", save_file)
    convert_checkpoint(place / "model", tmp_path / "out", **call)
    assert difference(place / "streamed", tmp_path / "out") == 0


def test_a_kill_between_the_last_rename_and_the_end_is_a_finished_run(place, streamed, tmp_path, monkeypatch):
    call = {"stream": True, "data": place / "text.txt", **CALIBRATED}
    with monkeypatch.context() as patched:
        patched.setattr(streamed_conversion.WorkDirectory, "remove", lambda self: None)
        record = convert_checkpoint(place / "model", tmp_path / "out", **call)
    assert (tmp_path / "out.partial").exists()
    assert convert_checkpoint(place / "model", tmp_path / "out", **call) == record
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(FileExistsError, match="already holds something"):
        convert_checkpoint(place / "model", tmp_path / "out", **call)
    convert_checkpoint(place / "model", tmp_path / "out", overwrite=True, **{**call, "d_vo": 4})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["v_head_dim"] == 4


# What is refused, each before anything is written.


@pytest.fixture
def damaged(tmp_path, tiny_tokenizer):
    """Change a sharded checkpoint, then expect a sentence of its streamed conversion, and nothing written or changed."""
    model = write_sharded(tmp_path / "model", tiny_tokenizer)

    def call(change, match: str, error=ValueError, **options) -> None:
        change(model)
        before = snapshot(model)
        with pytest.raises(error, match=match):
            convert_checkpoint(
                **{
                    "model": model,
                    "out": tmp_path / "out",
                    "stream": True,
                    **HALF,
                    "preset": "paper",
                    **options,
                }
            )
        assert snapshot(model) == before
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    return call


def rewrite(file: Path, change) -> None:
    """Change the tensors of one shard."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def edit_index(model: Path, change) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_tensor_that_no_shard_has(damaged):
    def change(model):
        name = "model.layers.1.mlp.up_proj.weight"
        for shard in shards(model):
            rewrite(shard, lambda tensors: tensors.pop(name, None))
        edit_index(model, lambda listed: listed.pop(name))

    damaged(change, r"do not fit its config: 1 missing tensors, e.g. model.layers.1.mlp.up_proj.weight")


def test_a_tensor_that_the_model_has_not(damaged):
    def change(model):
        rewrite(shards(model)[0], lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
        edit_index(model, lambda listed: listed.update({"model.extra": shards(model)[0].name}))

    damaged(change, "1 unexpected tensors, e.g. model.extra")


def test_a_tensor_of_another_shape(damaged):
    damaged(
        lambda model: rewrite(shards(model)[-1], lambda t: t.update({n: torch.zeros(3) for n in t})),
        "mismatched tensors",
    )


def test_a_tensor_in_two_shards(damaged):
    def change(model):
        first, last = shards(model)[0], shards(model)[-1]
        rewrite(last, lambda tensors: tensors.update(load_file(first)))

    damaged(change, r"a tensor lies in one shard: .* is in model-00001-.* and in model-")


def test_an_index_that_names_another_shard(damaged):
    def change(model):
        edit_index(model, lambda listed: listed.update({"model.norm.weight": shards(model)[0].name}))

    damaged(
        change, r"the index of .* disagrees with its shards: model.norm.weight is listed in .* and lies in"
    )


def test_an_index_that_leaves_a_tensor_out(damaged):
    damaged(
        lambda model: edit_index(model, lambda listed: listed.pop("model.norm.weight")),
        "model.norm.weight is not listed and lies in",
    )


def test_an_index_of_a_tensor_that_is_nowhere(damaged):
    def change(model):
        edit_index(model, lambda listed: listed.update({"model.extra": shards(model)[0].name}))

    damaged(change, "model.extra is listed in .* and in none of them")


def test_a_shard_that_is_not_there(damaged):
    damaged(lambda model: shards(model)[1].unlink(), "lacks 1 of .* weight shards")


def test_a_shard_that_was_cut_short_before(damaged):
    def change(model):
        os.truncate(shards(model)[1], shards(model)[1].stat().st_size - 8)

    damaged(change, "is truncated or damaged")


def test_a_shard_larger_than_any_memory_is_not_mapped(tmp_path):
    """Of a file without content: mapping a whole checkpoint of 70 B fails on most machines."""
    count = 2**40
    header = json.dumps({"w": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * count)
    weights = open_sharded(tmp_path, None)
    assert weights.num_bytes() == 2 * count
    assert weights.sample("w", torch.float32).tolist() == [0] * 64


def test_a_shard_that_is_cut_short_while_it_is_read(tmp_path, tiny_tokenizer, monkeypatch):
    model = write_sharded(tmp_path / "model", tiny_tokenizer)

    def cut(place, costs):
        os.truncate(shards(model)[-1], shards(model)[-1].stat().st_size - 8)

    monkeypatch.setattr(streamed_conversion, "check_space", cut)
    match = r"ends 8 bytes before its tensor .* does; it was cut short while it was read"
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(model, tmp_path / "out", stream=True, **HALF, preset="paper")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_quantised_tensor(damaged):
    def change(model):
        rewrite(shards(model)[0], lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()}))

    damaged(change, "weights are floating-point numbers of 16 bits or more: .* is I8")


def test_a_number_that_is_none(damaged):
    def change(model):
        rewrite(shards(model)[0], lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan))

    damaged(change, r"weights must be finite: .* has NaN or infinity in .*\.weight")


def test_mixed_dtypes_become_one_with_a_warning(place, tmp_path, tiny_tokenizer):
    model = write_sharded(tmp_path / "model", tiny_tokenizer)
    rewrite(shards(model)[0], lambda t: t.update({n: x.double() for n, x in t.items()}))
    options = {**HALF, "preset": "own-frequency"}
    with pytest.warns(
        UserWarning, match=r"of several dtypes \(float32, float64\); all are written in float32"
    ):
        convert_checkpoint(model, tmp_path / "streamed", stream=True, **options)
    convert_checkpoint(place / "model", tmp_path / "resident", **options)
    assert difference(tmp_path / "resident", tmp_path / "streamed") == 0


def test_an_output_on_the_inputs_path(damaged, tmp_path):
    for out in ("model", "model/out", "link"):
        (tmp_path / "link").exists() or (tmp_path / "link").symlink_to(tmp_path / "model")
        damaged(lambda model: None, "an output must be apart from what it is made from", out=tmp_path / out)


def test_unfinished_work_on_the_inputs_path(tmp_path, tiny_tokenizer):
    model = write_sharded(tmp_path / "out.partial", tiny_tokenizer)
    with pytest.raises(ValueError, match="an output must be apart"):
        convert_checkpoint(model, tmp_path / "out", stream=True, **HALF)


def test_a_disk_without_room(damaged, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(streamed_plan.shutil, "disk_usage", lambda path: usage)
    damaged(lambda model: None, r"take 0.000 GB at the most: .* has 0.000 GB free; make room")


def test_a_device_without_room_for_one_layer(damaged, monkeypatch):
    monkeypatch.setattr(streamed_conversion, "free_memory", lambda device: 1e3)
    damaged(lambda model: None, r"holds one layer twice, 0.1 MB: 0.0 MB of memory are free; free some")
    check = streamed_conversion._check_device

    def on_gpu(layers, plan):
        check(layers, replace(plan, device="cuda"))

    monkeypatch.setattr(streamed_conversion, "_check_device", on_gpu)
    damaged(lambda model: None, "MB of the GPU are free; use --device cpu")


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"per_layer": True, "kv": 0.5}, "--per-layer measures what the whole model loses"),
        ({"minutes": 5}, "--minutes times the whole model"),
        ({"explain": True}, "--explain converts the whole model"),
        ({"global_steps": 3}, "--global-steps are steps on all layers at once"),
        ({"eval_data": "text.txt"}, "measures nothing: got --eval-data"),
    ],
)
def test_what_needs_the_whole_model(option, match, place, tmp_path):
    widths = {"device": "cpu"} if "kv" in option else HALF
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(
            place / "model", tmp_path / "out", stream=True, data=place / "text.txt", **widths, **option
        )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_directory_of_safetensors(make_gguf, tmp_path):
    for model in ("owner/name", make_gguf()):
        with pytest.raises((ValueError, FileNotFoundError)):
            convert_checkpoint(model, tmp_path / "out", stream=True, **HALF)
    with pytest.raises(ValueError, match="--stream reads the safetensors of a local directory"):
        convert_checkpoint(make_gguf(), tmp_path / "out", stream=True, **HALF)

"""Directories of multimodal checkpoints: every command works on the language model inside; what is written is whole again."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.self_check import SELF_CHECK, SelfCheck
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint, plan_checkpoint
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.engine_choice import Runner, choose_runnable
from kvlatent.workflows.export_checkpoint import export
from kvlatent.workflows.generate import continue_text
from kvlatent.workflows.inspect_checkpoint import describe
from kvlatent.workflows.slice_checkpoint import slice_checkpoint
from kvlatent.workflows.train_checkpoint import train
from on_disk import snapshot, write_text
from test_wrappers import IMAGES, outside, tiny_wrapper, with_image
from tiny import logits

NAMES = ("gemma3", "llava", "lfm2-vl")
CARRIED = {"preprocessor_config.json": '{"size": 16}\n', "processor_config.json": "{}\n", "LICENSE": "free\n"}


def stored(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """Originals in bfloat16, but for one tensor of a tower, and a text."""
    place = tmp_path_factory.mktemp("wrappers")
    for name in NAMES:
        tiny_wrapper(name, vocab_size=300).to(torch.bfloat16).save_pretrained(place / name)
        tiny_tokenizer.save_pretrained(place / name)
        for file, content in CARRIED.items():
            (place / name / file).write_text(content)
    write_text(place / "text.txt")
    return place


@pytest.fixture(scope="module")
def converted(place):
    overrides = ["data.block_size=32", "calibration.blocks=4"]
    options = {
        "data": place / "text.txt",
        "d_qk": 16,
        "d_vo": 16,
        "align": 1,
        "global_steps": 1,
        "overrides": overrides,
    }
    before = {name: snapshot(place / name) for name in NAMES}
    records = {name: convert_checkpoint(place / name, place / f"{name}-latent", **options) for name in NAMES}
    assert before == {name: snapshot(place / name) for name in NAMES}
    return records


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_is_converted_and_all_else_carried_over(place, converted, name):
    out, source = place / f"{name}-latent", place / name
    assert 1 < converted[name]["figures"]["latent"]["ratio"] < 10
    config = json.loads((out / "config.json").read_text())
    assert (
        config["model_type"] == f"kv_latent_{json.loads((source / 'config.json').read_text())['model_type']}"
    )
    assert load_config(out).qk_head_dim == load_config(out).v_head_dim == 16
    for file, content in CARRIED.items():
        assert (out / file).read_text() == content
    original = AutoModelForImageTextToText.from_pretrained(source)
    whole = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=False)
    ours, theirs = outside(whole), outside(original)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in theirs.items())
    assert "README.md" in os.listdir(out) and "run.json" in os.listdir(out)
    ids = torch.arange(20)[None]
    text = load_model(out)
    torch.testing.assert_close(logits(text, ids), logits(whole, ids), rtol=0, atol=0)
    check = SelfCheck.from_dict(json.loads((out / SELF_CHECK).read_text()))
    assert check.difference(logits(text, torch.tensor([check.input_ids]))[0]) == pytest.approx(0, abs=1e-5)


def test_what_stands_in_a_tower_keeps_its_dtype(place):
    """Whatever dtype the language model is computed in."""
    stated = stored(place / "llava")
    name = next(n for n in stated if "patch_embedding" in n)
    files = [file for file in (place / "llava").iterdir() if file.name != "model.safetensors"]
    mixed = place / "mixed"
    mixed.mkdir()
    for file in files:
        shutil.copy(file, mixed)
    save_file(stated | {name: stated[name].float() + 1e-6}, mixed / "model.safetensors", {"format": "pt"})
    convert_checkpoint(mixed, place / "mixed-latent", d_qk=16)
    found = next(tensor for n, tensor in stored(place / "mixed-latent").items() if "patch_embedding" in n)
    assert found.dtype == torch.float32 and torch.equal(found, stated[name].float() + 1e-6)


LOAD = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    ids, given, wanted = torch.load(folder + ".expected.pt")
    with torch.no_grad():
        off = float((model(ids, **given).logits - wanted).abs().max() / wanted.abs().max())
    text = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("the cat")["input_ids"]
    print(json.dumps([off, text, "kvlatent" in sys.modules]))
"""


def test_the_result_loads_in_a_fresh_process_with_its_images(place, converted, tiny_tokenizer):
    folders = [place / f"{name}-latent" for name in NAMES if name in IMAGES]
    for folder in folders:
        ids, given = with_image(folder.name.removesuffix("-latent"))
        given = {n: t.bfloat16() if t.is_floating_point() else t for n, t in given.items()}
        model = AutoModelForImageTextToText.from_pretrained(folder)
        torch.save((ids, given, logits(model, ids, **given)), f"{folder}.expected.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(place / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[1:] for line in lines] == [[tiny_tokenizer("the cat")["input_ids"], False]] * 2
    assert all(off <= 1e-2 for off, *_ in lines)  # bfloat16
    other = tiny_wrapper("gemma3", vocab_size=300)
    ids, given = with_image("gemma3")
    assert (logits(other, ids, **given) - torch.load(f"{folders[0]}.expected.pt")[2]).abs().max() > 0.1


def test_commands_that_read_see_the_language_model(place, converted):
    original, latent = describe(place / "gemma3"), describe(place / "gemma3-latent")
    assert (original["family"], original["wrapper"]) == ("gemma3_text", "gemma3")
    assert (latent["is_latent"], latent["wrapper"], latent["d_qk"]) == (True, "kv_latent_gemma3", 16)
    assert latent["figures"] == converted["gemma3"]["figures"]
    data, small = place / "text.txt", ["data.block_size=32", "calibration.blocks=4"]
    record = calibrate_checkpoint(place / "llava", data, place / "seen.safetensors", overrides=small)
    assert record["blocks"] == 4
    statistics = place / "seen.safetensors"
    plan = plan_checkpoint(place / "llava", kv=0.5, statistics=statistics)
    assert {"d_qk", "d_vo"} <= plan["plan"].keys()
    convert_checkpoint(place / "llava", place / "by-statistics", d_qk=16, statistics=statistics, align=1)
    assert load_config(place / "by-statistics").qk_head_dim == 16
    continued = continue_text(place / "gemma3-latent", "the cat", max_new_tokens=3, temperature=0.0)
    assert continued["prompt"] == "the cat"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda model, out: export(model, out, to="stock"), "an export is of a language model alone: got .*'kv_latent_gemma3'.*kvlatent.save"),
        (lambda model, out: convert_checkpoint(model, out, d_qk=8), "latent already"),
    ],
)  # fmt: skip
def test_what_a_latent_wrapper_cannot_have_is_refused_before_anything_is_written(
    place, converted, refused, message
):
    before = snapshot(place)
    with pytest.raises(ValueError, match=message):
        refused(place / "gemma3-latent", place / "never")
    assert snapshot(place) == before


def test_engines_that_do_not_know_the_wrapper_are_refused(place, converted, monkeypatch):
    monkeypatch.setattr(Runner, "missing", [])
    with pytest.raises(
        ValueError, match="engine vllm runs a language model alone.*use --engine transformers"
    ):
        choose_runnable(place / "gemma3-latent", "vllm", place / "cache")
    chosen = choose_runnable(place / "gemma3-latent", "transformers", place / "cache")
    assert set(chosen.d_qk) == set(chosen.d_vo) == {16}
    assert choose_runnable(place / "gemma3", "vllm", place / "cache").path == str(place / "gemma3")


_TEXT = {"align": 1, "overrides": ["data.block_size=32", "calibration.blocks=4"]}


@pytest.mark.parametrize(
    ("name", "options", "allowed"),
    [
        ("gemma3", _TEXT, 1e-2),  # bfloat16
        ("llava", {"preset": "own-frequency"}, 0),
        ("lfm2-vl", {"preset": "own-frequency"}, 0),
    ],
)
def test_streamed_is_as_in_memory(place, name, options, allowed):
    """Bit for bit without text, and close with it."""
    given = {"d_qk": 16, "d_vo": 16, **options}
    if options is _TEXT:
        given["data"] = place / "text.txt"
    for stream, more in ((False, {"global_steps": 0}), (True, {})):
        convert_checkpoint(place / name, place / f"{name}-{stream}", stream=stream, **given, **more)
    ours, theirs = (
        AutoModelForImageTextToText.from_pretrained(place / f"{name}-{stream}").state_dict()
        for stream in (False, True)
    )
    assert ours.keys() == theirs.keys()
    for tensor, found in ours.items():
        torch.testing.assert_close(theirs[tensor], found, rtol=allowed, atol=allowed, msg=tensor)
    for file, content in CARRIED.items():
        assert (place / f"{name}-True" / file).read_text() == content


def test_a_streamed_training_is_refused(place, converted):
    with pytest.raises(ValueError, match=r"--stream trains a language model alone.*leave --stream out"):
        train(
            place / "llava-latent",
            data=place / "text.txt",
            stage=1,
            out=place / "never",
            teacher=place / "llava",
            overrides=["data.block_size=32"],
            tokens=256,
            stream=True,
        )
    assert not (place / "never").exists()


def test_the_language_model_alone_is_written_and_exported(place, converted, tiny_tokenizer):
    """The next step that the refusal of an export names."""
    save(load_model(place / "gemma3-latent"), place / "alone", tokenizer=tiny_tokenizer)
    assert "vision_config" not in json.loads((place / "alone" / "config.json").read_text())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        logits(load_model(place / "alone"), ids),
        logits(load_model(place / "gemma3-latent"), ids),
        rtol=0,
        atol=0,
    )


def test_a_tower_without_a_tensor_is_refused(place):
    stated = stored(place / "llava")
    name = next(n for n in stated if "patch_embedding" in n)
    lacking = place / "lacking"
    shutil.copytree(place / "llava", lacking)
    save_file({n: t for n, t in stated.items() if n != name}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config: 1 missing keys"):
        convert_checkpoint(lacking, place / "never", d_qk=16)
    assert not (place / "never").exists()


@pytest.mark.filterwarnings("ignore:its channels were never trained")
def test_a_slice_and_a_training_keep_what_stands_around(place, converted):
    latent, out = place / "llava-latent", {name: place / name for name in ("sliced", "trained")}
    slice_checkpoint(latent, out["sliced"], d_qk=8)
    few = [f"stage1.{name}={value}" for name, value in {"batch_size": 4, "save_steps": 2}.items()]
    more = {"tokens": 256, "overrides": ["data.block_size=32", "lora.rank=2", *few]}
    train(latent, data=place / "text.txt", stage=1, out=out["trained"], teacher=place / "llava", **more)
    theirs = outside(AutoModelForImageTextToText.from_pretrained(place / "llava"))
    for name, folder in out.items():
        ours = outside(AutoModelForImageTextToText.from_pretrained(folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items()), name
        assert (folder / "preprocessor_config.json").is_file()
    assert load_config(out["sliced"]).qk_head_dim == 8
    weights = [
        load_model(folder).get_decoder().layers[0].self_attn.q_proj.weight
        for folder in (latent, out["trained"])
    ]
    assert not torch.equal(*weights)

"""Wrong configs, recipes, checkpoints and command lines end in a sentence: some drawn by hypothesis, and those that once did not."""

import json
import struct
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.jobs.atomic import put_in_place, write_atomically
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.config import FORMAT_VERSION, LatentConfig
from kvlatent.selection.latent_config import choose
from on_disk import write_checkpoint
from tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize("kind", ["LatentConfig", "recipe", "checkpoint", "command line"])
def test_drawn_cases(kind):
    from fuzz import measure

    found = measure(50, 1, [kind])
    ended = found["kinds"][kind]["ended"]
    assert found["cases"] == 50 and found["input_unchanged"]
    assert found["faults"] == 0, found["kinds"][kind]["faults"]
    assert kind == "command line" or min(ended["a sentence"], ended["success"]) > 0


@pytest.mark.parametrize("fault", [lambda: {}["x"], lambda: int("x"), lambda: [].index(3)])
def test_the_fuzz_sees_a_fault(monkeypatch, fault):
    """What Python says by itself is no sentence of ours, even where it is a ValueError."""
    import fuzz

    monkeypatch.setitem(fuzz.KINDS, "recipe", (30, lambda place, draw: fault()))
    assert fuzz.measure(3, 0, ["recipe"])["faults"] > 0


def saved_config():
    return json.loads(json.dumps(choose(tiny_model("llama").config, 16, 16).to_dict()))


@pytest.mark.parametrize(
    ("way", "value", "place"),
    [
        (("tables", 0, 0, "switch"), [3], "tables.0.0.switch"),
        (("tables", 0, 0), None, "tables.0.0"),
        (("tables", 0, 0, "short", 0), "0.5", "tables.0.0.short.0"),
        (("selection", "channels", 0, 0, 0), [1], "selection.channels.0.0.0"),
        (("original_head_dim",), "x", "original_head_dim"),
        (("layers",), [], "layers"),
        (("version",), "1", "version"),
    ],
)
def test_a_value_of_another_type_is_named(way, value, place):
    data = saved_config()
    LatentConfig.from_dict(data).check_model(range(3), 2)
    holder = data
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = value
    with pytest.raises(
        ValueError, match=rf"kv_latent in config.json is damaged \({place}: .*convert the model again"
    ):
        LatentConfig.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_what_is_no_mapping_is_damaged(data):
    with pytest.raises(ValueError, match="kv_latent in config.json is damaged"):
        LatentConfig.from_dict(data)


def test_a_later_format_says_so_whatever_else_it_has():
    with pytest.raises(ValueError, match=f"version {FORMAT_VERSION + 1} but this kvlatent reads up to"):
        LatentConfig.from_dict({"version": FORMAT_VERSION + 1, "sizes": 3})


def test_lists_of_no_layer_are_refused():
    data = saved_config()
    data["tables"] = data["selection"]["channels"] = []
    with pytest.raises(ValueError, match="must be listed for the same layers: got 0 and 0"):
        LatentConfig.from_dict(data)


@pytest.mark.parametrize("text", ["2026-13-45", "[" * 5000 + "]" * 5000])
def test_what_yaml_cannot_make_is_not_yaml(tmp_path, text):
    with pytest.raises(ValueError, match="is not YAML; quote it if it is text"):
        Recipe.load(None, [f"seed={text}"])
    (tmp_path / "recipe.yaml").write_text(f"seed: {text}\n")
    with pytest.raises(ValueError, match="recipe.yaml is not YAML: "):
        Recipe.load(tmp_path / "recipe.yaml")


def test_a_header_without_offsets_is_damaged(tmp_path, tiny_tokenizer):
    file = write_checkpoint(tmp_path, tiny_tokenizer) / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = []
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(ValueError, match="is truncated or damaged .*download it again"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("transformers_weights", 3, "transformers_weights in .* is the name of a file: got 3"),
        ("dtype", 0.5, "dtype in the config.json of .* is a type of numbers such as float32: got 0.5"),
        ("dtype", {"a": 1}, "(dtype in the|cannot use).*"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": [1]}, "cannot (load|use) .*"),
    ],
)
def test_fields_that_only_break_when_they_are_used(tmp_path, tiny_tokenizer, field, value, sentence):
    file = write_checkpoint(tmp_path, tiny_tokenizer) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)


def test_a_damaged_tokenizer_does_not_load(tmp_path, tiny_tokenizer, tiny_llama, monkeypatch):
    """The tokenizers library raises bare exceptions for some damage."""
    tiny_tokenizer.save_pretrained(tmp_path)

    def fail(*_, **__):
        raise Exception("expected `,` or `}` at line 2 column 12")  # noqa: TRY002 - as that library does

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(FileNotFoundError, match="has no tokenizer that loads: expected `,`"):
        load_tokenizer(tmp_path, tiny_llama.config)


def test_half_files_of_killed_processes_do_not_get_into_an_output(tmp_path):
    """They lie where a streamed conversion collects its shards, under the number of a process that is gone, or is another."""
    (tmp_path / "work" / "sub").mkdir(parents=True)
    halves = [".a.safetensors.tmp-1", ".b.json.tmp-4999999", "sub/.c.tmp-2"]
    for name in [*halves, ".d.tmp-x", "e.tmp-3", ".gitignore"]:
        (tmp_path / "work" / name).write_text(name)
    put_in_place(tmp_path / "work", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".d.tmp-x",
        ".gitignore",
        "e.tmp-3",
        "sub",
    ]
    assert not list((tmp_path / "out" / "sub").iterdir())


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / ".a.json.tmp-4999999").write_text("hal")
    (tmp_path / ".a.json.tmp-1").write_text("of a process that lives")
    write_atomically(tmp_path / "a.json", lambda file: file.write_text("{}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.tmp-1", "a.json"]

"""Saving, loading in a fresh process with and without kvlatent, and every checkpoint that must be refused."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.remote_code import MODULE_NAME, remote_code
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.atomic import atomic_directory
from kvlatent.model.classes import latent_classes, latent_config_of
from kvlatent.model.config import LatentConfig
from tiny import FAMILIES, logits, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale, assert_same_model

LOAD = """
import json, sys, torch
{prelude}
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder{trust})
    ids, expected, weights = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        logits = model(ids).logits
    state = model.state_dict()
    same = state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    rotary = [m for m in model.modules() if type(m).__name__ == "LatentRotary" and m.tables]
    tables = [m.inv_freq(ids.device, torch.tensor(1)).reshape(-1).tolist() for m in rotary]
    print(json.dumps([same, difference, tables, "kvlatent" in sys.modules]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One saved latent checkpoint per family, with expected logits beside it, and its in-memory tables."""
    folders = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp("hub") / name
        layers = [16, 32, 8] if name in ("llama", "qwen3") else 16
        latent = convert(tiny_model(name), d_qk=layers, d_vo=8, preset="own-frequency")
        save(latent, folder)
        torch.save((tokens(), logits(latent, tokens()), latent.state_dict()), folder / "expected.pt")
        config = latent_config_of(latent.config)
        tables = [config.tables_at(i)[0] for i in range(len(config.tables))]
        folders[name] = folder, [torch.tensor(t.short).tolist() for t in tables]
    return folders


@pytest.mark.parametrize("trust", [False, True])
def test_a_fresh_process_gives_the_same_logits_and_tables(saved, trust, tmp_path):
    """Once with kvlatent imported, once through the checkpoint's own modelling file, kvlatent never imported."""
    code = LOAD.format(
        prelude="" if trust else "import kvlatent", trust=", trust_remote_code=True" if trust else ""
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, *(str(folder) for folder, _ in saved.values())]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout.splitlines()
    for line, (name, (_, tables)) in zip(lines, saved.items(), strict=True):
        same_weights, difference, loaded_tables, has_kvlatent = json.loads(line)
        assert same_weights and difference <= ROUNDING, name  # a mapped file rounds otherwise: tolerances.py
        assert loaded_tables == tables, name
        assert has_kvlatent is not trust


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_config_has_one_source_of_truth(saved, name):
    folder, _ = saved[name]
    data = json.loads((folder / "config.json").read_text())
    latent = latent_config_of(load_model(folder).config)
    assert data["model_type"] == f"kv_latent_{latent.original_model_type}"
    assert (data["qk_head_dim"], data["v_head_dim"]) == (latent.max_d_qk, 8)
    assert data["head_dim"] == max(latent.max_d_qk, 8)
    assert data["rope_parameters"]["rope_type"] == "default"
    assert (
        data["original_rope_parameters"]["rope_type"] == tiny_model(name).config.rope_parameters["rope_type"]
    )
    assert set(data["kv_latent"]) == {
        "version", "widths", "tables", "selection", "original_head_dim", "original_model_type"
    }  # fmt: skip
    assert set(data["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (folder / f"{MODULE_NAME}.py").read_text() == remote_code(latent.original_model_type)


def test_the_latent_config_is_parsed_once_a_model(saved, monkeypatch):
    """By the config, both model classes and every reader; not again by copies, but for another dict or other sizes."""
    folder, parse, calls = saved["llama"][0], LatentConfig.from_dict, []
    monkeypatch.setattr(LatentConfig, "from_dict", lambda data: calls.append(data) or parse(data))
    config = load_model(folder).config
    latent = latent_config_of(config)
    for copied in (config, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and latent_config_of(copied) == latent
    assert len(calls) == 1
    text = config.to_json_string(use_diff=False)
    assert "_parsed" not in text and "_parsed" not in config.to_dict()
    config.kv_latent = copy.deepcopy(config.kv_latent)
    config.kv_latent["selection"]["values"] = "slice"
    assert latent_config_of(config).values == "slice" != latent.values and len(calls) == 2
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="needs one width per layer: got 3 for 2 layers"):
        latent_config_of(config)


@pytest.mark.parametrize("field", ["qk_head_dim", "v_head_dim", "head_dim"])
def test_a_config_that_contradicts_itself_is_refused(saved, tmp_path, field):
    data = json.loads((saved["mistral"][0] / "config.json").read_text())
    config_type = latent_classes("mistral")[0]
    expected, data[field] = data[field], 20
    with pytest.raises(
        ValueError, match=f"{field}=20 but kv_latent says {expected}; kv_latent is the source"
    ):
        config_type(**data)


def test_a_config_without_kv_latent_makes_no_model():
    config_type, _, causal = latent_classes("llama")
    with pytest.raises(ValueError, match="has no 'kv_latent': it is not a latent model"):
        causal(config_type())


def test_key_names_are_upstreams(saved):
    names = set(load_model(saved["llama"][0]).state_dict())
    assert names == set(tiny_model("llama").state_dict())
    assert set(load_model(saved["phi3"][0]).state_dict()) == set(tiny_model("phi3").state_dict())
    extra = set(load_model(saved["qwen3"][0]).state_dict()) - set(tiny_model("qwen3").state_dict())
    assert extra == {f"model.layers.{i}.self_attn.q_map" for i in (0, 2)}  # layer 1 is at full width


def test_auto_model_and_from_config(saved):
    folder, _ = saved["llama-tied"]
    decoder = AutoModel.from_pretrained(folder)
    assert type(decoder).__name__ == "KVLatentLlamaModel"
    causal = load_model(folder)
    x = tokens()
    with torch.no_grad():
        hidden = decoder(x).last_hidden_state
        assert_close_to_scale(hidden, causal.model(x).last_hidden_state, ROUNDING)
    assert causal.lm_head.weight is causal.model.embed_tokens.weight
    contradiction = type(causal.config)
    with pytest.raises(
        ValueError, match="model_type='kv_latent_llama' but kv_latent was made from 'mistral'"
    ):
        contradiction(
            **{
                **causal.config.to_dict(),
                "kv_latent": {**causal.config.kv_latent, "original_model_type": "mistral"},
            }
        )
    fresh = AutoModelForCausalLM.from_config(causal.config)
    assert logits(fresh, x).isfinite().all()


def test_tokenizer_chat_template_generation_config_and_shards_travel(tmp_path, tiny_tokenizer):
    model = tiny_model("llama", vocab_size=300)
    model.generation_config.max_new_tokens = 7
    tiny_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    latent = convert(model, d_qk=16, preset="paper")
    save(
        latent,
        tmp_path / "a",
        tokenizer=tiny_tokenizer,
        card="# card",
        files={"run.json": "{}"},
        max_shard_size="100KB",
    )
    loaded = load_model(tmp_path / "a")
    assert loaded.generation_config.max_new_tokens == 7
    assert (tmp_path / "a" / "README.md").read_text() == "# card" and (tmp_path / "a" / "run.json").exists()
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert_same_model(loaded, latent, tokens())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer("the cat").input_ids == tiny_tokenizer("the cat").input_ids


def test_an_output_that_holds_something_is_refused_and_overwritten_on_demand(tmp_path):
    latent = convert(tiny_model("llama"), d_qk=16, preset="paper")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    with pytest.raises(
        FileExistsError, match="already holds something; give another directory or --overwrite"
    ):
        save(latent, tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").exists()
    save(latent, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists() and load_model(tmp_path / "out")
    with pytest.raises(FileExistsError, match="is a file; give a directory"):
        save(latent, tmp_path / "out" / "config.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")

    with pytest.raises(RuntimeError, match="boom"):
        _fail_in(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "old").exists()


def test_what_a_killed_process_left_is_cleaned_or_put_back(tmp_path):
    dead = 2**22 + 1  # above the kernel's largest process id
    (tmp_path / f".out.tmp-{dead}").mkdir()
    (tmp_path / f".out.old-{dead}").mkdir()
    (tmp_path / f".out.old-{dead}" / "precious").write_text("x")
    with pytest.raises(RuntimeError, match="boom"):
        _fail_in(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "precious").exists()


def test_an_interrupt_between_the_renames_puts_the_old_output_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "precious").exists()


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latent = convert(tiny_model("llama"), d_qk=16, preset="paper")
    for out in (".", "/"):
        with pytest.raises(FileExistsError, match="cannot be replaced as a whole; give the name of a new"):
            save(latent, out, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is not a directory that may be written to"):
        save(latent, "file/out")


def _fail_in(out):
    with atomic_directory(out, overwrite=True) as folder:
        (folder / "half").write_text("y")
        raise RuntimeError("boom")


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from tiny import tiny_model
from kvlatent.conversion.convert_model import convert
from kvlatent.checkpoints.save import save
latent = convert(tiny_model("llama"), d_qk=16, preset="paper")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    save(latent, {out!r})
except OSError as error:
    print("OSError", error.errno)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    code = FULL_DISK.format(tests=os.path.dirname(__file__), out=str(tmp_path / "out"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OSError" in result.stdout, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    save(convert(tiny_model("llama"), d_qk=16, preset="paper"), tmp_path / "m", max_shard_size="100KB")
    return tmp_path / "m"


def test_checkpoints_without_usable_weights_are_refused(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shards[1].name} is truncated or damaged"):
        load_model(folder)
    index = folder / "model.safetensors.index.json"
    listed = index.read_text()
    for damaged in ("{", "{}", "[]", '{"weight_map": {}}'):
        index.write_text(damaged)
        with pytest.raises(ValueError, match="index.json is damaged"):
            load_model(folder)
    index.write_text('{"weight_map": {}, "metadata": {}}')
    with pytest.raises(ValueError, match="index.json lists no weights"):
        load_model(folder)
    index.write_text(listed)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of {len(shards)} weight shards, e.g. {shards[1].name}"):
        load_model(folder)
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no weights: expected model.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"pickled weights only \(pytorch_model.bin\).*convert them to safetensors"
    ):
        load_model(folder)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(convert(tiny_model("llama"), d_qk=16, preset="paper"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    removed = {k: v for k, v in weights.items() if "layers.1.self_attn.q_proj.weight" not in k}
    save_file(removed, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, e.g. model.layers.1.self_attn.q_proj.weight"):
        load_model(tmp_path / "m")
    save_file({**weights, "extra.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected keys, e.g. extra.weight"):
        load_model(tmp_path / "m")
    save_file({**weights, "model.norm.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="cannot load the weights|mismatched keys"):
        load_model(tmp_path / "m")


def test_an_unknown_dtype_is_refused(folder):
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'abc'; choose one of float32"):
        load_model(folder, dtype="abc")


def test_paths_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="neither a local directory or GGUF file nor a model that the hub gives us"
    ):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        load_model(tmp_path)
    for text in (
        '{"model_type": "foo", "auto_map": {"AutoConfig": "x.C"}}',
        '{"model_type": "llama", "hidden_size": "x"}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="its config.json is not that of a supported model"):
            load_model(tmp_path)
    with pytest.raises(ValueError, match="is a file, not a model directory"):
        load_model(tmp_path / "config.json")


def test_a_tokenizer_is_loaded_or_missed(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path, tiny_model("llama", vocab_size=300).config)) == 300
    with pytest.raises(FileNotFoundError, match="has no tokenizer that loads"):
        load_tokenizer(tmp_path / "nowhere", tiny_model("llama").config)


def test_pushing_to_the_hub_uploads_the_modelling_file(tmp_path, monkeypatch):
    latent, uploaded = convert(tiny_model("llama"), d_qk=16, preset="paper"), []

    def upload(self, folder, *args, **kwargs):
        uploaded.append(sorted(os.listdir(folder)))

    module = "transformers.utils.hub"
    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    card = SimpleNamespace(save=lambda _: None)
    monkeypatch.setattr(f"{module}.hf_api", lambda: api)
    monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(f"{module}.PushToHubMixin._upload_modified_files", upload)
    latent.push_to_hub("someone/latent")
    latent.save_pretrained(tmp_path / "mine", push_to_hub=True)
    for files in (*uploaded, sorted(os.listdir(tmp_path / "mine"))):
        assert {"config.json", "model.safetensors", f"{MODULE_NAME}.py"} <= set(files)
    assert len(uploaded) == 2
    pushed = []
    monkeypatch.setattr(
        type(latent), "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs))
    )
    options = {"private": True, "token": "hf_x", "revision": "dev"}
    latent.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/secret", **options)
    latent.save_pretrained(tmp_path / "rank1", push_to_hub=True, is_main_process=False)
    assert pushed == [(("me/secret",), options)]
    assert_same_model(load_model(tmp_path / "mine"), latent, tokens())


def test_generated_file_is_plain_python_without_kvlatent():
    source = remote_code("phi3")
    compile(source, "modeling_kv_latent.py", "exec")
    assert "from .config" not in source and "import kvlatent" not in source
    assert source.count("from __future__ import annotations") == 1
    assert source.rstrip().endswith(
        'KVLatentPhi3Config, KVLatentPhi3Model, KVLatentPhi3ForCausalLM = latent_classes("phi3")'
    )

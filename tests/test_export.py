"""The export command: whole and checked in a fresh process, or nothing; one sentence for what cannot go out."""

import importlib
import json

import pytest
import torch

import kvlatent
from export_setup import latent_directory, latent_toy, untrained_tokenizer
from kvlatent.engines import gguf_export, stock_checkpoint
from kvlatent.engines.export_options import ExportOptions
from kvlatent.selection.choices import Choices
from kvlatent.workflows import export_checkpoint
from kvlatent.workflows.export_checkpoint import TARGETS, ExportRecord, export
from on_disk import snapshot, write_checkpoint
from test_cli import answer, mistake
from tiny import SWITCH

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """`latent`, `unequal` and `original` beside each other."""
    folder = tmp_path_factory.mktemp("export")
    latent_directory(folder / "latent", tiny_tokenizer)
    latent_directory(folder / "unequal", tiny_tokenizer, d_qk=8)
    write_checkpoint(folder / "original", tiny_tokenizer)
    return folder


@pytest.fixture
def read_here(monkeypatch):
    """Read back in this process, where a test is not about the other one: starting it takes seconds."""

    def read(module, folder, input_ids, texts):
        exporter = {"stock_checkpoint": stock_checkpoint, "gguf_export": gguf_export}[module]
        return exporter.read_logits(folder, input_ids), None

    monkeypatch.setattr(export_checkpoint, "read_in_fresh_process", read)


@pytest.mark.parametrize("to", ["stock", "gguf"])
def test_a_checkpoint_goes_out_by_the_command(to, place, tmp_path):
    before = snapshot(place / "latent")
    document = answer("export", place / "latent", "--to", to, "--out", tmp_path / "out")
    assert document.pop("out") == str(tmp_path / "out")
    assert document == json.loads((tmp_path / "out" / "export.json").read_text())
    ExportRecord.checked(document)
    assert document["command"] == f"kvlatent export latent --to {to} --out out"
    assert document["check"]["relative"] < 1e-5 and document["check"]["same_argmax"] == 1.0
    card = (tmp_path / "out" / "README.md").read_text()
    facts = document["export"]
    assert facts["cache_bytes_per_token"] == {"stock": 768, "gguf": 384}[to]
    assert facts["engine"] in card and f"{facts['cache_bytes_per_token']} bytes per token" in card
    engine = {"stock": "transformers 5", "gguf": "llama.cpp in "}[to]
    assert document["export"]["engine"].startswith(engine)
    assert str(tmp_path) not in card + json.dumps(document)
    assert snapshot(place / "latent") == before


def test_the_function_is_public(place, tmp_path, read_here):
    assert kvlatent.export is export
    document = kvlatent.export(place / "unequal", tmp_path / "out", to="stock", pad=True)
    assert (document["d_qk"], document["d_vo"]) == (8, 16)
    assert "filled up with zeros to 16" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["stock", "gguf"])
def test_another_model_is_removed(to, place, tmp_path, read_here, monkeypatch):
    exporter = {"stock": stock_checkpoint, "gguf": gguf_export}[to]
    monkeypatch.setattr(exporter, "frequency_factors", lambda frequencies: [3.0] * len(frequencies))
    with pytest.raises(
        ValueError, match=rf"the export to {to} was removed, since .* computes something else"
    ):
        export(place / "latent", tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_a_coarser_type_may_differ_by_twice_what_it_costs_this_model(
    dtype, place, tmp_path, read_here, monkeypatch
):
    check = export(place / "latent", tmp_path / "out", to="gguf", dtype=dtype)["check"]
    assert check["tolerance"] == 2 * check["rounding"]
    assert 0.5 < check["relative"] / check["rounding"] < 1.5
    factors = gguf_export.frequency_factors
    off = {"f16": 1.02, "bf16": 1.2, "q8_0": 1.5}[dtype]
    monkeypatch.setattr(
        gguf_export, "frequency_factors", lambda frequencies: [off * one for one in factors(frequencies)]
    )
    with pytest.raises(ValueError, match="computes something else than our class: log-prob"):
        export(place / "latent", tmp_path / "wrong", to="gguf", dtype=dtype)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("to", ["stock", "gguf"])
def test_a_model_that_the_exporter_changes_is_another_model(to, place, tmp_path, read_here, monkeypatch):
    """What went out is what the exporter left of it, so ours has to be from before."""
    exporter = {"stock": stock_checkpoint, "gguf": gguf_export}[to]
    write = exporter.write_export

    def changing(latent, source, out, options):
        with torch.no_grad():
            latent.model.norm.weight.mul_(torch.linspace(0.5, 1.5, len(latent.model.norm.weight)))
        return write(latent, source, out, options)

    monkeypatch.setattr(exporter, "write_export", changing)
    with pytest.raises(
        ValueError, match=rf"the export to {to} was removed, since .* computes something else"
    ):
        export(place / "latent", tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["stock", "gguf", "openvino"])
@pytest.mark.parametrize(("name", "context"), [("llama-mha", 256), ("phi3-longrope", SWITCH)])
def test_the_context_is_known_before_anything_is_written(to, name, context, tmp_path, tiny_tokenizer):
    """The row of tokens that decides whether an export counts lies within it."""
    latent = latent_toy(name, vocab_size=300)
    exporter = importlib.import_module(f"kvlatent.engines.{TARGETS[to]}")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    assert exporter.check_exportable(latent, ExportOptions()) == context
    assert (
        exporter.write_export(latent, tmp_path / "source", tmp_path / "out", ExportOptions())["context"]
        == context
    )


def test_logits_that_are_no_numbers_are_no_match(place, tmp_path, monkeypatch):
    nothing = torch.full((1, 4, 300), torch.nan), None
    monkeypatch.setattr(export_checkpoint, "read_in_fresh_process", lambda *_: nothing)
    with pytest.raises(ValueError, match="logits differ by nan"):
        export(place / "latent", tmp_path / "out", to="stock")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_load_is_removed(place, tmp_path, monkeypatch):
    def write(latent, source, out, options):
        facts = original(latent, source, out, options)
        (out / "model.safetensors").write_bytes(b"")
        return facts

    original = stock_checkpoint.write_export
    monkeypatch.setattr(stock_checkpoint, "write_export", write)
    with pytest.raises(ValueError, match="does not load in a fresh process, so it was removed: ."):
        export(place / "latent", tmp_path / "out", to="stock")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_splits_otherwise_is_removed(place, tmp_path, monkeypatch, read_here):
    def read(module, folder, input_ids, texts):
        return gguf_export.read_logits(folder, input_ids), [[1, 2]] * len(texts)

    monkeypatch.setattr(export_checkpoint, "read_in_fresh_process", read)
    with pytest.raises(ValueError, match=r"was removed, since .* into other tokens .*: \[1, 2\] and not"):
        export(place / "latent", tmp_path / "out", to="gguf")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_sentence_and_leave_nothing(place, tmp_path, tiny_tokenizer, read_here):
    out = tmp_path / "out"

    def said(*words, source="latent"):
        sentence = mistake("export", place / source, *words)
        assert not out.exists()
        return sentence

    assert "unknown target 'onnx'; choose one of stock, gguf" in said("--to", "onnx", "--out", out)
    assert "is an original (model_type 'llama')" in said("--to", "stock", "--out", out, source="original")
    assert "got d_qk=8 and d_vo=16; convert with `kvlatent convert" in said(
        "--to", "stock", "--out", out, source="unequal"
    )
    assert "--dtype is for --to gguf or openvino: got --to stock" in said(
        "--to", "stock", "--dtype", "f16", "--out", out
    )
    assert "unknown dtype 'q4_0'; choose one of f32" in said("--to", "gguf", "--dtype", "q4_0", "--out", out)
    assert "got both; give one" in said("--to", "gguf", "--pad", "--experimental", "--out", out)
    assert "must be apart" in said("--to", "stock", "--out", place / "latent", "--overwrite")
    assert "neither a local directory" in mistake("export", tmp_path / "none", "--to", "stock", "--out", out)


@pytest.mark.refused_by("any export")
def test_an_export_of_an_export_is_refused(place, tmp_path, read_here):
    for to in ("stock", "gguf"):
        export(place / "latent", tmp_path / to, to=to)
        with pytest.raises(ValueError, match="is an export already; export the latent checkpoint"):
            export(tmp_path / to, tmp_path / "again", to="stock")
    with pytest.raises(FileExistsError, match="already holds something"):
        export(place / "latent", tmp_path / "stock", to="gguf")
    export(place / "latent", tmp_path / "stock", to="gguf", overwrite=True)
    assert not (tmp_path / "stock" / "config.json").exists()


@pytest.mark.refused_by("any export")
def test_a_table_per_head_and_an_untrained_tokenizer_leave_nothing(tmp_path, tiny_tokenizer):
    latent_directory(tmp_path / "heads", tiny_tokenizer, choices=Choices(keys="weights", table="head"))
    latent_directory(tmp_path / "letters", untrained_tokenizer())
    with pytest.raises(ValueError, match="one set of 8 rotary frequencies"):
        export(tmp_path / "heads", tmp_path / "out", to="stock")
    with pytest.raises(ValueError, match="was never trained"):
        export(tmp_path / "letters", tmp_path / "out", to="gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"heads", "letters"}

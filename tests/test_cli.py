"""The command line: answers on stdout, one sentence and exit code 2 for every mistake, nothing half-written."""

import json
import logging
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config
from typer.testing import CliRunner

from kvlatent.evaluation.checks import task_loading
from kvlatent.evaluation.speed.caches import CACHES
from kvlatent.evaluation.speed.variants import ATTENTIONS
from kvlatent_cli.main import app
from kvlatent_cli.session import sentence_of, session
from on_disk import SETTINGS, TOKENS, snapshot, write_checkpoint, write_text

SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    """model, text.txt, and `latent`: the model converted by the command."""
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt")
    done = call("convert", folder / "model", "--out", folder / "latent", "--preset", "paper")
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch):
    """On a busy machine a command says after some seconds that it is at work."""
    monkeypatch.setattr("kvlatent_cli.session._FIRST_LINE_AFTER_S", math.inf)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words) -> dict:
    """The one JSON document of a successful call; nothing else may be on stdout."""
    done = call(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def mistake(*words, at_work: bool = False) -> str:
    """The sentence of a call that must fail: exit 2, nothing on stdout, and on stderr one line.

    What goes wrong `at_work` comes after the plan's lines.
    """
    done = call(*words, "--json")
    assert done.exit_code == 2, (done.exit_code, done.stderr, done.exception)
    assert done.stdout == ""
    *before, line = done.stderr.splitlines()
    assert line.startswith("error: ") and bool(before) == at_work
    return line


def compress_words(place, out, *words):
    return (
        "compress",
        place / "model",
        "--data",
        place / "text.txt",
        "--out",
        out,
        "--device",
        "cpu",
        *SET,
        *words,
    )


def test_compress_says_its_plan_then_its_figures(place, tmp_path):
    done = call(*compress_words(place, tmp_path / "out", "--tokens", TOKENS))
    assert done.exit_code == 0, done.stderr
    assert "widths: d_qk 8, d_vo 8 of 16 (preset paper)" in done.stderr
    assert "cache: 256 of 512 bytes per token in float32: 50.0%" in done.stderr
    assert "an estimate" in done.stderr and f"stage I {TOKENS // 2}" in done.stderr
    for label in ("original", "converted", "after stage I", "latent", "saved in"):
        assert label in done.stdout


def test_compress_as_json_is_the_record_of_the_run(place, tmp_path):
    out = tmp_path / "out"
    document = answer(*compress_words(place, out, "--stages", "1", "--tokens", 64, "--kv", 0.25, "--seed", 3))
    assert document["plan"]["d_qk"] == 4
    assert document == json.loads((out / "run.json").read_text()) | {"out": str(out)}
    assert "seed: 3" in (out / "recipe.yaml").read_text()


def test_dry_run_prints_the_plan_and_writes_nothing(place, tmp_path):
    done = call(*compress_words(place, tmp_path / "out", "--tokens", 900, "--dry-run"))
    assert done.exit_code == 0
    assert "training tokens: stage I 450, stage II 450; about" in done.stdout
    assert "an estimate" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert answer(*compress_words(place, tmp_path / "out", "--dry-run"))["plan"]["share"] == 0.5


def test_widths_per_layer(place, tmp_path):
    words = ("--d-qk", "8,16", "--d-vo", "16,4", "--stages", "none", "--dry-run")
    plan = answer(*compress_words(place, tmp_path / "out", *words))["plan"]
    assert (plan["d_qk"], plan["d_vo"]) == ([8, 16], [16, 4])


def test_eval_measures_both(place):
    words = (
        "eval",
        place / "latent",
        "--against",
        place / "model",
        "--data",
        place / "text.txt",
        "--block-size",
        32,
    )
    document = answer(*words)
    figures = document["figures"]
    assert figures["latent"]["cache_bytes_per_token"] == 256
    assert figures["original"]["cache_bytes_per_token"] == 512
    assert figures["ratio_standard_error"] > 0 and figures["fidelity"]["kl"] > 0
    assert document["diagnosis"]["summary"] and document["record"]["command"].startswith(
        "kvlatent eval latent --data text.txt --against model --block-size 32"
    )
    done = call(*words)
    assert "±" in done.stdout and "256" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--contexts", "64,300"], "got 300 tokens, max_position_embeddings=128; ask for 128"),
        (["--contexts", "many"], "--contexts is a whole number or a list such as 32,32,16: got 'many'"),
        (["--block-size", 4096], "got --block-size 4096, the model's context has 128; give 128"),
        (["--checks", ""], "got 0 checks and 0 tasks; name some of perplexity"),
        (["--checks", "needles"], "unknown check 'needles'; choose of perplexity"),
        (["--checks", "fidelity"], "got --checks with fidelity and no --against"),
        (["--tasks", ","], "--tasks names at least one task: got 0"),
        (["--limit", 5], "--limit is for tasks only: got 5"),
        (["--checks", "needle", "--stride", 8], "--stride is for perplexity only: got 8"),
        (["--checks", "needle", "--batch-size", 0], "got batch_size=0; raise it or leave it out"),
        (["--seed", -1], "a seed is between 0 and 4294967295: got -1"),
    ],
)
def test_mistakes_in_an_evaluation(place, words, sentence):
    assert sentence in mistake("eval", place / "latent", "--data", place / "text.txt", *words)


def test_a_mistaken_task_is_told_its_near_matches(place, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    read = task_loading._read_tasks
    monkeypatch.setattr(task_loading, "_read_tasks", lambda path, _, metadata: read(path, False, metadata))
    (tmp_path / "colours.yaml").write_text("task: colours\noutput_type: multiple_choice\n")
    words = ("eval", place / "latent", "--data", place / "text.txt", "--tasks", "colour")
    sentence = mistake(*words, "--include-path", tmp_path)
    assert "there is no task 'colour'; names like it: colours; correct the name" in sentence


def test_help_names_what_can_be_chosen():
    options = {option.name: option for option in typer.main.get_command(app).commands["bench"].params}
    assert options["caches"].help.startswith(
        f"Caches to compare, of {', '.join(CACHES)}; by default dynamic and"
    )
    assert options["attention"].metavar == "|".join(ATTENTIONS)


def test_train_in_place_and_beside(place, tmp_path):
    shutil.copytree(place / "latent", tmp_path / "latent")
    before = load_file(tmp_path / "latent" / "model.safetensors")
    words = (
        "--teacher",
        place / "model",
        "--data",
        place / "text.txt",
        "--tokens",
        512,
        "--device",
        "cpu",
        *SET,
    )
    beside = answer("train", tmp_path / "latent", "--stage", 2, "--out", tmp_path / "two", *words)
    assert beside["stage"] == 2 and beside["out"] == str(tmp_path / "two")
    assert load_file(tmp_path / "latent" / "model.safetensors").keys() == before.keys()
    assert answer("train", tmp_path / "latent", "--stage", 1, *words)["tokens"] == 512
    after = load_file(tmp_path / "latent" / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latent", "two"]


def test_generate_and_inspect(place):
    words = ("generate", place / "latent", "--prompt", "The cat", "--max-new-tokens", 5)
    first, second = answer(*words), answer(*words)
    assert first == second and first["continuation"]
    assert call(*words).stdout == "The cat" + first["continuation"] + "\n"
    assert answer(*words, "--temperature", 1e-40) == first  # float32 has no logits over that
    document = answer("inspect", place / "latent")
    assert document["cache_bytes_per_token"] == {"original": 512, "latent": 256, "share": 0.5}
    assert (document["family"], document["d_qk"], document["is_latent"]) == ("llama", 8, True)
    assert not answer("inspect", place / "model")["is_latent"]
    assert "cache_bytes_per_token.share" in call("inspect", place / "latent").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--d-qk", 7, "--d-vo", 8], "d_qk must be even"),
        (["--d-qk", 32, "--d-vo", 8], "got d_qk=32, head_dim=16"),
        (["--d-qk", 8, "--d-vo", 32], "got d_vo=32, head_dim=16"),
        (["--d-qk", 2, "--d-vo", 8], "4"),
        (["--d-qk", 6, "--d-vo", 8], "d_qk"),
        (["--d-qk", 0, "--d-vo", 8], "d_qk=0"),
        (["--d-qk", 8, "--d-vo", -4], "d_vo=-4"),
        (["--d-qk", "8,8,8", "--d-vo", 8], "got 3 for 2 layers"),
        (["--d-qk", "half", "--d-vo", 8], "got 'half'"),
        (["--kv", 0], "got 0"),
        (["--kv", 1.5], "got 1.5"),
        (["--kv", "nan"], "got nan"),
        (["--kv", 0.1], "smallest width 4"),
        (["--kv", 0.5, "--d-qk", 8], "exclude each other"),
        (["--preset", "magic"], "unknown preset 'magic'"),
        (["--set", "stage1.foo=1"], "unknown recipe key stage1.foo"),
        (["--set", "stage1.learning_rate=-1"], "recipe key stage1.learning_rate"),
        (["--set", "stage1"], "section.key=value"),
        (["--recipe", "/nowhere/r.yaml"], "does not exist"),
        (["--tokens", 0], "got 0"),
        (["--stages", "three"], "got 'three'"),
        (["--device", "tpu"], "got 'tpu'"),
        (["--dtype", "int8"], "recipe key dtype"),
        (["--seed", -1], "recipe key seed"),
        (["--set", "data.block_size=512"], "max_position_embeddings=128"),
        (["--eval-data", "/nowhere/v.txt"], "/nowhere/v.txt"),
        (["--data", "/"], "is a directory; give a file"),
        (["--out", ""], "cannot be replaced"),
        (["--out", "/"], "cannot be replaced"),
        (["--out", "."], "cannot be replaced"),
    ],
)
def test_mistakes_in_options(place, tmp_path, words, sentence):
    assert sentence in mistake(*compress_words(place, tmp_path / "out", *words))
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_the_line_itself():
    for words in (
        ["compress"],
        ["compress", "m", "--data", "d"],
        ["shrink"],
        ["eval"],
        ["compress", "--kv", "much"],
    ):
        done = call(*words)
        assert done.exit_code == 2 and "Traceback" not in done.stderr


def damage_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    no_weights(folder)
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    no_weights(folder)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[1:]}, folder / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(names[1:], "model-00001-of-00002.safetensors") | {
        names[0]: "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def encoder(folder: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder)


def unsupported(folder: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(folder)


def small_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    damage_config(folder, vocab_size=200)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def soft_capped(folder: Path) -> None:
    damage_config(folder, attn_logit_softcapping=30.0)


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_weights, "no weights"),
        (pickled, "pickled weights"),
        (truncated, "truncated or damaged"),
        (missing_shard, "lacks 1 of 2 weight shards"),
        (missing_tensor, "1 missing keys"),
        (encoder, "'bert'"),
        (unsupported, "'gpt2'"),
        (soft_capped, "soft-capped"),
        (small_embedding, "the embedding has 200 rows"),
        (no_tokenizer, "tokenizer"),
        (not_json, "config.json"),
        (shutil.rmtree, "neither a local directory or GGUF file nor"),
    ],
)
def test_mistakes_in_the_model(place, tmp_path, damage, sentence):
    shutil.copytree(place / "model", tmp_path / "bad")
    damage(tmp_path / "bad")
    words = (
        "compress",
        tmp_path / "bad",
        "--data",
        place / "text.txt",
        "--out",
        tmp_path / "out",
        "--tokens",
        64,
        *SET,
    )
    assert sentence in mistake(
        *words, at_work=damage is small_embedding
    )  # a warning comes before its text is read
    assert [p.name for p in tmp_path.iterdir()] in (["bad"], [])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n \n", "no text"),
        ("binary.txt", bytes(range(256)) * 40, "binary.txt"),
        ("short.txt", b"A cat.", "block"),
        ("text.docx", b"words", "docx"),
        ("fieldless.jsonl", b'{"body": "a cat"}\n', "text"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl"),
        ("broken.parquet", b"PAR", "broken.parquet"),
        ("half.jsonl", b'{"text": "\\ud800 hello"}\n', "record 1 of"),
        ("nested.jsonl", b"[" * 100_000, "nested.jsonl is not valid JSON at line 1"),
    ],
)
def test_mistakes_in_the_text(place, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    words = ("--data", tmp_path / name, "--out", tmp_path / "out", "--tokens", 64, "--device", "cpu", *SET)
    assert sentence in mistake("compress", place / "model", *words)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    # One window of spans needs a text, where a block of training needs one as well.
    sentence = "too short for one window of 32 tokens" if name == "short.txt" else sentence
    assert sentence in mistake("eval", place / "latent", "--data", tmp_path / name, "--block-size", 32)


def test_a_missing_text(place, tmp_path):
    assert "nowhere.txt" in mistake(
        "compress", place / "model", "--data", tmp_path / "nowhere.txt", "--out", tmp_path / "out", *SET
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["compress", "convert"])
def test_an_output_that_holds_something(place, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    data = ["--data", place / "text.txt"] if command == "compress" else []
    assert "already holds something" in mistake(command, place / "model", "--out", tmp_path / "out", *data)
    assert "already holds something" in mistake(
        command, place / "model", "--out", tmp_path / "out", *data, "--dry-run"
    )
    (tmp_path / "file").write_text("mine")
    assert "is a file" in mistake(command, place / "model", "--out", tmp_path / "file", *data)
    assert snapshot(tmp_path) == {"out/thesis.txt": b"mine", "file": b"mine"}


def test_mistakes_in_training(place, tmp_path, tiny_tokenizer):
    wide = write_checkpoint(tmp_path / "wide", tiny_tokenizer, hidden_size=48)
    words = (
        "train",
        place / "latent",
        "--data",
        place / "text.txt",
        "--out",
        tmp_path / "out",
        "--tokens",
        64,
        *SET,
    )
    assert "got 48 in the teacher and 32" in mistake(*words, "--stage", 1, "--teacher", wide)
    assert "got stage=3" in mistake(*words, "--stage", 3, "--teacher", place / "model")
    assert "got none" in mistake(*words, "--stage", 1)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_step(place, tmp_path):
    words = ("--tokens", 4096, "--set", "stage1.learning_rate=1e30", "--set", "stage1.max_grad_norm=0")
    sentence = mistake(*compress_words(place, tmp_path / "out", *words), at_work=True)
    assert "stopped at step" in sentence
    assert not (tmp_path / "out").exists()


def test_mistakes_in_generation(place):
    words = ("generate", place / "latent", "--prompt")
    assert "0 tokens" in mistake(*words, "")
    assert "must fit the context of 128" in mistake(*words, "A cat", "--max-new-tokens", 500)
    assert "max_new_tokens=0" in mistake(*words, "A cat", "--max-new-tokens", 0)
    for temperature in (-1, "nan", "inf"):
        assert "temperature is 0 or more" in mistake(*words, "A cat", "--temperature", temperature)
    assert "unknown dtype 'abc'" in mistake(*words, "A cat", "--dtype", "abc")
    assert "unknown dtype 'abc'" in mistake(
        "eval", place / "latent", "--data", place / "text.txt", "--dtype", "abc"
    )
    done = call(*words, "A cat", "--seed", 99999999999999999999)
    assert done.exit_code == 2 and "4294967295" in done.stderr
    assert (
        "already" in mistake("convert", place / "latent", "--out", place / "twice")
        and not (place / "twice").exists()
    )


@pytest.mark.parametrize("content", ["[1]", "{bad", "[" * 100_000], ids=["list", "bad", "nested"])
def test_inspect_names_a_damaged_record(place, tmp_path, content):
    shutil.copytree(place / "latent", tmp_path / "latent")
    (tmp_path / "latent" / "run.json").write_text(content)
    assert str(tmp_path / "latent" / "run.json") in mistake("inspect", tmp_path / "latent")


def test_libraries_are_silent_about_retries(place):
    """Each retry of an unreachable hub would be a warning on stderr."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING)
    answer("inspect", place / "model")
    assert not logger.isEnabledFor(logging.WARNING)
    assert not logging.getLogger("httpx").isEnabledFor(logging.WARNING)


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("kvlatent_cli.session.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("kvlatent_cli.session._FIRST_LINE_AFTER_S", 3.5)
    with session() as run:
        for step in range(41):
            run.report("stage I", 10 + step, 50, "900 tokens/s")
            clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "stage I: 14/50, 900 tokens/s, about 36 s left",
        "stage I: 29/50, 900 tokens/s, about 21 s left",
        "stage I: 44/50, 900 tokens/s, about 6 s left",
        "stage I: 41 s, 900 tokens/s",
    ]


def run(*words, **kwargs):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "kvlatent_cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.parametrize("limit", [20_000, 60_000], ids=["in the text's blocks", "in a checkpoint"])
def test_a_full_disk_leaves_nothing_half_written(place, tmp_path, limit):
    """A limit on file sizes makes the kernel refuse the write, as a full disk would."""
    words = compress_words(place, tmp_path / "out", "--tokens", TOKENS)
    done = run(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert call(*words).exit_code == 0


def test_a_full_disk_at_the_save_leaves_nothing_at_all(place, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run("convert", place / "model", "--out", tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: writing failed")
    assert list(tmp_path.iterdir()) == []


def test_sentences_for_the_disk_and_silence_about_defects():
    full = OSError(28, "No space left on device", "x.bin")
    assert sentence_of(full) == (
        "the disk is full while writing x.bin; nothing half-written is left, make room and repeat the command"
    )
    wrapped = RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0")
    assert "writing failed" in str(sentence_of(wrapped))
    closing = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 20096 vs 19990")
    assert "writing failed" in str(sentence_of(closing))
    assert sentence_of(PermissionError(13, "Permission denied", "out")) == "Permission denied: out"
    assert sentence_of(RuntimeError("shape mismatch")) is None
    assert sentence_of(KeyError("x")) is None


def test_interruption_exits_130(place, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvlatent.workflows.inspect_checkpoint.describe", interrupt)
    done = call("inspect", place / "latent")
    assert done.exit_code == 130 and "repeat the command" in done.stderr


def test_a_defect_keeps_its_traceback(place, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr("kvlatent.workflows.inspect_checkpoint.describe", fail)
    done = call("inspect", place / "latent")
    assert done.exit_code == 1 and isinstance(done.exception, RuntimeError)

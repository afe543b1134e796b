"""`teach`, and stage II from what it wrote: exact against a dense oracle, resumable, and refused where it does not fit."""

from __future__ import annotations

import copy
import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import normalizers
from typer.testing import CliRunner

import kvlatent
from corpora import SEPARATOR, stories
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe, Stage2
from kvlatent.model.logit_loss import stage2_loss
from kvlatent.text.parts import TextReader
from kvlatent.training.loop import collate
from kvlatent.training.teacher_store import RECORD, TeacherStore
from kvlatent.workflows import compress_steps, teach_checkpoint
from kvlatent.workflows.train_checkpoint import train
from kvlatent_cli.main import app

SIZE, TOP_K = 32, 8
DATA = [f"data.block_size={SIZE}", "data.held_out=0.1"]
SMALL = [*DATA, "lora.rank=2", "stage2.tokens=512", "stage2.batch_size=4", "stage2.save_steps=3"]


@pytest.fixture
def place(tmp_path, tiny_llama, tiny_tokenizer):
    """A folder with an original, its latent model and a text; each call of a command writes beside them."""
    save(tiny_llama, tmp_path / "original", tokenizer=tiny_tokenizer)
    save(convert(tiny_llama, d_qk=8, d_vo=8, preset="paper"), tmp_path / "latent", tokenizer=tiny_tokenizer)
    (tmp_path / "text.txt").write_text(f"\n{SEPARATOR}\n".join(stories(40)))
    return tmp_path


def teach(place, out="store", overrides=(), **options):
    options = {"data": place / "text.txt", "top_k": TOP_K, "device": "cpu", **options}
    return kvlatent.teach(place / "original", out=place / out, overrides=[*DATA, *overrides], **options)


def learn(place, out="out", teacher="store", overrides=(), stage=2, data="text.txt", source="latent"):
    return train(
        place / source, stage=stage, data=place / data, out=place / out, device="cpu", teacher=place / teacher,
        overrides=[*SMALL, *overrides],
    )  # fmt: skip


def blocks_of(place, tokenizer, config):
    """The training blocks, as `train` would cut them."""
    return (
        TextReader(Recipe.load(None, SMALL), tokenizer, config, place / "cache")
        .prepare(place / "text.txt")
        .train
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_store_holds_the_likeliest_tokens_and_the_rest_of_every_position(
    place, tiny_llama, tiny_tokenizer, monkeypatch, temperature
):
    monkeypatch.setattr(teach_checkpoint, "_SHARD_TOKENS", 20 * SIZE)
    summary = teach(place, overrides=[f"stage2.temperature={temperature}"])
    store = TeacherStore(place / "store")
    blocks = blocks_of(place, tiny_tokenizer, tiny_llama.config)
    assert (summary["blocks"], len(store.record.shards)) == (len(blocks), -(-len(blocks) // 20))
    assert len(store.record.shards) > 1 and len(blocks) % 20
    assert summary["tokens"] == SIZE * len(blocks)
    assert summary["bytes_per_token"] == 4 * TOP_K + 4
    headers = 1024 * len(store.record.shards)
    assert 0 <= summary["bytes"] - summary["tokens"] * summary["bytes_per_token"] < headers
    taught = store.join(blocks)
    for index in (0, 19, 20, len(blocks) - 1):
        row = taught[index]
        call = {name: row[name][None] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            shares = F.softmax(tiny_llama(**call, use_cache=False).logits[0].double() / temperature, dim=-1)
        top = shares.sort(descending=True)
        assert torch.equal(row["teacher_ids"].sort().values, top.indices[:, :TOP_K].sort().values)
        wanted = torch.cat([top.values[:, :TOP_K], top.values[:, TOP_K:].sum(-1, keepdim=True)], -1)
        found = row["teacher_log_shares"].double().exp()
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)  # float16 logarithms as large as 10
        torch.testing.assert_close(found.sum(-1), torch.ones(SIZE).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["kl", "reverse_kl", "mixed_kl", "mix"])
def test_loss_from_the_store_is_that_of_the_dense_classes(place, tiny_llama, tiny_tokenizer, objective):
    """With the original's own logits merged into k + 1 classes, but for the rounding of what is stored."""
    teach(place)
    blocks = TeacherStore(place / "store").join(blocks_of(place, tiny_tokenizer, tiny_llama.config))
    batch = collate([blocks[index] for index in range(3)])
    student = convert(tiny_llama, d_qk=8, d_vo=8, preset="paper").requires_grad_(False)
    call = {name: batch[name] for name in ("input_ids", "position_ids")}
    hidden = student.get_decoder()(**call, use_cache=False).last_hidden_state.detach().requires_grad_()
    settings = Stage2(objective=objective, reverse_weight=0.3)
    stored = kvlatent.model.divergences.TopTokens(batch["teacher_ids"], batch["teacher_log_shares"])
    loss = stage2_loss(hidden, student.lm_head, batch["labels"], settings, stored=stored)

    def classes(logits):
        shares = F.softmax(logits.double(), dim=-1)
        top = shares.gather(-1, batch["teacher_ids"])
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1)[counted]

    counted = batch["labels"] != -100
    p, q = classes(tiny_llama(**call, use_cache=False).logits.detach()), classes(student.lm_head(hidden))
    forward, reverse = (p * (p / q).log()).sum(-1).mean(), (q * (q / p).log()).sum(-1).mean()
    tokens = F.cross_entropy(student.lm_head(hidden).double()[counted], batch["labels"][counted])
    dense = {
        "kl": forward, "reverse_kl": reverse, "mixed_kl": 0.7 * forward + 0.3 * reverse, "mix": (forward + tokens) / 2,
    }[objective]  # fmt: skip
    torch.testing.assert_close(loss, dense.float(), rtol=2e-3, atol=0)
    slopes = [torch.autograd.grad(one, hidden)[0] for one in (loss, dense)]
    assert (slopes[0] - slopes[1]).norm() < 5e-3 * slopes[1].norm()


def test_stage_two_from_the_store_is_as_good_as_from_the_original(place):
    teach(place, top_k=64)
    assert learn(place)["steps"] == 4
    learn(place, "live", "original")
    taught, live, before = (
        load_file(place / name / "model.safetensors") for name in ("out", "live", "latent")
    )
    moved = sum((live[name] - before[name]).norm() ** 2 for name in live) ** 0.5
    apart = sum((live[name] - taught[name]).norm() ** 2 for name in live) ** 0.5
    assert 0 < apart < 0.5 * moved
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["sha256"]["teacher"] and "--teacher store" in record["command"]


def test_a_killed_call_goes_on_behind_its_last_whole_shard(place, monkeypatch):
    monkeypatch.setattr(teach_checkpoint, "_SHARD_TOKENS", 20 * SIZE)

    def stop(step, done, total, note):
        if step == "teach" and done > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(place, progress=stop)
    assert not (place / "store").exists()
    partial = place / "store.partial"
    assert [path.name for path in partial.glob("shard-*")] == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"another top_k \(8, now 9\)"):
        teach(place, top_k=9)
    (partial / ".shard-00001.safetensors.tmp-1").write_bytes(b"what a kill in a write leaves")
    written = (partial / "shard-00000.safetensors").stat().st_mtime_ns
    done = []
    teach(place, progress=lambda step, *told: done.append(told[0]) if step == "teach" else None)
    assert min(done[1:]) == 20
    assert (place / "store" / "shard-00000.safetensors").stat().st_mtime_ns == written
    assert not list((place / "store").glob(".*"))
    teach(place, "whole")
    for path in (place / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (place / "store" / path.name).read_bytes()
    assert not partial.exists()


def test_killed_before_any_shard_leaves_nothing_and_killed_behind_the_last_is_not_done_again(
    place, monkeypatch
):
    def stop(step, done, total, note):
        if step == "teach":
            raise KeyboardInterrupt

    def interrupt(directory):
        raise KeyboardInterrupt

    before = {path.name for path in place.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        teach(place, progress=stop)
    assert {path.name for path in place.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(teach_checkpoint.StoreDirectory, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            teach(place)
    assert (place / "store" / RECORD).is_file() and (place / "store.partial").is_dir()
    summary = teach(place, progress=stop)
    assert summary["blocks"] == TeacherStore(place / "store").record.blocks
    assert not (place / "store.partial").exists()
    with pytest.raises(FileExistsError, match="overwrite"):
        teach(place)


def test_a_file_system_without_links_gets_copies(place, monkeypatch):
    def refuse(*names):
        raise OSError("no links here")

    monkeypatch.setattr(teach_checkpoint.os, "link", refuse)
    teach(place)
    TeacherStore(place / "store")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"top_k": 300}, "leave a token of the vocabulary to the rest: got 300 of 300; try 64"),
        ({"top_k": 0}, "--top-k must be at least 1.*got 0 of 300"),
        ({"tokens": 0}, "--tokens must be positive: got 0; leave it out"),
        ({"overrides": ["data.block_size=129"]}, "block_size=129, max_position_embeddings=128"),
        ({"out": "original"}, "is the model"),
        ({"out": "."}, "holds the model|cannot be replaced"),
        ({"data": "absent.txt"}, "absent.txt"),
    ],
)
def test_what_cannot_be_taught_is_refused_and_leaves_nothing(place, change, sentence):
    before = {path.name for path in place.iterdir()}
    if "data" in change:
        change = {"data": place / change["data"]}
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=sentence) as caught:
        teach(place, **change)
    assert "\n" not in str(caught.value)
    assert {path.name for path in place.iterdir()} == before


def test_an_original_whose_logits_are_not_finite_teaches_nothing(place, tiny_llama, tiny_tokenizer):
    tiny_llama.model.norm.weight.data.fill_(3e38)
    shutil.rmtree(place / "original")
    save(tiny_llama, place / "original", tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="not finite in blocks 0 to 7 of the text"):
        teach(place)
    assert not list(place.glob("store*"))


def test_a_store_that_does_not_fit_is_refused(place, tiny_llama, tiny_tokenizer):
    teach(place, tokens=256)
    (place / "other.txt").write_text((place / "text.txt").read_text() + " And so on.")
    other = copy.deepcopy(tiny_tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    save(convert(tiny_llama, d_qk=8, d_vo=8, preset="paper"), place / "lower", tokenizer=other)
    before = {path.name for path in place.iterdir()}
    for change, sentence in (
        ({"source": "lower"}, "made with another tokenizer than the model's"),
        ({"data": "other.txt"}, "is of another text: got .*, it has .* .SHA-256."),
        (
            {"overrides": ["data.block_size=16"]},
            "got data.block_size=16, .* has 32; pass --set data.block_size=32",
        ),
        ({"overrides": ["stage2.temperature=2"]}, "got stage2.temperature=2, .* has 1; pass --set"),
        ({"overrides": ["seed=1"]}, r"made with another seed \(0, now 1\)"),
        ({"overrides": ["data.isolate=false"]}, r"made with another data.isolate \(True, now False\)"),
        (
            {},
            r"wants more tokens than the teacher store .* holds: got 512, it has 256 of the text's \d+; pass --set",
        ),
        ({"stage": 1}, "stage I compares layers, and a teacher store holds logits alone"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            learn(place, **change)
        assert "\n" not in str(caught.value)
        assert {path.name for path in place.iterdir()} == before
    assert learn(place, overrides=["stage2.tokens=256"])["tokens"] == 256


def test_a_complete_store_is_read_more_than_once(place):
    """As the text would be: only of what it lacks can no more be had."""
    tokens = teach(place)["tokens"]
    summary = learn(place, overrides=[f"stage2.tokens={2 * tokens}", "stage2.batch_size=32"])
    assert summary["tokens"] > 1.5 * tokens  # an epoch's last batch is a part of one


def test_next_tokens_need_no_store_and_take_one(place):
    """As they take an original."""
    teach(place, tokens=64)
    key = "stage2.objective=next_token"
    assert learn(place, overrides=[key])["tokens"] == 512
    learn(place, "without", "original", overrides=[key])
    taught, live = (load_file(place / name / "model.safetensors") for name in ("out", "without"))
    assert all(torch.equal(taught[name], live[name]) for name in live)


def test_a_store_of_another_shape_is_refused(place):
    teach(place)
    record = json.loads((place / "store" / RECORD).read_text())
    record["original"]["head_dim"] = 64
    (place / "store" / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="student's head_dim: got 64 in the teacher and 16 in the student"):
        learn(place)


def test_a_damaged_store_is_refused(place, tiny_llama, tiny_tokenizer):
    teach(place)
    store = place / "store"
    whole = (store / RECORD).read_text()
    record = json.loads(whole)
    shard = store / "shard-00000.safetensors"
    data = shard.read_bytes()
    for text, sentence in (
        ("{", "damaged, not JSON"),
        ("{}", "is damaged .*: Field required."),
        (json.dumps({**record, "format": 2}), "is damaged .format"),
        (json.dumps({**record, "blocks": 1}), "said to hold 1 blocks and holds"),
    ):
        (store / RECORD).write_text(text)
        with pytest.raises(ValueError, match=f"{sentence}.*; make the store again with kvlatent teach"):
            learn(place)
    (store / RECORD).write_text(whole)
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is missing or cut"):
        learn(place)
    shard.write_bytes(b"\xff" * len(data))
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged"):
        learn(place)
    shard.write_bytes(data)
    other = [
        {**row, "input_ids": row["input_ids"] + 1}
        for row in blocks_of(place, tiny_tokenizer, tiny_llama.config)
    ]
    with pytest.raises(ValueError, match="the blocks of the text are not those"):
        TeacherStore(store).join(other)


COMPRESS = [*SMALL, "conversion.preset=paper", "stage1.tokens=128", "stage1.batch_size=4"]


def test_compress_trains_stage_two_without_the_original(place, monkeypatch):
    teach(place)
    seen = []
    inner, load = compress_steps.train_stage, compress_steps.load_original

    def loaded(*given):
        original, tokenizer = load(*given)
        seen.append(weakref.ref(original.model.layers[0].self_attn.q_proj.weight))
        return original, tokenizer

    def trained(latent, teacher, stage, *given, **options):
        seen.append((stage, type(teacher).__name__, seen[0]() is not None))
        return inner(latent, teacher, stage, *given, **options)

    monkeypatch.setattr(compress_steps, "load_original", loaded)
    monkeypatch.setattr(compress_steps, "train_stage", trained)
    options = {"kv": 0.5, "overrides": COMPRESS, "stages": "both", "device": "cpu"}
    record = kvlatent.compress(
        place / "original", place / "text.txt", place / "out", teacher=place / "store", **options
    )
    assert seen[1:] == [(1, "LlamaForCausalLM", True), (2, "TeacherStore", False)]
    assert record["sha256"]["teacher"] and "--teacher store" in record["command"]
    assert record["training"]["stage2"]["tokens"] == 512


def test_a_store_that_does_not_fit_a_compress_is_refused(place, tiny_llama, tiny_tokenizer):
    teach(place)
    tiny_llama.lm_head.weight.data += 1
    save(tiny_llama, place / "moved", tokenizer=tiny_tokenizer)
    shutil.copy(place / "text.txt", place / "eval.txt")
    (place / "eval.txt").write_text("Another text. " * 200)
    before = {path.name for path in place.iterdir()}
    for change, sentence in (
        ({"teacher": place / "latent"}, "is what kvlatent teach wrote: got .*latent, which is no store"),
        (
            {"minutes": 1, "stages": "2", "overrides": DATA},
            "got --minutes 1 with --teacher; leave one of them out",
        ),
        ({"stages": "1"}, "got stages 1 with stage2.objective=kl"),
        ({"overrides": [*COMPRESS, "stage2.objective=next_token"]}, "with stage2.objective=next_token"),
        ({"model": place / "moved"}, "is of another original: got .*, it has"),
        ({"eval_data": place / "eval.txt"}, r"another data.held_out \(0.1, now 0.0\)"),
        ({"out": place / "store", "overwrite": True}, "is the teacher"),
    ):
        given = {
            "model": place / "original", "data": place / "text.txt", "out": place / "out", "teacher": place / "store",
            "kv": 0.5, "overrides": COMPRESS, "device": "cpu", **change,
        }  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            kvlatent.compress(**given)
        assert {path.name for path in place.iterdir()} == before


def test_command_line_teaches_and_says_the_size(place):
    words = [
        "teach",
        place / "original",
        "--data",
        place / "text.txt",
        "--top-k",
        8,
        "--out",
        place / "store",
    ]
    words += [word for key in DATA for word in ("--set", key)]
    done = CliRunner().invoke(app, [*map(str, words), "--tokens", "320", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["top_k"], answer["blocks"], answer["tokens"], answer["bytes_per_token"]) == (
        8,
        10,
        320,
        36,
    )
    assert "320 tokens in 10 blocks, 36 bytes a token: 0.0 MB" in done.stderr
    record = json.loads((place / "store" / RECORD).read_text())
    assert record["command"].startswith(
        "kvlatent teach original --data text.txt --out store --top-k 8 --tokens 320"
    )
    again = CliRunner().invoke(app, [*map(str, words), "--top-k", "300", "--overwrite"])
    assert again.exit_code == 2 and "got 300 of 300" in again.stderr

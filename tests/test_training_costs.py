"""Predicted memory and hours: against counting by hand, in the recipes, the page and `train --dry-run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent.selection.choices import PAPER
from kvlatent.training.trainable import prepare_for_training, trainable_names
from kvlatent.training.training_costs import Card, predict_stage
from kvlatent.workflows.run_plan import plan_run
from kvlatent.workflows.settings import check_trackers
from kvlatent.workflows.train_checkpoint import plan_training
from kvlatent_cli.main import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import predicted_costs

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
BLOCK = "data.block_size=32"
SMALL = ["dtype=bfloat16", "lora.rank=4", "data.block_size=32", "stage1.batch_size=8", "stage2.batch_size=8"]


def test_weights_are_those_that_a_model_has():
    original = AutoModelForCausalLM.from_config(CONFIG)
    student = convert(original, d_qk=8, d_vo=8, choices=PAPER)
    prepare_for_training(student, Recipe.load(None, [*SMALL, "dtype=float32"]))
    trained = sum(p.numel() for name, p in student.named_parameters() if name in trainable_names(student))
    whole = sum(p.numel() for p in original.parameters())
    attention = sum(p.numel() for name, p in original.named_parameters() if "self_attn" in name)
    ends = 2 * 97 * 64
    for recipe, shards in ((SMALL, 1), ([*SMALL, "scale.sharding=fsdp2"], 4)):
        for config in (CONFIG, student.config):
            cost = predict_stage(config, Recipe.load(None, recipe), 1, kv=0.5, cards=4)
            parts = cost.card_bytes
            assert parts["trained"] == 4 * trained / shards
            assert parts["gradients and optimizer"] == 12 * trained / shards
            assert parts["frozen"] == 2 * (whole - attention - ends) / shards
            assert parts["embedding and head"] == 2 * ends
            assert parts["teacher"] == (
                2 * attention if shards == 1 else 2 * (whole - ends) / 4 + 2 * ends / 2
            )


def test_operations_are_two_a_weight_of_each_product():
    recipe = Recipe.load(None, [*SMALL, "lora.rank=0", "data.block_size=2", "stage2.objective=next_token"])
    layers = 3 * (64 * 96 * 3 + 2 * 64) + 64
    narrow = 3 * (2 * 64 * 32 + 2 * 64 * 16)  # half of q, k, v, o
    cost = predict_stage(CONFIG, recipe, 2, kv=0.5)
    scores = 2 * 2 * 4 * 16 * 3
    assert cost.flops_per_token == 4 * (layers + narrow) + 2 * narrow + 3 * scores + 4 * 97 * 64
    again = predict_stage(CONFIG, Recipe.load(recipe, ["stage2.activation_checkpointing=true"]), 2, kv=0.5)
    assert again.flops_per_token - cost.flops_per_token == 2 * (layers + narrow) + scores
    assert again.card_bytes["activations"] < cost.card_bytes["activations"]
    taught = predict_stage(CONFIG, Recipe.load(recipe, ["stage2.objective=kl"]), 2, kv=0.5)
    assert taught.flops_per_token - cost.flops_per_token == 2 * (layers + 2 * narrow) + scores + 2 * 97 * 64
    card = Card(flops=1e6, reached=0.5)
    hours = predict_stage(CONFIG, recipe, 2, kv=0.5, cards=2, card=card).hours
    assert hours == pytest.approx(recipe.stage2.tokens * cost.flops_per_token / (2 * 1e6 * 0.5) / 3600)


@pytest.mark.parametrize("name", predicted_costs.SHAPES)
@pytest.mark.parametrize("share", predicted_costs.SHARES)
def test_recipes_say_what_is_predicted_and_fit_their_model_alone(name, share, tmp_path):
    path = ROOT / "recipes" / f"{name}-{share}.yaml"
    costs = predicted_costs.recipe_costs(name, share)
    assert path.read_text().splitlines()[1] == f"# {predicted_costs.header(*costs)}"
    assert all(
        cost.total_bytes * 1.8 < 80e9 for cost in costs
    )  # 1.8: the worst of the measured runs over its prediction
    predicted_costs.config_of(name).save_pretrained(tmp_path)
    kv = predicted_costs.SHARES[share]
    options = {"recipe": path, "stages": "none", "device": "cpu", "overrides": ["dtype=float32"]}
    assert plan_run(tmp_path, kv=kv, **options).recipe.target.kv == kv
    other = 0.25 if kv == 0.5 else 0.5
    with pytest.raises(ValueError, match=rf"the recipe is for kv={kv}: got {other}; take the recipe of this"):
        plan_run(tmp_path, kv=other, **options)
    if name == "qwen3-4b":
        predicted_costs.config_of("llama-3.1-8b").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"the recipe is for family=qwen3: got llama"):
            plan_run(tmp_path, kv=kv, **options)
        with pytest.raises(ValueError, match=r"for hidden_size=2560: got 4096"):
            plan_run(tmp_path, kv=kv, **{**options, "overrides": ["dtype=float32", "target.family=null"]})


def test_the_page_has_the_table_and_the_measured_ratios():
    page = (ROOT / "docs" / "many-gpus.md").read_text()
    assert "\n".join(predicted_costs.rows()) in page
    rows = json.loads((ROOT / "benchmarks" / "results" / "predicted_costs.json").read_text())["rows"]
    plain = [row for row in rows if not row["activation_checkpointing"]]
    for stage in (1, 2):
        ratios = [row["bytes_ratio"] for row in plain if row["stage"] == stage]
        assert f"{min(ratios):.2f} to {max(ratios):.2f}" in page
    assert f"{max(row['bytes_ratio'] for row in rows):.2f}" in page
    reached = [row["reached"] for row in rows]
    assert f"{min(reached):.0%} to {max(reached):.0%}".replace("%", " %") in page


@pytest.fixture
def latent(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    save(
        convert(AutoModelForCausalLM.from_config(CONFIG), d_qk=8, d_vo=8, preset="paper"),
        tmp_path / "latent",
        tokenizer=tiny_tokenizer,
    )
    (tmp_path / "text.txt").write_text("some text")
    return tmp_path / "latent"


def test_dry_run_of_train_predicts_and_writes_nothing(latent):
    before = sorted(latent.parent.rglob("*"))
    words = [
        "train",
        str(latent),
        "--stage",
        "2",
        "--data",
        str(latent.parent / "text.txt"),
        "--out",
        str(latent.parent / "out"),
    ]
    words += ["--dry-run", "--cards", "4", *(word for item in SMALL[1:] for word in ("--set", item))]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    recipe = Recipe.load(None, [*SMALL, "dtype=float32"])
    expected = predict_stage(
        convert(AutoModelForCausalLM.from_config(CONFIG), d_qk=8, d_vo=8, choices=PAPER).config,
        recipe,
        2,
        cards=4,
    )
    assert document["costs"] == json.loads(json.dumps(expected.summary()))
    assert document["plan"]["tokens"] == {"stage2": 400_000}
    text = CliRunner().invoke(app, words).stdout
    assert "GB on each of 4 cards" in text and "400,000 tokens" in text
    words[words.index("4")] = "3"
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "got --cards 3 and stage2.batch_size=8; try --cards 2" in refused.stderr
    words.remove("--dry-run")
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "got --cards 3 without --dry-run; add that, or start the command by torchrun" in refused.stderr
    assert sorted(latent.parent.rglob("*")) == before


def test_a_recipe_for_another_width_is_refused_by_train(latent):
    with pytest.raises(ValueError, match=r"the recipe is for kv=0.25: got 0.5"):
        plan_training(latent, latent / "x", stage=1, overrides=[BLOCK, "target.kv=0.25"], device="cpu")
    with pytest.raises(ValueError, match=r"the recipe is for num_hidden_layers=4: got 3"):
        plan_training(
            latent, latent / "x", stage=1, overrides=[BLOCK, "target.num_hidden_layers=4"], device="cpu"
        )
    fits = [
        BLOCK,
        "target.kv=0.5",
        "target.family=llama",
        "target.hidden_size=64",
        "target.num_hidden_layers=3",
    ]
    assert plan_training(latent, latent / "x", stage=1, overrides=fits, device="cpu").stages == (1,)


def test_trackers_that_are_not_there_are_one_sentence(latent, monkeypatch):
    monkeypatch.setattr("kvlatent.workflows.settings.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"report_to wandb needs .* not installed; pip install wandb"
    ) as caught:
        plan_training(latent, latent / "x", stage=1, overrides=[BLOCK, "report_to=[wandb]"], device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r"transformers does not know: got 'notes'; choose among .*trackio.*wandb"
    ):
        check_trackers(Recipe.load(None, ["report_to=[notes]"]))


def test_compress_does_not_spread_and_says_what_to_type(latent, tmp_path, tiny_tokenizer, monkeypatch):
    from kvlatent.workflows.compress_checkpoint import compress

    save(AutoModelForCausalLM.from_config(CONFIG), tmp_path / "original", tokenizer=tiny_tokenizer)
    given = {"data": tmp_path / "text.txt", "out": tmp_path / "out", "device": "cpu"}
    with pytest.raises(ValueError, match=r"compress trains in one process.*kvlatent convert, then torchrun"):
        compress(tmp_path / "original", **given, overrides=["scale.sharding=fsdp2"])
    with pytest.raises(ValueError, match=r"--minutes decides rate and tokens itself, and --allow-change"):
        compress(tmp_path / "original", **given, minutes=5, allow_change=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [
        "compress",
        str(tmp_path / "original"),
        "--data",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "kvlatent compress runs in one process: got 2, started by torchrun" in refused.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

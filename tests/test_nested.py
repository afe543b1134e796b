"""Several widths in one checkpoint: channels in the order of their worth, trained at a width a step, cut out of it."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import training_setup
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.cache_bytes import live_cache_bytes
from kvlatent.model.channel_slices import first_channels, slice_model, widths_at_share, widths_within
from kvlatent.model.classes import latent_config_of
from kvlatent.model.families import attention_layers_of, head_dim_of
from kvlatent.model.layer_parts import parts_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.channel_order import order_channels
from kvlatent.training.nested_widths import NestedWidths
from kvlatent.training.trainable import merged_copy, prepare_for_training
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.slice_checkpoint import slice_checkpoint
from kvlatent.workflows.train_checkpoint import train
from kvlatent_cli.main import app
from tiny import logits, tiny_model, tokens
from tolerances import ROUNDING, assert_close_to_scale
from training_setup import blocks, hashes, original, recipe, run, student_of

FAMILIES = ("llama", "phi3-longrope", "qwen3", "olmo2", "gpt-neox-sequential", "qwen3.5", "lfm2-moe")
"""Biases; a fused projection; a QK-norm over heads, and over all; fused by head, partly rotated; gated, layers without."""


def columns(count=16, length=48):
    positions = torch.arange(length).expand(count, -1)
    return {"input_ids": tokens(count, length, seed=3), "position_ids": positions}


def rows(count=16):
    both = columns(count)
    return [{name: both[name][i] for name in both} for i in range(count)]


def latent_of(family, **choices):
    model = tiny_model(family)
    half = head_dim_of(model.config) // 2
    options = {"preset": "own-frequency", **choices}
    return model, convert(model, d_qk=half, d_vo=half, **options)


def details(latent):
    return latent_config_of(latent.config), len(attention_layers_of(latent.config))


def masked_logits(model, widths, x):
    """Logits with everything but the first channels of queries, keys and values set to 0, by hand."""
    latent, count = details(model)
    layers = zip(attention_layers_of(model.config), widths.per_layer(count), strict=True)
    changed = []
    for layer, (d_qk, d_vo) in layers:
        attention = parts_of(model.get_decoder(), layer).attention
        kept = first_channels(attention.d_qk, latent.tables_at(layer)[0].rotary_dim, d_qk)

        def project(hidden, attention=attention, kept=kept, d_vo=d_vo):
            whole = type(attention).project(attention, hidden)
            query, key, value = (torch.zeros_like(part) for part in whole[:3])
            query[..., kept], key[..., kept] = whole.query[..., kept], whole.key[..., kept]
            value[..., :d_vo] = whole.value[..., :d_vo]
            return whole._replace(query=query, key=key, value=value)

        attention.project = project
        changed.append(attention)
    found = logits(model, x)
    for attention in changed:
        del attention.project
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_is_the_model_with_the_other_channels_at_zero(family):
    original_model, latent = latent_of(family)
    x, (config, layers) = tokens(), details(latent)
    assert torch.equal(logits(slice_model(latent, config.widths), x), logits(latent, x))
    before = hashes(latent), hashes(original_model)
    for d_qk, d_vo in ((config.d_qk // 2, config.d_vo // 2), (config.d_qk, 3), (4, config.d_vo)):
        widths = widths_within(config, layers, d_qk, d_vo)
        cut, masked = slice_model(latent, widths), masked_logits(latent, widths, x)
        assert_close_to_scale(logits(cut, x), masked, ROUNDING)
        assert (masked - logits(latent, x)).abs().max() > 1e-2
        cache = cut(x, use_cache=True).past_key_values
        assert (
            live_cache_bytes(cache) == x.numel() * layers * cut.config.num_key_value_heads * (d_qk + d_vo) * 4
        )
    assert (hashes(latent), hashes(original_model)) == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3.5"])
def test_a_whole_side_is_cut_too_and_layers_have_widths_of_their_own(family):
    model = tiny_model(family)
    full, x = convert(model, d_vo=16, preset="own-frequency"), tokens()
    config, layers = details(full)
    per_layer = widths_within(config, layers, [32, *[8] * (layers - 1)], [4, *[16] * (layers - 1)])
    cut = slice_model(full, per_layer)
    assert_close_to_scale(logits(cut, x), masked_logits(full, per_layer, x), ROUNDING)
    again = slice_model(cut, widths_at_share(details(cut)[0], layers, 0.15))
    assert 2 * sum(map(sum, details(again)[0].widths.per_layer(layers))) <= 0.3 * 64 * layers


@pytest.mark.parametrize("table", ["model", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ordered_channels_compute_the_same_and_are_cut_at_less_loss(family, table):
    model = tiny_model(family)
    statistics = calibrate(model, columns())
    half = head_dim_of(model.config) // 2
    latent = convert(model, d_qk=half, d_vo=half, statistics=statistics, table=table, align=0, global_steps=0)
    x, (config, layers) = tokens(), details(latent)
    whole, widths = logits(latent, x), widths_at_share(config, layers, 0.25)
    before = hashes(model)
    unordered = divergence(whole, logits(slice_model(latent, widths), x))
    order_channels(latent, rows())
    assert_close_to_scale(logits(latent, x), whole, 10 * ROUNDING)
    ordered = latent_config_of(latent.config)
    assert ordered.channels != config.channels
    assert {frozenset(kept) for layer in ordered.channels for kept in layer} == {
        frozenset(kept) for layer in config.channels for kept in layer
    }
    assert len(ordered.tables) == len(config.tables)
    if family in (
        "llama",
        "gpt-neox-sequential",
        "qwen3.5",
    ):  # the others' random weights differ too little in worth
        assert divergence(whole, logits(slice_model(latent, widths), x)) < unordered
    assert hashes(model) == before


def divergence(whole, given):
    return float((whole.softmax(-1) * (whole.log_softmax(-1) - given.log_softmax(-1))).sum(-1).mean())


def test_a_step_trains_one_width_and_every_width_comes_as_often():
    latent = student_of(original())
    nested = NestedWidths(latent, [0.25, 0.375, 0.5], seed=3)
    assert nested.summary() == [{"d_qk": 4, "d_vo": 4}, {"d_qk": 6, "d_vo": 6}, {"d_qk": 8, "d_vo": 8}]
    drawn = [nested.index_at(step) for step in range(30)]
    assert drawn == [NestedWidths(latent, [0.25, 0.375, 0.5], seed=3).index_at(step) for step in range(30)]
    assert all(sorted(drawn[at : at + 3]) == [0, 1, 2] for at in range(0, 30, 3))
    assert len({tuple(drawn[at : at + 3]) for at in range(0, 30, 3)}) > 2
    assert drawn != [NestedWidths(latent, [0.25, 0.375, 0.5], seed=4).index_at(step) for step in range(30)]
    step, x = drawn.index(0), tokens() % 61
    with nested.narrowed(step):
        latent.model(x).last_hidden_state.square().sum().backward()
    with nested.narrowed(step):
        narrow = logits(latent, x)
    assert_close_to_scale(narrow, masked_logits(latent, nested.widths[0], x), ROUNDING)
    assert "project" not in vars(latent.model.layers[0].self_attn)
    attention = latent.model.layers[0].self_attn
    gradients = {part: getattr(attention, f"{part}_proj").weight.grad for part in "qkvo"}
    for part in "qkv":
        by_channel = gradients[part].unflatten(0, (-1, 8)).abs().sum((0, 2))
        kept = [0, 1, 4, 5] if part in "qk" else [0, 1, 2, 3]
        assert by_channel.nonzero().flatten().tolist() == kept
    assert gradients["o"].unflatten(1, (-1, 8)).abs().sum((0, 1)).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_a_killed_nested_stage_ends_with_the_same_weights(tmp_path):
    settings, teacher = recipe("stage2.nested_kv=[0.25, 0.5]"), original()

    def student():
        latent = student_of(teacher)
        prepare_for_training(latent, settings)
        return latent

    whole = student()
    summary = run(whole, teacher, 2, tmp_path / "whole", settings)
    assert summary["nested_widths"] == [{"d_qk": 4, "d_vo": 4}, {"d_qk": 8, "d_vo": 8}]
    assert run(student(), teacher, 2, tmp_path / "alone", recipe())["last_loss"] != summary["last_loss"]

    def killed(_, done, *rest):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student(), teacher, 2, tmp_path / "cut", settings, progress=killed)
    resumed = student()
    run(resumed, teacher, 2, tmp_path / "cut", settings)
    assert hashes(resumed) == hashes(whole)
    assert resumed.config.kv_latent == whole.config.kv_latent
    finished = student()
    run(finished, teacher, 2, tmp_path / "cut", settings)  # loaded, not run
    assert hashes(finished) == hashes(whole)
    x = tokens() % 61
    assert torch.equal(logits(finished.eval(), x), logits(whole.eval(), x))
    with pytest.raises(ValueError, match=r"another settings\.nested_kv"):
        run(student(), teacher, 2, tmp_path / "cut", recipe("stage2.nested_kv=[0.3, 0.5]"))


def test_training_at_several_widths_mends_the_narrow_one_as_training_it_alone_does(tmp_path):
    teacher, x = original(), torch.stack([row["input_ids"] for row in blocks(8)])
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "embed" in name or "lm_head" in name:
                parameter.mul_(8)  # a distribution that is far from flat
    untrained = student_of(teacher)
    order_channels(untrained, blocks())

    def divergence_at_a_quarter(latent):
        config, layers = details(latent)
        return divergence(
            logits(teacher, x), logits(slice_model(latent, widths_at_share(config, layers, 0.25)), x)
        )

    found = {}
    for name, shares in (("nested", "[0.25, 0.5]"), ("alone", "[0.25]")):
        settings = recipe(
            "stage2.tokens=4096",
            "stage2.objective=kl",
            "stage2.learning_rate=0.003",
            f"stage2.nested_kv={shares}",
        )
        latent = student_of(teacher)
        prepare_for_training(latent, settings)
        run(latent, teacher, 2, tmp_path / name, settings, rows=blocks(96))
        found[name] = divergence_at_a_quarter(merged_copy(latent))
    assert found["nested"] < 0.7 * divergence_at_a_quarter(untrained)
    assert found["nested"] < 1.2 * found["alone"]


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_tokenizer):
    save(tiny_llama, tmp_path / "original", tokenizer=tiny_tokenizer)
    latent = convert(tiny_llama, d_qk=8, d_vo=8, preset="paper")
    save(latent, tmp_path / "latent", tokenizer=tiny_tokenizer)
    sentence = "Once upon a time there was a small cat who lived near the river and liked the sun. "
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(f"{n} {sentence * 3}" for n in range(40)))
    return tmp_path


FRESH = """
import sys, json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits.flatten().tolist()))
"""


def test_a_slice_is_a_checkpoint_like_any_other(folder):
    settings = [
        "data.block_size=32",
        "lora.rank=2",
        "stage2.nested_kv=[0.25, 0.5]",
        "stage2.tokens=512",
        "stage2.batch_size=4",
    ]
    places = {"data": folder / "text.txt", "teacher": folder / "original", "out": folder / "nested"}
    train(folder / "latent", stage=2, overrides=settings, device="cpu", **places)
    record = slice_checkpoint(
        folder / "nested", folder / "cut", kv=0.25
    )  # trained: no warning, which would be an error
    assert record["warnings"] == []
    assert json.loads((folder / "cut" / "run.json").read_text())["training"]["stage2"]["nested_widths"] == [
        {"d_qk": 4, "d_vo": 4}, {"d_qk": 8, "d_vo": 8},
    ]  # fmt: skip
    names = {path.name for path in (folder / "cut").iterdir()}
    assert {"README.md", "run.json", "recipe.yaml", "self_check.json", "tokenizer.json"} <= names
    assert "width 4 and values at 4" in (folder / "cut" / "README.md").read_text()
    whole, cut = load_model(folder / "nested"), load_model(folder / "cut")
    x = tokens(1, 12)
    config, layers = details(whole)
    assert torch.equal(logits(cut, x), logits(slice_model(whole, widths_at_share(config, layers, 0.25)), x))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder / "cut"), json.dumps(x[0].tolist())],
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    found = torch.tensor(json.loads(done.stdout)).view_as(logits(cut, x))
    assert_close_to_scale(found, logits(cut, x), ROUNDING)
    slice_checkpoint(folder / "nested", folder / "same", kv=0.5)
    assert torch.equal(logits(load_model(folder / "same"), x), logits(whole, x))
    with pytest.warns(UserWarning, match="trained at other widths .4/4 and 8/8., between"):
        slice_checkpoint(folder / "nested", folder / "between", kv=0.4)
    with pytest.warns(UserWarning, match="never trained to be cut"):
        slice_checkpoint(folder / "latent", folder / "blind", d_qk=4)
    assert latent_config_of(load_model(folder / "blind").config).widths == (4, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--kv", "0.6"], "cannot be wider than its checkpoint: got --kv 0.6 of one that keeps 0.5"),
        (
            ["--kv", "0.01"],
            r"a pair of key channels and a value direction: got --kv 0.01, .* give --kv 0.0938",
        ),
        (["--kv", "1.5"], r"in \(0, 1\]: got --kv 1.5; try --kv 0.25"),
        (["--d-vo", "9"], "got d_vo=9 in layer 0, which has 8"),
        (["--d-qk", "3"], "d_qk must be even"),
        (["--d-qk", "4,4,4"], "one width per layer: got 3 for 2 layers"),
        ([], "a slice needs a width: got none; pass --kv 0.28"),
        (["--kv", "0.3", "--d-qk", "4"], "say the same thing: got both"),
    ],
)
def test_impossible_slices_are_one_sentence_and_write_nothing(folder, options, sentence):
    asked = ["slice", str(folder / "latent"), *options, "--out", str(folder / "cut")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert __import__("re").search(sentence, result.stderr.replace("\n", " ")), result.stderr
    assert not (folder / "cut").exists()


def test_a_slice_neither_replaces_its_checkpoint_nor_starts_from_an_original(folder):
    before = {path.name: path.read_bytes() for path in (folder / "latent").iterdir()}
    for options in ({}, {"overwrite": True}):
        with pytest.raises((ValueError, FileExistsError), match="latent"):
            slice_checkpoint(folder / "latent", folder / "latent", kv=0.25, **options)
    with pytest.raises(
        ValueError, match="original is not a latent checkpoint; make one with kvlatent convert"
    ):
        slice_checkpoint(folder / "original", folder / "cut", kv=0.25)
    assert {path.name: path.read_bytes() for path in (folder / "latent").iterdir()} == before


def test_keys_that_cannot_be_cut_or_ordered_are_refused():
    model = tiny_model("qwen3")
    sliced = convert(model, d_qk=16, d_vo=16, preset="own-frequency", qk_norm="sliced")
    with pytest.raises(ValueError, match=r"got qk_norm=sliced; convert .* conversion\.qk_norm=full"):
        slice_model(sliced, details(sliced)[0].widths)
    whole_keys = convert(model, d_vo=16, preset="own-frequency")
    with pytest.raises(
        ValueError, match=r"behind a QK-norm have the original's order: got d_qk=32; .*d_qk=30 or less"
    ):
        order_channels(whole_keys, rows(2))


@pytest.mark.parametrize("value", ["[]", "[0.0]", "[1.5]", "0.28"])
def test_shares_of_a_recipe_are_shares(value):
    with pytest.raises(ValueError, match=r"recipe key stage2\.nested_kv"):
        Recipe.load(None, [f"stage2.nested_kv={value}"])


def test_a_share_wider_than_the_model_is_refused_before_anything_is_written(tmp_path):
    teacher, settings = original(), recipe("stage2.nested_kv=[0.75]")
    latent = student_of(teacher)
    prepare_for_training(latent, settings)
    with pytest.raises(
        ValueError,
        match=r"got stage2\.nested_kv 0\.75 of one that keeps 0\.5 .*; give stage2\.nested_kv 0\.5 or less",
    ):
        run(latent, teacher, 2, tmp_path / "work", settings)
    assert not (tmp_path / "work").exists()
    assert training_setup.SIZES["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"minutes": 5.0}, r"got --minutes 5 with stage2\.nested_kv=\[0\.25, 0\.5\]; give --tokens instead"),
        ({"kv": 0.25}, r"got stage2\.nested_kv=\[0\.25, 0\.5\] and --kv 0\.25; raise --kv to 0\.5"),
    ],
)
def test_a_run_that_cannot_train_several_widths_says_so_before_it_starts(folder, options, sentence):
    asked = {
        "data": folder / "text.txt",
        "out": folder / "run",
        "overrides": ["stage2.nested_kv=[0.25, 0.5]"],
    }
    with pytest.raises(ValueError, match=sentence):
        compress(folder / "original", **asked, **options)
    assert not (folder / "run.partial").exists()


def test_the_share_that_was_asked_for_is_trained_at_the_widths_that_it_gave(folder):
    """30 % of heads of 16 channels are 4 and 4, which is 25 %: no reason to end a run behind its conversion."""
    small = ["data.block_size=32", "stage2.batch_size=4", "calibration.recall=0"]
    record = compress(
        folder / "original", folder / "text.txt", folder / "run",
        kv=0.3, preset="own-frequency", stages="2", tokens=128,
        overrides=["stage2.nested_kv=[0.2, 0.3]", *small],
    )  # fmt: skip
    narrow, own = record["training"]["stage2"]["nested_widths"]
    assert own == {"d_qk": record["plan"]["d_qk"], "d_vo": record["plan"]["d_vo"]} == {"d_qk": 4, "d_vo": 4}
    assert sum(narrow.values()) < 8
    assert Recipe.load(folder / "run" / "recipe.yaml").stage2.nested_kv == [0.2, 0.25]

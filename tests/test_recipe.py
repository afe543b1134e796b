"""Recipes: every key is present and explained in the files, unknown ones are refused, a partial file keeps
defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kvlatent.jobs.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


def keys(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_in_the_file_with_a_comment(path):
    text = path.read_text()
    assert keys(yaml.safe_load(text)) == keys(Recipe().model_dump())
    Recipe.load(path)
    for line in text.splitlines():
        key, _, value = line.strip().partition(":")
        if key and not key.startswith("#") and value.strip():
            assert "  # " in line, f"no comment on {line!r}"


def test_the_small_recipe_is_the_default():
    models = ("llama-3.1-8b", "qwen3-4b", "qwen3.5-9b", "phi-4-mini")
    known = {f"{name}-{share}" for name in models for share in ("half", "quarter")}
    assert {path.stem for path in FILES} == {"cpu-small", "paper", "real-small", "real-gpu"} | known
    assert Recipe.load(FOLDER / "cpu-small.yaml") == Recipe()
    assert Recipe.load(FOLDER / "paper.yaml") != Recipe()


def test_the_paper_recipe_holds_appendix_a():
    paper = Recipe.load(FOLDER / "paper.yaml")
    assert (paper.lora.rank, paper.lora.alpha, paper.data.block_size) == (256, 512, 4096)
    assert (paper.stage1.tokens, paper.stage2.tokens) == (100_000_000, 1_000_000_000)
    for stage in (paper.stage1, paper.stage2):
        assert stage.batch_size * stage.gradient_accumulation == 8
        assert (stage.learning_rate, stage.adam_epsilon, stage.weight_decay) == (2e-5, 2e-4, 0.01)
        assert (stage.adam_beta1, stage.adam_beta2) == (0.9, 0.999)


def test_dump_and_load_give_the_same_recipe(tmp_path):
    recipe = Recipe.load(FOLDER / "paper.yaml", ["data.separator=null", "stage2.temperature=2"])
    (tmp_path / "r.yaml").write_text(recipe.dump_yaml())
    assert Recipe.load(tmp_path / "r.yaml") == recipe


def test_partial_file_keeps_the_stage_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("stage2: {learning_rate: 2e-5}\nlora:\n")
    with pytest.raises(ValueError, match="recipe key lora"):
        Recipe.load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("stage2: {learning_rate: 2e-5}\n")
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.stage2.learning_rate == 2e-5
    assert recipe.stage2.objective == Recipe().stage2.objective
    assert recipe.stage1 == Recipe().stage1


def test_overrides_win_over_the_file():
    recipe = Recipe.load(FOLDER / "paper.yaml", ["stage1.tokens=1e6", "seed=7", "stage2.objective=kl"])
    assert (recipe.stage1.tokens, recipe.seed, recipe.stage2.objective) == (1_000_000, 7, "kl")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage1.lr=1e-3", "unknown recipe key stage1.lr: the known keys there are tokens, batch_size"),
        ("stages=2", "unknown recipe key stages: the known keys there are seed"),
        ("stage1.tokens=0", "stage1.tokens: .*greater than or equal to 1, got 0"),
        ("stage1.tokens=many", "stage1.tokens: .*integer.*got 'many'"),
        ("stage1.keep=1", "stage1.keep: .*greater than or equal to 2, got 1"),
        ("stage2.objective=ce", "stage2.objective: .*'next_token'.*got 'ce'"),
        ("stage2.learning_rate=.nan", "stage2.learning_rate: .*finite"),
        ("dtype=float16", "dtype: .*'float32'.*got 'float16'"),
        ("seed", "written section.key=value: got 'seed'"),
        ("seed.a=1", "recipe key seed: "),
        ("stage1.tokens.x=1", "stage1.tokens"),
        ("seed={", "not YAML"),
    ],
)
def test_mistakes_are_one_sentence(override, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Recipe.load(None, [override])
    assert "\n" not in str(caught.value)


def test_override_inside_a_value_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("stage1: {tokens: 5}")
    with pytest.raises(ValueError, match=r"tokens in the override 'stage1.tokens.x=1' is a value"):
        Recipe.load(tmp_path / "r.yaml", ["stage1.tokens.x=1"])


@pytest.mark.parametrize(("text", "sentence"), [("- a\n", "mapping of sections"), ("a: [", "not YAML")])
def test_files_that_are_no_recipe(tmp_path, text, sentence):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not YAML"):
        Recipe.load(path)
    with pytest.raises(FileNotFoundError, match=r"recipes/cpu-small\.yaml"):
        Recipe.load(tmp_path / "absent.yaml")


def test_the_real_recipe_trains_as_long_as_its_comment_says():
    """35 minutes of the hour on two cores, at the speed of one that was measured, of which two give 1.6 times."""
    folder = FOLDER.parent / "benchmarks" / "results"
    measured = json.loads((folder / "training_speed.json").read_text())["bfloat16"]
    recipe = Recipe.load(FOLDER / "real-small.yaml")
    assert recipe.stage2.batch_size * recipe.data.block_size == measured["tokens_a_step"]
    speed = 1.6 * measured["stage II"]["tokens_per_processor_second"]
    assert 20 * 60 < (recipe.stage1.tokens + recipe.stage2.tokens) / speed < 35 * 60
    assert measured["stage II"]["peak_bytes"] < measured["limits"]["peak_bytes"]

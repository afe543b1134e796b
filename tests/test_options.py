"""An option is declared once: what a command offers is what its workflow takes, and what the recipe says of it."""

import inspect
from typing import get_args

import pytest
import typer

from kvlatent.jobs.recipe import Recipe, option_keys
from kvlatent.workflows.calibrate_and_plan import calibrate_checkpoint, plan_checkpoint
from kvlatent.workflows.compress_checkpoint import compress
from kvlatent.workflows.convert_checkpoint import convert_checkpoint
from kvlatent.workflows.settings import RUN_OPTIONS, recipe_overrides
from kvlatent_cli.main import app
from kvlatent_cli.options import BLOCKS, CONVERSION, DTYPE, SEED, Option, command, switch
from kvlatent_cli.session import Session

COMMANDS = typer.main.get_command(app).commands
WORKFLOWS = {
    "compress": compress,
    "convert": convert_checkpoint,
    "calibrate": calibrate_checkpoint,
    "plan": plan_checkpoint,
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_option_is_taken_by_its_workflow(name):
    taken = {*inspect.signature(WORKFLOWS[name]).parameters, *RUN_OPTIONS, "json"}
    taken |= {"memory"} if name == "plan" else set()  # in bytes there
    assert {parameter.name for parameter in COMMANDS[name].params} <= taken


def test_every_key_of_the_recipe_that_is_marked_is_an_option():
    assert option_keys() == {
        "seed": "seed", "dtype": "dtype", "preset": "conversion.preset", "table": "conversion.table",
        "align": "conversion.align",
            "global_steps": "conversion.global_steps", "blocks": "calibration.blocks",
    }  # fmt: skip
    assert set(option_keys()) <= {option.name for option in (*CONVERSION, DTYPE, SEED)}


def test_help_agrees_with_the_recipe():
    assert DTYPE.metavar.split("|") == list(get_args(Recipe.model_fields["dtype"].annotation))
    (preset,) = (option for option in CONVERSION if option.name == "preset")
    assert f"'{Recipe().conversion.preset}' by default" in preset.help
    assert f"{Recipe().calibration.blocks} by default" in BLOCKS.help


def test_help_is_in_sentences():
    for name, one in COMMANDS.items():
        for parameter in one.params:
            first, last = parameter.help[0], parameter.help[-1]
            assert (first.isupper() or first == "`") and last == ".", (name, parameter.name)
            assert not parameter.help.startswith(("Of ", "For ")), (name, parameter.name)


def test_an_unknown_option_is_refused_and_its_like_is_named():
    with pytest.raises(TypeError, match="unexpected option 'tabel' of a run; did you mean table"):
        compress("model", "text.txt", "out", tabel="layer")
    for workflow in (calibrate_checkpoint, convert_checkpoint):
        with pytest.raises(TypeError, match="unexpected option 'colour'.*kv, d_qk, d_vo, engine"):
            workflow("model", data="text.txt", out="out", colour="red")


def test_options_stand_for_keys_after_the_overrides():
    given = {"overrides": ["seed=1", "lora.rank=2"], "seed": 3, "table": "layer", "align": None, "kv": 0.5}
    recipe = Recipe.load(None, recipe_overrides(given))
    assert (recipe.seed, recipe.lora.rank, recipe.conversion.table) == (3, 2, "layer")
    assert Recipe.load(recipe, ["seed=4"]) == Recipe.load(None, [*recipe_overrides(given), "seed=4"])
    assert recipe.seed == 3


def test_a_command_gives_what_was_typed_and_leaves_out_what_was_not():
    seen = []

    @command(
        Option("first_one", "A number.", "N", int, 2),
        Option("second", "A word."),
        Option("third", "A word.", flag="other", read=lambda flag, text: f"{flag}={text}"),
        switch("fourth", "Or not."),
    )
    def show(run: Session, given: dict) -> None:
        """Show."""
        seen.append((given, run.typed))

    show(first_one=2, second=None, third="x", fourth=False, json=False)
    assert seen == [
        (
            {"first_one": 2, "third": "other=x", "fourth": False},
            {"first-one": 2, "other": "x", "fourth": False},
        )
    ]

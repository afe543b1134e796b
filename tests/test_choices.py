"""Presets, single choices, contradictions, and what is left without text."""

import dataclasses
import warnings

import pytest
import torch

from calibration_setup import short_descent, text
from kvlatent.conversion.convert_model import convert
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.calibrate import calibrate
from kvlatent.selection.choices import NO_DATA, PAPER, PRESETS, Choices, resolve_choices, without_statistics
from kvlatent.selection.latent_config import choose
from tiny import FAMILIES, HEAD_DIM, logits, tiny_model, tokens


def test_the_presets_are_what_they_are_called():
    assert resolve_choices() == resolve_choices("calibrated") == PRESETS["calibrated"]
    calibrated = PRESETS["calibrated"]
    assert (calibrated.keys, calibrated.values, calibrated.frequencies) == ("gram", "whitened", "own")
    assert calibrated.gains and calibrated.refit and calibrated.align > 0
    assert (calibrated.table, calibrated.scale) == ("head", "original")
    assert calibrated.unrotated == "factored" and resolve_choices("own-frequency").unrotated == "selected"
    paper = resolve_choices("paper")
    assert paper == PAPER and (paper.keys, paper.frequencies) == ("stride", "frequency_aware")
    assert (paper.values, paper.scale, paper.align) == ("slice", "d_qk", 0)
    own = resolve_choices("own-frequency")
    assert (own.keys, own.frequencies, own.values, own.scale) == ("stride", "own", "svd", "original")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"keys": "energy"}, {"keys": "energy", "unrotated": "selected"}),
        ({"align": 7}, {"align": 7}),
        ({"align": 0}, {"align": 0, "global_steps": 0}),  # statistics alone
        ({"gains": False}, {"gains": False}),
        ({"refit": False}, {"refit": False}),
        ({"values": "svd"}, {"values": "svd"}),
        ({"table": "layer"}, {"table": "layer"}),
        ({"keys": "stride"}, {"keys": "stride", "table": "model", "unrotated": "selected"}),  # the same channels everywhere
        ({"keys": "stride", "table": "model"}, {"keys": "stride", "table": "model", "unrotated": "selected"}),
        ({"keys": "matched", "frequencies": "frequency_aware"},
         {"keys": "matched", "frequencies": "frequency_aware", "table": "model", "gains": False,
          "unrotated": "selected"}),
    ],
)  # fmt: skip
def test_a_single_choice_replaces_that_of_the_preset(given, expected):
    assert resolve_choices(**given) == dataclasses.replace(PRESETS["calibrated"], **expected)


def test_only_the_papers_own_choices_keep_the_papers_scale():
    assert resolve_choices("paper", keys="stride", values="slice", table="model", align=0).scale == "d_qk"
    for change in ({"values": "svd"}, {"frequencies": "own"}, {"refit": True}, {"align": 1}):
        assert resolve_choices("paper", **change).scale == "original"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "magic"}, "unknown preset 'magic'; choose one of calibrated, paper, own-frequency"),
        ({"keys": "magic"}, "unknown keys 'magic'; choose one of stride, matched, gram, energy, weights"),
        ({"frequencies": "magic"}, "unknown frequencies 'magic'; choose one of own, frequency_aware"),
        ({"values": "magic"}, "unknown values 'magic'; choose one of slice, svd, whitened"),
        ({"table": "room"}, "unknown table 'room'; choose one of head, layer, model"),
        ({"align": -1}, r"alignment takes 0 steps \(off\) or more: got align=-1; try 200"),
        ({"frequencies": "frequency_aware"}, "pairs chosen by 'gram' keep their own frequencies"),
        ({"preset": "paper", "keys": "energy"}, "pairs chosen by 'energy' keep their own.*frequencies=own"),
        ({"preset": "own-frequency", "table": "head"}, "keys='stride' takes the same.*got table='head'"),
        ({"preset": "paper", "table": "layer"}, "keys='stride' takes the same.*got table='layer'"),
        ({"keys": "matched", "table": "head"}, "keys='matched' takes the same channels everywhere"),
    ],
)
def test_unknown_and_contradictory_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_choices(**arguments)
    with pytest.raises(ValueError, match=message):  # and so by the function people call
        convert(tiny_model("llama"), d_qk=16, **arguments)


def test_what_needs_text_and_what_is_left_without():
    assert not PAPER.needs_statistics and not PRESETS["own-frequency"].needs_statistics
    assert PRESETS["calibrated"].needs_statistics and not Choices().needs_statistics
    for one in (
        {"keys": "gram"},
        {"keys": "energy"},
        {"values": "whitened"},
        {"gains": True},
        {"refit": True},
        {"align": 1},
    ):
        assert Choices(**one).needs_statistics and not without_statistics(Choices(**one)).needs_statistics
    assert not Choices(keys="weights").needs_statistics
    left = without_statistics(resolve_choices(table="layer"))
    assert left == Choices(keys="weights", values="svd", table="layer")
    assert without_statistics(PAPER) == PAPER
    kept = resolve_choices("own-frequency", refit=True)
    assert without_statistics(kept) == PRESETS["own-frequency"]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_text_there_is_a_warning_and_a_working_model(name):
    model = tiny_model(name)
    with pytest.warns(UserWarning, match="no text to calibrate on: .* so give --data FILE") as caught:
        latent = convert(model, d_qk=16, d_vo=16)
    assert [str(each.message) for each in caught] == [NO_DATA]
    assert caught[0].filename == __file__
    config = latent_config_of(latent.config)
    assert (config.keys, config.values, config.scale) == ("weights", "svd", "original")
    assert len(config.channels) == 3 and len(config.channels[0]) == model.config.num_key_value_heads
    assert logits(latent, tokens()).isfinite().all()


def test_spelled_out_choices_that_need_no_text_and_full_widths_do_not_warn():
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in (
            {"choices": PRESETS["paper"]},
            {"choices": PRESETS["own-frequency"]},
            {"choices": without_statistics(PRESETS["calibrated"])},
            {"d_qk": None},
            {"d_qk": HEAD_DIM, "d_vo": HEAD_DIM},
        ):
            convert(model, **{"d_qk": 16, **arguments})


def test_pairs_chosen_by_weights_are_those_that_matter_when_inputs_are_white():
    """Pairs whose rows are zero in W_Q or W_K are never kept before those that are not."""
    for name in ("llama-mha", "qwen2", "qwen3", "phi3-longrope"):
        model = tiny_model(name)
        dead = torch.tensor([0, 3, 5, 6, 9, 12, 14, 15])  # of 16 pairs
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                if hasattr(attention, "qkv_proj"):
                    rows = attention.qkv_proj.weight[: 4 * HEAD_DIM].view(4, HEAD_DIM, -1)
                    dead_channels = _channels(dead, 8)
                else:
                    rows = attention.k_proj.weight.view(-1, HEAD_DIM, model.config.hidden_size)
                    dead_channels = _channels(dead, 16)
                    if attention.k_proj.bias is not None:
                        attention.k_proj.bias.view(-1, HEAD_DIM)[:, dead_channels] = 0
                rows[:, dead_channels] = 0
        with pytest.warns(UserWarning, match="no text"):
            latent = convert(model, d_qk=16)
        for layer in latent_config_of(latent.config).channels:
            for kept in layer:
                assert not set(kept) & set(dead_channels.tolist())


def _channels(pairs, rotated):
    """Both channels of each pair, of which the first `rotated` turn."""
    rotary = 2 * rotated
    passed = (HEAD_DIM - rotary) // 2
    first = torch.where(pairs < rotated, pairs, rotary + pairs - rotated)
    return torch.cat([first, first + torch.where(pairs < rotated, rotated, passed)])


def test_choices_given_as_one_object_are_taken_as_they_are():
    model = tiny_model("llama")
    statistics = calibrate(model, text())
    chosen = Choices(keys="energy", values="whitened", table="layer", gains=True)
    with short_descent():
        ours = convert(model, d_qk=16, d_vo=8, choices=chosen, statistics=statistics)
        theirs = convert(
            model, d_qk=16, d_vo=8, keys="energy", table="layer", refit=False, align=0, statistics=statistics
        )
    assert torch.equal(logits(ours, tokens()), logits(theirs, tokens()))
    assert latent_config_of(ours.config).keys == "energy"


def test_pairs_are_needed_where_statistics_choose():
    with pytest.raises(ValueError, match="keys='gram' needs the pairs that statistics or weights name"):
        choose(tiny_model("llama").config, 16, 16, resolve_choices())


def test_one_table_for_the_model_needs_one_width():
    model = tiny_model("llama")
    statistics = calibrate(model, text())
    with pytest.raises(
        ValueError, match="one rotary table for the model needs one key width: got d_qk from 8"
    ):
        convert(model, d_qk=[8, 16, 16], table="model", statistics=statistics)


def test_a_sliced_qk_norm_needs_a_table_a_layer():
    model = tiny_model("qwen3")
    statistics = calibrate(model, text())
    with pytest.raises(ValueError, match="must keep the same channels: got 2 lists"):
        convert(model, d_qk=16, qk_norm="sliced", statistics=statistics)
    latent = convert(model, d_qk=16, qk_norm="sliced", table="layer", align=2, statistics=statistics)
    assert logits(latent, tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"keys": "best"}, "unknown keys 'best'; choose one of stride"),
        ({"frequencies": "fast"}, "unknown frequencies 'fast'; choose one of own"),
        ({"values": "pca"}, "unknown values 'pca'; choose one of slice"),
        ({"table": "token"}, "unknown table 'token'; choose one of"),
        ({"align": -1}, "0 steps .off. or more: got align=-1; try 200"),
        (
            {"keys": "gram", "frequencies": "frequency_aware"},
            "pairs chosen by 'gram' keep their own frequencies",
        ),
        (
            {"gains": True, "frequencies": "frequency_aware"},
            "gains are for pairs that keep their own frequencies",
        ),
        ({"keys": "stride", "table": "head"}, "one table for the model: got table='head'; leave it out"),
    ],
)
def test_choices_made_by_hand_are_checked_too(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Choices(**given)


def test_pairs_named_for_a_preset_without_them_bring_a_table_per_head():
    assert resolve_choices("own-frequency", keys="gram").table == "head"
    assert resolve_choices("own-frequency", keys="gram", table="model").table == "model"
    assert resolve_choices("calibrated", keys="stride").table == "model"


def test_a_config_with_whitened_values_cannot_be_filled_without_statistics():
    model = tiny_model("llama")
    statistics = calibrate(model, text(blocks=5, length=40))
    config = latent_config_of(convert(model, d_qk=16, d_vo=8, statistics=statistics, align=0).config)
    with pytest.raises(
        ValueError, match='values="whitened", which are computed from text: got statistics=None'
    ):
        convert(model, config)
    convert(model, config, statistics=statistics, align=0)


def test_a_side_that_was_not_narrowed_is_recorded_and_cannot_be_asked_to_shrink():
    config = tiny_model("llama").config
    recorded = Choices(keys="full", values="full")
    assert choose(config, HEAD_DIM, HEAD_DIM, recorded).keys == "full"
    with pytest.raises(
        ValueError, match='"full" keeps every channel, 32 of them: got d_qk=16; name another rule'
    ):
        choose(config, 16, HEAD_DIM, recorded)
    with pytest.raises(ValueError, match="got d_vo=8"):
        choose(config, HEAD_DIM, 8, recorded)

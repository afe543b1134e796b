"""The layer report against attention outputs recorded from the models' own forwards."""

import json
import re
from contextlib import ExitStack

import pytest
import torch

from kvlatent.conversion.convert_model import convert
from kvlatent.conversion.layer_report import STRATEGIES, layer_report
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.calibrate import calibrate
from tiny import tiny_model, tokens


def packed(batch=3, length=48):
    """Random blocks of two documents each."""
    positions = torch.cat([torch.arange(20), torch.arange(length - 20)]).expand(batch, -1)
    return {"input_ids": tokens(batch, length), "position_ids": positions}


def outputs_on(model, inputs, text):
    """Attention output of every layer [L], the attention fed `inputs` where given; and what it was fed."""
    fed, given = [], []
    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(model.model.layers):

            def feed(module, args, kwargs, index=index):
                hidden = kwargs["hidden_states"] if inputs is None else inputs[index]
                fed.append(hidden)
                return args, {**kwargs, "hidden_states": hidden}

            hooks.callback(layer.self_attn.register_forward_pre_hook(feed, with_kwargs=True).remove)
            hooks.callback(
                layer.self_attn.register_forward_hook(lambda m, a, out: given.append(out[0])).remove
            )
        model.model(**text, use_cache=False)
    return given, fed


def direct(model, latent, text):
    """Relative squared error of every layer, from the two models' own forwards."""
    wanted, inputs = outputs_on(model, None, text)
    given, _ = outputs_on(latent, inputs, text)
    pairs = zip(given, wanted, strict=True)
    return [float((a - b).double().square().sum() / b.double().square().sum()) for a, b in pairs]


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "phi3-longrope"])
def test_every_strategy_is_measured_on_the_originals_inputs(name):
    model, text = tiny_model(name), packed()
    statistics = calibrate(model, text)
    config = latent_config_of(convert(model, d_qk=16, d_vo=8, align=0, statistics=statistics).config)
    report = layer_report(model, statistics, config, blocks=2)
    assert json.loads(json.dumps(report)) == report
    assert [(row["layer"], row["d_qk"], row["d_vo"]) for row in report] == [(i, 16, 8) for i in range(3)]
    seen = {key: column[:2] for key, column in text.items()}
    for strategy, choices in STRATEGIES.items():
        if strategy in report[0]["reasons"]:
            assert all(row["errors"][strategy] is None for row in report)
            with pytest.raises(ValueError, match=re.escape(report[0]["reasons"][strategy])):
                convert(model, d_qk=16, d_vo=8, choices=choices, statistics=statistics)
            continue
        latent = convert(model, d_qk=16, d_vo=8, choices=choices, statistics=statistics)
        errors = direct(model, latent, seen)
        assert [row["errors"][strategy] for row in report] == pytest.approx(errors, rel=1e-4)
        assert min(errors) > 1e-3


def test_the_scope_of_the_tables_is_the_configs():
    model, text = tiny_model("llama-mha"), packed()
    statistics, seen = calibrate(model, text), {key: column[:1] for key, column in text.items()}
    found = {}
    for scope in ("head", "layer", "model"):
        made = convert(model, d_qk=8, d_vo=16, align=0, refit=False, table=scope, statistics=statistics)
        report = layer_report(model, statistics, latent_config_of(made.config), blocks=1)
        found[scope] = [row["errors"]["calibrated"] for row in report]
        assert found[scope] == pytest.approx(direct(model, made, seen), rel=1e-4)
    assert found["head"] != found["layer"] != found["model"]


def test_an_impossible_strategy_says_why_and_spares_the_other_layers():
    model = tiny_model("llama")
    statistics = calibrate(model, packed())
    latent = convert(model, d_qk=[16, 12, 32], d_vo=[8, 8, 32], align=0, statistics=statistics)
    report = layer_report(model, statistics, latent_config_of(latent.config), blocks=1)
    first, middle, last = report
    assert middle["errors"]["paper"] is None and middle["errors"]["matched"] is None
    assert "d_qk=12, head_dim=32" in middle["reasons"]["stride"]
    assert first["errors"]["stride"] > 0 and not first["reasons"]
    assert set(last["errors"].values()) == {0.0}  # full width: the original itself
    assert middle["errors"]["energy"] > 0 and middle["errors"]["calibrated"] > 0


def test_where_all_layers_are_equally_impossible():
    model = tiny_model("llama")
    statistics = calibrate(model, packed())
    latent = convert(model, d_qk=12, d_vo=10, align=0, statistics=statistics)
    report = layer_report(model, statistics, latent_config_of(latent.config), blocks=9)
    assert all(set(row["reasons"]) == {"paper", "matched", "stride"} for row in report)


def test_bad_input():
    model = tiny_model("llama")
    statistics = calibrate(model, packed())
    config = latent_config_of(convert(model, d_qk=16, d_vo=8, align=0, statistics=statistics).config)
    with pytest.raises(ValueError, match="1 calibration block or more: got blocks=0; try 4"):
        layer_report(model, statistics, config, blocks=0)
    with pytest.raises(ValueError, match="statistics are of another model"):
        layer_report(tiny_model("llama-tied"), statistics, config)

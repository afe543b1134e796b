"""Diagnosis on figures made by hand, one rule at a time, and on the embedded model made to fail in each way."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.checks.causality import LEAK, causality
from kvlatent.evaluation.checks.fidelity import ENTROPY_RATIO, FOCUS_KEPT, fidelity
from kvlatent.evaluation.checks.needle import needle
from kvlatent.evaluation.checks.word_order import order
from kvlatent.evaluation.copying import windowed_mask
from kvlatent.evaluation.diagnosis import diagnose
from kvlatent.evaluation.evidence import FORGETTING_NATS, SCORE_KEPT
from kvlatent.evaluation.perplexity import perplexity, perplexity_ratio
from kvlatent.selection.choices import resolve_choices, without_statistics
from kvlatent.text.corpus import evaluation_blocks
from kvlatent.text.standard_library import MODEL_PATH, stdlib_documents


def layer(index=0, original=0.4, latent=0.45, ratio=None):
    """A layer's figures, with the uniformity of both and the entropies that belong to 100 keys."""
    logs = math.log(100)
    ratio = latent / original if ratio is None else ratio
    return {
        "layer": index,
        "relative_error": 0.1,
        "attention_kl": 0.1,
        "entropy_original": original * logs,
        "entropy_latent": latent * logs,
        "entropy_ratio": ratio,
        "uniformity_original": original,
        "uniformity_latent": latent,
    }


def healthy():
    """Figures of everything, nothing wrong with any of them."""
    needles = {"contexts": [128, 256], "depths": [0.1, 0.9], "exact": [[1.0, 0.9], [0.9, 0.8]]}
    needles |= {"rank": [[1.0, 0.95], [0.95, 0.9]], "trials": 4, "seed": 0}
    orders = {"spans": [2, 4], "depths": [0.1, 0.9], "margin": [[3.0, 4.0], [6.0, 7.0]]}
    orders |= {"preferred": [[1.0, 0.9], [1.0, 0.9]], "trials": 4, "seed": 0}
    one = {"perplexity": {"perplexity": 10.0}, "needle": needles, "order": orders, "causality": 0.0}
    fidelity = {
        "kl": 0.02,
        "kl_standard_error": 0.001,
        "top1_agreement": 0.9,
        "tokens": 999,
        "layers": [layer(0), layer(1)],
    }
    return {
        "latent": copy.deepcopy(one) | {"perplexity": {"perplexity": 10.2}},
        "original": one,
        "ratio": 1.02,
        "ratio_standard_error": 0.002,
        "fidelity": fidelity,
    }


def changed(**paths):
    """Healthy figures with values replaced by "a__b" paths; None removes one."""
    figures = healthy()
    for path, value in paths.items():
        *parents, last = path.split("__")
        inner = figures
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return figures


def names(figures):
    return [finding["name"] for finding in diagnose(figures)["findings"]]


def finding(figures, name):
    return next(one for one in diagnose(figures)["findings"] if one["name"] == name)


FORGOT = {"ratio": 1.5, "fidelity__kl": 0.45}
NEEDLE_GONE = {"latent__needle__rank": [[0.9, 0.3], [0.3, 0.1]]}
COLLAPSED = {"fidelity__layers": [layer(0), layer(1, 0.4, 0.98), layer(2, 0.3, 0.9), layer(3, 0.95, 0.9995)]}


def test_healthy_figures_have_no_finding():
    report = diagnose(healthy())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    (found,) = report["findings"]
    assert found["name"] == "none"
    expected = {"perplexity_ratio", "kl", "needle_rank_kept", "needle_exact_kept", "order_margin_kept"}
    expected |= {"order_preferred_kept", "focus_kept", "entropy_ratio", "causality"}
    assert found["evidence"].keys() == expected
    assert all({"value", "threshold", "standard_error"} <= one.keys() for one in found["evidence"].values())
    assert report["not_measured"] == []
    assert report["summary"] == (
        "No sign of: forgetting, positional confusion, attention collapse, non-causal."
    )


def test_nothing_measured_is_no_health():
    report = diagnose({})
    assert report["findings"] == []
    assert report["summary"] == (
        "Not judged: forgetting, positional confusion, attention collapse, non-causal."
    )
    assert [sentence.split(":")[0] for sentence in report["not_measured"]] == [
        "perplexity ratio",
        "divergence",
        "needle",
        "order",
        "attention",
        "causality",
    ]
    assert diagnose({"latent": None, "original": None, "fidelity": None}) == report


def test_forgetting_is_perplexity_and_divergence():
    report = diagnose(changed(**FORGOT))
    (found,) = report["findings"]
    assert found["name"] == "forgetting"
    assert found["evidence"]["perplexity_ratio"] == {
        "value": 1.5,
        "threshold": math.exp(FORGETTING_NATS),
        "standard_error": 0.002,
    }
    assert found["evidence"]["kl"]["value"] == 0.45
    assert "--kv" in found["advice"] and "--tokens" in found["advice"]
    assert report["summary"].startswith(
        "Found: forgetting (perplexity_ratio 1.5, threshold 1.22); no sign of"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ratio": 1.5}, "none"),  # one of the two does not make it
        ({"fidelity__kl": 0.45}, "none"),
        ({"ratio": 1.23, "fidelity__kl": 0.21}, "forgetting"),
        ({"ratio": 1.21, "fidelity__kl": 0.21}, "none"),
        ({"ratio": 1.23, "fidelity__kl": 0.19}, "none"),
        ({"ratio": 1.23, "ratio_standard_error": 0.01, "fidelity__kl": 0.45}, "none"),  # not sure enough
        ({"ratio": 1.5, "fidelity__kl": 0.21, "fidelity__kl_standard_error": 0.01}, "none"),
        ({"ratio": 1.5, "ratio_standard_error": None, "fidelity__kl": 0.45}, "none"),  # nobody knows how sure
        ({"ratio": 1.5, "fidelity": None}, "forgetting"),  # judged by the one there is
        ({"ratio": None, "fidelity__kl": 0.45}, "none"),  # the two perplexities stand in
        ({"ratio": None, "latent__perplexity": None, "fidelity__kl": 0.45}, "forgetting"),
        ({"ratio": None, "latent__perplexity": 15.0, "fidelity__kl": 0.45}, "forgetting"),  # a bare number
    ],
)
def test_thresholds_of_forgetting(change, expected):
    assert names(changed(**change)) == [expected]


@pytest.mark.parametrize(
    ("ratio", "kl", "shown"),
    [
        (1.3, 0.15, "perplexity_ratio 1.3 (threshold 1.22), kl 0.15 (threshold 0.2)"),
        (1.1, 0.3, "perplexity_ratio 1.1 (threshold 1.22), kl 0.3 (threshold 0.2)"),
    ],
)
def test_one_of_the_two_up_is_not_judged(ratio, kl, shown):
    report = diagnose(changed(ratio=ratio, fidelity__kl=kl))
    (sentence,) = report["not_measured"]
    assert sentence == f"forgetting: {shown}: one is up and the other is not; measure on more text"
    assert report["summary"].endswith("; not judged: forgetting.")
    assert "no sign of: forgetting" not in report["summary"].lower()
    # Nor is ordinary text predicted as before then.
    report = diagnose(changed(**NEEDLE_GONE, ratio=ratio, fidelity__kl=kl))
    assert report["not_measured"][1] == "positional confusion: needle fell, but so may have ordinary text"
    assert report["summary"].endswith("; not judged: forgetting, positional confusion.")


def test_one_block_has_no_error_and_no_verdict():
    figures = {"fidelity": {"kl": 3.0, "kl_standard_error": None, "layers": []}}
    report = diagnose(figures)
    assert report["findings"] == [] and "not judged: forgetting" in report["summary"].lower()
    assert (
        "forgetting: kl 3 (threshold 0.2): kl of one block has no standard error; measure on more text"
        in (report["not_measured"])
    )
    report = diagnose(figures | {"ratio": 9.0, "ratio_standard_error": None})
    assert any("perplexity_ratio and kl of one block has" in sentence for sentence in report["not_measured"])
    report = diagnose(changed(**NEEDLE_GONE, fidelity__kl=3.0, fidelity__kl_standard_error=None))
    assert report["summary"].endswith("; not judged: forgetting, positional confusion.")
    figures["fidelity"]["kl"] = 0.1  # below the threshold there is nothing to be sure of
    assert diagnose(figures)["summary"].startswith("No sign of: forgetting")


def test_positional_confusion_is_needle_or_order_while_perplexity_holds():
    found = finding(changed(**NEEDLE_GONE), "positional confusion")
    kept = found["evidence"]["needle_rank_kept"]
    assert kept["value"] == pytest.approx(1.6 / 3.8)
    assert kept["original"] == pytest.approx(0.95) and kept["latent"] == pytest.approx(0.4)
    drops = [0.1, 0.65, 0.65, 0.8]
    assert kept["standard_error"] == pytest.approx(np.std(drops, ddof=1) / 2 / 0.95)
    assert kept["threshold"] == SCORE_KEPT
    assert next(iter(found["evidence"])) == "needle_rank_kept"  # the worst stands first
    assert "distant" in found["advice"] and "--table head" not in found["advice"]

    for score, cells in (("margin", [[1.0, 2.0], [3.0, 3.0]]), ("preferred", [[0.6, 0.6], [0.7, 0.5]])):
        found = finding(changed(**{f"latent__order__{score}": cells}), "positional confusion")
        assert "--table head" in found["advice"] and "distant" not in found["advice"]
    kept = found["evidence"]["order_preferred_kept"]
    assert kept["value"] == pytest.approx(0.1 / 0.45)  # above the half that chance gives

    both = changed(**NEEDLE_GONE, latent__order__margin=[[1.0, 2.0], [3.0, 3.0]])
    assert {"distant", "--table"} <= set(finding(both, "positional confusion")["advice"].split())


def test_positional_confusion_is_not_told_apart_from_forgetting():
    report = diagnose(changed(**FORGOT, **NEEDLE_GONE))
    assert [one["name"] for one in report["findings"]] == ["forgetting"]
    assert report["not_measured"] == ["positional confusion: needle fell, but so did ordinary text"]
    assert report["summary"].endswith("; not judged: positional confusion.")
    alone = changed(**NEEDLE_GONE, ratio=None, latent__perplexity=None, fidelity=None)
    assert (
        "positional confusion: needs perplexity or fidelity, to tell it from forgetting"
        in (diagnose(alone)["not_measured"])
    )
    assert names(alone) == ["none"]  # causality was measured
    assert names(changed(**NEEDLE_GONE, ratio=None, latent__perplexity=None)) == ["positional confusion"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([[0.77, 0.73], [0.73, 0.69]], "positional confusion"),  # three quarters kept, everywhere alike
        ([[0.82, 0.78], [0.78, 0.74]], "none"),  # 82 % kept
        ([[1.0, 0.95], [0.95, 0.0]], "none"),  # one cell of four: 24 % less, and as much in doubt
        ([[1.0, 1.0], [1.0, 1.0]], "none"),
    ],
)
def test_a_fall_is_large_and_sure(cells, expected):
    assert names(changed(latent__needle__rank=cells)) == [expected]


def test_paired_trials_decide_how_sure_a_fall_is():
    rank = [[1.0, 0.95], [0.95, 0.0]]
    figures = changed(latent__needle__rank=rank)
    for side, trials in (("original", [1.0, 0.9, 1.0, 0.9]), ("latent", [0.77, 0.68, 0.77, 0.68])):
        figures[side]["needle"]["trial_rank"] = trials
    kept = finding(figures, "positional confusion")["evidence"]["needle_rank_kept"]
    assert kept["standard_error"] == pytest.approx(np.std([0.23, 0.22] * 2, ddof=1) / 2 / 0.95)

    figures = changed(latent__order__margin=[[1.0, 2.0], [3.0, 3.0]])
    figures["original"]["order"]["trial_margin"] = [[3.0, 4.0, None], [6.0, 7.0, 8.0]]
    figures["latent"]["order"]["trial_margin"] = [[1.0, 2.0, None], [3.0, 2.0, 2.0]]
    kept = finding(figures, "positional confusion")["evidence"]["order_margin_kept"]
    assert kept["standard_error"] == pytest.approx(np.std([2.5, 3.5, 6.0], ddof=1) / math.sqrt(3) / 5)


def test_one_question_has_no_error_but_a_threshold():
    grid = {"contexts": [128], "depths": [0.5], "rank": [[1.0]]}
    figures = changed(original__needle=grid, latent__needle=grid | {"rank": [[0.5]]})
    kept = finding(figures, "positional confusion")["evidence"]["needle_rank_kept"]
    assert (kept["value"], kept["standard_error"]) == (0.5, None)
    assert "needle_exact_kept" not in finding(figures, "positional confusion")["evidence"]


@pytest.mark.parametrize(
    ("setting", "value"), [("contexts", [128, 512]), ("depths", [0.1, 0.8]), ("seed", 1), ("trials", 5)]
)
def test_other_grids_are_not_compared(setting, value):
    report = diagnose(changed(**NEEDLE_GONE, **{f"latent__needle__{setting}": value}))
    assert [one["name"] for one in report["findings"]] == ["none"]
    (sentence,) = report["not_measured"]
    assert f"needle: the two models were measured with different {setting}, " in sentence
    assert str(value) in sentence


def test_what_the_original_cannot_do_cannot_fall():
    dark = [[0.05, 0.05], [0.05, 0.05]]
    figures = changed(original__needle__rank=dark, original__needle__exact=dark, latent__needle__rank=dark)
    report = diagnose(figures)
    assert report["not_measured"] == [
        "needle: the original's rank is 0.05 above chance, below 0.1 none can fall",
        "needle: the original's exact is 0.05 above chance, below 0.1 none can fall",
    ]
    assert [one["name"] for one in report["findings"]] == ["none"]


def test_attention_collapse_names_the_layers():
    found = finding(changed(**COLLAPSED), "attention collapse")
    kept, ratio = found["evidence"]["focus_kept"], found["evidence"]["entropy_ratio"]
    assert kept["value"] == pytest.approx(0.02 / 0.6) and kept["threshold"] == FOCUS_KEPT
    assert (kept["layer"], kept["layers"]) == (1, [1, 2])  # layer 3 kept less, but was uniform before
    assert (kept["original"], kept["latent"]) == (0.4, 0.98)
    assert ratio["value"] == pytest.approx(0.98 / 0.4) and ratio["threshold"] == ENTROPY_RATIO
    assert "--d-qk" in found["advice"] and "stage I" in found["advice"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (layer(0, 0.4, 0.69), "none"),  # 52 % of the focus
        (layer(0, 0.4, 0.71), "attention collapse"),  # 48 %
        (layer(0, 0.9, 0.99), "none"),  # almost uniform before
        (layer(0, 0.002, 0.12), "none"),  # sixty times the entropy, and still looking at one token
        (layer(0, 1.0, 1.0), None),
        (layer(0, 0.4, 1.0 + 1e-12), "attention collapse"),
        (layer(0, 1e-9, 0.9) | {"entropy_ratio": None}, "attention collapse"),
    ],
)
def test_thresholds_of_collapse(row, expected):
    report = diagnose({"fidelity": {"kl": 0.0, "layers": [row]}})
    found = [one for one in report["findings"] if "focus_kept" in one["evidence"]]
    assert [one["name"] for one in found] == ([expected] if expected else [])
    assert all(0 <= one["evidence"]["focus_kept"]["value"] <= 1 for one in found)  # rounding aside


def test_layers_without_uniformity_are_not_measured():
    bare = {name: value for name, value in layer().items() if "uniformity" not in name}
    for layers in ([], [bare]):
        assert (
            "attention: needs the fidelity layer by layer"
            in (diagnose(changed(fidelity__layers=layers))["not_measured"])
        )


def test_non_causal_says_whose_fault_it_is():
    found = finding(changed(latent__causality=0.5), "non-causal")
    assert found["evidence"]["causality"] == {
        "value": 0.5,
        "threshold": LEAK,
        "standard_error": None,
        "original": 0.0,
    }
    assert "mask is lost" in found["advice"]
    both = finding(changed(latent__causality=0.5, original__causality=0.4), "non-causal")
    assert "original looks ahead" in both["advice"]
    alone = finding({"latent": {"causality": 0.5}}, "non-causal")
    assert "mask is lost" in alone["advice"]
    assert names(changed(latent__causality=LEAK / 2)) == ["none"]


def test_several_failures_stand_together():
    report = diagnose(changed(**FORGOT, **COLLAPSED, latent__causality=2.0))
    assert [one["name"] for one in report["findings"]] == ["forgetting", "attention collapse", "non-causal"]
    assert report["summary"] == (
        "Found: forgetting (perplexity_ratio 1.5, threshold 1.22), attention collapse (focus_kept 0.0333, threshold "
        "0.5), non-causal (causality 2, threshold 0.001); no sign of: positional confusion."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(value):
    with pytest.raises(
        ValueError, match=f"must be finite: got {value} in figures.fidelity.kl; measure again"
    ):
        diagnose(changed(fidelity__kl=value))
    with pytest.raises(ValueError, match=r"in figures.latent.order.margin;"):
        diagnose(changed(latent__order__margin=[[1.0, value]]))


class Place:
    """The embedded model and how it is measured: little text, few trials."""

    def __init__(self, folder):
        self.original = load_model(MODEL_PATH, dtype="float32")
        self.tokenizer = load_tokenizer(MODEL_PATH, self.original.config)
        self.documents = stdlib_documents("held_out")[:8]
        text = folder / "text.txt"
        text.write_text("\n<|endoftext|>\n".join(self.documents))
        self.blocks = evaluation_blocks(
            text,
            self.tokenizer,
            256,
            vocab_size=self.original.config.vocab_size,
            cache_dir=folder / "cache",
            max_tokens=2048,
        )
        self.own = self.alone(self.original)

    def alone(self, model):
        """Figures of one model, and its perplexity for the pair."""
        grid = {"contexts": [128, 192], "depths": [0.1, 0.5], "trials": 6}
        needles = needle(model, self.tokenizer, haystack=self.documents, **grid)
        orders = order(
            model, self.documents, self.tokenizer, spans=(2, 4), depths=(0.5,), length=64, trials=12
        )
        found = perplexity(model, self.blocks)
        figures = {"perplexity": found.perplexity, "needle": needles, "order": orders}
        return figures | {"causality": causality(model)}, found

    def figures(self, latent, compare=True):
        figures, found = self.alone(latent)
        ratio, error = perplexity_ratio(found, self.own[1])
        report = {"latent": figures, "original": self.own[0], "ratio": ratio, "ratio_standard_error": error}
        if compare:
            report["fidelity"] = fidelity(self.original, latent, self.blocks, rows=16)
        return report


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("diagnosis"))


def masked(model, window):
    """The model behind a mask of its own: a window of that many tokens, or none at all."""

    def hide(attention, args, kwargs):
        hidden = kwargs["hidden_states"]
        length = hidden.shape[1]
        mask = windowed_mask(length, window, hidden.dtype) if window else torch.zeros(1, 1, length, length)
        return args, {**kwargs, "attention_mask": mask}

    for one in model.model.layers:
        one.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    return model


@pytest.mark.slow
def test_a_light_conversion_of_the_embedded_model_is_healthy(place):
    choices = without_statistics(resolve_choices())
    report = diagnose(place.figures(convert(place.original, d_qk=48, d_vo=48, choices=choices)))
    assert [one["name"] for one in report["findings"]] == ["none"]
    assert not any(
        sentence.startswith(("needle: needs", "order: needs")) for sentence in report["not_measured"]
    )


@pytest.mark.slow
def test_a_stride_through_the_embedded_model_is_forgetting(place):
    latent = convert(place.original, d_qk=32, d_vo=32, preset="own-frequency")
    found = names(place.figures(latent))
    assert "forgetting" in found and "non-causal" not in found


@pytest.mark.slow
def test_random_outputs_are_forgetting(place):
    latent = convert(place.original, d_qk=64, d_vo=32, preset="own-frequency")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in latent.model.layers:
            weight = one.self_attn.o_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
    assert names(place.figures(latent))[0] == "forgetting"


@pytest.mark.slow
def test_keys_of_zero_are_collapse(place):
    latent = convert(place.original, d_qk=32, d_vo=64, preset="own-frequency")
    with torch.no_grad():
        for one in latent.model.layers:
            one.self_attn.k_proj.weight.zero_()
    figures = place.figures(latent)
    assert {"forgetting", "attention collapse"} <= set(names(figures))
    assert finding(figures, "attention collapse")["evidence"]["focus_kept"]["layers"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_short_memory_is_positional_confusion(place):
    figures = place.figures(masked(load_model(MODEL_PATH, dtype="float32"), 64), compare=False)
    found = finding(figures, "positional confusion")
    assert found["evidence"]["needle_rank_kept"]["value"] < 0.7
    assert "distant" in found["advice"]


@pytest.mark.slow
def test_a_model_that_looks_ahead_is_non_causal(place):
    figures = place.figures(masked(load_model(MODEL_PATH, dtype="float32"), None), compare=False)
    assert "non-causal" in names(figures)

"""What a checkpoint says of itself: saved by every save, equal after loading, told apart from another model's."""

import json
import math

import pytest
import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.self_check import SELF_CHECK, SelfCheck, allowed_difference
from kvlatent.conversion.convert_model import convert
from kvlatent.model.rotary import LatentRotary
from tiny import FAMILIES, SWITCH, logits, tiny_model

FP32 = allowed_difference("float32")


def stored(folder):
    return SelfCheck.from_dict(json.loads((folder / SELF_CHECK).read_text()))


def distance(model, check):
    return check.difference(logits(model, torch.tensor([check.input_ids]))[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked") / "m"
    save(convert(tiny_model("llama"), d_qk=[16, 32, 8], d_vo=[8, 16, 32], preset="own-frequency"), folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_carries_its_answers(name, tmp_path):
    latent = convert(tiny_model(name), d_qk=16, d_vo=8, preset="own-frequency")
    save(latent.train(), tmp_path / "m")
    assert latent.training
    check = stored(tmp_path / "m")
    assert len(check.input_ids) == (SWITCH if name == "phi3-longrope" else 64)
    assert check.positions[-1] == len(check.input_ids) - 1 and len(check.positions) == 8
    assert check.dtype == "float32"
    expected = logits(latent.eval(), torch.tensor([check.input_ids]))[0].log_softmax(-1)
    for position, ids, values in zip(check.positions, check.top_ids, check.log_probabilities, strict=True):
        top = expected[position].topk(8)
        assert list(ids) == top.indices.tolist()
        assert values == pytest.approx(top.values.tolist(), abs=2e-6)  # six decimals are stored
    assert distance(load_model(tmp_path / "m"), check) < 1e-5 < FP32


def test_another_table_scale_or_weight_is_told_apart(folder):
    check = stored(folder)

    def damaged(change):
        model = load_model(folder)
        change(model.model)
        return distance(model, check)

    def turn_otherwise(decoder):
        for module in decoder.modules():
            if isinstance(module, LatentRotary):
                module.inv_freq = lambda device, _: torch.full((4,), 0.1)
        for layer in decoder.layers:
            width = layer.self_attn.d_qk // 2
            layer.self_attn.rotary.inv_freq = lambda device, _, width=width: torch.full((width,), 0.1)

    def scale(decoder):
        decoder.layers[1].self_attn.scaling *= 1.2

    def permute(decoder):
        weight = decoder.layers[0].self_attn.k_proj.weight
        weight.data = weight.data.roll(1, 0)

    assert damaged(lambda decoder: None) < 1e-5
    for change in (turn_otherwise, scale, permute):
        assert damaged(change) > 10 * FP32, change.__name__


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("positions", [3], "1 positions for 8 answers"),
        ("positions", [7, 15, 23, 31, 39, 47, 55, 64], "positions up to 64 in 64 tokens"),
        ("top_ids", [[1]] * 8, "1 tokens with 8 log-probabilities"),
        ("top_ids", [["x"]] * 8, "damaged .ValueError: invalid literal"),
        ("log_probabilities", [[0.5] * 8] * 8, "a log-probability of 0.5"),
        ("log_probabilities", [[math.nan] * 8] * 8, "a log-probability of nan"),
        ("log_probabilities", None, "damaged .TypeError"),
        ("dtype", ..., "damaged .KeyError: 'dtype'"),
    ],
)
@pytest.mark.refused_by("vLLM (self-check)")
def test_a_damaged_vector_is_refused(folder, field, value, said):
    data = json.loads((folder / SELF_CHECK).read_text())
    data[field] = value
    if value is ...:
        del data[field]
    with pytest.raises(ValueError, match=said) as error:
        SelfCheck.from_dict(data)
    assert "save the model again with kvlatent, or delete self_check.json" in str(error.value)


def test_no_object_is_refused():
    with pytest.raises(ValueError, match="self_check.json is damaged: it holds a list, no JSON object"):
        SelfCheck.from_dict([])


@pytest.mark.refused_by("vLLM (self-check)")
def test_answers_of_another_vocabulary_or_a_short_context(folder):
    check = stored(folder)
    with pytest.raises(ValueError, match="of a vocabulary of 20"):
        check.difference(torch.zeros(64, 20))
    with pytest.raises(ValueError, match="needs a context of 8 tokens: got 7"):
        check.difference(torch.zeros(7, 128))
    whole = logits(load_model(folder), torch.tensor([check.input_ids]))[0]
    assert check.difference(whole[:30]) < 1e-5
    assert check.difference(torch.full_like(whole, math.nan)) == math.inf


def test_what_is_allowed_goes_by_the_coarsest():
    assert allowed_difference("float32") < allowed_difference("float32", "float16")
    assert allowed_difference("bfloat16", "float32") == allowed_difference("int8")
    assert allowed_difference("float32", quantised=True) > allowed_difference("bfloat16")


def test_the_state_of_the_generator_is_left_alone(tmp_path):
    latent = convert(tiny_model("llama"), d_qk=16, preset="paper")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    save(latent, tmp_path / "m")
    assert torch.equal(torch.rand(1), expected)


def test_a_model_that_answers_nothing_finite_gets_none(tmp_path):
    latent = convert(tiny_model("llama"), d_qk=16, preset="paper")
    latent.model.norm.weight.data[0] = math.inf
    save(latent, tmp_path / "m")
    assert not (tmp_path / "m" / SELF_CHECK).exists()


def test_other_weights_saved_over_it_take_it_away_and_it_loads_without(folder, tmp_path):
    model = load_model(folder)
    save(model, tmp_path / "m")
    assert (tmp_path / "m" / SELF_CHECK).is_file()
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / SELF_CHECK).exists()
    assert load_model(tmp_path / "m")

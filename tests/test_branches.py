"""Sequences that begin alike, read at once, are those read one by one."""

import numpy as np
import pytest
import torch

from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.branches import can_branch, read_branches
from kvlatent.evaluation.check import CheckRequest
from kvlatent.evaluation.checks.word_order import CHECK
from kvlatent.evaluation.sequences import at_the_ends
from tiny import FAMILIES, VOCAB, tiny_model
from tolerances import ROUNDING, assert_close_to_scale

pytestmark = pytest.mark.numerics
WHOLE = ("llama", "llama-mha", "llama-3.1", "llama-yarn", "llama-tied", "qwen2", "qwen3")


def ids(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(model, shared, ends):
    with torch.no_grad():
        return torch.stack(
            [
                torch.stack([model(torch.cat([start, end])[None]).logits[0, len(start) :] for end in group])
                for start, group in zip(shared, ends, strict=True)
            ]
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_branches_are_the_sequences(name, latent, attention):
    model = tiny_model(name).eval()
    if latent:
        model = convert(model, d_qk=16, d_vo=16, preset="own-frequency").eval()
    model.set_attn_implementation(attention)
    assert can_branch(model)
    shared, ends = ids(2, 20), ids(2, 3, 6, seed=1)
    with torch.no_grad():
        found = read_branches(model, shared, ends)
    assert_close_to_scale(found, one_by_one(model, shared, ends), ROUNDING)


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if "window" in name or "longrope" in name or name == "mistral"]
)
def test_windows_and_two_tables_are_read_whole(name):
    assert not can_branch(tiny_model(name))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_ends_are_scored_where_they_stand(monkeypatch, batch_size):
    model = tiny_model("llama").eval()
    beginnings = ids(3, 30).repeat(4, 1)  # rows of a group are not neighbours
    rows = torch.cat([beginnings, ids(12, 6, seed=2)], dim=1).numpy()
    done, passes = [], []
    model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )

    def score(logits, target):
        return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]

    def measured():
        done.clear()
        return at_the_ends(model, rows, 6, score, batch_size=batch_size, advance=done.append)

    branched = measured()
    assert sum(done) == 12 and {shape[1] for shape in passes} == {29 + 4 * 6}
    monkeypatch.setattr("kvlatent.evaluation.sequences.can_branch", lambda model: False)
    whole = measured()
    assert sum(done) == 12
    np.testing.assert_allclose(branched, whole, rtol=1e-4, atol=1e-5)
    assert np.abs(np.diff(whole, axis=0)).min() > 1e-3  # a row in another's place would show


def test_what_branches_is_taken_to_cost_less(monkeypatch):
    """So that as much time holds more trials."""
    request = CheckRequest({"latent": tiny_model("llama")}, None, None, {}, 256, 256, 0)
    branched = CHECK.extents(request)
    monkeypatch.setattr("kvlatent.evaluation.checks.word_order.can_branch", lambda model: False)
    whole = CHECK.extents(request)
    assert [settings for settings, _ in branched] == [settings for settings, _ in whole]
    assert all(2 * less < more for (_, less), (_, more) in zip(branched[2:], whole[2:], strict=True))

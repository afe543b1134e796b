"""Order for models whose answers are computed by hand: unigram, urn, bigram, skip-bigram; and for real ones."""

import itertools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import kvlatent
from fakes import FakeModel
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.checks.word_order import order, order_drop
from kvlatent.text.standard_library import MODEL_PATH, stdlib_documents

pytestmark = pytest.mark.numerics

VOCABULARY = 300
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
LOG_P = TABLE.double().log_softmax(-1)
SMALL = {"length": 40, "after": 4, "depths": (0.0, 0.5, 1.0), "spans": (2, 3, 5)}


def text(length, seed=0):
    """Every token once, then every token once again in another order, and so on."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(VOCABULARY) for _ in range(-(-length // VOCABULARY))])[
        :length
    ].tolist()


def bigram():
    """The next token by the last one alone."""
    return FakeModel(lambda ids: TABLE[ids])


def skip_bigram():
    """The next token by the one before the last."""
    return FakeModel(lambda ids: TABLE[ids.roll(1, dims=1)])


def bag_of_words():
    """Pólya's urn: a token is as likely as it was frequent, plus one; all orders of a text are equally likely."""

    def rule(ids):
        counts = torch.nn.functional.one_hot(ids, VOCABULARY).cumsum(dim=1)
        return torch.log(counts.double() + 1)

    return FakeModel(rule)


@pytest.fixture(scope="module")
def embedded():
    model = load_model(MODEL_PATH, dtype="float32").eval()
    return model, load_tokenizer(MODEL_PATH, model.config)


def test_a_bag_of_words_sees_no_order():
    found = order(bag_of_words(), text(400), permutations=2, trials=10, **SMALL)
    assert np.abs(found["margin"]).max() < 1e-4
    assert found["after_margin"] == [[0.0] * 3] * 3
    assert found["after_preferred"] == [[0.5] * 3] * 3


def test_a_model_of_single_frequencies_is_indifferent():
    found = order(FakeModel(lambda ids: TABLE[0].expand(*ids.shape, -1)), text(400), trials=10, **SMALL)
    assert np.abs(found["margin"]).max() < 1e-4  # sums of some logarithms near 6 in float32


@pytest.mark.parametrize(("depth", "begin"), [(0.0, 1), (0.5, 17), (1.0, 34)])
def test_a_bigram_margin_by_hand(depth, begin):
    ids = text(40)
    found = order(bigram(), ids, spans=(2,), depths=(depth,), length=40, after=4)
    before, a, b, behind = ids[begin - 1 : begin + 3]
    by_hand = sum(LOG_P[pair] for pair in ((before, a), (a, b), (b, behind)))
    by_hand -= sum(LOG_P[pair] for pair in ((before, b), (b, a), (a, behind)))
    assert found["margin"] == [[pytest.approx(float(by_hand), abs=1e-4)]]
    assert found["preferred"] == [[float(by_hand > 0)]]
    assert found["after_margin"] == [[0.0]] and found["after_preferred"] == [[0.5]]
    assert found["trials"] == 1
    assert found["margin_standard_error"] == found["after_margin_standard_error"] == [[None]]


def test_a_skip_bigram_margin_by_hand():
    ids = text(40)
    found = order(skip_bigram(), ids, spans=(2,), depths=(0.5,), length=40, after=4)
    first, second, a, b, c, d = ids[15:21]
    by_hand = LOG_P[a, c] + LOG_P[b, d] - LOG_P[b, c] - LOG_P[a, d]
    by_hand += LOG_P[first, a] + LOG_P[second, b] - LOG_P[first, b] - LOG_P[second, a]
    assert found["margin"] == [[pytest.approx(float(by_hand), abs=1e-4)]]
    reached = LOG_P[b, d] - LOG_P[a, d]  # the first token behind has another predecessor, the second has not
    assert found["after_margin"] == [[pytest.approx(float(reached), abs=1e-4)]]


def test_all_orders_of_a_span_together():
    """Three tokens have five other orders: asked for more, each is taken once, and the means are over those five."""
    ids = text(40)
    found = order(bigram(), ids, spans=(3,), depths=(0.5,), length=40, after=4, permutations=50)

    def likelihood(span):
        chain = [ids[16], *span, ids[20]]
        return float(sum(LOG_P[pair] for pair in itertools.pairwise(chain)))

    true = likelihood(ids[17:20])
    others = [likelihood(span) for span in itertools.permutations(ids[17:20])][1:]
    assert found["margin"] == [[pytest.approx(true - np.mean(others), abs=1e-4)]]
    assert found["preferred"] == [[pytest.approx(np.mean([true > other for other in others]))]]


def test_cells_are_means_over_windows_with_their_errors():
    ids = text(240)
    together = order(bigram(), ids, spans=(2,), depths=(0.0, 1.0), length=40, after=4)
    assert together["trials"] == 6
    assert order(bigram(), ids, length=40, trials=4)["trials"] == 4
    singles = [order(bigram(), ids[at : at + 40], spans=(2,), depths=(0.0, 1.0), length=40, after=4)
               for at in range(0, 240, 40)]  # fmt: skip
    margins = np.array([single["margin"][0] for single in singles])
    assert together["margin"][0] == pytest.approx(margins.mean(axis=0), abs=1e-5)
    errors = margins.std(axis=0, ddof=1) / math.sqrt(6)
    assert together["margin_standard_error"][0] == pytest.approx(errors, abs=1e-5)
    assert sorted(together["trial_margin"][0]) == pytest.approx(sorted(margins.mean(axis=1)), abs=1e-5)
    assert together["preferred"][0] == pytest.approx((margins > 0).mean(axis=0))


def test_only_the_span_changes():
    model, ids = bigram(), text(80)
    order(model, ids, spans=(2, 5), depths=(0.5,), length=40, after=4, permutations=3, batch_size=3)
    windows = [ids[at : at + 40] for at in (0, 40)]
    assert len(model.seen) == 2 + 2 + 2 * 3  # true, one swap each, three shuffles each
    lengths = {len(row) for row in model.seen}
    assert lengths == {16 + 5 + 4 - 1}  # cut behind what is scored, less the last
    for row in model.seen:
        window = next(window for window in windows if window[0] == row[0])
        assert row[:16] == window[:16] and row[21:] == window[21:24]
        assert sorted(row[16:21]) == sorted(window[16:21])
    assert len({tuple(row) for row in model.seen}) == 10


def test_batch_size_and_repetition_change_nothing(tiny_llama):
    ids = text(400)
    first = order(tiny_llama, ids, permutations=2, **SMALL)
    assert order(tiny_llama, ids, permutations=2, **SMALL) == first
    other = order(tiny_llama, ids, permutations=2, batch_size=3, **SMALL)
    for name in ("margin", "after_margin"):
        np.testing.assert_allclose(other[name], first[name], atol=1e-4)
    again = order(tiny_llama, ids, permutations=2, seed=1, **SMALL)
    assert again["margin"] != first["margin"]
    one = [order(bigram(), text(40), spans=(8,), depths=(0.5,), length=40, seed=seed) for seed in (0, 1)]
    assert one[0]["margin"] != one[1]["margin"]  # of one window, so that the shuffle alone differs


def test_two_models_get_the_same_trials(tiny_llama):
    models = bigram(), skip_bigram()
    for model in models:
        order(model, text(400), trials=5, **SMALL)
    assert models[0].seen == models[1].seen


def test_a_random_model_is_at_chance(tiny_llama):
    found = order(tiny_llama, text(4000), trials=100, **SMALL)
    assert 0.4 < np.mean(found["preferred"]) < 0.6
    assert abs(np.mean(found["margin"])) < 4 * np.mean(found["margin_standard_error"])


def test_the_embedded_model_knows_order_and_the_papers_table_forgets_it(embedded):
    model, tokenizer = embedded
    settings = {"spans": (2, 8), "depths": (0.3, 0.7), "length": 96, "trials": 24}
    documents = stdlib_documents("held_out")

    def measure(which):
        return order(which, documents, tokenizer, **settings)

    original = measure(model)
    assert np.min(original["preferred"]) > 0.9
    assert original["spans"] == [2, 8] and original["depths"] == [0.3, 0.7]
    own, paper = (
        order_drop(original, measure(kvlatent.convert(model, d_qk=32, d_vo=64, preset=preset)))["by_span"]
        for preset in ("own-frequency", "paper")
    )
    for gentle, harsh in zip(own, paper, strict=True):
        assert gentle["margin_kept"] - harsh["margin_kept"] > 0.2
        assert gentle["after_margin_kept"] - harsh["after_margin_kept"] > 0.2
        assert harsh["margin_difference"] < -4 * harsh["margin_standard_error"]


def test_strings_are_read_with_their_leading_token(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    leading = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>")
    document = "Once upon a time there was a small cat who lived near the river and liked the sun."
    ids = leading(document, add_special_tokens=False)["input_ids"]
    model = bigram()
    found = order(model, [document] * 9, leading, spans=(2,), depths=(0.0, 1.0), length=24, after=4)
    assert found["trials"] == 9 * len(ids) // 23
    assert all(row[0] == 0 and 0 not in row[1:] for row in model.seen)
    whole = [[0, *(ids * 9)[at * 23 : at * 23 + 23]] for at in range(found["trials"])]
    assert all(row in [window[: len(row)] for window in whole] for row in model.seen[: found["trials"]])


def test_spans_of_one_token_are_left_out():
    varied, dull = text(40), [7] * 40
    alone = order(bigram(), varied, **SMALL)
    mixed = order(bigram(), varied + dull, **SMALL)
    for name in ("margin", "preferred", "after_margin"):
        np.testing.assert_allclose(mixed[name], alone[name], atol=1e-5)
    assert mixed["trials"] == 2 and [None in row for row in mixed["trial_margin"]] == [True] * 3
    assert mixed["margin_standard_error"] == [[None] * 3] * 3
    kept = order_drop(mixed, mixed)["by_span"]
    assert [(row["margin_difference"], row["margin_standard_error"]) for row in kept] == [(0.0, None)] * 3


def test_drop_is_latent_minus_original_with_paired_errors():
    ids = text(400)
    original, latent = (order(model, ids, **SMALL) for model in (bigram(), skip_bigram()))
    drop = order_drop(original, latent)
    for name in ("margin", "preferred", "after_margin", "after_preferred"):
        np.testing.assert_allclose(drop[name], np.array(latent[name]) - np.array(original[name]))
    for place, row in enumerate(drop["by_span"]):
        assert row["span"] == SMALL["spans"][place]
        pairs = np.array(latent["trial_margin"][place]) - np.array(original["trial_margin"][place])
        assert row["margin_difference"] == pytest.approx(np.mean(drop["margin"][place]))
        assert row["margin_standard_error"] == pytest.approx(np.std(pairs, ddof=1) / math.sqrt(10))
        before = np.mean(original["margin"][place])
        kept = np.mean(latent["margin"][place]) / before
        assert row["margin_kept"] == (pytest.approx(kept) if before > 0 else None)
        assert row["after_margin_kept"] is None  # the bigram's is 0
    with pytest.raises(ValueError, match="seed is 0 and 1; measure again"):
        order_drop(original, order(bigram(), ids, seed=1, **SMALL))


def test_mode_is_restored_and_progress_told(tiny_llama):
    tiny_llama.train()
    told = []
    order(tiny_llama, text(80), spans=(2,), depths=(0.5,), length=40, after=4, batch_size=3,
          progress=lambda done, total: told.append((done, total)))  # fmt: skip
    assert tiny_llama.training
    assert told == [(0, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": (2, 1)}, "two tokens to change places: got 1; try 2"),
        ({"spans": ()}, "a span and a depth: got 0 and 3"),
        ({"depths": ()}, "a span and a depth: got 3 and 0"),
        ({"spans": (2, 50)}, "a span of 50 needs 55 tokens, got length=40"),
        ({"after": 36}, "a span of 5 needs 42 tokens, got length=40"),
        ({"after": 1}, "after must be at least 2: got after=1"),
        ({"depths": (0.5, 1.1)}, "0 to 1: got 1.1"),
        ({"depths": (math.nan,)}, "0 to 1: got nan"),
        ({"length": 300}, "got length=300, max_position_embeddings=256; pass length=256"),
        ({"length": 81}, "of 81 tokens: got 80; give more text, a shorter window, or leave order out"),
        ({"trials": 0}, "got trials=0"),
        ({"permutations": 0}, "got permutations=0"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"seed": -1}, "got seed=-1"),
        ({"text": [7] * 80}, "all 2 spans of 2 at token 1 of a window repeat one token"),
        ({"text": [300, *text(79)]}, "the model lacks: id 300, the embedding has 300 rows"),
        ({"text": []}, "got 0 tokens; give a text"),
        ({"text": "the cat sat on the hill"}, "needs a tokenizer: got None"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    model = bigram()
    with pytest.raises(ValueError, match=message):
        order(model, **{"text": text(80), **SMALL, **options})
    assert model.seen == []


def test_broken_weights_are_refused(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="logits must be finite: got NaN or infinity within"):
        order(tiny_llama, text(80), **SMALL)

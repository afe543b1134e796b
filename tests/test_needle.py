"""Needles for models that copy, that see only near tokens, and that know nothing; and for the embedded one."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fakes import FakeModel
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.evaluation.checks import haystack
from kvlatent.evaluation.checks.haystack import planted_rows, random_needles, written_needles
from kvlatent.evaluation.checks.needle import needle as measure_needle
from kvlatent.evaluation.checks.needle import needle_drop
from kvlatent.evaluation.sequences import ordinary_ids
from kvlatent.text.standard_library import MODEL_PATH

TEMPLATE = "The magic number for {key} is {value}."
IDS = range(1, 41)  # a haystack in which every token occurs once


def generated_text(sentences: int, seed: int = 0) -> str:
    """Sentences without a story."""
    drawn = np.random.default_rng(seed).choice([*haystack._ADJECTIVES, *haystack._NOUNS], (sentences, 5))
    return " ".join("The {} {} was near the {}, behind the {} {}.".format(*row) for row in drawn)


def needle(*given, **options):
    """Of a text of generated sentences, in the contexts of 128 and 256 tokens."""
    return measure_needle(*given, **({"haystack": generated_text(800), "contexts": [128, 256]} | options))


def copying(reach=10_000, rank=1):
    """Gives the token that followed the last four tokens before, at most `reach` back, the `rank`-th place."""

    def rule(ids):
        logits = torch.zeros(*ids.shape, 300)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(3, len(tokens)):
                for before in range(at - 1, max(2, at - reach - 1), -1):
                    if tokens[before - 3 : before + 1] == tokens[at - 3 : at + 1]:
                        for place in range(rank):
                            logits[row, at, (tokens[before + 1] + place) % 300] = 50 - rank + place
                        break
        return logits

    return FakeModel(rule)


@pytest.fixture(scope="module")
def embedded():
    model = load_model(MODEL_PATH, dtype="float32").eval()
    return model, load_tokenizer(MODEL_PATH, model.config)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_copying_model_finds_every_needle(tiny_tokenizer, template):
    found = needle(copying(), tiny_tokenizer, contexts=[128, 200], trials=3, template=template)
    assert found["exact"] == found["rank"] == [[1.0] * 5] * 2
    assert found["trial_exact"] == found["trial_rank"] == [1.0] * 3
    assert (found["contexts"], found["depths"]) == ([128, 200], [0, 0.25, 0.5, 0.75, 1])
    assert (found["trials"], found["needle_tokens"], found["seed"]) == (3, 8, 0)
    assert (found["template"], found["cue_tokens"]) == (template, 4 if template is None else None)


def test_a_short_sighted_model_finds_near_needles(tiny_tokenizer):
    # 24 of the tokens are needle, question and answer, so that the cues are 52, 32 and 12 tokens apart in a context of
    # 64, and 116, 64 and 12 in one of 128.
    found = needle(copying(reach=50), tiny_tokenizer, contexts=[64, 128], depths=(0, 0.5, 1), trials=2)
    assert found["exact"] == [[0, 1, 1], [0, 0, 1]]
    assert all(rank < 0.01 for rank in (found["rank"][0][0], found["rank"][1][0], found["rank"][1][1]))


def test_the_third_place_is_a_third(tiny_tokenizer):
    found = needle(copying(rank=3), tiny_tokenizer, contexts=[128], trials=2)
    assert found["exact"] == [[0.0] * 5]
    assert found["rank"] == [[pytest.approx(1 / 3)] * 5]


def test_a_model_that_knows_nothing_shares_the_middle_rank(tiny_tokenizer):
    blank = FakeModel(lambda ids: torch.zeros(*ids.shape, 300))
    found = needle(blank, tiny_tokenizer, contexts=[128], depths=[0.5], trials=4)
    assert found["exact"] == [[0.0]]  # the first of equals is the special token 0, which is in no needle
    assert found["rank"] == [[pytest.approx(2 / 301)]]


def test_a_random_model_is_at_chance(tiny_llama, tiny_tokenizer):
    found = needle(tiny_llama, tiny_tokenizer, contexts=[64, 128], trials=60)
    assert found["exact"] == [[0.0] * 5] * 2
    chance = sum(1 / rank for rank in range(1, 301)) / 300
    spread = math.sqrt(sum(1 / rank**2 for rank in range(1, 301)) / 300 - chance**2)
    # The ten cells share their needles: only 480 tokens are independent.
    assert abs(np.mean(found["rank"]) - chance) < 4 * spread / math.sqrt(480)


def test_where_everything_stands(tiny_tokenizer):
    model = copying()
    needle(model, tiny_tokenizer, haystack=IDS, contexts=[64, 100], depths=(0, 0.5, 1), trials=2)
    rows = [np.array(row) for row in model.seen]  # without the last token, which nothing follows
    assert [len(row) + 1 for row in rows] == [64] * 6 + [100] * 6
    needles = {0: set(), 1: set()}
    for index, row in enumerate(rows):
        trial, depth = divmod(index % 6, 3)
        at = (0, 20, 40)[depth] if len(row) == 63 else (0, 38, 76)[depth]
        planted = row[at : at + 12]
        assert planted[:11].tolist() == row[-11:].tolist()
        needles[trial].add(tuple(planted.tolist()))
        text = np.concatenate([row[:at], row[at + 12 : -11]])
        assert (np.diff(text) % 40 == 1).all()  # read on, and round and round
    assert len(needles[0]) == len(needles[1]) == 1 and needles[0] != needles[1]


def test_a_cell_does_not_depend_on_its_neighbours(tiny_tokenizer):
    def rows(**options):
        model = FakeModel(lambda ids: torch.zeros(*ids.shape, 300))
        needle(model, tiny_tokenizer, **options)
        return model.seen

    alone = rows(contexts=[64], depths=[0.5], trials=2)
    assert (
        alone == [row for row in rows(contexts=[200, 64], depths=[0, 0.5], trials=3) if len(row) == 63][1:4:2]
    )
    assert alone != rows(contexts=[64], depths=[0.5], trials=2, seed=1)
    needles = random_needles(tiny_tokenizer, 300, 3, 8, 4, seed=0)
    texts = [planted_rows(needles, np.array(IDS), [], 64, [0.5], seed=seed)[:, :20] for seed in (0, 1)]
    assert (texts[0] != texts[1]).any()  # the same needles in other text


def test_exact_is_what_greedy_generation_writes(embedded):
    model, tokenizer = embedded
    ids, trials = tokenizer(generated_text(40), add_special_tokens=False)["input_ids"], 16
    found = needle(model, tokenizer, haystack=ids, contexts=[96], depths=[0.3], trials=trials)
    needles = random_needles(tokenizer, len(tokenizer), trials, 8, 4, seed=0)
    rows = torch.from_numpy(planted_rows(needles, np.array(ids), [], 96, [0.3], seed=0))
    written = model.generate(
        rows[:, :-8], attention_mask=torch.ones_like(rows[:, :-8]), max_new_tokens=8, do_sample=False
    )
    generated = [row.tolist() == one.value for row, one in zip(written[:, 88:], needles, strict=True)]
    assert found["trial_exact"] == generated
    assert 0 < sum(generated) < trials  # both answers occur
    assert found["exact"] == [[sum(generated) / trials]]


def test_the_embedded_model_finds_needles(embedded):
    found = needle(*embedded, contexts=[128, 512], depths=(0.1, 0.9), trials=8)
    assert np.min(found["rank"]) > 0.85
    assert np.mean(found["exact"]) > 0.5


def test_batch_size_and_repetition_change_nothing(tiny_llama, tiny_tokenizer):
    options = {"contexts": [48, 64], "trials": 3, "needle_tokens": 2}
    first = needle(tiny_llama, tiny_tokenizer, **options)
    assert needle(tiny_llama, tiny_tokenizer, **options) == first
    assert needle(tiny_llama, tiny_tokenizer, batch_size=1, **options)["rank"] == [
        pytest.approx(row) for row in first["rank"]
    ]
    assert needle(tiny_llama, tiny_tokenizer, **options, seed=1)["rank"] != first["rank"]


def test_a_template_repeats_what_it_names(tiny_tokenizer):
    template = "The {key} holds {value}. So {value} is in the {key}."
    (one,) = written_needles(tiny_tokenizer, 1, 3, template, seed=0)
    planted = tiny_tokenizer.decode(one.planted)
    number = tiny_tokenizer.decode(one.value).strip()
    assert planted.count(number) == 2
    assert "{" not in planted


def test_a_template_is_written_and_asked(tiny_tokenizer):
    model = copying()
    needle(model, tiny_tokenizer, contexts=[200], depths=[0.5], trials=2, needle_tokens=5, template=TEMPLATE)
    for row in model.seen:
        text = tiny_tokenizer.decode(row)
        said = text.index("The magic number for")
        sentence = text[said : text.index(".", said) + 1]
        asked, _, number = sentence[:-1].rpartition(" ")
        assert len(number) == 5 and number.isdigit()
        assert text.endswith(f"{asked} {number[:-1]}")  # the last digit is to be predicted
        assert sentence.count(" ") == 7  # the key is an adjective and a noun


def test_values_of_different_lengths(tiny_llama):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(str(number) for number in range(10, 40))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    needles = written_needles(tokenizer, 12, 4, TEMPLATE, seed=0)
    assert len({len(one.value) for one in needles}) > 1
    found = needle(tiny_llama, tokenizer, haystack=IDS, contexts=[128], depths=[0.5], trials=12,
                   needle_tokens=4, template=TEMPLATE)  # fmt: skip
    rows = torch.from_numpy(planted_rows(needles, np.array(IDS), [], 128, [0.5], seed=0))
    for row, one, rank in zip(rows, needles, found["trial_rank"], strict=True):
        with torch.no_grad():
            logits = tiny_llama(input_ids=row[None]).logits[0]
        order = [logits[at - 1].argsort(descending=True).tolist() for at in range(128 - len(one.value), 128)]
        places = [1 + ids.index(token) for ids, token in zip(order, one.value, strict=True)]
        assert rank == pytest.approx(np.mean([1 / place for place in places]))


def test_a_leading_token_counts(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    leading = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>")
    model = copying()
    found = needle(model, leading, haystack=IDS, contexts=[64], trials=1)
    assert found["exact"] == [[1.0] * 5]
    assert all(row[0] == 0 and 0 not in row[1:] and len(row) == 63 for row in model.seen)


def test_text_is_read_no_further_than_needed(tiny_tokenizer):
    read = []

    def documents():
        for number in range(10_000):
            read.append(number)
            yield "the cat sat on the hill by the river"

    strings = needle(copying(), tiny_tokenizer, haystack=documents(), contexts=[64], trials=1, depths=[0])
    assert len(read) < 200
    one = " ".join(["the cat sat"] * 40)
    assert strings["exact"] == [[1.0]]
    assert needle(copying(), tiny_tokenizer, haystack=one, contexts=[64], trials=1, depths=[0])["exact"] == [
        [1]
    ]


def test_mode_is_restored_and_progress_told(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    told = []
    needle(
        tiny_llama,
        tiny_tokenizer,
        contexts=[40, 64],
        depths=[0.5],
        trials=3,
        batch_size=2,
        progress=lambda done, total: told.append((done, total)),
    )
    assert tiny_llama.training
    assert told == [(0, 312), (80, 312), (120, 312), (248, 312), (312, 312)]  # tokens


def test_drop_is_latent_minus_original_with_paired_errors(tiny_llama, tiny_tokenizer):
    options = {"contexts": [64, 128], "depths": [0, 1], "trials": 4}
    original = needle(copying(), tiny_tokenizer, **options)
    latent = needle(tiny_llama, tiny_tokenizer, **options)
    drop = needle_drop(original, latent)
    assert drop["exact"] == [[-1.0, -1.0]] * 2
    assert drop["rank"] == [[pytest.approx(cell - 1) for cell in row] for row in latent["rank"]]
    assert (drop["exact_mean"], drop["exact_standard_error"]) == (-1.0, 0.0)
    assert drop["rank_mean"] == pytest.approx(np.mean(drop["rank"]))
    assert drop["rank_standard_error"] == pytest.approx(np.std(latent["trial_rank"], ddof=1) / 2)
    single = needle(copying(), tiny_tokenizer, **{**options, "trials": 1})
    assert needle_drop(single, single)["rank_standard_error"] is None
    with pytest.raises(ValueError, match="trials is 4 and 1; measure again"):
        needle_drop(original, single)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": [64, 300]}, "got 300 tokens, max_position_embeddings=256; ask for 256"),
        ({"contexts": [20, 64]}, "24 tokens, the context has 20; ask for contexts of 24 tokens or more"),
        ({"contexts": [64], "needle_tokens": 40}, "they take 88 tokens, the context has 64"),
        ({"contexts": []}, "a context and a depth: got 0 and 5"),
        ({"depths": []}, "a context and a depth: got 2 and 0"),
        ({"depths": [0.5, 1.5]}, "0 to 1: got 1.5"),
        ({"depths": [math.nan]}, "0 to 1: got nan"),
        ({"cue_tokens": 0}, "got cue_tokens=0; try 4"),
        ({"needle_tokens": 0}, "needle_tokens must be at least 1: got needle_tokens=0"),
        ({"trials": 0}, "got trials=0"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"seed": -1}, "got seed=-1"),
        ({"haystack": []}, "got 0 tokens; give a text"),
        ({"haystack": ""}, "got 0 tokens; give a text"),
        ({"haystack": [5, 300]}, "the model lacks: id 300, the embedding has 300 rows"),
        ({"haystack": [-1, 3]}, "the model lacks: id -1, the embedding has 300 rows"),
        ({"template": "The magic number is {value}."}, r"must name \{key\}: got 'The magic number is"),
        ({"template": "{value} is the number for {key}."}, r"must name \{key\}"),
        ({"template": "The magic number for {key}"}, r"must name \{key\}"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_tokenizer, options, message):
    blank = FakeModel(lambda ids: torch.zeros(*ids.shape, 300))
    with pytest.raises(ValueError, match=message):
        needle(blank, tiny_tokenizer, **options)
    assert all(len(row) < 256 for row in blank.seen)


def test_a_value_that_joins_its_cue_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "is": 1, "5": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    blank = FakeModel(lambda ids: torch.zeros(*ids.shape, 300))
    with pytest.raises(ValueError, match="a token of its own: in '{key} is{value}' it joins"):
        needle(blank, words, template="{key} is{value}", trials=1)


def test_a_model_without_a_context_length_needs_contexts(tiny_tokenizer):
    model = copying()
    model.config.max_position_embeddings = None
    with pytest.raises(ValueError, match="got contexts=None; pass contexts="):
        needle(model, tiny_tokenizer, contexts=None)
    assert needle(model, tiny_tokenizer, contexts=[64], trials=1, depths=[0])["exact"] == [[1.0]]


def test_broken_weights_are_refused(tiny_llama, tiny_tokenizer):
    with torch.no_grad():
        tiny_llama.lm_head.weight[3, 3] = math.nan
    tiny_llama.train()
    with pytest.raises(ValueError, match="NaN or infinity within 64 tokens"):
        needle(tiny_llama, tiny_tokenizer, contexts=[64], trials=1)
    assert tiny_llama.training


def test_needles_are_of_ordinary_tokens(tiny_tokenizer):
    tokens = {
        token for one in random_needles(tiny_tokenizer, 300, 200, 8, 4, seed=0) for token in one.planted
    }
    assert tokens <= set(ordinary_ids(tiny_tokenizer, 300).tolist()) and len(tokens) > 250

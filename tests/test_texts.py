"""Which text is calibrated on and which is measured: apart, enough of both, and no more read than needed."""

import pytest
import torch
from transformers import LlamaConfig

from corpora import flat, stories
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.recipe import Recipe
from kvlatent.selection.statistics import Statistics
from kvlatent.text.corpus import prepare
from kvlatent.text.parts import (
    TextReader,
    calibration_blocks,
    check_sources,
    check_statistics,
    read_texts,
    seen_share,
    text_to_calibrate,
)

CONFIG = LlamaConfig(max_position_embeddings=128)


def recipe(*overrides: str) -> Recipe:
    return Recipe.load(None, ["data.block_size=32", "calibration.blocks=8", *overrides])


@pytest.fixture
def read(tiny_tokenizer, tmp_path):
    """`read_texts` with a cache in the test's own folder."""

    def call(data, eval_data=None, settings=None, eval_tokens=320, calibrates=True, config=CONFIG):
        reader = TextReader(settings or recipe(), tiny_tokenizer, config, tmp_path / "cache")
        return read_texts(reader, data, eval_data, eval_tokens=eval_tokens, calibrates=calibrates)

    return call


def statistics_of(blocks) -> Statistics:
    ids = torch.stack([torch.as_tensor(block["input_ids"]) for block in blocks]).int()
    return Statistics((), ids, ids, "", 1, 2)


def test_enough_is_held_out_to_measure(read, corpus_file):
    texts = read(corpus_file, settings=recipe("data.held_out=0.001"))
    assert len(texts.held_out) == 10  # of 32 tokens; the share alone would be 12 tokens
    assert len(texts.train) > 100
    small = read(corpus_file, settings=recipe("data.held_out=0.3"), eval_tokens=64)
    assert len(small.held_out) == 2


def test_a_small_text_keeps_three_quarters_to_calibrate_on(read, corpus_file):
    texts = read(corpus_file, eval_tokens=1_000_000)
    whole = 32 * (len(texts.train) + len(texts.held_out))
    assert 0.7 * whole < 32 * len(texts.train) < 0.8 * whole


def test_no_more_is_read_than_a_few_times_what_is_needed(read, corpus_file):
    texts = read(corpus_file, settings=recipe("calibration.blocks=2"), eval_tokens=64)
    assert 32 * (len(texts.train) + len(texts.held_out)) <= 8 * (2 * 32 + 64)


def test_another_text_leaves_all_of_the_first(read, corpus_file, tmp_path, tiny_tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("<|endoftext|>".join(stories(30, start=500)))
    texts = read(corpus_file, other)
    everything = prepare(
        corpus_file, tiny_tokenizer, block_size=32, vocab_size=300, cache_dir=tmp_path / "c", held_out=0.0
    ).train
    assert flat(texts.train) == flat(everything)[: 32 * len(texts.train)]
    assert len(texts.held_out) <= 10 and flat(texts.held_out) != flat(texts.train)[: 32 * len(texts.held_out)]


def test_where_nothing_calibrates_all_of_the_text_is_measured(read, corpus_file):
    texts = read(corpus_file, calibrates=False)
    assert texts.train is None and len(texts.held_out) == 10
    assert read(None, corpus_file, calibrates=False).held_out is not None
    assert read(None) == (None, None)


def test_blocks_fit_the_context(read, corpus_file):
    texts = read(corpus_file, config=LlamaConfig(max_position_embeddings=16))
    assert len(texts.train[0]["input_ids"]) == len(texts.held_out[0]["input_ids"]) == 16


def test_nothing_held_out_and_too_little_text_are_refused(read, corpus_file, tmp_path):
    with pytest.raises(ValueError, match="nothing is held out to measure on: data.held_out is 0; raise it"):
        read(corpus_file, settings=recipe("data.held_out=0"))
    short = tmp_path / "short.txt"
    short.write_text("A cat ran over the hill. " * 8)
    with pytest.raises(ValueError, match="the held-out part must fill a block"):
        read(short)


def test_blocks_are_drawn_by_the_seed(tiny_tokenizer, corpus_file, tmp_path):
    text = text_to_calibrate(TextReader(recipe(), tiny_tokenizer, CONFIG, tmp_path / "cache"), corpus_file)
    assert len(text) > 8
    first, again = (calibration_blocks(text, recipe(), tiny_tokenizer, learns=True) for _ in range(2))
    assert len(first) == 8 and flat(first) == flat(again)
    assert flat(first) != flat(calibration_blocks(text, recipe("seed=1"), tiny_tokenizer, learns=True))
    whole = [tuple(flat(text.select([i]))) for i in range(len(text))]
    places = [whole.index(tuple(flat(first.select([i])))) for i in range(8)]
    assert places == sorted(places) and max(places) > 8
    all_of_it = recipe("calibration.blocks=9999")
    assert calibration_blocks(text, all_of_it, tiny_tokenizer, learns=True) is text


def test_the_share_that_was_seen_is_counted(tiny_tokenizer, corpus_file, tmp_path):
    text = text_to_calibrate(TextReader(recipe(), tiny_tokenizer, CONFIG, tmp_path / "cache"), corpus_file)
    first = text.select(range(4))
    assert seen_share(first, statistics_of(first).input_ids) == 1
    assert seen_share(text.select(range(8)), statistics_of(first).input_ids) == pytest.approx(0.5, abs=0.2)
    assert seen_share(text.select(range(20, 24)), statistics_of(first).input_ids) < 0.3


def test_two_texts_for_one_purpose_are_refused(tmp_path):
    saved = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match="no statistics at .*; make them with `kvlatent calibrate`"):
        check_statistics(saved)
    saved.write_bytes(b"")
    check_sources(None, saved, "eval.txt", calibrates=True)
    check_sources("a.txt", None, "eval.txt", calibrates=True)
    for arguments, sentence in (
        (("a.txt", saved, None, True), "got --statistics and --data; leave one out.*--eval-data"),
        ((None, saved, None, False), "this conversion looks at no statistics.*use the preset calibrated"),
        (("a.txt", None, "b.txt", False), "one text at most, to measure on: got --data and --eval-data"),
    ):
        data, statistics, eval_data, calibrates = arguments
        with pytest.raises(ValueError, match=sentence):
            check_sources(data, statistics, eval_data, calibrates=calibrates)


def test_a_reader_tells_a_plain_function_or_a_progress(tiny_tokenizer, corpus_file, tmp_path):
    told = []
    listeners = (
        lambda *event: told.append(event),
        Progress(lambda **event: told.append(tuple(event.values())[:4])),
    )
    for number, progress in enumerate(listeners):
        told.clear()
        TextReader(recipe(), tiny_tokenizer, CONFIG, tmp_path / str(number), progress=progress).prepare(
            corpus_file
        )
        assert told and {event[:3] for event in told} == {("tokenise", 0, 0)}
        assert (
            told[-1][3].endswith(" tokens")
            and int(told[-1][3].removesuffix(" tokens").replace(",", "")) > 1000
        )

"""Recall blocks: what they are made of, where they stand among the blocks of a calibration, and when there are none."""

import itertools
import time

import numpy as np
import pytest
import torch

from corpora import flat
from kvlatent.conversion import refinement
from kvlatent.model.head import IGNORED
from kvlatent.text import recall_blocks
from kvlatent.text.recall_blocks import (
    SMALLEST_BLOCK,
    LineMarks,
    held_out_blocks,
    line_marks,
    mix_recall_blocks,
    recall_positions,
    replace_by_recall,
)
from numbered_text import numbered, rows_of

MARKS = LineMarks((1,), (2,))
COUNT = 32


def mixed(size: int = 256, seed: int = 0, share: float = 0.25, count: int = COUNT):
    """The recall blocks among numbered ones, in turn, spans first; those to learn from come before the others."""
    ids, is_recall = mix_recall_blocks(numbered(count, size), MARKS, share=share, seed=seed)
    places = [place for side in recall_positions(count, share) for place in side]
    assert sorted(places) == np.flatnonzero(is_recall).tolist()
    return [ids[place].tolist() for place in places], ids, is_recall


def values_of(block: list[int]) -> list[tuple[int, ...]]:
    """What stands between a colon and the next newline, line by line; the last one may be cut."""
    colons = [at for at, token in enumerate(block) if token == 1]
    return [tuple(block[at + 1 : block.index(2, at)]) for at in colons if 2 in block[at:]]


def test_all_is_decided_by_the_seed():
    text = numbered()
    before = text.copy()
    ids, is_recall = mix_recall_blocks(text, MARKS, share=0.25, seed=3)
    again, same_places = mix_recall_blocks(text, MARKS, share=0.25, seed=3)
    other, _ = mix_recall_blocks(text, MARKS, share=0.25, seed=4)
    assert np.array_equal(ids, again) and np.array_equal(is_recall, same_places)
    assert np.array_equal(text, before)
    assert np.array_equal(ids[~is_recall], text[~is_recall])
    assert (ids != other).any(1).tolist() == is_recall.tolist() == (ids != text).any(1).tolist()
    assert len({tuple(block) for block in ids[is_recall].tolist()}) == is_recall.sum()


@pytest.mark.parametrize("size", [SMALLEST_BLOCK, 512, 2048])
def test_spans_repeat_text_that_is_far_enough_back(size):
    distances, lengths, shares = [], [], []
    for seed in range(30):
        # One block in many, and a long text: where the reader jumps it hardly ever comes back to what the block holds.
        text, _ = mix_recall_blocks(numbered(600, size), MARKS, share=0.002, seed=seed)
        block = text[recall_positions(600, 0.002)[0][0]].tolist()
        copies = repeats_of(block)
        shares.append(sum(length for *_, length in copies) / size)
        assert copies[0][0] >= 50
        for start, source, length in copies:
            assert start - source >= max(length, 50)
        for (start, _, length), (following, *_) in itertools.pairwise(copies):
            assert 16 <= following - start - length <= 63
        distances += [start - source for start, source, _ in copies]
        lengths += [length for *_, length in copies[:-1]]  # the last one may be cut
    assert min(lengths) >= 16 and max(lengths) <= 49 + 63  # text before a first copy
    assert max(distances) > size / 2
    assert 0.2 < np.mean(shares) < 0.6


def repeats_of(block: list[int]) -> list[tuple[int, int, int]]:
    """Start, start of the source and length of every stretch that was there before."""
    first: dict[int, int] = {}
    found: list[tuple[int, int, int]] = []
    for place, token in enumerate(block):
        source = first.setdefault(token, place)
        if source == place:
            continue
        start, behind, length = found[-1] if found else (-1, -1, 0)
        if (start + length, behind + length) == (place, source):
            found[-1] = (start, behind, length + 1)
        else:
            found.append((place, source, 1))
    return found


def test_a_span_holds_no_copy():
    rng = np.random.default_rng(0)
    for _ in range(300):
        copied = np.repeat(rng.random(12) < 0.4, rng.integers(1, 60, 12))
        start, length = recall_blocks._choose_span(copied, rng)
        if length:
            assert 16 <= length <= 128 and not copied[start : start + length].any()
            assert start + max(length, 50) <= len(copied)
        else:
            far = copied[: max(0, len(copied) - 49)]
            assert not any((~copied[s : s + 16]).sum() == 16 for s in range(len(far)))
    lengths = [recall_blocks._choose_span(np.zeros(2000, dtype=bool), rng)[1] for _ in range(2000)]
    assert (min(lengths), max(lengths)) == (16, 128)
    assert np.median(lengths) == pytest.approx(45, abs=4)  # log-uniform: the root of 16 x 128


@pytest.mark.parametrize("size", [SMALLEST_BLOCK, 512, 2048])
def test_every_line_of_a_look_up_comes_again(size):
    counts = set()
    for seed in range(20):
        for block in mixed(size, seed)[0][1::2]:
            values = values_of(block)
            lines = list(dict.fromkeys(values))
            assert 6 <= len(lines) <= max(6, size // 32)
            assert all(values.count(line) >= 2 for line in lines)
            assert values[: len(lines)] == lines  # all of them first, then all again
            assert set(values[len(lines) : 2 * len(lines)]) == set(lines)
            assert all(3 <= len(value) <= 8 for value in lines)
            colons, newlines = ([at for at, token in enumerate(block) if token == mark] for mark in (1, 2))
            assert 8 < colons[0] <= 32 + 3
            between = colons[len(lines)] - newlines[len(lines) - 1] - 1  # with a name
            assert 16 < between <= max(16, size // 4) + 3
            counts.add(len(lines))
    assert size == SMALLEST_BLOCK or len(counts) > 3


def test_names_differ_and_neither_they_nor_values_hold_a_mark():
    rng = np.random.default_rng(0)
    text = rng.integers(1, 21, size=(COUNT, 256))  # a colon or a newline in ten tokens
    ids, is_recall = mix_recall_blocks(text, MARKS, share=0.25, seed=0)
    source = recall_blocks._Source(text.ravel(), 0, rng)
    for _ in range(50):
        lines = recall_blocks._lines(source, 256, MARKS)
        names = [tuple(line[: line.index(1)]) for line in lines]
        assert len(set(names)) == len(names) > 1
        assert all(line.count(1) == line.count(2) == 1 and line[-1] == 2 for line in lines)
    assert ids.shape == text.shape and is_recall.sum() == 9


def test_a_text_of_one_token_ends_all_the_same():
    for token in (1, 7):
        ids, _ = mix_recall_blocks(np.full((8, 256), token), MARKS, share=0.5, seed=0)
        assert ids.shape == (8, 256) and set(ids.ravel()) <= {token, 1, 2}


def test_text_starts_at_the_place_of_the_block_and_goes_on_or_jumps():
    blocks, _, _ = mixed()
    first, _ = recall_positions(COUNT, 0.25)
    starts = [block[0] == 10 + 256 * place for block, place in zip(blocks, first, strict=False)]
    assert 0 < sum(starts) < len(starts)  # 7 of 10
    jumps, pieces = 0, 0
    source = recall_blocks._Source(np.arange(10**6), 0, np.random.default_rng(0))
    end = 0
    for _ in range(1000):
        piece = source.read(16, 63)
        assert piece == [(piece[0] + step) % 10**6 for step in range(len(piece))] and 16 <= len(piece) <= 63
        jumps, pieces, end = jumps + (piece[0] != end), pieces + 1, (piece[-1] + 1) % 10**6
    assert jumps / pieces == pytest.approx(0.3, abs=0.05)


def test_what_measures_and_what_is_learnt_from_share_no_text():
    text = numbered(64)
    ids, is_recall = mix_recall_blocks(text, MARKS, share=0.25, seed=0)
    measuring = held_out_blocks(64)
    own = set(text[measuring].ravel())
    assert is_recall[measuring].any() and not is_recall[measuring].all()
    for place in np.flatnonzero(is_recall):
        words = set(ids[place]) - {1, 2}
        assert words <= own if place in measuring else not words & own


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("count", [4, 6, 24, 31, 32, 100, 128, 256, 1000])
def test_both_sides_get_their_share(count, share):
    learnt, measuring = recall_positions(count, share)
    held = held_out_blocks(count)
    assert not set(learnt) & set(held) and set(measuring) <= set(held)
    assert len(learnt) == round(share * (count - len(held)))
    assert len(measuring) == (max(1, round(share * len(held))) if learnt else 0)
    gaps = np.diff(learnt)
    assert not len(gaps) or max(gaps) <= 2 + 1 / share + 1  # spread over all of the text


def test_of_many_blocks_exactly_a_quarter_and_both_kinds_on_both_sides():
    learnt, measuring = recall_positions(128, 0.25)
    assert (len(learnt), len(measuring)) == (30, 2)
    _, ids, is_recall = mixed(512, count=128)
    assert is_recall.sum() == 32
    for side in (learnt, measuring):
        assert [1 in ids[place] for place in side] == [False, True] * (len(side) // 2)


def test_held_out_blocks_are_the_ones_they_were():
    """The last of every 16, or of as many as make eight; of fewer the last; of one none."""
    assert [held_out_blocks(count) for count in (1, 2, 15, 16, 33)] == [[], [1], [14], [15], [15, 31]]
    assert held_out_blocks(128) == list(range(15, 128, 16))
    assert held_out_blocks(256) == list(range(31, 256, 32))
    assert refinement.held_out_blocks is held_out_blocks


def test_128_blocks_take_less_than_a_second():
    text = numbered(128, 512)
    start = time.process_time()
    mix_recall_blocks(text, MARKS, share=0.25, seed=0)
    assert time.process_time() - start < 1


def test_the_marks_are_the_tokenizers_own(tiny_tokenizer):
    marks = line_marks(tiny_tokenizer)
    assert tiny_tokenizer.decode(marks.colon) == ":" and tiny_tokenizer.decode(marks.newline) == "\n"

    def adds_a_blank(text, **_):
        return {"input_ids": [100, *map(ord, text)] if not text.startswith("x") else list(map(ord, text))}

    assert line_marks(adds_a_blank) == ((ord(":"),), (ord("\n"),))

    def drops_what_is_blank(text, **_):
        return {"input_ids": [ord(letter) for letter in text if not letter.isspace()]}

    assert line_marks(drops_what_is_blank) == ((ord(":"),), ())


def test_a_recall_block_is_one_document(tiny_tokenizer):
    text = torch.randint(1, 300, (COUNT, 256), generator=torch.Generator().manual_seed(0))
    text[:, 99] = tiny_tokenizer.eos_token_id
    blocks = rows_of(text)
    made = replace_by_recall(blocks, tiny_tokenizer, seed=1)
    columns, is_recall = made[:], made[:]["is_recall"].bool()
    assert len(made) == COUNT and is_recall.sum() == 9
    assert torch.equal(columns["position_ids"][is_recall], torch.arange(256).repeat(9, 1))
    assert not (columns["input_ids"][is_recall] == tiny_tokenizer.eos_token_id).any()
    assert torch.equal(columns["labels"][is_recall][:, :-1], columns["input_ids"][is_recall][:, 1:])
    assert (columns["labels"][is_recall][:, -1] == IGNORED).all()
    for name, column in blocks[:].items():
        assert torch.equal(columns[name][~is_recall], column[~is_recall])
        assert not torch.equal(columns[name], column)
    assert replace_by_recall(blocks, tiny_tokenizer, share=0) is blocks
    assert flat(replace_by_recall(blocks, tiny_tokenizer, seed=1)) == flat(made)


def test_what_cannot_hold_a_recall_block_is_refused(tiny_tokenizer):
    short, few, fit = (rows_of(numbered(*shape)) for shape in ((8, 191), (2, 192), (4, 192)))
    with pytest.raises(
        ValueError,
        match=r"at least 192 tokens: got blocks of 191; give longer or more blocks .*calibration.recall=0",
    ):
        replace_by_recall(short, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"replace whole blocks: got a share of 0.25 of 2, which is less"):
        replace_by_recall(few, tiny_tokenizer)
    assert replace_by_recall(fit, tiny_tokenizer)[:]["is_recall"].sum() == 2
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"at least 0 and less than 1: got {share:g}; try 0.25"):
            replace_by_recall(fit, tiny_tokenizer, share=share)

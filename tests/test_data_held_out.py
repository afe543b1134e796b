"""The held-out part never overlaps training."""

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from corpora import EOS, SEPARATOR, flat, stories
from kvlatent.model.head import IGNORED
from kvlatent.text.packing import Documents, hold_out


def rows_of(part, tokenizer):
    """The distinct story numbers that a part contains, complete or cut."""
    stream = tokenizer.decode(flat(part), skip_special_tokens=False)
    return {piece.split(".")[0] for piece in stream.split("Story ")[1:] if "." in piece}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_documents_are_never_trained_on(make_corpus, tiny_tokenizer, tmp_path, seed):
    documents = stories(120)
    path = tmp_path / "twice.txt"
    path.write_text(SEPARATOR.join(documents + documents[::-1]))
    corpus = make_corpus(path, held_out=0.2, seed=seed)
    train, kept = rows_of(corpus.train, tiny_tokenizer), rows_of(corpus.held_out, tiny_tokenizer)
    assert kept
    assert not train & kept
    share = corpus.held_out_tokens / (corpus.train_tokens + corpus.held_out_tokens)
    assert 0.15 < share < 0.25
    assert kept != rows_of(make_corpus(path, held_out=0.2, seed=seed + 1).held_out, tiny_tokenizer)
    plain = make_corpus(path, held_out=0)
    assert kept <= rows_of(plain.train, tiny_tokenizer)


def test_one_document_is_split_by_position(make_corpus, tiny_tokenizer, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("\n".join(stories(120)))
    whole = flat(make_corpus(path, held_out=0).train)
    corpus = make_corpus(path, held_out=0.25)
    train, kept = flat(corpus.train), flat(corpus.held_out)
    assert train == whole[: len(train)]
    assert len(train) + len(kept) <= len(whole) + 32
    ids = tiny_tokenizer(path.read_text())["input_ids"] + [EOS]
    first = len(ids) - -(-len(ids) // 4)  # the last quarter, rounded up
    assert kept == ids[first : first + len(kept)]
    assert len(train) <= first
    last = corpus.train[-1]["labels"][-1].item()
    assert last == (ids[len(train)] if len(train) < first else IGNORED)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8)), min_size=1, max_size=40), st.floats(0.05, 0.6)
)
def test_parts_never_share_content(drawn, share):
    """Equal keys mean equal documents; nothing of a key may be on both sides, unless it is one cut in two."""
    keys = np.array([key for _, key in drawn], dtype=np.uint64)
    size_of = {key: size for size, key in drawn}
    lengths = np.array([size_of[key] for _, key in drawn])
    try:
        train, kept = hold_out(Documents(lengths, keys), share, 2, "drawn")
    except ValueError:
        reject()  # too little text, or too many copies: tests of their own
    target = int(np.ceil(share * lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    owner = np.searchsorted(starts, np.arange(lengths.sum()), side="right") - 1

    def covered(part):
        return [int(n) for s, l in zip(part.starts, part.lengths, strict=True) for n in range(s, s + l)]

    trained, held = covered(train), covered(kept)
    assert not set(trained) & set(held)
    assert target <= len(held) < 2 * target
    content = {(int(keys[owner[n]]), n - int(starts[owner[n]])) for n in trained}
    assert not content & {(int(keys[owner[n]]), n - int(starts[owner[n]])) for n in held}

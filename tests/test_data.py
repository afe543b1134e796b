"""What a block holds, and that it is written once."""

import os

import pytest
import torch

from corpora import EOS, flat, stories
from kvlatent.model.head import IGNORED
from kvlatent.text import documents as text_module
from kvlatent.text.corpus import evaluation_blocks, prepare


def oracle(tokenizer, documents, block_size, isolate):
    """Blocks the slow way: one Python list per column, token by token."""
    stream = []
    for number, document in enumerate(documents):
        ids = [*tokenizer(document)["input_ids"], EOS]
        stream += [(token, number, place) for place, token in enumerate(ids)]
    blocks = []
    for first in range(0, len(stream) - block_size + 1, block_size):
        ids, positions, labels = [], [], []
        for index in range(first, first + block_size):
            token, number, place = stream[index]
            following = stream[index + 1] if index + 1 < len(stream) else None
            known = following is not None and (following[1] == number or not isolate)
            ids.append(token)
            labels.append(following[0] if known else IGNORED)
            same_document_before = sum(1 for item in stream[first:index] if item[1] == number)
            positions.append(same_document_before if isolate else index - first)
            assert not isolate or same_document_before <= place
        blocks.append((ids, positions, labels))
    return blocks


@pytest.mark.parametrize("isolate", [True, False])
def test_blocks_are_what_the_slow_way_gives(make_corpus, tiny_tokenizer, corpus_file, isolate, monkeypatch):
    monkeypatch.setattr("kvlatent.text.packing._CHUNK_TOKENS", 1000)  # written in several batches
    part = make_corpus(corpus_file, held_out=0, isolate=isolate).train
    expected = oracle(tiny_tokenizer, stories(120), 32, isolate)
    assert len(part) == len(expected)
    for row, (ids, positions, labels) in zip(part, expected, strict=True):
        assert row["input_ids"].tolist() == ids
        assert row["position_ids"].tolist() == positions
        assert row["labels"].tolist() == labels
    assert part[0]["labels"].dtype == torch.int64
    assert (IGNORED in flat(part, "labels")[:-1]) == isolate


def test_packed_documents_do_not_see_each_other(make_corpus, tiny_llama, corpus_file):
    row = make_corpus(corpus_file, held_out=0, block_size=120).train[0]
    ids, positions = row["input_ids"][None], row["position_ids"][None]
    start = int((positions[0] == 0).nonzero()[1])
    with torch.no_grad():
        packed = tiny_llama(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = tiny_llama(
            input_ids=ids[:, start:], position_ids=positions[:, start:], use_cache=False
        ).logits
        plain = tiny_llama(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(packed[:, start:], alone)
    assert (plain[:, start:] - alone).abs().max() > 1e-2


def test_special_tokens_frame_each_document(make_corpus, tiny_tokenizer, corpus_file):
    ids = flat(make_corpus(corpus_file, held_out=0).train)
    assert 1 < ids.count(EOS) <= 120
    tiny_tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    assert tiny_tokenizer.eos_token_id is None
    without = prepare(
        corpus_file,
        tiny_tokenizer,
        block_size=32,
        held_out=0,
        vocab_size=300,
        cache_dir=corpus_file.parent / "c",
    )
    assert EOS not in flat(without.train)
    assert flat(without.train)[:100] == [token for token in ids if token != EOS][:100]


def test_a_beginning_of_text_token_is_added_where_the_tokenizer_adds_it(
    tiny_tokenizer, corpus_file, tmp_path
):
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    number = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", number)]
    )
    adding = type(tiny_tokenizer)(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    part = prepare(
        corpus_file, adding, block_size=32, held_out=0, vocab_size=301, cache_dir=tmp_path / "c"
    ).train
    starts = [row["input_ids"][row["position_ids"] == 0] for row in part]
    ids = flat(part)
    assert ids[0] == number
    assert all(ids[place + 1] == number for place, token in enumerate(ids[:-1]) if token == EOS)
    assert len(starts) == len(part)


def test_second_call_reads_the_cache(make_corpus, tiny_tokenizer, corpus_file, monkeypatch):
    first = make_corpus(corpus_file)
    state = {path: path.stat().st_mtime_ns for path in (corpus_file.parent / "cache").rglob("*.arrow")}
    tiny_tokenizer(
        ["a", "bb bb bb"], padding=False, truncation=True, max_length=2
    )  # leaves traces in the backend
    monkeypatch.setattr(text_module, "pieces", lambda *_, **__: pytest.fail("read the text again"))
    second = make_corpus(corpus_file)
    assert flat(second.train) == flat(first.train)
    assert second.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in state} == state
    os.utime(corpus_file, (1, 1))
    assert make_corpus(corpus_file).fingerprint == first.fingerprint  # content, not dates


def test_other_content_options_or_tokenizer_are_another_entry(make_corpus, tiny_tokenizer, corpus_file):
    seen = {make_corpus(corpus_file).fingerprint}
    for options in (
        {"block_size": 16},
        {"isolate": False},
        {"separator": "."},
        {"seed": 1},
        {"max_tokens": 3200},
    ):
        seen.add(make_corpus(corpus_file, **options).fingerprint)
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    seen.add(
        prepare(
            corpus_file, other, block_size=32, vocab_size=300, cache_dir=corpus_file.parent / "cache"
        ).fingerprint
    )
    corpus_file.write_text(corpus_file.read_text() + "!")
    seen.add(make_corpus(corpus_file).fingerprint)
    assert len(seen) == 8


def test_a_damaged_entry_is_written_again(make_corpus, corpus_file):
    first = flat(make_corpus(corpus_file).train)
    (entry,) = (corpus_file.parent / "cache").iterdir()
    for damage in (
        lambda: (entry / "train.arrow").write_bytes(b"short"),
        lambda: (entry / "meta.json").write_text("{"),
        lambda: (entry / "held_out.arrow").unlink(),
    ):
        damage()
        assert flat(make_corpus(corpus_file).train) == first
    assert [path.name for path in (corpus_file.parent / "cache").iterdir()] == [entry.name]


def test_evaluation_uses_everything_up_to_the_limit(make_corpus, tiny_tokenizer, corpus_file, tmp_path):
    whole = make_corpus(corpus_file, held_out=0)
    assert whole.held_out is None
    assert whole.held_out_tokens == 0
    blocks = evaluation_blocks(corpus_file, tiny_tokenizer, 32, vocab_size=300, cache_dir=tmp_path / "cache")
    assert flat(blocks) == flat(whole.train)
    few = evaluation_blocks(
        corpus_file, tiny_tokenizer, 32, vocab_size=300, cache_dir=tmp_path / "cache", max_tokens=330
    )
    assert flat(few) == flat(blocks)[:320]


def test_progress_counts_tokens(make_corpus, corpus_file, monkeypatch):
    monkeypatch.setattr("kvlatent.text.tokenise._BATCH_CHARACTERS", 2000)
    seen = []
    corpus = make_corpus(corpus_file, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] >= corpus.train_tokens + corpus.held_out_tokens

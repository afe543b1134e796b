"""Reading: every format, datasets by name, long documents in pieces, and what is refused."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from corpora import SEPARATOR, flat, stories
from kvlatent.evaluation.scored_text import read_documents
from kvlatent.text import documents as text_module
from kvlatent.text.packing import Documents, hold_out


def test_every_format_gives_the_same_blocks(make_corpus, corpus_file, tmp_path):
    documents = stories(120)
    rows = [{"text": document} for document in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": None}]) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in rows))
    pa.parquet.write_table(pa.table({"n": range(120), "text": documents}), tmp_path / "d.parquet")
    expected = flat(make_corpus(corpus_file, held_out=0).train)
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert flat(make_corpus(tmp_path / name, held_out=0).train) == expected
    renamed = [{"body": document} for document in documents]
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps(row) for row in renamed))
    assert flat(make_corpus(tmp_path / "e.jsonl", held_out=0, text_field="body").train) == expected


def test_a_dataset_name_is_loaded_by_datasets(make_corpus, corpus_file, tmp_path, monkeypatch):
    """A folder stands for a hub repository: `datasets` resolves both through the same builder."""
    (tmp_path / "stories").mkdir()
    rows = [json.dumps({"text": document}) for document in stories(120)]
    (tmp_path / "stories" / "train.jsonl").write_text("\n".join(rows[:60]))
    (tmp_path / "stories" / "test.jsonl").write_text("\n".join(rows[60:]))
    monkeypatch.chdir(tmp_path)
    first, second = (
        make_corpus("stories:default", held_out=0),
        make_corpus("stories:default:test", held_out=0),
    )
    assert flat(first.train) == flat(make_corpus(corpus_file, held_out=0).train)[: first.train_tokens]
    assert flat(second.train) != flat(first.train)[: second.train_tokens]
    with pytest.raises(ValueError, match="check the split nosuch"):
        make_corpus("stories:default:nosuch")


def test_a_dataset_of_several_configurations_needs_one(make_corpus, tmp_path, monkeypatch):
    (tmp_path / "two").mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "two" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in "ab":
        rows = [json.dumps({"text": document}) for document in stories(60)]
        (tmp_path / "two" / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"several configurations; give one as two:CONFIG: .*\['a', 'b'\]"):
        make_corpus("two::train", held_out=0)
    assert make_corpus("two:a", held_out=0).train_tokens


def test_long_documents_are_read_in_pieces(make_corpus, tiny_tokenizer, corpus_file, tmp_path, monkeypatch):
    whole = flat(make_corpus(corpus_file, held_out=0, separator=None).train)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(text_module, "_READ_CHARACTERS", 70)
    pieces = list(text_module.pieces(text_module.resolve(corpus_file), separator=None, text_field="text"))
    assert len(pieces) > 20
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == corpus_file.read_text()
    # Cut before white space, byte-level tokens do not notice; in another folder, so not from the cache.
    assert (
        flat(make_corpus(corpus_file, held_out=0, separator=None, cache_dir=tmp_path / "other").train)
        == whole
    )
    texts = [
        piece.text
        for piece in text_module.pieces(text_module.resolve(corpus_file), separator=SEPARATOR, text_field="")
    ]
    assert texts == stories(120)


@pytest.mark.parametrize("read", [1, 7, 64])
def test_a_separator_is_found_wherever_reading_stops(corpus_file, monkeypatch, read):
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 20)
    monkeypatch.setattr(text_module, "_READ_CHARACTERS", read)
    words = [f"a{n} " + "long " * (n % 7) + "end" for n in range(30)]
    corpus_file.write_text(" \n= \n= ".join(words))
    found, document = [], ""
    source = text_module.resolve(corpus_file)
    for piece in text_module.pieces(source, separator=" \n= \n= ", text_field="text"):
        document = piece.text if piece.first else document + piece.text
        assert len(piece.text) <= 20
        if piece.last:
            found.append(document)
    assert found == words


def test_a_full_disk_leaves_nothing(corpus_file, tiny_tokenizer, tmp_path):
    """A file-size limit in a fresh process makes the write fail for real."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = textwrap.dedent(f"""
        import os, resource
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import PreTrainedTokenizerFast
        from kvlatent.text.corpus import prepare
        tokenizer = PreTrainedTokenizerFast.from_pretrained({str(tmp_path / "tokenizer")!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            prepare({str(corpus_file)!r}, tokenizer, block_size=32, vocab_size=300, cache_dir={str(tmp_path / "cache")!r})
        except OSError as error:
            print("refused", error.errno)
    """)
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stdout.startswith("refused")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.txt", b" \n<|endoftext|>\n \n", "blank.txt holds no text"),
        ("binary.txt", b"ab\0\x01cd" * 50, "binary, not text"),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 50, "not UTF-8 text"),
        ("utf16.txt", ("hello " * 50).encode("utf-16"), "not UTF-8 text"),
        ("short.txt", b"a few words", r"short.txt has \d+ tokens, block_size=32"),
        ("data.csv", b"text\nhello\n", "must end in .txt, .jsonl, .json, .parquet: got"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "not valid JSON at line 2"),
        ("nested.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "not valid JSON at line 2: nested too deeply"),
        ("nested.json", b"[" * 100_000, "not valid JSON at line 1: nested too deeply"),
        (
            "half.jsonl",
            b'{"text": "a"}\n{"text": "a \\ud800 b"}\n',
            "record 2 of .* is not valid Unicode .*character 3",
        ),
        ("broken.json", b'[{"text": "a"},\n', "not valid JSON at line"),
        ("split.json", b'{\n"text":\n"a",,\n}', "not valid JSON at line 3"),
        (
            "long.jsonl",
            b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b"}\n",
            "long.jsonl is not valid JSON at line 2",
        ),
        ("nest.json", b'{\n"data": [{"text": "a"}]\n}', "'text': record 1 of .* has data"),
        (
            "fields.jsonl",
            b'{"body": "a", "id": 1}\n',
            "'text': record 1 of .* has body, id; name the field to read, e.g. --set data.text_field=body ",
        ),
        ("array.jsonl", b"[1, 2]\n", "'text': record 1 of .* has list"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 5}\n', "must hold text: record 2 of .* holds a int"),
        ("broken.parquet", b"PAR1 nothing", "not a readable Parquet file"),
    ],
)
def test_bad_text_is_refused_and_leaves_nothing(make_corpus, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make_corpus(tmp_path / name)
    assert not list(tmp_path.glob("cache/*"))


def test_parquet_without_the_field_is_refused(make_corpus, tmp_path):
    pa.parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(
        ValueError, match="has body; name the field to read, e.g. --set data.text_field=body "
    ):
        make_corpus(tmp_path / "d.parquet")


def test_a_directory_is_no_text(make_corpus, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("folder", tmp_path / "folder"):
        with pytest.raises(ValueError, match="folder is a directory; give a file"):
            make_corpus(name)


@pytest.mark.parametrize(
    "name", ["missing.txt", "no/such/folder/file", "../up", "org/nosuch", "nosuch:config"]
)
def test_missing_sources_are_refused(make_corpus, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is n"):
        make_corpus(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "at least 2 tokens to predict one: got 1"),
        ({"held_out": 1.5}, "between 0 and 1: got 1.5"),
        ({"max_tokens": 10}, "max_tokens must fill a block: got 10, block_size=32"),
        (
            {"held_out": 0.0001},
            "held-out part must fill a block: held_out=0.0001 of .* leaves it 2, block_size=32",
        ),
        ({"held_out": 0.9999}, "training part must fill a block: held_out=0.9999 of .* leaves it 1"),
    ],
)
def test_options_that_leave_no_block_are_refused(make_corpus, corpus_file, options, message):
    with pytest.raises(ValueError, match=message):
        make_corpus(corpus_file, **options)


def test_repeated_text_that_cannot_be_parted_is_refused(make_corpus, tmp_path):
    path = tmp_path / "same.txt"
    path.write_text(SEPARATOR.join(stories(1) * 100))
    with pytest.raises(ValueError, match="repeats its documents too often"):
        make_corpus(path, held_out=0.1)
    documents = Documents(np.full(10, 40), np.ones(10, dtype=np.uint64))
    with pytest.raises(
        ValueError, match="few leaves it 5 tokens beside the held-out documents, block_size=30"
    ):
        hold_out(documents, 0.0875, 30, "few")


@pytest.mark.parametrize(
    "content",
    [
        '{\n  "text": "one two"\n}\n',
        '\n[\n  {"text": "one two"}\n]\n',
        '[{"text": "one two"}]',
        '{"text": "one"}\n{"text": "two"}\n',
        '{"text": "one two"}',
    ],
)
def test_a_json_file_is_an_array_a_record_or_a_record_a_line(tmp_path, content):
    (tmp_path / "text.json").write_text(content)
    assert " ".join(read_documents(tmp_path / "text.json")) == "one two"

"""Conversations: every format, as the model's chat template writes them, in files and data sets."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from conftest import SENTENCES
from corpora import flat, stories
from kvlatent.evaluation.checks.text_perplexity import measure_documents
from kvlatent.evaluation.scored_text import read_documents
from kvlatent.text.corpus import prepare

TEMPLATE = """{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>
{% endif %}{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('no robots,
please') }}{% endif %}<|im_start|>{{ message.role }}
{{ message.content | trim }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}"""


@pytest.fixture(scope="module")
def chatty(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <bos> before a text, and whose template writes one itself."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>", "<|im_start|>", "<|im_end|>"])
    bos = [("<bos>", backend.token_to_id("<bos>"))]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def talk(n: int, *, system: bool = False) -> list[dict]:
    head = [{"role": "system", "content": "Be kind."}] if system else []
    question, answer = SENTENCES[n % 4], f"Answer {n}. {SENTENCES[n // 4 % 4]}"
    return [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def in_parts(messages: list[dict]) -> list[dict]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def in_columns(messages: list[dict]) -> dict:
    return {name: [m[name] for m in messages] for name in ("role", "content")}


FORMATS = {
    "messages": lambda m: {"messages": m, "id": "x"},
    "messages beside a null text": lambda m: {"text": None, "messages": m},
    "messages in parts": lambda m: {"messages": in_parts(m)},
    "messages in columns": lambda m: {"messages": in_columns(m)},
    "messages with nulls": lambda m: {"messages": [{**one, "tool_calls": None, "name": None} for one in m]},
    "sharegpt": lambda m: {"conversations": sharegpt(m)},
    "sharegpt with openai's names": lambda m: {"conversation": m},
    "prompt and completion": lambda m: {"prompt": m[:1], "completion": m[1:]},
    "prompt in words": lambda m: {"prompt": m[0]["content"], "completion": m[1:]},
    "preference": lambda m: {"prompt": m[:1], "chosen": m[1:], "rejected": m[:1]},
    "preference, whole": lambda m: {"prompt": m[0]["content"], "chosen": m, "rejected": m[:1]},
    "prompt alone": lambda m: {"prompt": m},
    "alpaca": lambda m: {"instruction": m[0]["content"], "input": "", "output": m[1]["content"]},
    "the named field": lambda m: {"text": m},
}


def write(folder, name: str, rows: list) -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids_of(tokenizer, conversations) -> list[int]:
    """What the tokenizer itself makes of conversations."""
    return [
        token
        for messages in conversations
        for token in tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    ]


def blocks(tokenizer, source, tmp_path, **options) -> list[int]:
    options = {"block_size": 32, "held_out": 0, "vocab_size": 400, "cache_dir": tmp_path / "cache", **options}
    return flat(prepare(source, tokenizer, **options).train)


TALKS = [talk(n) for n in range(12)]
WHOLE = [message for messages in TALKS for message in messages]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_what_the_chat_template_makes_of_it(chatty, tmp_path, form, suffix):
    source = write(tmp_path, f"talks{suffix}", [FORMATS[form](messages) for messages in TALKS])
    found, expected = blocks(chatty, source, tmp_path), ids_of(chatty, TALKS)
    assert found == expected[: len(found)] and len(expected) - len(found) < 32
    assert found.count(chatty.bos_token_id) == len(TALKS)  # not doubled
    bos = chatty.bos_token
    texts = [chatty.apply_chat_template(m, tokenize=False).removeprefix(bos) for m in TALKS]
    assert (
        list(read_documents(source, tokenizer=chatty)) == texts
    )  # measurements put <bos> before a text themselves


def test_a_data_set_of_conversations(chatty, tmp_path, monkeypatch):
    (tmp_path / "talks").mkdir()
    rows = [{"messages": m} | ({"score": 1} if n % 2 else {"score": None}) for n, m in enumerate(TALKS)]
    write(tmp_path / "talks", "train.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    found = blocks(chatty, "talks:default", tmp_path)
    assert found == ids_of(chatty, TALKS)[: len(found)]


def test_perplexity_reads_the_ids_of_the_template(chatty, tmp_path, tiny_llama, monkeypatch):
    tiny_llama.resize_token_embeddings(len(chatty))
    seen = []
    decoder = tiny_llama.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    source = write(tmp_path, "talks.jsonl", [{"messages": talk(0)}])
    figures, _ = measure_documents(tiny_llama, chatty, read_documents(source, tokenizer=chatty), window=128)
    expected = ids_of(chatty, [talk(0)])
    assert seen[0][0].tolist() == expected[:-1] and figures["tokens"] == len(expected) - 1


def test_system_messages_and_tools_reach_the_template(chatty, tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    called = {"role": "assistant", "content": None}
    called |= {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}]}
    answered = [{"role": "user", "content": "Look."}, called, {"role": "tool", "content": "a cat"}]
    rows = [
        {"conversations": sharegpt(talk(0)), "system": "Be kind."},
        {"conversations": sharegpt(talk(0, system=True)), "system": "Be unkind."},
        {"messages": answered, "tools": [tool]},
        {"messages": answered, "tools": json.dumps([tool])},
        {"conversations": [{"from": "observation", "value": "a cat"}]},
        talk(1),
    ]
    kind, same, listed, spelled, seen, bare = read_documents(
        write(tmp_path, "a.jsonl", rows), tokenizer=chatty
    )
    assert kind == same and kind.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert listed == spelled and listed.startswith('<tools>[{"type": "function"')
    assert '<|im_start|>assistant\n{"name": "look", "arguments": {"at": 1}}<|im_end|>' in listed
    assert seen.startswith("<|im_start|>tool\na cat")
    assert bare == chatty.apply_chat_template(talk(1), tokenize=False).removeprefix("<bos>")


def test_plain_prompts_with_answers_are_texts(chatty, tmp_path):
    rows = [{"prompt": "Once upon", "completion": " a time."}, {"chosen": "Human: hi", "rejected": "no"}]
    source = write(tmp_path, "a.jsonl", rows)
    assert list(read_documents(source, tokenizer=chatty)) == ["Once upon a time.", "Human: hi"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_and_conversations_in_one_file(chatty, tmp_path, suffix):
    """A record is a text where it has one; only texts are put between the tokenizer's own tokens."""
    rows = [{"text": story, "messages": None} for story in stories(3)]
    rows += [{"text": "a text", "messages": talk(0)}, {"text": None, "messages": talk(1)}]
    rows += [{"text": "", "messages": []}, {"text": None, "messages": None}]
    source = write(tmp_path, f"a{suffix}", rows)
    expected = [
        token
        for text in [*stories(3), "a text"]
        for token in [*chatty(text)["input_ids"], chatty.eos_token_id]
    ] + ids_of(chatty, [talk(1)])
    found = blocks(chatty, source, tmp_path)
    assert len(expected) - len(found) < 32 and found == expected[: len(found)]


def test_a_long_conversation_is_read_in_pieces(chatty, tmp_path, monkeypatch):
    source = write(tmp_path, "a.jsonl", [{"messages": WHOLE}])
    whole = blocks(chatty, source, tmp_path)
    monkeypatch.setattr("kvlatent.text.documents.PIECE_CHARACTERS", 300)
    assert blocks(chatty, source, tmp_path / "again") == whole == ids_of(chatty, [WHOLE])[: len(whole)]


def test_another_template_is_another_entry_of_the_cache(chatty, tmp_path):
    options = {"block_size": 32, "vocab_size": 400, "cache_dir": tmp_path / "cache"}
    talks, plain = write(tmp_path, "a.jsonl", [{"messages": m} for m in TALKS]), tmp_path / "a.txt"
    plain.write_text("\n".join(stories(20)))
    other = type(chatty)(
        tokenizer_object=chatty.backend_tokenizer, bos_token="<bos>", eos_token="<|im_end|>",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )  # fmt: skip
    first, second = (prepare(talks, one, held_out=0, **options) for one in (chatty, other))
    assert (
        first.fingerprint != second.fingerprint
        and flat(first.train) != flat(second.train)[: first.train_tokens]
    )
    assert len({prepare(plain, one, **options).fingerprint for one in (chatty, other)}) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([{"role": "robot", "content": "a"}], r"record 2 of .* cannot be written as text: the model's chat template refuses it \(no robots, please\)"),
        ([{"content": "a"}], r"record 2 of .* is no conversation: a message has no role \(its fields: content\)"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"record 2 .*'user' holds something else than text \(image_url\)"),
        ([{"role": "user", "content": 5}], r"record 2 .*'user' holds something else than text \(int\)"),
        ([{"role": "user", "content": "a \ud800"}], "record 2 .*is not valid Unicode"),
        ("a", "'text': record 2 of .* has messages; name the field to read, e.g. --set data.text_field=messages"),
        ([1], "'text': record 2 of .* has messages; write the text of each record into a field of its own"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(chatty, tmp_path, row, message):
    source = write(tmp_path, "a.jsonl", [{"messages": talk(0)}, {"messages": row}])
    with pytest.raises(ValueError, match=message):
        blocks(chatty, source, tmp_path)
    with pytest.raises(ValueError, match=message):
        list(read_documents(source, tokenizer=chatty))
    assert not list(tmp_path.glob("cache/*"))


def test_tools_that_are_no_json_are_refused(chatty, tmp_path):
    source = write(tmp_path, "a.jsonl", [{"messages": talk(0), "tools": "look"}])
    with pytest.raises(ValueError, match="record 1 of .* is no conversation: its field 'tools' is no JSON"):
        blocks(chatty, source, tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_without_a_template_conversations_are_refused(tiny_tokenizer, tmp_path, form):
    source = write(tmp_path, "a.jsonl", [FORMATS[form](talk(0))])
    message = "record 1 of .* is a conversation, and the model's tokenizer has no chat template .*chat_template.jinja"
    with pytest.raises(ValueError, match=message):
        blocks(tiny_tokenizer, source, tmp_path)


def test_messages_under_another_name_are_named(chatty, tmp_path):
    source = write(tmp_path, "a.jsonl", [{"id": "long identity", "my talk": m} for m in TALKS])
    with pytest.raises(ValueError, match="e.g. --set data.text_field='my talk' "):
        blocks(chatty, source, tmp_path)
    found = blocks(chatty, source, tmp_path, text_field="my talk")
    assert found == ids_of(chatty, TALKS)[: len(found)]

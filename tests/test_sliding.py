"""Sliding-window perplexity against lm-eval's own sum and against one forward pass a token."""

import heapq
import inspect
import json
import math
import queue

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import SENTENCES
from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.checks.text_perplexity import measure_documents
from kvlatent.evaluation.copying import window_hiding, windowed_mask
from kvlatent.evaluation.perplexity import perplexity_ratio
from kvlatent.evaluation.scored_text import read_documents
from kvlatent.text.standard_library import MODEL_PATH
from tiny import SWITCH, tiny_model

TEXTS = [" ".join(SENTENCES), SENTENCES[0], "", " ".join(reversed(SENTENCES)), "The cat über alles."]


def figures_of(*given, **options):
    return measure_documents(*given, **options)[0]


@pytest.fixture
def word_tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a beginning-of-text token that it puts in front of every text by itself."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<eos>")


def one_at_a_time(model, tokenizer, texts, lead, window, stride):
    """Nats of every token, each from a forward pass of its own over exactly the ids its window shows before it."""
    losses = []
    for text in texts:
        stream = [lead, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        ends, last = [], len(stream) - 1
        while not ends or ends[-1] < last:  # how far each window sees
            ends.append(min(last, window if not ends else ends[-1] + stride))
        for place in range(1, len(stream)):
            end = next(end for end in ends if end >= place)
            seen = stream[max(0, end - window) : place]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[stream[place]].item())
    return losses


@pytest.mark.parametrize(
    ("window", "stride", "batch_size"),
    [(24, 7, 1), (24, 24, 3), (16, 1, 8), (1, 1, 8)],
)
def test_equals_one_token_at_a_time(tiny_llama, tiny_tokenizer, window, stride, batch_size):
    expected = one_at_a_time(tiny_llama, tiny_tokenizer, TEXTS, tiny_tokenizer.eos_token_id, window, stride)
    found = figures_of(tiny_llama, tiny_tokenizer, TEXTS, window=window, stride=stride, batch_size=batch_size)
    assert found["tokens"] == len(expected)
    assert found["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / size, rel=1e-6)
    assert (found["window"], found["stride"], found["documents"]) == (window, stride, 4)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("start", [False, True], ids=["eos", "bos"])
def test_equals_lm_eval_rolling(tiny_llama, tiny_tokenizer, word_tokenizer, start):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = word_tokenizer if start else tiny_tokenizer
    if start:
        tiny_llama.resize_token_embeddings(len(tokenizer))
    harness = HFLM(
        pretrained=tiny_llama, tokenizer=tokenizer, backend="causal", max_length=24,
        add_bos_token=False if start else None,
    )  # fmt: skip
    texts = [text for text in TEXTS if text]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = -math.fsum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    found = figures_of(tiny_llama, tokenizer, texts, window=24)
    assert found["tokens"] > 4 * 24
    assert found["loss"] * found["tokens"] == pytest.approx(expected, rel=1e-5)  # 1e-4 is promised


def test_a_longrope_model_keeps_its_short_table_beside_longer_texts(tiny_tokenizer):
    model = tiny_model("phi3-longrope", vocab_size=300)
    texts = [" ".join(SENTENCES), SENTENCES[0][:40]]
    lengths = [len(ids) for ids in tiny_tokenizer(texts)["input_ids"]]
    assert lengths[0] > 2 * SWITCH and lengths[1] < SWITCH
    for latent in (model, convert(model, d_qk=8, d_vo=16, preset="paper")):
        alone = [measure_documents(latent, tiny_tokenizer, [text])[1] for text in texts]
        together = measure_documents(latent, tiny_tokenizer, texts)[1]
        assert together.block_losses == pytest.approx([part.block_losses[0] for part in alone], rel=1e-5)


def test_more_context_helps_a_trained_model_and_a_latent_one_is_paired_with_it():
    model = load_model(MODEL_PATH)
    tokenizer = load_tokenizer(MODEL_PATH, model.config)
    texts = [inspect.getsource(queue), inspect.getsource(heapq)]
    options = {"window": 128, "max_tokens": 1200}
    found, original = measure_documents(model, tokenizer, texts, **options)
    overlapping, same_blocks = measure_documents(model, tokenizer, texts, stride=32, **options)
    assert overlapping["loss"] < found["loss"]
    assert original.block_tokens == same_blocks.block_tokens
    latent = convert(model, d_qk=8, d_vo=8, preset="paper")
    ratio, error = perplexity_ratio(measure_documents(latent, tokenizer, texts, **options)[1], original)
    assert error is not None and ratio > 1 + 3 * error


def test_clusters_are_stretches_of_a_document(tiny_llama, tiny_tokenizer):
    _, found = measure_documents(tiny_llama, tiny_tokenizer, TEXTS, window=24, stride=7)
    lengths = [len(ids) for ids in tiny_tokenizer(TEXTS)["input_ids"]]
    expected = [min(24, length - at) for length in lengths for at in range(0, length, 24)]
    assert found.block_tokens == tuple(expected)
    one = figures_of(tiny_llama, tiny_tokenizer, ["cat"], window=24)
    assert one["standard_error"] is None


def test_max_tokens_cuts_the_last_document_and_its_bytes(tiny_llama, tiny_tokenizer):
    def texts():
        yield from ("cat", SENTENCES[0])
        raise AssertionError("read on after enough text")

    count = len(tiny_tokenizer("cat")["input_ids"])
    ids = tiny_tokenizer(SENTENCES[0])["input_ids"][:10]
    found = figures_of(tiny_llama, tiny_tokenizer, texts(), window=8, max_tokens=count + 10)
    cut = figures_of(tiny_llama, tiny_tokenizer, ["cat", tiny_tokenizer.decode(ids)], window=8)
    assert found == cut
    assert found["tokens"] == count + 10
    assert found["bytes"] == 3 + len(tiny_tokenizer.decode(ids))


def test_mode_is_restored_progress_told_and_the_context_is_the_default(tiny_llama, tiny_tokenizer):
    tiny_llama.train()
    seen = []
    found = figures_of(
        tiny_llama, tiny_tokenizer, TEXTS, batch_size=2, progress=lambda *numbers: seen.append(numbers)
    )
    assert tiny_llama.training
    assert found["window"] == found["stride"] == 128
    assert seen[-1] == (found["tokens"], found["tokens"])
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    tiny_llama.config.max_position_embeddings = 131072
    assert figures_of(tiny_llama, tiny_tokenizer, ["cat"])["window"] == 2048


def test_documents_of_files(tmp_path):
    stories = ["One.\n\nStill one.", "Two."]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"story": story}) + "\n" for story in stories))
    (tmp_path / "long.txt").write_text("word " * 200_000)
    assert list(read_documents(tmp_path / "a.txt")) == stories
    assert len(list(read_documents(tmp_path / "a.txt", separator=None))) == 1
    assert list(read_documents(tmp_path / "a.jsonl", text_field="story")) == stories
    assert list(read_documents(tmp_path / "long.txt")) == ["word " * 200_000]
    with pytest.raises(FileNotFoundError, match="no data file"):
        list(read_documents(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 129}, "got window=129, max_position_embeddings=128"),
        ({"window": 0}, "at least 1 token: got window=0"),
        ({"window": 16, "stride": 17}, "got stride=17, window=16"),
        ({"window": 16, "stride": 0}, "got stride=0, window=16"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"max_tokens": 0}, "at least 1: got 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tiny_llama, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        figures_of(tiny_llama, tiny_tokenizer, TEXTS, **options)


def test_no_text_no_start_and_broken_weights_are_refused(tiny_llama, tiny_tokenizer):
    with pytest.raises(ValueError, match="hold 0 tokens"):
        figures_of(tiny_llama, tiny_tokenizer, ["", ""])
    with pytest.raises(TypeError, match="pass \\[text\\]"):
        figures_of(tiny_llama, tiny_tokenizer, "cat")
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="name one of its tokens as eos_token"):
        figures_of(tiny_llama, bare, TEXTS)
    with torch.no_grad():
        tiny_llama.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="finite and below 700 nats per token: got nan"):
        figures_of(tiny_llama, tiny_tokenizer, TEXTS)


def test_a_window_hides_keys_in_every_layer_and_only_inside(tiny_llama):
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        whole = tiny_llama(input_ids=ids).logits
        masked = tiny_llama(input_ids=ids, attention_mask=windowed_mask(20, 3, torch.float32)).logits
        with window_hiding(tiny_llama, 3):
            hidden = tiny_llama(input_ids=ids).logits
        with window_hiding(tiny_llama, None):
            assert torch.equal(tiny_llama(input_ids=ids).logits, whole)
    assert torch.equal(hidden, masked) and not torch.equal(hidden, whole)

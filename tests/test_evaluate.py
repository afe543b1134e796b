"""Evaluation: perplexity against dense logits, cache bytes against integer arithmetic, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.quality import cache_bytes_per_token, measure
from kvlatent.evaluation.standard import evaluate, standard_evaluation
from kvlatent.jobs.devices import precision
from kvlatent.jobs.progress import Progress
from kvlatent.text.corpus import evaluation_blocks
from on_disk import write_checkpoint, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(folder / "model", tiny_tokenizer)
    write_text(folder / "text.txt", 60)
    latent = convert(load_model(folder / "model"), d_qk=8, d_vo=4, preset="paper")
    save(latent, folder / "latent", tokenizer=tiny_tokenizer)
    return folder


def test_both_sides_their_ratio_and_the_cache(place):
    report = evaluate(place / "latent", place / "text.txt", against=place / "model", block_size=32)
    latent, original = report["latent"], report["original"]
    assert latent["cache_bytes_per_token"] == 2 * 2 * (8 + 4) * 4
    assert original["cache_bytes_per_token"] == 2 * 2 * (16 + 16) * 4
    assert report["cache_ratio"] == 12 / 32
    assert report["ratio"] == pytest.approx(latent["perplexity"] / original["perplexity"])
    assert report["ratio"] != 1
    assert report["ratio_standard_error"] > 0
    assert latent["tokens"] == original["tokens"] > 1000


def test_a_model_against_itself_is_one_without_spread(place):
    report = evaluate(place / "model", place / "text.txt", against=place / "model", block_size=32)
    assert (report["ratio"], report["ratio_standard_error"]) == (1.0, 0.0)
    assert report["latent"]["standard_error"] > 0


def test_perplexity_equals_the_mean_over_dense_logits(place, tmp_path):
    model = load_model(place / "latent")
    blocks = evaluation_blocks(
        place / "text.txt",
        load_tokenizer(place / "model", model.config),
        32,
        vocab_size=300,
        cache_dir=tmp_path,
    )
    total, count = 0.0, 0
    for block in blocks:
        labels = block["labels"]
        with torch.no_grad():
            logits = model(
                input_ids=block["input_ids"][None], position_ids=block["position_ids"][None], use_cache=False
            ).logits
        chosen = logits[0].double().log_softmax(-1)[labels != -100]
        total -= chosen.gather(1, labels[labels != -100][:, None]).sum().item()
        count += int((labels != -100).sum())
    figures, _ = measure(model, blocks)
    assert figures["tokens"] == count
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_bytes_are_read_off_the_live_cache_in_its_own_dtype(place):
    ids = torch.arange(1, 21)[None]
    latent = load_model(place / "latent")
    assert cache_bytes_per_token(latent, ids) == 2 * 2 * 12 * 4
    assert (
        cache_bytes_per_token(load_model(place / "latent", dtype="bfloat16"), ids.repeat(3, 1))
        == 2 * 2 * 12 * 2
    )
    latent.train()
    cache_bytes_per_token(latent, ids)
    assert latent.training


def test_a_window_is_what_is_measured_where_the_text_exceeds_it(tiny_tokenizer):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=8,
    )  # fmt: skip
    latent = convert(MistralForCausalLM(config).eval(), d_qk=8, d_vo=8, preset="paper")
    whole = 2 * 2 * 16 * 4
    assert cache_bytes_per_token(latent, torch.arange(1, 7)[None]) == whole
    assert cache_bytes_per_token(latent, torch.arange(1, 41)[None]) < whole / 2


def test_autocast_only_for_narrow_dtypes():
    with precision("cpu", "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with precision("cpu", "bfloat16"):
        assert torch.is_autocast_enabled("cpu")


def test_max_tokens_scores_less(place):
    part = evaluate(place / "latent", place / "text.txt", block_size=32, max_tokens=64)
    assert part["latent"]["tokens"] <= 64
    assert "ratio" not in part


def test_progress_tells_the_speed(place):
    seen = []
    evaluate(place / "latent", place / "text.txt", block_size=32, progress=lambda *event: seen.append(event))
    step, done, total, note = seen[-1]
    assert (step, done) == ("measure", total)
    assert note.endswith(" tokens/s") and int(note.removesuffix(" tokens/s").replace(",", "")) > 0


def test_an_unknown_dtype_is_refused(place):
    with pytest.raises(ValueError, match="unknown dtype 'abc'; choose one of float32, bfloat16, float16"):
        evaluate(place / "latent", place / "text.txt", dtype="abc")
    assert (
        evaluate(place / "latent", place / "text.txt", block_size=32, dtype="bfloat16", max_tokens=64)[
            "latent"
        ]["cache_dtype"]
        == "bfloat16"
    )


def test_other_vocabularies_do_not_compare(place, tmp_path, tiny_tokenizer):
    other = write_checkpoint(tmp_path / "other", tiny_tokenizer, vocab_size=320)
    with pytest.raises(ValueError, match="300 and 320 entries"):
        evaluate(place / "latent", place / "text.txt", against=other, block_size=32)


def test_a_loaded_model_needs_a_tokenizer_or_blocks(place, tmp_path, tiny_tokenizer):
    model = load_model(place / "latent")
    with pytest.raises(ValueError, match="without its tokenizer"):
        evaluate(model, place / "text.txt", block_size=32)
    named = evaluate(model, place / "text.txt", tokenizer=tiny_tokenizer, block_size=32)
    assert evaluate(place / "latent", place / "text.txt", block_size=32) == named
    blocks = evaluation_blocks(place / "text.txt", tiny_tokenizer, 32, vocab_size=300, cache_dir=tmp_path)
    assert evaluate(model, blocks) == {"latent": measure(model, blocks)[0]}


def test_windows_and_blocks_longer_than_the_context_are_refused(place, tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="got --block-size 256, the model's context has 128; give 128"):
        evaluate(place / "latent", place / "text.txt", block_size=256)
    blocks = evaluation_blocks(place / "text.txt", tiny_tokenizer, 256, vocab_size=300, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="got data.block_size=256, max_position_embeddings=128"):
        evaluate(load_model(place / "latent"), blocks)


def test_a_progress_is_told_as_a_function_is(place):
    """Steps of an evaluation inside a longer job are named after their place in it."""
    told = []
    progress = Progress(lambda step, done, total, **_: told.append((step, done, total))).within("cell")
    evaluate(place / "latent", place / "text.txt", block_size=32, max_tokens=64, progress=progress)
    standard_evaluation(place / "latent", checks=["causality"], progress=progress)
    assert told[0] == ("cell: measure", 0, 0)
    assert {step for step, *_ in told} >= {"cell: load", "cell: read the text", "cell: causality, latent"}

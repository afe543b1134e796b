"""Latent toys of every family, and exporters called without the command around them."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.engines.engine_process import EngineSettings
from kvlatent.engines.export_options import ExportOptions
from kvlatent.evaluation.speed.memory import held_bytes
from kvlatent.selection.choices import Choices
from tiny import tiny_model

ONE_TABLE = Choices(keys="weights", table="model")
WIDTH = 16  # of HEAD_DIM
LONG = 8192


def latent_toy(name, d_qk=WIDTH, d_vo=WIDTH, choices=ONE_TABLE, **overrides):
    """A converted toy; Qwen3 with the norm that an engine has."""
    return convert(tiny_model(name, **overrides), d_qk=d_qk, d_vo=d_vo, choices=choices, qk_norm="sliced")


def latent_directory(folder, tokenizer, name="llama-mha", **more):
    """A latent toy of the tokenizer's vocabulary, as a checkpoint."""
    vocab = {"vocab_size": 300, "num_key_value_heads": 2}
    return save(latent_toy(name, **{**vocab, **more}), folder, tokenizer=tokenizer)


def difference(exporter, latent, source, out, input_ids, **options):
    """Facts, and the largest difference from ours of what the exporter reads back, within the context of the export."""
    out.mkdir(exist_ok=True)
    chosen = ExportOptions(**options)
    input_ids = input_ids[:1, : exporter.check_exportable(latent, chosen) - 1]
    with torch.no_grad():  # before the exporter has had it
        ours = latent(input_ids, use_cache=False).logits
    facts = exporter.write_export(latent, source, out, chosen)
    theirs = exporter.read_logits(out, input_ids)
    ours = ours[:, -theirs.shape[1] :]
    if theirs.logsumexp(-1).abs().max() < 1e-3:
        ours = ours.log_softmax(-1)
    return facts, float((ours - theirs).abs().max()), ours


def formula_bytes(facts, number_bytes=4):
    """Bytes of a token in a type of that many bytes a number, by what an export says of its own type."""
    own = {"float32": 4, "float16": 2, "bfloat16": 2}[facts["cache_dtype"]]
    return facts["cache_bytes_per_token"] * number_bytes / own


def transformers_cache_bytes(out, input_ids):
    """Bytes of a token in the cache that upstream's class fills, in float32."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        cache = model(input_ids, use_cache=True).past_key_values
    return held_bytes(cache) / input_ids.numel()


def llama_cpp_cache_bytes(out, kv_dtype="f32"):
    """Bytes of a token as xllamacpp's log has them; in a long context, as it says hundredths of a MiB."""
    from kvlatent.engines import llama_cpp_server

    settings = EngineSettings(str(next(out.glob("*.gguf"))), "toy", LONG, kv_dtype, threads=1)
    facts, run = llama_cpp_server.open_bench(settings)
    run([5, 6], 1)  # one that is closed before it has started never ends
    return facts["cache_bytes_per_token"]


def untrained_tokenizer():
    """Single letters, and nothing that merges them."""
    vocabulary = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())

"""GGUF exports in llama.cpp through llama-cpp-python, which gives logits: in every type of the cache, and its bytes.

`make engines` runs these, in an environment where llama-cpp-python was built; elsewhere they are skipped.
"""

import io
import re
from contextlib import redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from export_setup import LONG, latent_toy
from kvlatent.engines import gguf_export
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.kv_dtypes import kv_bytes_by_layer, kv_dtype_named
from tiny import tokens

pytestmark = [
    pytest.mark.skipif(
        find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: make engines"
    ),
    pytest.mark.slow,
]
SIZES = {"head_dim": 64, "vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": LONG}
LAYERS, HEADS = 3, 2
PROMPTS = [row.tolist()[: 12 + 9 * index] for index, row in enumerate(tokens(batch=5, length=60))]
NEW_TOKENS = 64
CACHE_SIZE = re.compile(r"llama_kv_cache: size =\s*([\d.]+) MiB \(\s*(\d+) cells,\s+([1-9]\d*) layers")
# Exact in float32 (2.5e-6 was measured). Of coarser types a toy of random weights feels more than a model does; 1.5e-3, 0.02
# and 0.29 were measured. The limits are about three times that.
LARGEST = {"f32": 1e-5, "f16": 5e-3, "q8_0": 6e-2, "q4_0": 0.9}
PROFILES = {
    "32/32": ("llama-mha", 32, 32, {}, "--dtype f32"),
    "64/64": ("llama-mha", 64, 64, {}, "--dtype f32"),
    "40/24": ("qwen2", 40, 24, {"experimental": True}, "--dtype f32 --experimental"),
}
CASES = [
    *[("32/32", kv_dtype) for kv_dtype in LARGEST],
    *[("64/64", kv_dtype) for kv_dtype in LARGEST],
    ("40/24", "f32"),
    ("40/24", "f16"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """A latent toy of each profile, and its file."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}
    tiny_tokenizer.save_pretrained(folder / "source")
    for profile, (name, d_qk, d_vo, options, _) in PROFILES.items():
        latent, out = latent_toy(name, d_qk, d_vo, **SIZES), folder / profile.replace("/", "-")
        out.mkdir()
        gguf_export.write_export(latent, folder / "source", out, ExportOptions(dtype="f32", **options))
        found[profile] = latent, next(out.glob("*.gguf"))
    return found


def load(file, kv_dtype, length, logits_all=False):
    """The model in llama.cpp, with a cache of that type; its log goes to stderr."""
    import llama_cpp

    kind = getattr(llama_cpp, f"GGML_TYPE_{kv_dtype.upper()}")
    # Quantised values need flash attention; float32 keeps to the plain path, as an export is checked.
    cache = {"type_k": kind, "type_v": kind, "flash_attn": kv_dtype.startswith("q")}
    plain = {"n_gpu_layers": 0, "n_threads": 1, "n_threads_batch": 1, "logits_all": logits_all}
    return llama_cpp.Llama(str(file), n_ctx=length, n_batch=256, **cache, **plain)


def said_bytes(file, kv_dtype):
    """Bytes of a token by its log, of a long context, as it says hundredths of a MiB."""
    with redirect_stderr(io.StringIO()) as log:
        load(file, kv_dtype, LONG)
    size, cells, _ = CACHE_SIZE.search(log.getvalue()).groups()
    return float(size) * 2**20 / int(cells)


def logits_of(file, ids, kv_dtype):
    llama = load(file, kv_dtype, 256, logits_all=True)
    llama.eval(ids)
    return torch.from_numpy(llama.scores[: len(ids)].copy())


@pytest.mark.parametrize(("profile", "kv_dtype"), CASES)
def test_logits_and_bytes(profile, kv_dtype, exported, compatibility):
    latent, file = exported[profile]
    x = tokens(1, 128)
    theirs = logits_of(file, x[0].tolist(), kv_dtype)
    with torch.no_grad():
        ours = latent(x, use_cache=False).logits[0]
    off = float((theirs - ours).abs().max())
    assert off < LARGEST[kv_dtype]
    assert kv_dtype == "f32" or off > 1e-4
    said = said_bytes(file, kv_dtype)
    name, d_qk, d_vo, _, options = PROFILES[profile]
    expected = sum(kv_bytes_by_layer(kv_dtype_named(kv_dtype, "llama.cpp"), d_qk, d_vo, LAYERS, HEADS))
    assert said == pytest.approx(expected, rel=0.005)
    compatibility.computed(
        latent,
        name,
        engine=f"llama.cpp in llama-cpp-python {version('llama-cpp-python')}",
        command=f"kvlatent export DIR --to gguf {options} --out OUT; llama-server -m OUT/model-f32.gguf -ctk {kv_dtype} -ctv {kv_dtype}",
        kv_dtype=kv_dtype,
        difference=off,
        said_bytes=said,
        formula_bytes=expected,
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_greedy_tokens(profile, exported):
    latent, file = exported[profile]
    llama = load(file, "f32", 256)
    for prompt in PROMPTS:
        found = []
        for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            found.append(token)
            if len(found) == NEW_TOKENS:
                break
        with torch.no_grad():
            ours = torch.tensor([prompt])
            for _ in range(NEW_TOKENS):
                ours = torch.cat([ours, latent(ours).logits[:, -1:].argmax(-1)], 1)
        assert found == ours[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("profile", "kv_dtype"), [("40/24", "q8_0"), ("40/24", "q4_0")])
def test_quantised_caches_that_it_does_not_hold(profile, kv_dtype, exported, compatibility):
    """The engine itself refuses what `kvlatent plan` does."""
    with redirect_stderr(io.StringIO()) as log, pytest.raises(ValueError, match="Failed to create"):
        load(exported[profile][1], kv_dtype, 256)
    (said,) = re.findall(r"llama_init_from_model: (.*)", log.getvalue())
    assert said == f"K cache type {kv_dtype} with block size 32 does not divide n_embd_head_k=40"
    compatibility.refused("llama.cpp itself", said)

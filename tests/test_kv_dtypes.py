"""KV dtypes of engines: bytes against packed numbers, against other people's tables, and the sentences of what is refused."""

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES

from kvlatent.engines.facts import ENGINES
from kvlatent.engines.kv_dtypes import (
    _KV_DTYPES,
    check_kv_dtype,
    kv_bytes_by_layer,
    kv_dtype_named,
    kv_dtypes_of,
)

SHARES_OF_BFLOAT16 = {  # percent of 128 channels in bfloat16, as vLLM's sources give them
    128: {"bfloat16": 100, "fp8": 50, "int4_per_token_head": 26.6, "nvfp4": 28.1,
          "turboquant_k8v4": 38.3, "turboquant_4bit_nc": 26.2, "turboquant_3bit_nc": 19.9},
    64: {"bfloat16": 50, "fp8": 25, "int4_per_token_head": 14.1, "nvfp4": 14.1,
         "turboquant_k8v4": 19.5, "turboquant_4bit_nc": 13.7, "turboquant_3bit_nc": 10.5},
    32: {"bfloat16": 25, "fp8": 12.5, "int4_per_token_head": 7.8, "nvfp4": 7.0,
         "turboquant_k8v4": 10.2, "turboquant_4bit_nc": 7.4, "turboquant_3bit_nc": 5.9},
}  # fmt: skip


@pytest.mark.parametrize("width", SHARES_OF_BFLOAT16)
def test_bytes_of_vllm_to_the_printed_digit(width):
    found = {
        dtype.name: round(100 * dtype.token_bytes(width, width) / (2 * 2 * 128) + 1e-9, 1)
        for dtype in kv_dtypes_of("vllm", "sm100")[1]
    }
    assert found == pytest.approx(SHARES_OF_BFLOAT16[width], abs=0.0501)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_bytes_of_llama_cpp_by_the_sizes_of_its_blocks(backend):
    """gguf lists block sizes of its own; the whole key of a head is packed where it has a packer."""
    for dtype in kv_dtypes_of("llama.cpp", backend)[1]:
        kind = gguf.GGMLQuantizationType[dtype.name.upper()]
        block, size = GGML_QUANT_SIZES[kind]
        assert dtype.token_bytes(64, 128) == (64 + 128) / block * size
        if dtype.name != "iq4_nl":
            packed = gguf.quants.quantize(np.ones((1, 64), dtype=np.float32), kind)
            assert 2 * packed.nbytes == dtype.token_bytes(64, 64)


@pytest.mark.parametrize("d_qk", [32, 64])
@pytest.mark.parametrize("d_vo", [64, 128])
def test_bytes_by_packing(d_qk, d_vo):
    """One token of one head, as an engine lays it out: the numbers, and beside them the scales."""
    four, half, single = np.uint8, np.float16, np.float32  # two numbers of four bits fill a byte

    def size(*parts):
        return sum(np.zeros(count, kind).nbytes for count, kind in parts)

    expected = {
        "bfloat16": size((d_qk, half), (d_vo, half)),
        "fp8": size((d_qk, np.uint8), (d_vo, np.uint8)),
        "int4_per_token_head": size((d_qk // 2, four), (1, single), (d_vo // 2, four), (1, single)),
        "nvfp4": size((d_qk // 2, four), (d_qk // 16, np.uint8), (d_vo // 2, four), (d_vo // 16, np.uint8)),
        "turboquant_k8v4": size((d_qk, np.uint8), (d_vo // 2, four), (2, half)),
        "turboquant_4bit_nc": size((d_qk // 2, four), (1, half), (d_vo // 2, four), (2, half)),
        "turboquant_3bit_nc": size((3 * d_qk // 8, four), (1, half), (3 * d_vo // 8, four), (2, half)),
    }
    assert {d.name: d.token_bytes(d_qk, d_vo) for d in kv_dtypes_of("vllm")[1]} == expected


@pytest.mark.parametrize(("d_qk", "d_vo"), [(32, 32), (40, 24), (128, 64)])
def test_bytes_of_openvino_by_the_shape_of_its_blocks(d_qk, d_vo):
    """As `compile_model` of 2026.4.1 shapes them: 32 tokens of keys in 40 rows of u8 or 48 of u4, values 8 bytes longer."""
    key_rows, value_width = {"u8": 40, "u4": 48}, {"u8": d_vo + 8, "u4": d_vo + 16}
    for name, numbers_a_byte in (("u8", 1), ("u4", 2)):
        block = (key_rows[name] * d_qk + 32 * value_width[name]) / numbers_a_byte
        assert kv_dtype_named(name, "openvino").token_bytes(d_qk, d_vo) == block / 32


def test_layers_at_the_edge_stay_in_16_bits():
    """Six layers, of which two at either end; widths differ."""
    widths = (32, 64, 64, 32, 64, 32)
    dtype = kv_dtype_named("turboquant_3bit_nc", "vllm")
    plain, packed = {32: 128, 64: 256}, {32: 30, 64: 54}
    expected = [
        3 * table[width]
        for width, table in zip(widths, [plain] * 2 + [packed] * 2 + [plain] * 2, strict=True)
    ]
    assert kv_bytes_by_layer(dtype, widths, widths, 6, 3) == tuple(expected)
    assert kv_bytes_by_layer(dtype, 64, 64, 3, 1) == (256,) * 3  # all of them are at an edge
    fp8 = kv_dtype_named("fp8", "vllm")
    assert kv_bytes_by_layer(fp8, 40, 24, 2, 2) == (128, 128)


def test_every_engine_has_one_without_loss_first():
    assert set(_KV_DTYPES) == set(ENGINES)
    for name, by_backend in _KV_DTYPES.items():
        for backend, dtypes in by_backend.items():
            assert dtypes[0].is_lossless and not dtypes[0].rule, (name, backend)
            assert len({dtype.name for dtype in dtypes}) == len(dtypes)
            for dtype in dtypes:  # a rule without words could not be told
                assert bool(dtype.rule) == bool(dtype.only or dtype.multiple > 1), (name, dtype.name)


@pytest.mark.parametrize(
    ("engine", "backend", "dtype", "taken"),
    [
        ("vllm", "cuda", "fp8", [32, 40, 48, 64, 96, 128]),
        ("vllm", "cuda", "int4", [32, 64, 128]),
        ("vllm", "cuda", "nvfp4", [128]),
        ("vllm", "sm100", "nvfp4", [64, 128]),
        ("vllm", "cuda", "turboquant_k8v4", [32, 64, 128]),
        ("vllm", "cpu", "fp8", [32, 64, 96, 128]),
        ("llama.cpp", "cpu", "q4_0", [32, 64, 96, 128]),
        ("llama.cpp", "cuda", "q4_0", [64, 128]),
        ("llama.cpp", "cuda", "f16", [32, 40, 48, 64, 96, 128]),
        ("openvino", "cpu", "bf16", [32, 40, 48, 64, 96, 128]),
    ],
)
def test_widths_that_are_taken(engine, backend, dtype, taken):
    known = kv_dtype_named(dtype, engine, backend)
    assert [width for width in (32, 40, 48, 64, 96, 128) if known.takes(width)] == taken


def test_notes_name_the_widths_that_are_slower_or_coarser():
    f16 = kv_dtype_named("f16", "llama.cpp", "cuda")
    assert "no CUDA flash-attention kernel" in f16.note_at(32) and f16.note_at(40, 64) == ""
    assert f16.note_at(64, 48) and not kv_dtype_named("f16", "llama.cpp").note_at(32)
    q8_0 = kv_dtype_named("q8_0", "llama.cpp")
    assert "not rotated" in q8_0.note_at(96) and q8_0.note_at(128) == ""
    assert "two layers stay bf16" in kv_dtype_named("turboquant_k8v4", "vllm").note_at(64)


@pytest.mark.parametrize(
    ("dtype", "engine", "widths", "backend", "sentence"),
    [
        ("q4_0", "llama.cpp", (48, 48), None,
         r"^engine llama.cpp on cpu takes multiples of its block of 32 in q4_0: got d_qk=48; try 32 or 64 channels, or --kv-dtype f16$"),
        ("q8_0", "llama.cpp", (64, 40), None, r"got d_vo=40; try 32 or 64 channels, or --kv-dtype f16"),
        ("q8_0", "llama.cpp-step35", (16, 64), None, r"step35 on cpu takes multiples .* got d_qk=16; try 32 channels"),
        ("q4_0", "llama.cpp", (32, 32), "cuda", r"on cuda takes the widths of its CUDA kernels, 64, 128 and 256 .* got d_qk=32; try 64"),
        ("nvfp4", "vllm", (64, 64), None, r"on cuda takes widths 128, 256 and 512 \(64 on --backend sm100 only\) in nvfp4: got d_qk=64; try 128 channels, or --kv-dtype turboquant_3bit_nc"),
        ("int4", "vllm", (48, 48), None, r"powers of two in int4_per_token_head: got d_qk=48; try 32 or 64 channels, or --kv-dtype fp8"),
        ("turboquant_4bit_nc", "vllm", (96, 96), None, r"powers of two .* got d_qk=96; try 64 or 128"),
        ("fp8", "vllm", (48, 48), "cpu", r"vllm on cpu takes multiples of 32 in fp8: got d_qk=48; try 32 or 64 channels, or --kv-dtype bfloat16"),
        ("fp8", "vllm", ((64, 40), (64, 40)), "cpu", r"got d_qk=40"),
        ("q4_0", "vllm", (32, 32), None, r"engine vllm on cuda has no KV dtype 'q4_0'; choose one of bfloat16, fp8"),
        ("q8-0", "llama.cpp", (32, 32), None, r"has no KV dtype 'q8-0'; did you mean q8_0"),
        ("fp8", "vllm", (32, 32), "tpu", r"engine vllm is known on cuda, sm100 and cpu: got --backend tpu; try --backend cuda"),
        ("fp8", None, (32, 32), "cuda", r"transformers keeps its cache alike on all backends: got --backend cuda; leave it out"),
        ("q8_0", None, (32, 32), None, r"^engine transformers has no KV dtype 'q8_0'; choose one of bfloat16, float32, fp8$"),
    ],
)  # fmt: skip
@pytest.mark.refused_by("planning (--kv-dtype)")
def test_refusals(dtype, engine, widths, backend, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        check_kv_dtype(dtype, engine, *widths, backend=backend)
    assert "\n" not in str(caught.value)


def test_what_is_not_refused():
    assert check_kv_dtype("bf16", "vllm", 48, 48).name == "bfloat16"
    assert check_kv_dtype("q8_0", "llama.cpp-step35", 32, 64).ran
    assert check_kv_dtype("nvfp4", "vllm", 64, 64, backend="sm100").name == "nvfp4"

"""Export to OpenVINO: the graph computes what our class does, in both of GenAI's backends, at every width and table."""

import copy
import json
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from openvino._offline_transformations import paged_attention_transformation
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvlatent.checkpoints.save import save
from kvlatent.conversion.convert_model import convert
from kvlatent.engines import openvino_graph, openvino_ir
from kvlatent.engines.export_options import ExportOptions
from kvlatent.engines.matrix_rounding import relative_difference
from kvlatent.engines.openvino_graph import compress_weights, stateful_graph
from kvlatent.engines.openvino_paging import MODEL_FILE, check_paging, paged_cache
from kvlatent.model.classes import latent_config_of
from kvlatent.selection.choices import Choices
from kvlatent.workflows.export_checkpoint import export
from tiny import FAMILIES, SWITCH, logits, padded, tiny_model, tokens

PER_HEAD = Choices(keys="weights", table="head")
ONE_TABLE = Choices(keys="weights", table="model")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
NEW = 24
# Float32 on both sides, two layers of sums in another order: 3e-6 of logits up to 4 were measured.
CLOSE = 1e-4


def toy(name="llama", d_qk=20, d_vo=12, choices=PER_HEAD, **overrides):
    """A latent toy whose attention looks at content and position alike; by default keys and values differ in width."""
    model = tiny_model(name, **overrides)
    with torch.no_grad():  # so that what attention gives decides the tokens, and these are not all alike
        for layer in model.model.layers:
            layer.self_attn.get_parameter(
                "qkv_proj.weight" if name.startswith("phi3") else "q_proj.weight"
            ).mul_(3)
            layer.self_attn.o_proj.weight.mul_(8)
            layer.mlp.down_proj.weight.mul_(0.25)
    return convert(model, d_qk=d_qk, d_vo=d_vo, choices=choices)


def inputs(x, start=0):
    """What the graph is given: tokens [B, T] at positions from `start` on."""
    batch, length = x.shape
    return {
        "input_ids": x.numpy(),
        "attention_mask": np.ones((batch, start + length), dtype=np.int64),
        "position_ids": np.arange(start, start + length)[None].repeat(batch, 0),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }


def request(graph):
    return ov.compile_model(graph, "CPU", EXACT).create_infer_request()


def run(inferring, given):
    inferring.infer(given)
    return torch.from_numpy(inferring.get_tensor("logits").data.copy())


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = None


UNEQUAL = {"d_qk": 20, "d_vo": 12, "choices": PER_HEAD}
EQUAL = {"d_qk": 16, "d_vo": 16, "choices": ONE_TABLE}
BY_LAYER = {"d_qk": (8, 20, 16), "d_vo": 7, "choices": PER_HEAD}


@pytest.fixture(scope="module", params=[UNEQUAL, EQUAL, BY_LAYER], ids=["unequal", "equal", "by-layer"])
def exported(request, tmp_path_factory, tokenizer):
    """A latent model, the directory it was exported to, and the facts."""
    folder = tmp_path_factory.mktemp("openvino")
    latent = toy(vocab_size=300, **request.param)
    save(latent, folder / "latent", tokenizer=tokenizer)
    (folder / "out").mkdir()
    openvino_ir.check_exportable(latent, ExportOptions())
    facts = openvino_ir.write_export(latent, folder / "latent", folder / "out", ExportOptions())
    return latent, folder / "out", facts


@pytest.mark.parametrize(
    ("d_qk", "d_vo", "refused"),
    [((16, 16, 16), (8, 8, 32), True), ((8, 8, 16), (8, 8, 32), True), ((16, 16, 8), 8, False), ((8, 8, 16), (8, 8, 16), False)],
)  # fmt: skip
@pytest.mark.refused_by("OpenVINO (--to openvino)")
def test_value_widths_that_paged_attention_misreads(d_qk, d_vo, refused):
    latent = toy(d_qk=d_qk, d_vo=d_vo)
    if not refused:
        assert openvino_ir.check_exportable(latent, ExportOptions()) == latent.config.max_position_embeddings
        return
    with pytest.raises(ValueError, match="got d_vo from 8 to 32 with other d_qk; convert with one d_vo, or"):
        openvino_ir.check_exportable(latent, ExportOptions())


def record(compatibility, latent, name, out, off):
    """Keep it for the page, with the pages that the engine asks for in float32."""
    config = latent_config_of(latent.config)
    compatibility.computed(
        latent,
        name,
        engine=f"OpenVINO {version('openvino')}",
        command="kvlatent export DIR --to openvino --out OUT",
        difference=off,
        said_bytes=paged_cache(out, "f32")["bytes_per_token"],
        formula_bytes=config.cache_bytes_per_token(3, latent.config.num_key_value_heads, 4),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name, tmp_path, compatibility):
    latent, x = toy(name, 16, 24), tokens()
    implementation = latent.config._attn_implementation
    graph = stateful_graph(latent)
    assert latent.config._attn_implementation == implementation
    off = float((run(request(graph), inputs(x)) - logits(latent, x)).abs().max())
    assert off < CLOSE
    ov.save_model(graph, tmp_path / MODEL_FILE, compress_to_fp16=False)
    record(compatibility, latent, name, tmp_path, off)


def test_an_export_gives_the_same_logits_and_says_its_cache(exported, compatibility):
    latent, out, facts = exported
    x, config = tokens(2, 60), latent_config_of(latent.config)
    off = (openvino_ir.read_logits(out, x) - logits(latent, x)).abs().max()
    assert float(off) < CLOSE
    # Two heads in each of three layers, two bytes a number.
    assert facts["cache_bytes_per_token"] == config.cache_bytes_per_token(3, 2, 2)
    sizes = paged_cache(out)
    assert sizes["k_head_sizes"] == [config.d_qk_at(layer) for layer in range(3)]
    assert sizes["v_head_sizes"] == [config.d_vo_at(layer) for layer in range(3)]
    assert sizes["cache_dtype"] == facts["cache_dtype"] and sizes["windows"] == [None] * 3
    assert facts["cache_dtype"] == "f16"
    assert paged_cache(out, "f32")["bytes_per_token"] == 2 * facts["cache_bytes_per_token"]
    record(compatibility, latent, "llama", out, off)
    assert facts["versions"]["openvino-genai"] and facts["weights"] == "f32"


def test_eight_bits_cost_their_scales(exported):
    """A scale and a zero point, four bytes each: of keys for every channel and page of 32 tokens, of values for every token."""
    latent, out, _ = exported
    config = latent_config_of(latent.config)
    widths = [config.widths_at(layer) for layer in range(3)]
    expected = sum(2 * (d_qk * (32 + 8) / 32 + d_vo + 8) for d_qk, d_vo in widths)
    assert paged_cache(out, "u8")["bytes_per_token"] == expected


def test_the_cache_in_memory_has_the_widths(exported):
    latent, out, _ = exported
    inferring = request(out / MODEL_FILE)
    run(inferring, inputs(tokens(2, 10)))
    held = {state.name: tuple(state.state.shape) for state in inferring.query_state()}
    for layer in range(3):
        for kind, width in zip(
            ("key", "value"), latent_config_of(latent.config).widths_at(layer), strict=True
        ):
            name = f"past_key_values.{layer}.{kind}present.{layer}.{kind}"
            assert held.pop(name) == (2, 2, 10, width)
    assert not held


def test_a_cache_changes_nothing_and_beams_choose_their_rows(exported):
    latent, out, _ = exported
    x = tokens(2, 40)
    whole = logits(latent, x)
    inferring = request(out / MODEL_FILE)
    run(inferring, inputs(x[:, :30]))
    one = run(inferring, inputs(x[:, 30:31], start=30))
    rest = run(inferring, inputs(x[:, 31:], start=31))
    assert float((torch.cat((one, rest), 1) - whole[:, 30:]).abs().max()) < CLOSE
    # The rows of the cache change places, and so must what goes on from them.
    for places, equal in (([1, 0], True), ([0, 1], False)):
        inferring.reset_state()
        run(inferring, inputs(x[:, :30]))
        given = {**inputs(x[:, 30:].flip(0), start=30), "beam_idx": np.array(places, dtype=np.int32)}
        off = float((run(inferring, given) - whole[:, 30:].flip(0)).abs().max())
        assert (off < CLOSE) if equal else (off > 0.1)


def test_padding_on_the_left_is_not_seen(exported):
    latent, out, _ = exported
    x = tokens(2, 20)
    ids, mask = padded(x)
    given = {
        **inputs(ids),
        "attention_mask": mask.numpy(),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).numpy(),
    }
    off = run(request(out / MODEL_FILE), given)[:, 5:] - logits(latent, x)
    assert float(off.abs().max()) < CLOSE


def generation(**options):
    config = openvino_genai.GenerationConfig()
    for name, value in {"max_new_tokens": NEW, "ignore_eos": True, "eos_token_id": 2, **options}.items():
        setattr(config, name, value)
    return config


def pipeline(out, backend):
    """GenAI's pipeline in float32; with paged attention in parts of 16 tokens, so that prompts are split."""
    if backend == "SDPA":
        return openvino_genai.LLMPipeline(out, "CPU", ATTENTION_BACKEND="SDPA", **EXACT)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks, scheduler.max_num_batched_tokens = 64, 16
    return openvino_genai.LLMPipeline(out, "CPU", scheduler_config=scheduler, ATTENTION_BACKEND="PA", **EXACT)


def greedy(latent, x, **options):
    with torch.no_grad():
        row = latent.generate(
            x, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
    return row[:, x.shape[1] :].tolist()


def ids_and_mask(ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return openvino_genai.TokenizedInputs(ov.Tensor(ids.numpy()), ov.Tensor(mask.numpy()))


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
def test_both_pipelines_give_our_tokens(exported, backend):
    """One prompt at a time, several together, padded, and by beams."""
    latent, out, _ = exported
    x = tokens(3, 40)
    expected, serving = greedy(latent, x), pipeline(out, backend)
    assert len({token for row in expected for token in row}) >= 4
    for row, wanted in zip(x, expected, strict=True):
        assert serving.generate(ov.Tensor(row[None].numpy()), generation()).tokens == [wanted]
    assert serving.generate(ids_and_mask(x), generation()).tokens == expected
    assert serving.generate(ids_and_mask(*padded(x)), generation()).tokens == expected
    beams = {"num_beams": 3, "num_return_sequences": 3}
    found = serving.generate(ov.Tensor(x[:1].numpy()), generation(**beams)).tokens
    assert found[0] == greedy(latent, x[:1], **beams)[0]


def test_the_tokenizer_and_its_template_go_along(exported, tokenizer):
    _, out, _ = exported
    theirs = openvino_genai.Tokenizer(out)
    assert theirs.chat_template == tokenizer.chat_template
    text = "The cat, and the dog."
    assert theirs.encode(text).input_ids.data[0].tolist() == tokenizer(text)["input_ids"]
    assert theirs.decode(tokenizer(text)["input_ids"]) == text
    serving = pipeline(out, "PA")
    chat = [{"role": "user", "content": text}]
    assert isinstance(serving.generate(openvino_genai.ChatHistory(chat), generation()).texts[0], str)


@pytest.mark.parametrize("name", ["mistral", "qwen3-window"])
def test_windows_reach_paged_attention(name, tmp_path, tokenizer):
    latent, x = toy(name, vocab_size=300), tokens(2, 60)
    save(latent, tmp_path / "latent", tokenizer=tokenizer)
    facts = openvino_ir.write_export(latent, tmp_path / "latent", tmp_path, ExportOptions())
    wanted = [layer.self_attn.sliding_window for layer in latent.model.layers]
    assert 16 in wanted and paged_cache(tmp_path)["windows"] == wanted
    assert "a sliding window of 16 tokens hides" in facts["changes"][0]
    expected = greedy(latent, x)
    for backend in ("SDPA", "PA"):
        assert pipeline(tmp_path, backend).generate(ids_and_mask(x), generation()).tokens == expected
    latent.config.sliding_window = None
    unwindowed = greedy_without_windows(latent, x)
    assert unwindowed != expected  # or the windows would not have mattered


def greedy_without_windows(latent, x):
    """Next tokens of the graph once no layer has a window."""
    inferring, ids = request(stateful_graph(latent)), x
    for _ in range(NEW):
        inferring.reset_state()
        ids = torch.cat((ids, run(inferring, inputs(ids))[:, -1:].argmax(-1)), 1)
    return ids[:, x.shape[1] :].tolist()


def test_a_window_that_paged_attention_would_lose_is_noticed(tmp_path, monkeypatch):
    latent = toy("mistral")
    (tmp_path / "latent").mkdir()

    def plain(attention_mask, num_new, window):  # right, but in a form that the engine takes for no window
        length = attention_mask.shape[1]
        keys = torch.arange(length)[None, None, None, :]
        queries = (torch.arange(num_new) + (length - num_new))[None, None, :, None]
        seen = (keys <= queries) & (keys > queries - window) & attention_mask[:, None, None, :].bool()
        return torch.where(seen, torch.tensor(0.0), torch.tensor(torch.finfo(torch.float32).min))

    monkeypatch.setattr(openvino_graph, "_mask", plain)
    with pytest.raises(ValueError, match=r"reads windows off the graph as \[None.*the checkpoint has \[16"):
        openvino_ir.write_export(latent, tmp_path / "latent", tmp_path, ExportOptions())


def test_other_widths_in_paged_attention_are_noticed():
    cache = {"k_head_sizes": [20] * 3, "v_head_sizes": [20] * 3, "windows": [None] * 3}
    with pytest.raises(
        ValueError, match=r"v_head_sizes .* as \[20, 20, 20\] .* has \[12, 12, 12\]; .*pip install openvino=="
    ):
        check_paging(toy(), cache)


def far_off(graph, latent):
    """Largest difference from ours, in standard deviations, where half of the tokens lie 20,000 positions behind the others."""
    x = tokens(1, 16)
    positions = torch.cat((torch.arange(8), torch.arange(20_000, 20_008)))[None]
    # With a mask, or transformers takes the jump for the start of another text.
    ours = logits(latent, x, position_ids=positions, attention_mask=torch.ones_like(x))
    given = {**inputs(x), "position_ids": positions.numpy()}
    return float((run(request(graph), given) - ours).abs().max()) / float(ours.std())


def test_half_precision_leaves_the_tables_alone(tmp_path):
    """OpenVINO's own compression does not: far into a text it turns keys elsewhere."""
    latent = toy()
    graph = stateful_graph(latent)
    ov.save_model(graph, tmp_path / "theirs.xml", compress_to_fp16=True)
    size = (tmp_path / "theirs.bin").stat().st_size
    compress_weights(graph)
    ov.save_model(graph, tmp_path / "ours.xml", compress_to_fp16=False)
    assert (tmp_path / "ours.bin").stat().st_size < 1.1 * size
    assert far_off(tmp_path / "ours.xml", latent) < 2e-2
    assert far_off(tmp_path / "theirs.xml", latent) > 0.2


@pytest.mark.parametrize(
    ("stored", "asked", "kept", "changes"),
    [
        ("float32", None, "f32", 0),
        ("float32", "f16", "f16", 1),
        ("bfloat16", None, "f16", 0),
        ("float16", "f32", "f32", 0),
    ],
)
def test_matrices_are_as_wide_as_stored_unless_told(stored, asked, kept, changes, tmp_path):
    latent = toy(num_hidden_layers=1)
    latent.to(getattr(torch, stored)).float()
    (tmp_path / "latent").mkdir()
    options = ExportOptions(stored_dtype=stored, dtype=asked)
    facts = openvino_ir.write_export(latent, tmp_path / "latent", tmp_path, options)
    assert facts["weights"] == kept
    assert len([change for change in facts["changes"] if "rounded" in change]) == changes
    ours, rounding = logits(latent, tokens()), openvino_ir.matrix_rounding(options)
    off = relative_difference(openvino_ir.read_logits(tmp_path, tokens()), ours)
    assert (rounding is not None) == (off > 1e-5) == bool(changes)
    if rounding is not None:  # nothing but that rounding is in the difference
        with rounding.applied(latent):
            assert off == pytest.approx(relative_difference(logits(latent, tokens()), ours), rel=0.05)


def test_a_table_that_switches_cuts_the_context(tmp_path):
    latent = toy("phi3-longrope", 16, 24)
    (tmp_path / "latent").mkdir()
    facts = openvino_ir.write_export(latent, tmp_path / "latent", tmp_path, ExportOptions())
    assert facts["context"] == SWITCH
    assert f"the context is cut to {SWITCH} tokens" in facts["changes"][0]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["max_position_embeddings"] == SWITCH and "auto_map" not in written
    assert latent.config.max_position_embeddings > SWITCH


def test_without_a_tokenizer_only_the_model_goes(tmp_path):
    (tmp_path / "latent").mkdir()
    facts = openvino_ir.write_export(toy(), tmp_path / "latent", tmp_path, ExportOptions())
    assert "the checkpoint has no tokenizer" in facts["changes"][-1]
    assert not (tmp_path / "openvino_tokenizer.xml").exists()


def refusal(latent, **options):
    with pytest.raises(ValueError) as caught:  # the sentence is looked at by the caller
        openvino_ir.check_exportable(latent, ExportOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.refused_by("OpenVINO (--to openvino)")
def test_what_is_not_installed_is_named_with_its_command(monkeypatch):
    find = openvino_ir.find_spec
    monkeypatch.setattr(openvino_ir, "find_spec", lambda name: None if "genai" in name else find(name))
    sentence = refusal(toy())
    assert "and openvino-genai is not installed; pip install openvino==2026" in sentence
    monkeypatch.setattr(openvino_ir, "find_spec", lambda name: None)
    assert "openvino and openvino-tokenizers and openvino-genai are not installed" in refusal(toy())


@pytest.mark.refused_by("OpenVINO (--to openvino)")
def test_what_a_graph_cannot_hold_is_refused():
    latent = toy()
    assert "in f32 or f16: got --dtype q8_0; leave it out" in refusal(latent, dtype="q8_0")
    with torch.no_grad():
        latent.model.layers[1].mlp.up_proj.weight[0, 0] = 70_000
    openvino_ir.check_exportable(latent, ExportOptions())
    sentence = "float16 holds numbers up to 65,504 and the largest weight is 70,000; give --dtype f32"
    assert refusal(latent, dtype="f16") == refusal(latent, stored_dtype="bfloat16") == sentence


@pytest.mark.refused_by("OpenVINO (--to openvino)")
def test_a_tokenizer_that_openvino_takes_otherwise_is_refused(tmp_path, tokenizer, monkeypatch):
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(
        ValueError, match="does not go to openvino, which says: .*; leave its files out of the"
    ):
        openvino_ir._write_tokenizer(nothing, tmp_path)
    ids = tokenizer("The cat")["input_ids"]
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: "another text")
    with pytest.raises(ValueError, match="where the ids of .* become another text; leave"):
        openvino_ir._write_tokenizer(tokenizer, tmp_path)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: {"input_ids": ids})
    with pytest.raises(ValueError, match="where .* becomes other ids; leave"):
        openvino_ir._write_tokenizer(tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_checks_in_a_fresh_process(tmp_path, tokenizer, monkeypatch):
    latent = toy(vocab_size=300)
    save(latent, tmp_path / "latent", tokenizer=tokenizer)
    record = export(tmp_path / "latent", tmp_path / "out", to="openvino")
    assert record["check"]["difference"] < CLOSE
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Read back by OpenVINO {record['export']['versions']['openvino']}" in card
    alone = "import sys, openvino_genai as g; print(len(g.LLMPipeline(sys.argv[1], 'CPU').generate('The cat', max_new_tokens=4, ignore_eos=True)))"
    done = subprocess.run(
        [sys.executable, "-c", alone, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_wrong_table_is_noticed_and_nothing_stays(tmp_path, tokenizer, monkeypatch):
    save(toy(vocab_size=300), tmp_path / "latent", tokenizer=tokenizer)

    def turned(latent):
        latent = copy.deepcopy(latent)
        for layer in latent.model.layers:
            layer.self_attn.rotary = type(layer.self_attn.rotary)(
                tuple(table.subset(range(len(table.short))[::-1]) for table in layer.self_attn.rotary.tables)
            )
        return stateful_graph(latent)

    monkeypatch.setattr(openvino_graph, "stateful_graph", turned)
    with pytest.raises(
        ValueError, match=r"export to openvino was removed, since OpenVINO 2026.* logits differ"
    ):
        export(tmp_path / "latent", tmp_path / "out", to="openvino")
    assert [path.name for path in tmp_path.iterdir()] == ["latent"]


def test_every_layer_is_paged():
    """What `paged_cache` looks at is GenAI's own rewriting: no attention over a growing state is left."""
    graph = stateful_graph(toy())
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 3 and kinds.count("ReadValue") == 6
    paged_attention_transformation(graph)
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("PagedAttentionExtension") == 3
    assert not {"ScaledDotProductAttention", "ReadValue", "Assign"} & set(kinds)

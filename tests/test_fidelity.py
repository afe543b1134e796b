"""Fidelity against dense logits and recorded attention of every document alone; causality against leaking models."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from kvlatent.conversion.convert_model import convert
from kvlatent.evaluation.checks import fidelity as module
from kvlatent.evaluation.checks.causality import causality
from kvlatent.evaluation.checks.fidelity import fidelity
from kvlatent.evaluation.checks.layerwise import sampled_rows
from kvlatent.model.families import family_of
from kvlatent.selection.choices import resolve_choices, without_statistics
from tiny import tiny_model, tokens

LENGTH, CUT = 48, 20
DOCUMENTS = (slice(0, CUT), slice(CUT, LENGTH))


def packed(blocks=3, seed=0):
    """Blocks of two documents each, the first of which has another length of label gap in every block."""
    ids = tokens(blocks, LENGTH, seed)
    labels = ids.roll(-1, dims=1)
    labels[:, [CUT - 1, LENGTH - 1]] = -100
    for block in range(blocks):
        labels[block, : 5 * block] = -100  # blocks of unequal weight
    positions = torch.cat([torch.arange(CUT), torch.arange(LENGTH - CUT)]).expand(blocks, -1)
    columns = {"input_ids": ids.tolist(), "position_ids": positions.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict(columns).with_format("torch")


def alone(model, ids):
    """Dense run of one document in float64: logits, what every layer gives behind the next norm, and attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids[None], use_cache=False, output_hidden_states=True, output_attentions=True)
    return output.logits[0].double(), output.hidden_states, [a[0].double() for a in output.attentions]


def dense(original, latent, blocks):
    """All figures by the book: no packing, no sampling, no chunks, no twin."""
    norms = [layer.input_layernorm for layer in original.model.layers[1:]]
    norms += [torch.nn.Identity()]  # upstream records the last hidden state behind the norm
    sums, counts, agreed = [], [], 0
    outputs = [([], []) for _ in norms]
    rows = [[] for _ in norms]
    for block in blocks:
        total, count = 0.0, 0
        for document in DOCUMENTS:
            found = [alone(model, block["input_ids"][document]) for model in (original, latent)]
            keep = block["labels"][document] != -100
            p, q = (logits[keep].log_softmax(-1) for logits, _, _ in found)
            total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += int(keep.sum())
            for index, norm in enumerate(norms):
                for side in (0, 1):
                    with torch.no_grad():
                        outputs[index][side].append(norm(found[side][1][index + 1][0]).double())
                window = family_of(original.config).sliding_window(original.config, index)
                for t in range(1, document.stop - document.start):
                    pair = [attention[index][:, t, : t + 1] for _, _, attention in found]
                    rows[index] += list(_row(*pair, min(t + 1, window or t + 1)))
        sums.append(total)
        counts.append(count)
    tokens = sum(counts)
    mean = sum(sums) / tokens
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return {
        "kl": mean,
        "kl_standard_error": math.sqrt(squares * len(sums) / (len(sums) - 1)) / tokens,
        "top1_agreement": agreed / tokens,
        "tokens": tokens,
        "layers": [_layer(i, outputs[i], torch.tensor(rows[i])) for i in range(len(norms))],
    }


def _row(p, q, keys):
    """Divergence, entropies and their share of log(keys), of the heads of one query: p, q [N, S]."""
    for one, other in zip(p, q, strict=True):
        seen = one > 0
        kl = float((one[seen] * (one[seen] / other[seen]).log()).sum())
        entropies = [float(torch.special.entr(each).sum()) for each in (one, other)]
        yield [kl, *entropies, *(entropy / math.log(keys) for entropy in entropies)]


def _layer(index, outputs, rows):
    wanted, given = (torch.cat(side) for side in outputs)
    kl, first, second, *uniformity = rows.mean(0).tolist()
    return {
        "layer": index,
        "relative_error": float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()),
        "attention_kl": kl,
        "entropy_original": first,
        "entropy_latent": second,
        "entropy_ratio": second / first,
        "uniformity_original": uniformity[0],
        "uniformity_latent": uniformity[1],
    }


def figures(report):
    """The numbers of a report in one list."""
    flat = [value for name, value in report.items() if name != "layers"]
    return flat + [value for row in report["layers"] for value in row.values()]


def looking(name):
    """A tiny model whose attention is neither uniform nor one-hot."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "qkv_proj", "q_norm")):
                parameter.mul_(2)
    return model


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3-window", "phi3-window", "mistral"])
def test_equals_dense_runs_of_separate_documents(name):
    original, blocks = looking(name), packed()
    latent = convert(original, d_qk=16, d_vo=8, preset="own-frequency")
    found = fidelity(original, latent, blocks, batch_size=2, rows=LENGTH)
    expected = dense(original, latent, blocks)
    assert json.loads(json.dumps(found)) == found
    assert [row.keys() for row in found["layers"]] == [row.keys() for row in expected["layers"]]
    assert figures(found) == pytest.approx(figures(expected), rel=2e-4)
    assert expected["kl"] > 1e-3 and 0 < expected["top1_agreement"] < 1
    assert min(row["attention_kl"] for row in expected["layers"]) > 1e-2
    assert max(row["uniformity_original"] for row in expected["layers"]) < 0.9


def test_widths_that_differ_by_layer_and_a_table_a_head():
    original, blocks = looking("llama"), packed()
    choices = without_statistics(resolve_choices())  # pairs by their weights, a table per head
    latent = convert(original, d_qk=[16, 8, 32], d_vo=[8, 32, 16], choices=choices)
    assert latent.model.layers[0].self_attn.rotary is not None
    found = fidelity(original, latent, blocks, rows=LENGTH)
    assert figures(found) == pytest.approx(figures(dense(original, latent, blocks)), rel=2e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3-longrope"])
def test_a_model_against_itself_is_exactly_equal(name):
    original, blocks = tiny_model(name), packed()
    narrow = convert(original, d_qk=16, d_vo=8, preset="own-frequency")
    whole = convert(original, d_qk=32, d_vo=32, preset="own-frequency")
    for pair in ((original, original), (original, whole), (narrow, narrow)):
        found = fidelity(*pair, blocks)
        assert (found["kl"], found["kl_standard_error"], found["top1_agreement"]) == (0.0, 0.0, 1.0)
        for row in found["layers"]:
            assert (row["relative_error"], row["attention_kl"], row["entropy_ratio"]) == (0.0, 0.0, 1.0)


def test_models_of_other_shapes_are_refused():
    original, other, blocks = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2), packed()
    with pytest.raises(
        ValueError, match="the same num_hidden_layers: got 3 and 2; compare with the model it came from"
    ):
        fidelity(original, other, blocks)


def test_batch_size_and_chunks_change_nothing(monkeypatch):
    original, blocks = looking("llama"), packed(5)
    latent = convert(original, d_qk=16, d_vo=8, preset="own-frequency")
    one = fidelity(original, latent, blocks, batch_size=1, rows=8)
    held = []
    plain = module.Head.logits
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 7)
    monkeypatch.setattr(
        module.Head, "logits", lambda self, hidden: held.append(len(hidden)) or plain(self, hidden)
    )
    three = fidelity(original, latent, blocks, batch_size=3, rows=8)
    assert figures(three) == pytest.approx(figures(one), rel=1e-5)
    assert max(held) == 7  # no logits of a whole block, let alone of a batch


def test_rows_are_drawn_where_there_is_a_choice_of_keys():
    positions = packed(3)[:]["position_ids"]
    seen = torch.zeros(LENGTH)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = sampled_rows(positions, 8, generator)
        assert rows.shape == (3, 8) and (rows.diff(dim=1) > 0).all()
        seen += torch.bincount(rows.flatten(), minlength=LENGTH)
    assert seen[0] == seen[CUT] == 0
    rest = seen[seen > 0]
    assert len(rest) == LENGTH - 2
    assert rest.min() > 0.7 * rest.mean() and rest.max() < 1.3 * rest.mean()  # 157 +- 11 each
    generator.manual_seed(1)
    together = sampled_rows(positions, 8, generator)
    generator.manual_seed(1)
    assert torch.equal(together, torch.cat([sampled_rows(one[None], 8, generator) for one in positions]))


def test_the_seed_chooses_the_rows():
    original, blocks = looking("llama"), packed()
    latent = convert(original, d_qk=16, d_vo=8, preset="own-frequency")
    first, again, other = (fidelity(original, latent, blocks, rows=4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["kl"] == other["kl"]
    assert first["layers"][0]["attention_kl"] != other["layers"][0]["attention_kl"]
    assert first["layers"][0]["relative_error"] == other["layers"][0]["relative_error"]


def test_keys_of_zero_give_uniform_attention():
    original, blocks = looking("llama-mha"), packed()
    latent = convert(original, d_qk=16, d_vo=32, preset="own-frequency")
    with torch.no_grad():
        for layer in latent.model.layers:
            layer.self_attn.k_proj.weight.zero_()
    for row in fidelity(original, latent, blocks)["layers"]:
        assert row["uniformity_latent"] == pytest.approx(1)
        assert row["uniformity_original"] < 0.9
        assert row["entropy_ratio"] > 1


def test_attention_without_entropy_has_no_ratio():
    original, blocks = tiny_model("llama-mha"), packed()
    with torch.no_grad():
        original.model.layers[0].self_attn.q_proj.weight.mul_(1e12)
    row = fidelity(original, original, blocks)["layers"][0]
    assert (row["entropy_original"], row["entropy_ratio"]) == (0.0, None)


def test_half_precision_beside_full():
    original, blocks = looking("llama"), packed()
    latent = convert(original, d_qk=32, d_vo=32, preset="own-frequency").to(torch.bfloat16)
    found = fidelity(original, latent, blocks)
    assert 0 < found["kl"] < 0.05
    assert all(0 < row["relative_error"] < 0.01 for row in found["layers"])


def test_one_block_has_no_standard_error():
    original = tiny_model("llama")
    assert fidelity(original, original, packed(1))["kl_standard_error"] is None


def test_models_are_left_as_they_were():
    original, blocks = tiny_model("llama", attention_dropout=0.5), packed()
    latent = convert(original, d_qk=16, d_vo=8, preset="own-frequency")
    expected = fidelity(original, latent, blocks, batch_size=2)
    latent.train()
    before = {name: tensor.clone() for name, tensor in latent.state_dict().items()}
    seen = []

    def watch(*event):
        seen.append(event)

    assert fidelity(original, latent, blocks, batch_size=2, progress=watch) == expected  # no dropout
    assert seen == [(0, 3), (2, 3), (3, 3)]
    assert latent.training and not original.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in latent.state_dict().items())


def test_what_cannot_be_compared_is_refused():
    original, blocks = tiny_model("llama"), packed()
    with pytest.raises(ValueError, match="vocabularies have 128 and 160 entries"):
        fidelity(original, tiny_model("llama", vocab_size=160), blocks)
    for name, value in (("num_attention_heads", 2), ("hidden_size", 32)):
        with pytest.raises(
            ValueError, match=f"the same {name}: got {getattr(original.config, name)} and {value}"
        ):
            fidelity(original, tiny_model("llama", **{name: value}), blocks)
    with pytest.raises(ValueError, match="got batch_size=0; try 4"):
        fidelity(original, original, blocks, batch_size=0)
    with pytest.raises(ValueError, match="at least 1 query row a block: got rows=0; try 64"):
        fidelity(original, original, blocks, rows=0)
    short = tiny_model("llama", max_position_embeddings=32)
    with pytest.raises(ValueError, match="got data.block_size=48, max_position_embeddings=32"):
        fidelity(short, short, blocks)


def test_nothing_to_compare_is_refused():
    original, blocks = tiny_model("llama"), packed()
    with pytest.raises(ValueError, match="0 blocks hold 0; give more text"):
        fidelity(original, original, blocks.select([]))
    silent = blocks.map(lambda row: {"labels": torch.full_like(row["labels"], -100)})
    with pytest.raises(ValueError, match="3 blocks hold 0; give more text"):
        fidelity(original, original, silent)


def test_tokens_that_see_themselves_alone_are_refused():
    original = tiny_model("llama")
    columns = {"input_ids": [[5], [6]], "position_ids": [[0], [0]], "labels": [[6], [7]]}
    blocks = Dataset.from_dict(columns).with_format("torch")
    with pytest.raises(ValueError, match="sees 2 keys or more: 0 of the sampled rows do"):
        fidelity(original, original, blocks)


@pytest.mark.parametrize("broken", ["original", "latent"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(broken, value):
    pair = {"original": tiny_model("llama"), "latent": tiny_model("llama")}
    with torch.no_grad():
        pair[broken].lm_head.weight[3, 3] = value
    with pytest.raises(ValueError, match=f"the {broken} model gave NaN or infinity"):
        fidelity(*pair.values(), packed())


def leaking(model, ahead):
    """The model with a mask that hides only what lies more than `ahead` tokens ahead."""
    model.set_attn_implementation("eager")

    def widen(attention, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        hidden = torch.full((length, length), torch.finfo(torch.float32).min).triu(ahead + 1)
        return args, {**kwargs, "attention_mask": hidden[None, None]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(widen, with_kwargs=True)
    return model


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "qwen3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_causal_models_do_not_change_their_past(name, implementation):
    original = tiny_model(name)
    for model in (original, convert(original, d_qk=16, d_vo=8, preset="own-frequency")):
        model.set_attn_implementation(implementation)
        assert causality(model) == 0.0
    assert causality(original, length=2) == causality(original, seed=3) == 0.0


@pytest.mark.parametrize("ahead", [1, 64])
def test_a_model_that_looks_ahead_is_caught(ahead):
    original = tiny_model("llama")
    for model in (convert(original, d_qk=16, d_vo=8, preset="own-frequency"), original):
        leaking(model, 0)
        assert causality(model) == 0.0
        assert causality(leaking(model, ahead)) > 0.1
    assert causality(original, length=2) > 0.1


def test_a_leak_of_the_last_token_alone_is_caught():
    model = tiny_model("llama")

    def peek(attention, args, kwargs, output):
        hidden = output[0].clone()
        hidden[:, -2] += kwargs["hidden_states"][:, -1]
        return hidden, *output[1:]

    model.model.layers[0].self_attn.register_forward_hook(peek, with_kwargs=True)
    assert causality(model) > 0.1


def test_causality_leaves_the_mode_and_refuses_bad_lengths():
    model = tiny_model("llama").train()
    causality(model)
    assert model.training
    with pytest.raises(ValueError, match="a past and a future need 2 tokens: got length=1; try 32"):
        causality(model, length=1)
    with pytest.raises(ValueError, match="max_position_embeddings=256"):
        causality(model, length=257)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity over 32 tokens"):
        causality(model)

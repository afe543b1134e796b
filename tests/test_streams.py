"""Hidden states on disk, and a decoder run one layer at a time."""

import pytest
import torch

from calibration_setup import short_descent, text
from kvlatent.conversion.convert_model import convert
from kvlatent.model.assembly import full_width
from kvlatent.model.hidden_states import (
    HiddenStateFile,
    HiddenStateTensor,
    blocks_at_once,
    hold_hidden_states,
    isolate_layer,
)
from kvlatent.model.layer_parts import parts_of
from kvlatent.selection.calibrate import calibrate
from tiny import FAMILIES, tiny_model
from tolerances import assert_close_to_scale


@pytest.fixture(scope="module", autouse=True)
def quick():
    with short_descent():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_back_bit_for_bit_in_any_order(tmp_path, dtype):
    blocks = torch.randn(5, 7, 3).to(dtype)
    blocks[2, 1] = torch.tensor([float("nan"), float("inf"), -0.0])
    stream = HiddenStateFile(tmp_path / "s", (7, 3), dtype, torch.device("cpu"))
    stream.write(block[None] for block in blocks)
    found = stream.read([4, 0, 2, 2])
    assert found.dtype == dtype and found.shape == (4, 7, 3)
    assert torch.equal(found.view(torch.uint8), blocks[[4, 0, 2, 2]].view(torch.uint8))
    assert stream.path.stat().st_size == blocks.numel() * blocks.element_size()
    found.zero_()  # a copy, not the file
    assert torch.equal(stream.read([0])[0], blocks[0])


def test_writing_replaces_what_can_be_read_until_the_end(tmp_path):
    stream = HiddenStateFile(tmp_path / "s", (2, 3), torch.float32, torch.device("cpu"))
    stream.write(torch.full((2, 3), float(b)) for b in range(4))
    stream.write(stream.read([b]) + 10 for b in (3, 2, 1))
    assert stream.read([0, 1, 2])[:, 0, 0].tolist() == [13, 12, 11]
    assert stream.path.stat().st_size == 3 * 6 * 4 and list(tmp_path.iterdir()) == [stream.path]

    def interrupted():
        yield torch.zeros(2, 3)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stream.write(interrupted())
    assert stream.read([0])[0, 0, 0] == 13
    stream.write([torch.ones(2, 3)])  # what the failed one left does not come before it
    assert stream.read([0])[0, 0, 0] == 1 and stream.path.stat().st_size == 24


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_one_at_a_time_are_the_decoder(name, latent):
    model, batch = tiny_model(name), text(blocks=3, length=48)
    if latent:
        model = convert(model, d_qk=[16, 32, 8], d_vo=16, align=0, statistics=calibrate(model, batch))
    decoder = model.model
    before = {key: id(value) for key, value in decoder.named_modules()}, decoder.config.to_dict()
    for ids, positions in zip(batch["input_ids"][:, None], batch["position_ids"][:, None], strict=True):
        with torch.no_grad():
            whole = decoder(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
            hidden = decoder.embed_tokens(ids)
            assert torch.equal(hidden, whole.hidden_states[0])
            for index in range(3):
                hidden = isolate_layer(decoder, index)(
                    inputs_embeds=hidden, position_ids=positions, use_cache=False
                ).last_hidden_state
                if index < 2:
                    assert torch.equal(hidden, whole.hidden_states[index + 1])
            assert torch.equal(decoder.norm(hidden), whole.last_hidden_state)
    assert before == ({key: id(value) for key, value in decoder.named_modules()}, decoder.config.to_dict())


def test_states_in_memory_are_those_in_a_file(tmp_path):
    file = HiddenStateFile(tmp_path / "s", (7, 3), torch.bfloat16, torch.device("cpu"))
    held = HiddenStateTensor(torch.bfloat16, torch.device("cpu"))
    blocks = torch.randn(5, 7, 3)
    for stream in (file, held):
        stream.write([blocks[:3], blocks[3], blocks[4:]])
        stream.write(stream.read([b]) + 1 for b in (4, 1, 1))
        stream.append(blocks[:2])
    for indices in ([0], [4, 0, 2, 2], [3, 1]):
        assert torch.equal(held.read(indices), file.read(indices))
    held.read([0]).zero_()  # a copy
    assert held.read([0]).abs().sum() > 0
    for stream in (file, held):
        stream.clear()
        stream.append(blocks[0])
        assert torch.equal(stream.read([0])[0], blocks[0].bfloat16())


def test_a_file_that_ends_early_is_named(tmp_path):
    stream = HiddenStateFile(tmp_path / "s", (7, 3), torch.float32, torch.device("cpu"))
    stream.write([torch.zeros(2, 7, 3)])
    with pytest.raises(ValueError, match="s ends before block 2; the disk may be full"):
        stream.read([2])


def test_states_stay_on_a_card_where_they_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    card = torch.device("cuda")
    for blocks, kind in ((4, HiddenStateTensor), (5, HiddenStateFile)):  # 2 streams x 4 x 12 x 4 bytes of 400
        stream = hold_hidden_states(tmp_path / "s", (4, 3), torch.float32, card, blocks, 2)
        assert isinstance(stream, kind)
    assert isinstance(
        hold_hidden_states(tmp_path / "s", (4, 3), torch.float32, torch.device("cpu"), 1, 1), HiddenStateFile
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_together_are_blocks_alone(name):
    model, batch = full_width(tiny_model(name)), text(blocks=4, length=48)
    together = blocks_at_once(model.model, 48)
    assert together == (1 if name == "phi3-longrope" else 42) and blocks_at_once(model.model, 5000) == 1
    for index in range(3):
        layer, hidden = isolate_layer(model.model, index), model.model.embed_tokens(batch["input_ids"])
        with torch.no_grad():
            alone = [
                layer(
                    inputs_embeds=hidden[b, None],
                    position_ids=batch["position_ids"][b, None],
                    use_cache=False,
                )
                for b in range(4)
            ]
            some = [
                layer(inputs_embeds=h, position_ids=p, use_cache=False)
                for h, p in zip(hidden.split(together), batch["position_ids"].split(together), strict=True)
            ]
        assert_close_to_scale(
            *(torch.cat([o.last_hidden_state for o in outputs]) for outputs in (some, alone)), 1e-5
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_alone_is_the_attention_in_its_layer(name):
    model, batch = full_width(tiny_model(name)), text(blocks=2, length=48)
    hidden, seen = model.model.embed_tokens(batch["input_ids"][:1]), []
    ffn, attention = parts_of(model.model, 1).ffn, parts_of(model.model, 1).attention
    hooks = [m.register_forward_hook(lambda m, a, output: seen.append((m, output))) for m in (attention, ffn)]
    for attention_only in (False, True):
        with torch.no_grad():
            isolate_layer(model.model, 1, attention_only=attention_only)(
                inputs_embeds=hidden, position_ids=batch["position_ids"][:1], use_cache=False
            )
    for hook in hooks:
        hook.remove()
    assert [module for module, _ in seen] == [attention, ffn, attention]
    assert torch.equal(seen[0][1][0], seen[2][1][0])
    assert parts_of(model.model, 1).ffn is ffn

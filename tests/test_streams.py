"""Hidden states on disk, and a decoder run one layer at a time."""

import pytest
import torch

from calibration_setup import short_descent, text
from kvlatent.conversion.convert_model import convert
from kvlatent.model.hidden_states import HiddenStateFile, isolate_layer
from kvlatent.selection.calibrate import calibrate
from tiny import FAMILIES, tiny_model


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

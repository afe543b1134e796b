"""What a training step computes in which precision, and for which tensors it makes gradients."""

from contextlib import nullcontext

import pytest
import torch

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.jobs import devices
from kvlatent.training.loop import StageTrainer
from kvlatent.training.trainable import merged_copy, prepare_for_training, trainable_names
from training_setup import blocks, original, recipe, run, student_of

SHORT = [f"stage{stage}.{item}" for stage in (1, 2) for item in ("tokens=64", "gradient_accumulation=2")]


def prepared(*overrides):
    teacher = original()
    student, config = student_of(teacher), recipe(*SHORT, *overrides)
    prepare_for_training(student, config)
    return teacher, student, config


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.append(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_product_runs_in_the_asked_precision_and_the_trained_weights_stay_float32(
    monkeypatch, tmp_path, stage, dtype
):
    """The model, the original, the head and the gradients: the step is as slow as what is left out."""
    monkeypatch.setattr(devices, "has_bfloat16_units", lambda device: True)
    teacher, student, config = prepared(f"dtype={dtype}")
    losses = []
    inner = StageTrainer.compute_loss

    def keep_loss(self, *args, **options):
        losses.append(inner(self, *args, **options))
        return losses[-1]

    monkeypatch.setattr(StageTrainer, "compute_loss", keep_loss)
    with Products() as seen:
        run(student, teacher, stage, tmp_path, config)
    assert seen.dtypes and set(seen.dtypes) == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert losses and {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "stopped"])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_was_trained_in_bfloat16_computes_as_its_checkpoint_does(monkeypatch, tmp_path, stage, stopped):
    """accelerate wraps the forward of what it trains in autocast, and leaves it so."""
    monkeypatch.setattr(devices, "has_bfloat16_units", lambda device: True)
    teacher, student, config = prepared("dtype=bfloat16")
    if stopped:
        monkeypatch.setattr(StageTrainer, "_get_grad_norm", lambda self, *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError) if stopped else nullcontext():
        run(student, teacher, stage, tmp_path / "stage", config)
    trained = merged_copy(student).float()
    save(trained, tmp_path / "out")
    ids = torch.arange(24).view(2, 12) % trained.config.vocab_size
    with torch.no_grad():
        logits, again = (each(input_ids=ids).logits for each in (trained, load_model(tmp_path / "out")))
    assert torch.equal(logits, again)


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_auto_is_one_precision_for_preparing_and_training(monkeypatch, tmp_path, stage, units):
    """A narrow model held in bfloat16 trains in float32 also where the processor has units for more."""
    monkeypatch.setattr(devices, "has_bfloat16_units", lambda device: units)
    teacher, config = original(dtype=torch.bfloat16), recipe(*SHORT, "dtype=auto")
    student = student_of(teacher)
    prepare_for_training(student, config)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    run(student, teacher, stage, tmp_path / "stage", config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_tensors_get_no_gradients(monkeypatch, tmp_path, stage, dtype):
    monkeypatch.setattr(devices, "has_bfloat16_units", lambda device: True)
    teacher, student, config = prepared(f"dtype={dtype}")
    with_gradient, view = [], []
    inner = StageTrainer._get_grad_norm

    def look(self, *args, **options):
        with_gradient.append({name for name, p in student.named_parameters() if p.grad is not None})
        view.extend(self.teacher.parameters())
        return inner(self, *args, **options)

    monkeypatch.setattr(StageTrainer, "_get_grad_norm", look)
    run(student, teacher, stage, tmp_path, config)
    assert with_gradient == [set(trainable_names(student))]
    assert any("lora" in name for name in with_gradient[0]) and any(
        "o_proj" in name for name in with_gradient[0]
    )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in view)


def test_no_product_makes_the_gradient_of_a_frozen_weight(tmp_path):
    """Autograd would make it and drop it: of the FFN, [48, 32] and [32, 48]; LoRA's are [4, ...] and [..., 4]."""
    teacher, student, config = prepared()
    made = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                made.append(tuple(result.shape))
            return result

    with Made():
        run(student, teacher, 2, tmp_path, config, blocks(length=20))  # 40 tokens a step, not the width of 32
    assert (4, 32) in made and not {(48, 32), (32, 48), (61, 32), (32, 61)} & set(made)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_is_refused_where_the_processor_has_no_units(monkeypatch, tmp_path, stage):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    teacher, student, config = prepared("dtype=bfloat16")
    with pytest.raises(ValueError, match=r"bfloat16 needs a cpu device with units for it.*float32$"):
        run(student, teacher, stage, tmp_path / "stage", config)
    assert not (tmp_path / "stage").exists()


def count_reads(monkeypatch):
    """A list that grows with every number that is read from a tensor."""
    reads, item = [], torch.Tensor.item

    def read(tensor):
        reads.append(tensor.shape)
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", read)
    monkeypatch.setattr(torch.Tensor, "__float__", read)
    return reads


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_reads_its_loss_once_however_many_forwards_it_has(monkeypatch, tmp_path, stage):
    """Every value that is read makes the processor wait for the card."""
    counts = []
    for forwards in (1, 4):
        size = f"stage{stage}.gradient_accumulation={forwards}", f"stage{stage}.tokens={64 * forwards}"
        teacher, student, config = prepared(*size)  # two steps
        reads = count_reads(monkeypatch)
        run(student, teacher, stage, tmp_path / str(forwards), config)
        monkeypatch.undo()
        counts.append(len(reads))
    assert counts[0] == counts[1]

"""FSDP2 (and what of a model each process holds under it): accelerate shards the student, and the teacher as a root of its own.

What is sharded is a copy in new modules on the same tensors: the caller's model stays whole, on the CPU, and is given what was
trained at the end. So an export knows nothing of shards, and no process ever needs a whole model on its GPU.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from kvlatent.jobs.recipe import Scale
from kvlatent.training.trainable import merged_copy, shared_copy

__all__ = [
    "check_scale",
    "is_sharded",
    "load_optimizer",
    "local_part",
    "optimizer_state",
    "place_heads",
    "put_trained",
    "shard_teacher",
    "trained_tensors",
    "use_fsdp2",
]


def check_scale(scale: Scale, device: str, *, is_spread: bool) -> None:
    """Raise `ValueError` where a run cannot be spread as asked, one sentence.

    Args:
        is_spread: a launcher started the processes.
    """
    if scale.sharding != "none" and not is_spread:
        raise ValueError(
            f"scale.sharding={scale.sharding} shards over the processes of a launcher: got one process without any; start "
            "with torchrun --nproc-per-node N -m kvlatent_cli train ..., or pass --set scale.sharding=none"
        )
    if scale.deepspeed is None:
        return
    if scale.sharding != "none":
        raise ValueError(
            f"scale.sharding={scale.sharding} and scale.deepspeed={scale.deepspeed} exclude each other; leave one out"
        )
    if device == "cpu":
        raise ValueError(
            "scale.deepspeed needs GPUs and torch sees none here, or --device is cpu; leave it out, or use "
            "scale.sharding=fsdp2"
        )
    _check_deepspeed(Path(scale.deepspeed))


def _check_deepspeed(path: Path) -> None:
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"scale.deepspeed={path} needs DeepSpeed, which is not installed; pip install deepspeed"
        )
    try:
        stage = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"scale.deepspeed={path} is no DeepSpeed configuration in JSON ({error})") from None
    if stage == 3:
        raise ValueError(
            f"scale.deepspeed takes ZeRO 1 and 2, whose weights stay whole: got stage {stage} in {path}; use "
            "scale.sharding=fsdp2 for sharded weights"
        )


def use_fsdp2(accelerator: Any, plugin_args: dict[str, Any] | None, dtype: str) -> bool:
    """Settle how accelerate shards; returns whether it does.

    It passes over FSDP on a CPU without a word (accelerate 1.15), so there its state is set here.

    Raises:
        ValueError: the launcher's configuration asks for FSDP1.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None and plugin_args is not None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
        state.distributed_type = DistributedType.FSDP
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"training shards by FSDP2: got fsdp_version {plugin.fsdp_version} from the launcher's configuration; set "
            "fsdp_version: 2"
        )
    plugin.cpu_ram_efficient_loading = False  # every process has read the weights; this would take them away
    if dtype != "float32":  # sums of gradients stay in float32, as within one process
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32
        )
    return True


def is_sharded(args: TrainingArguments) -> bool:
    """Whether accelerate will shard the model, by the recipe or by the launcher's configuration."""
    from accelerate.utils import parse_flag_from_env

    return bool(args.fsdp) or (args.world_size > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"))


def shard_teacher(teacher: PreTrainedModel, accelerator: Any, dtype: str) -> PreTrainedModel:
    """A frozen view of the teacher whose decoder is sharded, a root of its own, in evaluation mode."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    if dtype == "float32":
        view = merged_copy(teacher, torch.float32)
    else:
        view = shared_copy(teacher).requires_grad_(False).eval()
    fsdp2_prepare_model(accelerator, view.get_decoder())
    return view


def place_heads(device: torch.device, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Move the LM heads, which stand outside the sharded decoders, to the device; one tensor where they share it."""
    for name, parameter in _head_parameters(student):
        twin = None if teacher is None else dict(_head_parameters(teacher)).get(name)
        same = twin is not None and twin.data_ptr() == parameter.data_ptr()
        parameter.data = parameter.data.to(device)
        if twin is not None:
            twin.data = parameter.data if same else twin.data.to(device)


def _head_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    head = model.get_output_embeddings()
    return list(head.named_parameters(recurse=False)) if isinstance(head, nn.Module) else []


def trained_tensors(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The trained tensors of a decoder, whole, by name, on the CPU; all processes have to ask where it is sharded.

    Args:
        keep: False gives none of them, where another process wants them.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                found[name] = tensor.cpu().contiguous()
    return found


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put_trained(tensors: dict[str, Tensor], decoder: nn.Module) -> None:
    """Copy whole tensors into the trained parameters of a decoder of the same shapes, sharded or not."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(decoder, dict(tensors), options=options)


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The whole state of a sharded optimiser, by the names of parameters, on the CPU of process 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer(file: Path, model: nn.Module, optimizer: Any) -> None:
    """Give every process its shard of what `optimizer_state` said."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = torch.load(file, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)

"""A conversion of a checkpoint that need not fit in memory: planned, streamed layer by layer, continued after a kill.

Work in progress lies in `OUT.partial`: the plan, the shards that are finished, the states between layers. A second call with
the same arguments goes on with the layer that the first was at. `OUT` appears in one rename at the end.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvlatent.checkpoints.resident_layers import ResidentLayers
from kvlatent.checkpoints.shard_output import finish_checkpoint
from kvlatent.checkpoints.sharded import ShardedWeights
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.checkpoints.wrapper_files import wrapper_of
from kvlatent.conversion.stream_costs import stream_costs
from kvlatent.conversion.streaming import StreamedText, Streaming
from kvlatent.jobs.atomic import prepare_output, put_in_place
from kvlatent.jobs.devices import faster_dtype, free_memory, working_dtype
from kvlatent.jobs.fingerprints import fingerprint, sampled_fingerprint
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.jobs.work_directory import WorkDirectory, partial_of, prepare_place
from kvlatent.model.time_estimate import StreamCosts
from kvlatent.selection.statistics import Statistics
from kvlatent.text.parts import TextReader, calibration_blocks, check_sources, read_texts
from kvlatent.workflows.run_plan import Plan
from kvlatent.workflows.run_record import finished_record
from kvlatent.workflows.steps import (
    Announce,
    check_texts,
    describe_run,
    files_of_run,
    hash_sources,
    options_as_typed,
)
from kvlatent.workflows.streamed_plan import check_space, open_source, plan_streamed

__all__ = ["convert_streamed"]

_TWICE = 2  # a layer in memory: as it was, and as it becomes


def convert_streamed(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None,
    eval_data: str | Path | None,
    statistics: str | Path | None,
    eval_tokens: int,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
    announce: Announce | None,
    reason: str,
    **options: Any,
) -> dict[str, Any]:
    """As `convert_checkpoint`, for `reason` with one decoder layer in memory at a time; nothing is measured.

    Raises:
        ValueError: what needs the whole model was asked for, a disk or a GPU is too small; or as `convert_checkpoint`.
    """
    plan = plan_streamed(model, has_text=data is not None or statistics is not None, reason=reason, **options)
    if eval_data is not None:
        raise ValueError(
            f"this conversion is streamed, layer by layer, as {reason}, and measures nothing: got --eval-data; leave it out, and "
            "run `kvlatent eval` on the result"
        )
    files = {"data": data, "statistics": statistics}
    place = prepare_place(out, True, {"model": model, **files, "recipe": options.get("recipe")})
    check_sources(data, statistics, None, calibrates=plan.calibrates)
    check_texts(data)
    layers = _open_layers(*open_source(model), plan)
    _check_device(layers, plan)
    known = _fingerprint(layers)
    hashes = {**hash_sources(files, "text to calibrate on"), "model": f"sampled:{known}"}
    work = WorkDirectory(partial_of(place), {**hashes, **_decisions(plan)})
    if not dry_run and (finished := finished_record(place, work)) is not None:
        return finished
    prepare_output(place, overwrite)
    wrapper, costs = wrapper_of(model), _predict(layers, plan)
    if wrapper is not None:
        costs = replace(costs, disk_bytes=costs.disk_bytes + wrapper.outside_bytes())
    check_space(place, costs)
    shown = replace(plan, notes=(*plan.notes, costs.sentence())).summary()
    if dry_run:
        return {"plan": shown}
    tokenizer = load_tokenizer(model, layers.config)
    typed = options_as_typed({**files, "out": place}, {**options, "stages": None, "stream": True})
    record = describe_run("convert", model, typed, hashes, plan.device)
    record["fingerprint"] = fingerprint(work.plan)
    work.open(overwrite=overwrite)
    try:
        text, record["calibration"] = _read_text(
            plan, layers, tokenizer, data, statistics, eval_tokens, known
        )
        if announce is not None:
            announce(shown)
        latent, conversion = _stream(plan, layers, text, work, progress)
        record |= {"plan": plan.summary(), "conversion": conversion, "figures": {}, "warnings": []}
        written = files_of_run(record, plan.recipe)
        whole = latent if wrapper is None else wrapper.write_outside(work.path / "out", latent)
        finish_checkpoint(work.path / "out", whole, Path(model), tokenizer, written)
        put_in_place(work.path / "out", place.resolve())
    except BaseException as error:
        # Of a bad input nothing is worth going on from.
        if isinstance(error, ValueError) or not work.has_work():
            work.remove()
        raise
    work.remove()
    return record


def _open_layers(weights: ShardedWeights, config: Any, plan: Plan) -> ResidentLayers:
    """The original, in the dtype that a conversion in memory loads it in."""
    name = working_dtype(plan.recipe.dtype, plan.device, plan.stored_dtype)
    dtype = getattr(torch, name) if plan.calibrates else plan.stored_dtype
    return ResidentLayers(weights, config, dtype, plan.device)


def _fingerprint(layers: ResidentLayers) -> str:
    """As `model_fingerprint`, of the model whose layers are read one at a time."""
    names = layers.original.state_dict()
    read = {name: name for name in names}
    if layers.config.tie_word_embeddings:
        read[layers.head] = layers.embedding
    samples = {name: partial(layers.weights.sample, tensor, layers.dtype) for name, tensor in read.items()}
    return sampled_fingerprint(layers.config, samples)


def _stream(
    plan: Plan, layers: ResidentLayers, text: StreamedText | None, work: WorkDirectory, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """The latent model without weights, and the figures of the conversion; its shards are written."""
    start = time.monotonic()
    assert plan.widths is not None
    latent, tuned = Streaming(
        layers,
        plan.widths,
        plan.choices,
        plan.recipe.conversion.qk_norm,
        plan.recipe.seed,
        text,
        plan.stored_dtype,
        faster_dtype(layers.config, plan.device),
        work,
        work.path / "out",
        progress,
    ).run()
    latent.config.dtype = plan.stored_dtype
    return latent, {"seconds": round(time.monotonic() - start, 2), "predicted": None, "tuned": tuned}


def _read_text(
    plan: Plan,
    layers: ResidentLayers,
    tokenizer: Any,
    data: str | Path | None,
    file: str | Path | None,
    eval_tokens: int,
    known: str,
) -> tuple[StreamedText | None, dict[str, Any] | None]:
    """What the conversion looks at, as one in memory would, and figures of it; None where it looks at nothing."""
    if not plan.calibrates:
        return None, None
    if file is not None:
        seen = Statistics.load(file)
        seen.check_fingerprint(known, layers.dtype)
        text = StreamedText(seen.input_ids, seen.position_ids, statistics=seen)
        return text, _figures(text, seen.recall_blocks, known)
    with scratch_folder() as cache:
        reader = TextReader(plan.recipe, tokenizer, layers.config, cache)
        train, _ = read_texts(reader, data, None, eval_tokens=eval_tokens, calibrates=True)
        assert train is not None
        learns = plan.choices.learns_from_text
        blocks = calibration_blocks(train, plan.recipe, tokenizer, learns=learns)[:]
    ids, positions = (torch.as_tensor(blocks[name]).int() for name in ("input_ids", "position_ids"))
    text = StreamedText(ids, positions, plan.recipe.calibration.rows)
    return text, _figures(text, int(torch.as_tensor(blocks.get("is_recall", 0)).sum()), known)


def _figures(text: StreamedText, recall_blocks: int, known: str) -> dict[str, Any]:
    return {
        "blocks": len(text.input_ids),
        "recall_blocks": recall_blocks,
        "tokens": text.input_ids.numel(),
        "seconds": 0.0,
        "fingerprint": known,
    }


def _decisions(plan: Plan) -> dict[str, Any]:
    """What decides the result of a run, beside what it reads."""
    assert plan.widths is not None
    return {
        "device": plan.device,
        "conversion": plan.widths.to_dict() | asdict(plan.choices),
        "dtype": str(plan.stored_dtype),
        "recipe": plan.recipe.model_dump(mode="json"),
    }


def _check_device(layers: ResidentLayers, plan: Plan) -> None:
    """Raise `ValueError` where the device has no room for a layer while it is converted."""
    needed, free = _TWICE * layers.largest_layer_bytes(), free_memory(plan.device)
    if needed > free:
        where, step = ("the GPU", "use --device cpu") if plan.device == "cuda" else ("memory", "free some")
        raise ValueError(
            f"a streamed conversion holds one layer twice, {needed / 1e6:,.1f} MB: {free / 1e6:,.1f} MB of {where} are free; "
            f"{step}"
        )


def _predict(layers: ResidentLayers, plan: Plan) -> StreamCosts:
    """What it will take, as far as the shape says it."""
    assert plan.widths is not None
    size = min(plan.recipe.data.block_size, layers.config.max_position_embeddings)
    blocks = plan.recipe.calibration.blocks if plan.calibrates else 0
    return stream_costs(layers, plan.widths, plan.choices, plan.stored_dtype, blocks=blocks, size=size)

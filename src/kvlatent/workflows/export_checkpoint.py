"""A latent checkpoint to what engines load as they are; read back in a fresh process before it counts as written."""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from unicodedata import normalize

import torch
from huggingface_hub import snapshot_download
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.checkpoints.lineage import lineage
from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.tokenizer_files import HARD_STRINGS, load_tokenizer
from kvlatent.checkpoints.wrapper_files import check_no_wrapper
from kvlatent.engines.export_options import Exporter, ExportFacts, ExportOptions
from kvlatent.engines.matrix_rounding import MatrixRounding, relative_difference
from kvlatent.jobs.atomic import atomic_directory, prepare_output
from kvlatent.jobs.fingerprints import identity
from kvlatent.jobs.progress import Progress, Report
from kvlatent.jobs.record import Provenance, Result, command_line, environment
from kvlatent.model.classes import latent_config_of
from kvlatent.workflows.export_card import export_card
from kvlatent.workflows.read_export import read_in_fresh_process
from kvlatent.workflows.run_record import read_record

__all__ = ["EXPORT_RECORD", "ROUNDINGS", "TARGETS", "ExportRecord", "export"]

TARGETS = {"stock": "stock_checkpoint", "gguf": "gguf_export", "openvino": "openvino_ir"}
"""Modules of `kvlatent.engines` by what `--to` calls them; see `export_options` for what such a module has."""

ROUNDINGS = 2.0
"""Times what rounding the matrices costs in our class, by which an engine may differ; docs/compatibility.md has what they do."""

EXPORT_RECORD = "export.json"
_TAKEN = {"dtype": ("gguf", "openvino"), "pad": ("stock", "gguf"), "experimental": ("gguf",)}
_DTYPES = ("f32", "f16", "bf16", "q8_0")
# Composed already, which tokenizers may do first, and engines do not.
_TEXTS = [normalize("NFC", text) for text in HARD_STRINGS]
_CHECK_TOKENS = 128  # far enough that a wrong frequency shows, short enough for any context


class LogitCheck(Result):
    """How far what the engine computes is from what our class computes.

    `difference` is the largest, `relative` the root of the mean square over the standard deviation, which is what decides.
    `rounding` is the same of our class with matrices as coarse as they are written, 0 where they are exact: what the type costs
    this model anyway. `tolerance` is twice that, or what the exporter allows where nothing is rounded.
    """

    compared: str
    positions: int
    difference: float
    standard_deviation: float
    relative: float
    rounding: float
    tolerance: float
    same_argmax: float


class ExportRecord(Provenance):
    """`export.json`: what was exported, to what, what the engine says of it."""

    to: str
    source: dict[str, Any] | None = None
    sha256: dict[str, str | None] = Field(default_factory=dict)
    d_qk: int | list[int]
    d_vo: int | list[int]
    export: ExportFacts
    check: LogitCheck


def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    pad: bool = False,
    experimental: bool = False,
    overwrite: bool = False,
    progress: Progress | Report | None = None,
) -> dict[str, Any]:
    """Write a latent checkpoint as something that an engine loads without kvlatent, and check it there.

    Args:
        source: directory or hub id of a latent checkpoint.
        out: directory to write: whole, or not at all.
        to: one of `TARGETS`.
        dtype: of the matrices of a GGUF file: "f32", "f16", "bf16" or "q8_0", of an OpenVINO graph: "f32" or "f16"; None: as
            stored.
        pad: unequal widths may be filled up with zeros, at the cost of the wider one's cache.
        experimental: unequal widths may go into a GGUF file under the architecture name step35.
        overwrite: replace what `out` holds.
        progress: told of each step.

    Returns:
        The JSON-able record that is written as `out/export.json`, see `ExportRecord`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one sentence naming what is wrong and what to do. Where the engine
            computes something else than our class, nothing is left behind.
    """
    start = time.monotonic()
    report = Progress.of(progress)
    typed = {"dtype": dtype, "pad": pad, "experimental": experimental}
    exporter = _exporter(to, typed)
    place = prepare_output(out, overwrite, {"model": source})
    options = ExportOptions(stored_dtype=_check_latent(source), **typed)
    report.report("load")
    model = load_model(source, dtype="float32")
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source)))
    context = exporter.check_exportable(model, options)
    # Before the exporter has had the model: what it did to it would be in both, and be equal.
    input_ids = _check_tokens(model.config.vocab_size, context)
    ours, rounded = _our_logits(model, input_ids, exporter.matrix_rounding(options))
    latent = latent_config_of(model.config)
    with atomic_directory(place, overwrite=overwrite, inputs={"model": source}) as written:
        report.report(f"write {to}")
        facts = exporter.write_export(model, folder, written, options)
        del model  # the process that reads back needs the memory
        report.report("read back")
        theirs, token_ids = read_in_fresh_process(TARGETS[to], written, input_ids, _TEXTS)
        check = _compare(to, theirs, ours, rounded, facts)
        if token_ids is not None:
            _compare_tokens(to, token_ids, folder, facts)
        record = ExportRecord.checked(
            {
                "command": command_line("export", source, {"to": to, "out": place, **typed}),
                "to": to,
                "source": lineage(source),
                "sha256": {"model": identity(source)},
                **environment("cpu"),
                **latent.widths.to_dict(),
                "export": ExportFacts.checked(facts),
                "check": check,
                "seconds": round(time.monotonic() - start, 2),
            }
        )
        (written / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        card = export_card(record, read_record(folder / "run.json"))
        (written / "README.md").write_text(card, encoding="utf-8")
    return record


def _exporter(to: str, typed: dict[str, Any]) -> Exporter:
    """The module of a target, once the options are known to be for it."""
    if to not in TARGETS:
        raise ValueError(f"unknown target {to!r}; choose one of {', '.join(TARGETS)}")
    for name, targets in _TAKEN.items():
        if typed[name] not in (None, False) and to not in targets:
            raise ValueError(f"--{name} is for --to {' or '.join(targets)}: got --to {to}; leave it out")
    if typed["dtype"] not in (None, *_DTYPES):
        raise ValueError(f"unknown dtype {typed['dtype']!r}; choose one of {', '.join(_DTYPES)}")
    if typed["pad"] and typed["experimental"]:
        raise ValueError("--pad makes widths equal and --experimental keeps them apart: got both; give one")
    return cast(Exporter, import_module(f"kvlatent.engines.{TARGETS[to]}"))


def _check_latent(source: str | Path) -> str:
    """The dtype that a latent checkpoint is stored in.

    Raises:
        ValueError: it is an export, or no latent checkpoint.
    """
    if Path(source, EXPORT_RECORD).is_file():
        raise ValueError(
            f"{source} is an export already; export the latent checkpoint that it was made from once more"
        )
    check_no_wrapper(source, "an export is of")
    config = load_config(str(source))
    if not getattr(config, "kv_latent", None):
        raise ValueError(
            f"{source} is an original (model_type {config.model_type!r}), which engines load as it is; make a latent "
            "checkpoint of it with `kvlatent convert` and export that"
        )
    return str(config.dtype).removeprefix("torch.")


def _check_tokens(vocab_size: int, context: int) -> Tensor:
    """Random tokens [1, T], the same for every call and within the context."""
    length = min(_CHECK_TOKENS, context - 1)  # a server wants room for the next
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _our_logits(
    model: PreTrainedModel, input_ids: Tensor, rounding: MatrixRounding | None
) -> tuple[Tensor, Tensor]:
    """Our logits [1, T, V], and those with matrices as they are written, the same where that is exact."""
    ours = model(input_ids, use_cache=False).logits.float()
    if rounding is None:
        return ours, ours
    with rounding.applied(model):
        return ours, model(input_ids, use_cache=False).logits.float()


def _compare(to: str, theirs: Tensor, ours: Tensor, rounded: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """`LogitCheck` of what the engine gave for the last positions.

    Raises:
        ValueError: it is not what our class computes.
    """
    ours, rounded = (logits[:, -theirs.shape[1] :] for logits in (ours, rounded))
    kind = "logits"
    if theirs.logsumexp(-1).abs().max() < 1e-3:
        kind, ours, rounded = "log-probabilities", ours.log_softmax(-1), rounded.log_softmax(-1)
    relative, rounding = (relative_difference(found, ours) for found in (theirs, rounded))
    exact = facts.get("tolerance", ExportFacts.model_fields["tolerance"].default)
    tolerance = max(exact, ROUNDINGS * rounding)
    if not relative <= tolerance:  # a NaN is no match either
        raise ValueError(
            f"the export to {to} was removed, since {facts['engine']} computes something else than our class: {kind} differ "
            f"by {relative:.2g} of their standard deviation where {tolerance:.2g} is allowed; use another version of the engine, "
            "and report it"
        )
    return {
        "compared": kind,
        "positions": theirs.shape[1],
        "difference": float((theirs - ours).abs().max()),
        "standard_deviation": float(ours.std()),
        "relative": relative,
        "rounding": rounding,
        "tolerance": tolerance,
        "same_argmax": float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
    }


def _compare_tokens(to: str, theirs: list[list[int]], source: Path, facts: dict[str, Any]) -> None:
    """Raise `ValueError` unless the engine's own tokenizer makes the ids that the checkpoint's does, of hard strings."""
    tokenizer = load_tokenizer(source, load_config(str(source)))
    for text, found in zip(_TEXTS, theirs, strict=True):
        wanted = tokenizer(text, verbose=False)["input_ids"]
        if wanted != found:
            raise ValueError(
                f"the export to {to} was removed, since {facts['engine']} splits {text!r} into other tokens than the "
                f"checkpoint's tokenizer: {found[:8]} and not {wanted[:8]} first; export with --to stock, and report it"
            )

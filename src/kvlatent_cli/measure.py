"""The commands that measure: eval, bench, study, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measured_listings import evaluation_listing, study_listing
from .named_models import cache_folder, read_model
from .options import (
    CHECKPOINT,
    DEVICE,
    DRY_RUN,
    EVAL_DATA,
    LOAD_DTYPE,
    MEMORY,
    OVERWRITE_FILE,
    RECIPE,
    REQUIRED,
    SEED,
    TOKENS,
    Option,
    command,
    positional,
    read_names,
    read_numbers,
    switch,
)
from .session import Session

AGAINST = Option("against", "The original, to compare with.", "MODEL", read=read_model)

EVALUATION = (
    Option("data", "Text to read; standard library modules by default.", "FILE"),
    AGAINST,
    Option(
        "checks",
        "Checks to run, all by default; fidelity needs --against.",
        "perplexity,fidelity,needle,order,causality",
        read=read_names,
    ),
    Option("tasks", "Tasks of lm-eval to run, e.g. arc_easy,hellaswag.", "NAME,...", read=read_names),
    Option("include_path", "Folder of your own task files (YAML).", "DIR", Path),
    Option("limit", "Questions a task.", "N", int),
    Option("block_size", "Tokens a window; 512 by default, less where the context is.", "N", int),
    Option("stride", "Tokens by which the window moves; a window by default.", "N", int),
    Option("batch_size", "Sequences at a time; 4 to 16 by default, by check.", "N", int),
    Option(
        "max_tokens",
        "Tokens scored for perplexity; by default all of --data, of the standard library 50,000 or, of a large model, "
        "fewer.",
        "N",
        int,
    ),
    Option(
        "contexts",
        "Contexts of the needle; by default 128 and as much of the model's own as two minutes hold.",
        "N,...",
        read=read_numbers,
    ),
    Option("template", "A needle in words, with {key} and {value}.", "TEXT"),
    Option("separator", "What stands between the documents of a .txt file.", default="<|endoftext|>"),
    Option("text_field", "Field of a record that holds the text, or a conversation.", default="text"),
)

SPEED = (
    AGAINST,
    Option("contexts", "Lengths of the prompt, in tokens.", "N,...", read=read_numbers),
    Option("batches", "Sequences at once.", "N,...", default="1", read=read_numbers),
    Option(
        "caches",
        "Caches to compare, of dynamic, static, quantized-int4, quantized-int2, quantized-fp8, quantized-int8-hqq, "
        "quantized-int4-hqq, quantized-int2-hqq; by default dynamic and, where it works, quantized-int4.",
        "NAME,...",
        read=read_names,
    ),
    Option("new_tokens", "Tokens added to a prompt; 16 by default.", "N", int),
    Option("repeats", "Timed rounds, 3 or more; 5 by default.", "N", int),
    MEMORY,
    Option("attention", "Attention kernel.", "eager|sdpa|flex_attention|flash_attention_2|kvlatent"),
    switch("compile", "Compile the step that adds a token."),
    Option("engine", "Run on an engine itself instead of our own runtime.", "llama.cpp|openvino|vllm"),
    Option(
        "kv_dtypes",
        "Types of the engine's cache to compare, e.g. f16,q8_0.",
        "NAME,...",
        flag="kv-dtype",
        read=read_names,
    ),
)
_OWN_RUNTIME = ("batches", "caches", "memory", "attention", "compile", "device")

BENCH_DTYPE = Option(
    "dtype",
    "Precision to load in, the checkpoint's by default; with --engine type of the matrices of an export.",
    "float32|bfloat16|float16, or f32|f16|bf16|q8_0",
)

STUDY = (
    positional(
        "name",
        "NAME",
        "Study to run: conversion, choices, widths, lora-rank, stages, objective, rope, nested, cross-layer or token-eviction.",
    ),
    Option("out", "Folder of results, one file a cell.", "DIR", Path, REQUIRED),
    Option("model", "The original, or smollm2; the embedded model by default.", "MODEL", read=read_model),
    Option("data", "Text to calibrate and train on.", "FILE"),
    EVAL_DATA,
    Option("seeds", "Random seeds, one cell each.", "N,...", read=read_numbers),
    TOKENS,
    Option("eval_tokens", "Tokens to measure on, at the most.", "N", int),
    Option("cells", "Only cells of these names.", "PATTERN,..."),
    Option("limit", "Cells to measure in this call, at the most.", "N", int),
    Option("threads", "Torch threads.", "N", int),
    Option("python", "Python interpreter that has kvpress (for token-eviction).", "FILE"),
    *RECIPE,
    DEVICE,
    DRY_RUN,
)


@command(CHECKPOINT, *EVALUATION, DEVICE, LOAD_DTYPE, SEED)
def evaluate(run: Session, given: dict[str, Any]) -> None:
    """Measure perplexity, needles, word order and tasks, beside the original's with --against, and name what is wrong."""
    from kvlatent.evaluation.standard import standard_evaluation
    from kvlatent.jobs.devices import choose_device

    given["device"] = choose_device(given["device"])
    document = standard_evaluation(**given, progress=run.report, say=run.say)
    document["record"]["command"] = _command_line(run, "eval", given["model"])
    run.show(document, *evaluation_listing(document))


@command(CHECKPOINT, *SPEED, DEVICE, BENCH_DTYPE, SEED)
def bench(run: Session, given: dict[str, Any]) -> None:
    """Time reading and writing, weigh the live cache, and compare with the original and with quantised caches."""
    from kvlatent.evaluation.speed.lines import bench_lines, json_line

    model, original = given.pop("model"), given.pop("against", None)
    if "engine" in given:
        document = _bench_engine(run, model, original, given)
    else:
        from kvlatent.evaluation.speed.bench_run import bench
        from kvlatent.jobs.devices import choose_device

        if "kv_dtypes" in given:
            raise ValueError(
                "--kv-dtype is of an engine's cache: got no --engine; name one, or give --caches"
            )
        given["device"] = choose_device(given["device"])
        document = bench(model, original, **given, progress=run.report, say=run.say)
    document["record"]["command"] = _command_line(run, "bench", model)
    run.show(document, *bench_lines(document), json_line(document))


def _bench_engine(run: Session, model: str, original: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The same on an engine, which takes none of the options of our own runtime."""
    from kvlatent.workflows.bench_engine import bench_engine

    defaults = {option.name: option.default for option in (*SPEED, DEVICE)}
    for name in _OWN_RUNTIME:
        if given.pop(name, defaults[name]) not in (defaults[name], [1], False):
            raise ValueError(
                f"--{name} is of our own runtime: got it with --engine {given['engine']}; leave one of them out"
            )
    return bench_engine(model, original, **given, cache=cache_folder(), progress=run.report)


@command(*STUDY)
def study(run: Session, given: dict[str, Any]) -> None:
    """Run a grid of conversions and trainings. Repeat the command to continue; several of them share the cells."""
    from kvlatent_lab.study import study, summary

    document = study(**given, progress=run.report)
    if not given["dry_run"] and document["finished"]:
        document["summary"] = summary(given["out"])
    run.show(document, *study_listing(document))


@command(
    positional("paths", "PATH...", "Result files, or folders of them.", list[Path]),
    Option("out", "Page to write, .html.", "FILE", Path, REQUIRED),
    OVERWRITE_FILE,
)
def report(run: Session, given: dict[str, Any]) -> None:
    """Make one self-contained page of what eval, bench, studies and runs wrote."""
    from kvlatent_lab.report import report

    document = report(**given, progress=run.report)
    lines = [f"skipped {each['file']}: {each['reason']}" for each in document["skipped"]]
    run.show(document, *lines, f"{len(document['used'])} results in {given['out']}")


def _command_line(run: Session, name: str, model: str) -> str:
    """The command that repeats a measurement, for its record."""
    from kvlatent.jobs.record import command_line
    from kvlatent.workflows.steps import options_as_typed

    sources = ("data", "against")
    files = {option: run.typed[option] for option in sources if option in run.typed}
    others = {option: value for option, value in run.typed.items() if option not in sources}
    return command_line(name, model, options_as_typed(files, others))

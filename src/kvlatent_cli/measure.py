"""The commands that measure: eval, bench, study, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .results import evaluation_tables, study_tables
from .session import session

Checkpoint = Annotated[
    str, typer.Argument(help="Latent or original: a directory or a hub id.", metavar="DIR")
]
Against = Annotated[str | None, typer.Option(help="The original, to compare with.", metavar="MODEL")]


def evaluate(
    directory: Checkpoint,
    data: Annotated[
        str | None, typer.Option(help="Text to read; standard library modules by default.", metavar="FILE")
    ] = None,
    against: Against = None,
    checks: Annotated[
        str | None,
        typer.Option(
            help="All by default; fidelity needs --against.",
            metavar="perplexity,fidelity,needle,order,causality",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, e.g. arc_easy,hellaswag.", metavar="NAME,...")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your own task files (YAML).", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task.", metavar="N")] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens a window; 512 by default, less where the context is.", metavar="N"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens by which the window moves; a window by default.", metavar="N")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences at a time; 4 to 16 by default, by check.", metavar="N")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens scored for perplexity; by default all of --data, of the standard library 50,000 or, of a "
            "large model, fewer.",
            metavar="N",
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Contexts of the needle; by default 128 and as much of the model's own as two minutes hold.",
            metavar="N,...",
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A needle in words, with {key} and {value}.", metavar="TEXT")
    ] = None,
    separator: Annotated[str, typer.Option(help="Splits a .txt into documents.")] = "<|endoftext|>",
    text_field: Annotated[
        str, typer.Option(help="Field of a record that holds the text, or a conversation.")
    ] = "text",
    seed: o.Seed = None,
    device: o.Device = "auto",
    dtype: o.LoadDtype = None,
    as_json: o.Json = False,
) -> None:
    """Measure perplexity, needles, word order and tasks, beside the original's with --against, and name what is wrong."""
    with session(as_json) as run:
        from kvlatent.evaluation.standard import standard_evaluation
        from kvlatent.jobs.devices import choose_device
        from kvlatent.jobs.record import command_line, spoken_name

        document = standard_evaluation(
            directory,
            data,
            against=against,
            checks=None if checks is None else o.names(checks),
            tasks=None if tasks is None else o.names(tasks),
            include_path=include_path,
            limit=limit,
            block_size=block_size,
            stride=stride,
            batch_size=batch_size,
            max_tokens=max_tokens,
            contexts=None if contexts is None else o.numbers("contexts", contexts),
            template=template,
            separator=separator,
            text_field=text_field,
            seed=seed or 0,
            device=choose_device(device),
            dtype=dtype,
            progress=run.report,
            say=run.say,
        )
        given: dict[str, Any] = {
            "data": data and spoken_name(data),
            "against": against and spoken_name(against),
            "checks": checks,
        }
        given |= {"tasks": tasks, "include_path": include_path, "limit": limit, "block_size": block_size}
        given |= {"stride": stride, "batch_size": batch_size, "max_tokens": max_tokens, "contexts": contexts}
        given |= {"template": template, "separator": separator, "text_field": text_field, "device": device}
        given |= {"dtype": dtype, "seed": seed or 0}
        document["record"]["command"] = command_line("eval", directory, given)
        run.show(document, *evaluation_tables(document))


def bench(
    directory: Checkpoint,
    against: Against = None,
    contexts: Annotated[str | None, typer.Option(help="Prompt lengths.", metavar="N,...")] = None,
    batches: Annotated[str, typer.Option(help="Sequences at once.", metavar="N,...")] = "1",
    caches: Annotated[
        str | None,
        typer.Option(
            help="Of dynamic, static, quantized-int4, quantized-int2, quantized-fp8, quantized-int8-hqq, "
            "quantized-int4-hqq, quantized-int2-hqq; by default dynamic and, where it works, quantized-int4.",
            metavar="NAME,...",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens added to a prompt; 16 by default.", metavar="N")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed rounds, 3 or more; 5 by default.", metavar="N")
    ] = None,
    memory: o.Memory = None,
    attention: Annotated[
        str | None,
        typer.Option(help="Attention kernel.", metavar="eager|sdpa|flex_attention|flash_attention_2"),
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the step that adds a token.")] = False,
    seed: o.Seed = None,
    device: o.Device = "auto",
    dtype: o.LoadDtype = None,
    as_json: o.Json = False,
) -> None:
    """Time reading and writing, weigh the live cache, and compare with the original and with quantised caches."""
    with session(as_json) as run:
        from kvlatent.evaluation.speed.bench_run import bench as work
        from kvlatent.evaluation.speed.lines import bench_lines, json_line
        from kvlatent.jobs.devices import choose_device
        from kvlatent.jobs.record import command_line, spoken_name

        document = work(
            directory,
            against,
            batches=o.numbers("batches", batches),
            contexts=None if contexts is None else o.numbers("contexts", contexts),
            caches=None if caches is None else o.names(caches),
            new_tokens=new_tokens,
            repeats=repeats,
            memory=o.bytes_of(memory),
            attention=attention,
            compile=compile_,
            seed=seed or 0,
            device=choose_device(device),
            dtype=dtype,
            progress=run.report,
            say=run.say,
        )
        given: dict[str, Any] = {
            "against": against and spoken_name(against),
            "contexts": contexts,
            "batches": batches,
        }
        given |= {"caches": caches, "new_tokens": new_tokens, "repeats": repeats, "memory": memory}
        given |= {"attention": attention, "compile": compile_, "device": device, "dtype": dtype}
        document["record"]["command"] = command_line("bench", directory, given | {"seed": seed or 0})
        run.show(document, *bench_lines(document), json_line(document))


def study(
    name: Annotated[
        str,
        typer.Argument(
            help="conversion, choices, widths, lora-rank, stages, objective, rope or token-eviction.",
            metavar="NAME",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of results, one file a cell.", metavar="DIR")],
    model: Annotated[
        str | None, typer.Option(help="The original; the embedded model by default.", metavar="MODEL")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Text to calibrate and train on.", metavar="FILE")] = None,
    eval_data: o.EvalData = None,
    seeds: Annotated[str | None, typer.Option(help="One cell each.", metavar="N,...")] = None,
    tokens: o.Tokens = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Measure on that many tokens.", metavar="N")] = None,
    cells: Annotated[
        str | None, typer.Option(help="Only cells of these names.", metavar="PATTERN,...")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many cells in this call.", metavar="N")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch.", metavar="N")] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter with kvpress (token-eviction).", metavar="FILE")
    ] = None,
    recipe: o.RecipeFile = None,
    overrides: o.Set = None,
    device: o.Device = "auto",
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Run a grid of conversions and trainings. Repeat the command to continue; several of them share the cells."""
    with session(as_json) as run:
        from kvlatent_lab.study import study as work
        from kvlatent_lab.study import summary

        given: dict[str, Any] = {} if eval_tokens is None else {"eval_tokens": eval_tokens}
        document = work(
            name,
            model,
            out=out,
            data=data,
            eval_data=eval_data,
            seeds=None if seeds is None else o.numbers("seeds", seeds),
            tokens=tokens,
            cells=cells,
            limit=limit,
            recipe=recipe,
            overrides=overrides or [],
            threads=threads,
            device=device,
            python=python,
            dry_run=dry_run,
            progress=run.report,
            **given,
        )
        if not dry_run and document["finished"]:
            document["summary"] = summary(out)
        run.show(document, *study_tables(document))


def report(
    paths: Annotated[list[Path], typer.Argument(help="Result files, or folders of them.", metavar="PATH...")],
    out: Annotated[Path, typer.Option(help="Page to write, .html.", metavar="FILE")],
    overwrite: o.OverwriteFile = False,
    as_json: o.Json = False,
) -> None:
    """Make one self-contained page of what eval, bench, studies and runs wrote."""
    with session(as_json) as run:
        from kvlatent_lab.report import report as work

        document = work(paths, out, overwrite=overwrite, progress=run.report)
        lines = [f"skipped {each['file']}: {each['reason']}" for each in document["skipped"]]
        run.show(document, *lines, f"{len(document['used'])} results in {out}")

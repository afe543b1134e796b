"""Cases for `fuzz.py`: documents, recipes, checkpoints and command lines that are each a little wrong, drawn by hypothesis."""

import copy
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from toy import make_toy
from typer.testing import CliRunner

from kvlatent.checkpoints.load import load_model
from kvlatent.checkpoints.save import save
from kvlatent.checkpoints.tokenizer_files import load_tokenizer
from kvlatent.conversion.convert_model import convert
from kvlatent.jobs.recipe import Recipe
from kvlatent.model.classes import latent_config_of
from kvlatent.model.config import LatentConfig
from kvlatent.workflows.inspect_checkpoint import describe
from kvlatent_cli.main import app

SCALARS = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2, 3, 7, 16, 10**30, 2**63, -(2**31), 0.5, 1e-300, "", " ", "x", "8", "ä", "\ud800"]),
    st.integers(-40, 300),
    st.floats(),
    st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)
_DELETE = "delete"


@dataclass
class Place:
    """Checkpoints and a text that no case may change, and a folder for what cases write.

    Args:
        folder: where all of it goes.
    """

    folder: Path
    originals: dict[str, Path] = field(default_factory=dict)
    text: Path = Path()
    latent_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs = self.folder / "inputs"
        inputs.mkdir()
        model, self.text = make_toy(inputs)
        loaded = load_model(model)
        latent = convert(loaded, d_qk=8, d_vo=(8, 4), preset="own-frequency")
        self.latent_config = latent_config_of(latent.config).to_dict()
        tokenizer = load_tokenizer(str(model), loaded.config)
        save(latent, inputs / "latent", tokenizer=tokenizer)
        sharded = inputs / "sharded"
        loaded.save_pretrained(sharded, max_shard_size="60KB")
        tokenizer.save_pretrained(sharded)
        self.originals = {"original": model, "latent": inputs / "latent", "sharded": sharded}

    def scratch(self) -> Path:
        """An empty folder, the same for every case."""
        folder = self.folder / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def paths_in(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a nested document."""
    entries: Any = ()
    if isinstance(document, dict):
        entries = document.items()
    elif isinstance(document, list):
        entries = enumerate(document)
    found = [prefix] if prefix else []
    for key, value in entries:
        found += paths_in(value, (*prefix, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three entries replaced, removed or added, or something else altogether."""
    if draw(st.integers(0, 40)) == 0:
        return draw(VALUES)
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = paths_in(document)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = document
        for key in way:
            holder = holder[key]
        new = draw(st.one_of(VALUES, st.just(_DELETE), st.just(copy.deepcopy(holder[last]))))
        if new == _DELETE and isinstance(new, str):
            del holder[last]
        elif isinstance(holder, dict) and draw(st.integers(0, 9)) == 0:
            holder[draw(st.text(max_size=6))] = new
        else:
            holder[last] = new
    return document


def read_latent_config(place: Place, draw: Callable[[Any], Any]) -> None:
    """A `kv_latent` dict of a config.json, read, and held against a model of two layers."""
    read = LatentConfig.from_dict(draw(damaged(place.latent_config)))
    read.check_model((0, 1), 2)
    LatentConfig.from_dict(json.loads(json.dumps(read.to_dict())))


_KEYS = [".".join(map(str, path)) for path in paths_in(Recipe().model_dump())]
_WORDS = st.one_of(
    SCALARS.map(str),
    st.sampled_from(["[1, 2", "{a: b}", "1e6", "2026-13-45", "&a [*a]", "!!python/name:os.system", "? [x]", "<<: 1", "[" * 500, "1_0", ".nan", "0x1F", "12:30", "@"]),
)  # fmt: skip


def read_recipe(place: Place, draw: Callable[[Any], Any]) -> None:
    """A recipe file of JSON (which is YAML) or of words, with overrides of it."""
    file = place.scratch() / "recipe.yaml"
    if draw(st.booleans()):
        text = json.dumps(draw(damaged(Recipe().model_dump(mode="json"))))
    else:
        text = "".join(
            f"{draw(st.sampled_from(_KEYS))}: {draw(_WORDS)}\n" for _ in range(draw(st.integers(0, 2)))
        )
    file.write_bytes(text.encode(errors="surrogatepass"))
    keys = st.one_of(st.sampled_from(_KEYS), st.text(alphabet="ab.= stage12", max_size=8))
    overrides = [f"{draw(keys)}={draw(_WORDS)}" for _ in range(draw(st.integers(0, 2)))]
    recipe = Recipe.load(draw(st.sampled_from([file, None])), overrides)
    again = place.folder / "scratch" / "again.yaml"
    again.write_text(recipe.dump_yaml(), encoding="utf-8")
    if Recipe.load(again) != recipe:
        raise AssertionError("a recipe is another one once it was written and read")


def damage_bytes(draw: Callable[[Any], Any], file: Path) -> None:
    """Cut short, overwrite or insert some bytes, more often near the start."""
    content = bytearray(file.read_bytes())
    at = draw(st.one_of(st.integers(0, min(8, len(content) - 1)), st.integers(0, len(content) - 1)))
    new = draw(st.binary(min_size=1, max_size=9))
    kind = draw(st.sampled_from(["cut", "overwrite", "insert"]))
    if kind == "cut":
        del content[at:]
    else:
        content[at : at + (len(new) if kind == "overwrite" else 0)] = new
    file.write_bytes(content)


def damage_header(draw: Callable[[Any], Any], file: Path) -> None:
    """Another JSON header on the same tensors."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = draw(damaged(json.loads(content[8 : 8 + length])))
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def damage_json(draw: Callable[[Any], Any], file: Path) -> None:
    """Another document."""
    file.write_text(json.dumps(draw(damaged(json.loads(file.read_text())))))


def read_checkpoint(place: Place, draw: Callable[[Any], Any]) -> None:
    """A checkpoint with a damaged file, described and loaded."""
    source = place.originals[draw(st.sampled_from(sorted(place.originals)))]
    folder = place.scratch() / "model"
    shutil.copytree(source, folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    weights = [file for file in files if file.suffix == ".safetensors"]
    chosen = draw(st.sampled_from(["config.json", "header", "any", "any", "index"]))
    if chosen == "header":
        damage_header(draw, draw(st.sampled_from(weights)))
    elif chosen == "any":
        damage_bytes(draw, draw(st.sampled_from(files)))
    else:
        index = folder / "model.safetensors.index.json"
        damage_json(draw, index if chosen == "index" and index.exists() else folder / "config.json")
    describe(folder)
    model = load_model(folder)
    load_tokenizer(str(folder), model.config)


_OPTIONS = (
    "--kv", "--d-qk", "--d-vo", "--preset", "--table", "--align", "--global-steps", "--blocks", "--statistics", "--eval-data",
    "--set", "--recipe", "--tokens", "--minutes", "--stages", "--teacher", "--device", "--dtype", "--seed", "--engine",
    "--memory", "--kv-bytes", "--context", "--batch", "--kv-dtype", "--backend", "--to", "--port", "--host", "--prompt",
    "--max-new-tokens", "--temperature", "--json", "--per-layer", "--stream", "--overwrite", "--pad", "--nothing",
)  # fmt: skip
_FIXED: dict[str, tuple[str, ...]] = {
    "convert": ("MODEL", "--out", "OUT", "--dry-run"),
    "compress": ("MODEL", "--data", "TEXT", "--out", "OUT", "--dry-run"),
    "plan": ("MODEL",),
    "inspect": ("MODEL",),
    "slice": ("MODEL", "--out", "OUT"),
    "export": ("MODEL", "--out", "OUT"),
    "calibrate": ("nowhere", "--data", "TEXT", "--out", "OUT"),
    "train": ("nowhere", "--data", "TEXT", "--stage", "1"),
    "teach": ("nowhere", "--data", "TEXT", "--out", "OUT"),
    "eval": ("nowhere",),
    "generate": ("nowhere", "--prompt", "x"),
    "serve": ("nowhere",),
    "report": ("nowhere",),
}  # "nowhere": what would take long, were it not refused


def run_words(place: Place, draw: Callable[[Any], Any]) -> None:
    """A command line: exit code 0 or 2, a sentence on stderr, and an output that is whole or not there."""
    folder = place.scratch()
    models = [str(path) for path in (*place.originals.values(), place.text, folder / "missing")]
    places = {"OUT": str(folder / "out"), "TEXT": str(place.text)}
    name = draw(st.sampled_from(sorted(_FIXED)))
    words = [
        draw(st.sampled_from(models)) if word == "MODEL" else places.get(word, word) for word in _FIXED[name]
    ]
    values = st.one_of(
        SCALARS.map(str), st.sampled_from(["0.5", "8", "8,4", "16,16,16", "1GB", "nan", "inf", "1e999", "auto", "stock", "gguf", "paper",
                                          "stage1.tokens=0", *models]),
    )  # fmt: skip
    for _ in range(draw(st.integers(0, 3))):
        words += [draw(st.sampled_from(_OPTIONS)), draw(values)]
    if draw(st.integers(0, 9)) == 0:
        words.pop(draw(st.integers(0, len(words) - 1)))
    words = [word.replace("\0", "") for word in words]
    result = CliRunner().invoke(app, [name, *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"kvlatent {name} {words}") from result.exception
    if (
        result.exit_code not in (0, 2)
        or (result.exit_code and not result.stderr.strip())
        or "Traceback" in result.output
    ):
        raise AssertionError(
            f"exit code {result.exit_code} of kvlatent {name} {words}: {result.output[-300:]}"
        )
    left = sorted(file.name for file in folder.iterdir())
    if left and (result.exit_code or left != ["out"]):
        raise AssertionError(f"kvlatent {name} {words} ended with {result.exit_code} and left {left}")


KINDS: dict[str, tuple[int, Callable[[Place, Callable[[Any], Any]], None]]] = {
    "LatentConfig": (40, read_latent_config),
    "recipe": (30, read_recipe),
    "checkpoint": (20, read_checkpoint),
    "command line": (10, run_words),
}
"""How many of a hundred, and what a case does."""

"""Recipe: how a run happens (conversion choices, calibration, data, both stages), one YAML, saved beside the weights.

Why: what the artifact *is* lives in `LatentConfig`; what was *done* to it lives here, complete and resolved,
so that a run can be repeated from its own output directory. Unknown keys are refused: a misspelt learning
rate must not train. Each stage is a class of its own, so that a file that names only some keys keeps that
stage's other defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

__all__ = [
    "Calibration",
    "Conversion",
    "Data",
    "Lora",
    "Recipe",
    "Scale",
    "Stage",
    "Stage1",
    "Stage2",
    "Target",
    "option_keys",
]


def _whole(value: Any) -> Any:
    """Accept 1e6 and "1e6" (a string in YAML 1.1) where a whole number is wanted."""
    try:
        return int(float(value)) if isinstance(value, (float, str)) and float(value).is_integer() else value
    except (ValueError, OverflowError):
        return value


_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What a text that is none ends in: dates that do not exist and bytes of no text too, and nests too deep to be read."""

OPTION = object()
"""Marks a key that runs take as an option of its own: `--table layer` and `table="layer"`, as well as an override."""

Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Kept = Annotated[float, Field(gt=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Conversion(Section):
    """What is kept of the original and how it is corrected; None means what the preset says (checked by `convert`)."""

    preset: Annotated[str, OPTION] = "calibrated"
    keys: str | None = None
    frequencies: str | None = None
    values: str | None = None
    table: Annotated[str | None, OPTION] = None
    gains: bool | None = None
    align: Annotated[int | None, OPTION] = Field(None, ge=0)
    global_steps: Annotated[int | None, OPTION] = Field(None, ge=0)
    refit: bool | None = None
    qk_norm: str = "full"


class Calibration(Section):
    """How much text the statistics are collected from: blocks of data.block_size tokens, query rows in each.

    Where the conversion aligns, `recall` is the share of the blocks that ask for recall (`text.recall_blocks`); None is a
    quarter, or none where the blocks are too short or too few for it.
    """

    blocks: Annotated[Count, OPTION] = 128
    rows: Count = 32
    recall: Share | None = None


class Lora(Section):
    """LoRA on the FFN projections, merged into the exported weights; rank 0 leaves the FFN frozen."""

    rank: int = Field(16, ge=0)
    alpha: int = Field(32, ge=1)
    dropout: Share = 0.0


class Data(Section):
    """How text becomes blocks of tokens."""

    block_size: int = Field(512, ge=2)
    separator: str | None = "<|endoftext|>"
    held_out: float = Field(0.02, ge=0.0, lt=1.0)
    isolate: bool = True
    text_field: str = "text"


class Stage(Section):
    """What both stages share: budget, optimiser, checkpoints.

    `batch_size` counts the sequences of one forward over all processes, so a recipe gives the same on any number of them.
    """

    tokens: Count = 500_000
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: float = Field(1e-3, gt=0)
    warmup_ratio: Share = 0.05
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    activation_checkpointing: bool = False
    save_steps: Count = 50
    keep: int = Field(2, ge=2)
    log_steps: Count = 1
    spike_factor: float = Field(2.0, ge=0)


class Stage1(Stage):
    """In-layer distillation (paper 3.2.2); a fifth of the tokens: with that share two stages beat one.

    In the last `own_stream` of the steps a layer sees what the student's own layers below it gave, instead of the original's
    states. `activation_checkpointing` has an effect on sharded models only, since one layer's graph is alive otherwise.
    """

    tokens: Count = 100_000
    own_stream: float = Field(0.0, ge=0.0, le=1.0)


class Stage2(Stage):
    """End-to-end training (paper 3.2.3).

    `nested_kv` are shares of the original's cache whose widths are trained in one checkpoint, one a step; `kvlatent slice`
    cuts them out of it. The checkpoint's own share has to be among them to be trained, too.
    """

    tokens: Count = 400_000
    objective: Literal["next_token", "kl", "reverse_kl", "mixed_kl", "mix"] = "kl"
    kl_weight: float = Field(0.5, ge=0.0, le=1.0)
    reverse_weight: float = Field(0.5, ge=0.0, le=1.0)
    temperature: float = Field(1.0, gt=0)
    nested_kv: Annotated[list[Kept], Field(min_length=1)] | None = None


class Target(Section):
    """What a recipe was sized for; another model or width is refused, None is any."""

    family: str | None = None
    hidden_size: int | None = Field(None, ge=1)
    num_hidden_layers: int | None = Field(None, ge=1)
    kv: float | None = Field(None, gt=0.0, le=1.0)


class Scale(Section):
    """How a run spreads over the processes that torchrun or `accelerate launch` started."""

    sharding: Literal["none", "fsdp2"] = "none"
    deepspeed: str | None = None


class Recipe(Section):
    """A whole run. `Recipe()` equals `recipes/cpu-small.yaml`."""

    seed: Annotated[int, OPTION] = Field(0, ge=0, lt=2**32)
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], OPTION] = "auto"
    conversion: Conversion = Conversion()
    calibration: Calibration = Calibration()
    lora: Lora = Lora()
    data: Data = Data()
    stage1: Stage1 = Stage1()
    stage2: Stage2 = Stage2()
    target: Target = Target()
    scale: Scale = Scale()
    report_to: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str | Path | Recipe | None = None, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file (None: the defaults), or take a recipe, and apply `section.key=value` overrides, values in YAML.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a YAML mapping, an unknown key, or a value out of range; one sentence naming the
                key.
        """
        values = source.model_dump() if isinstance(source, Recipe) else {}
        if isinstance(source, (str, Path)):
            values = _read(Path(source))
        for override in overrides:
            _apply(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(_sentence(error)) from None

    def dump_yaml(self) -> str:
        """The resolved recipe as YAML; `Recipe.load` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def option_keys(section: type[Section] = Recipe, prefix: str = "") -> dict[str, str]:
    """The dotted key of every option that stands for one, by the option's name, which is the key's last word."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if OPTION in field.metadata:
            keys[name] = prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= option_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"the recipe {path} does not exist; pass a YAML file such as recipes/cpu-small.yaml"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except _NO_YAML as error:
        line = str(error).replace("\n", " ")
        raise ValueError(f"the recipe {path} is not YAML: {line}") from None
    if values is None or isinstance(values, dict):
        return values or {}
    raise ValueError(f"a recipe is a mapping of sections: {path} holds a {type(values).__name__}")


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` in the nested mapping, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f"an override is written section.key=value: got {override!r}; try stage1.tokens=100000"
        )
    *sections, last = key.strip().split(".")
    try:
        for section in sections:
            values[section] = values.get(section) or {}
            values = values[section]
        values[last] = yaml.safe_load(text)
    except (AttributeError, TypeError):
        raise ValueError(
            f"{section} in the override {override!r} is a value, not a section of the recipe"
        ) from None
    except _NO_YAML:
        raise ValueError(
            f"the value of the override {override!r} is not YAML; quote it if it is text"
        ) from None


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence that names the key, the value and what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"recipe key {key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r:.100}"
    section: Any = Recipe()
    for part in first["loc"][:-1]:
        section = getattr(section, str(part))
    known = ", ".join(type(section).model_fields)
    return f"unknown recipe key {key}: the known keys there are {known}"

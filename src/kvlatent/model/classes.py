"""The latent model classes: upstream's model with its attention modules exchanged, one trio per family.

`latent_classes("llama")` makes `KVLatentLlamaConfig`, `KVLatentLlamaModel` and `KVLatentLlamaForCausalLM`. Each
family has a `model_type` of its own (`kv_latent_llama`, ...), so that no stock class can load the weights by mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from kvlatent.model.attention import LatentAttention
from kvlatent.model.config import LatentConfig
from kvlatent.model.families import (
    FAMILIES,
    LATENT_PREFIX,
    attention_layers_of,
    family_of,
    key_value_heads_of,
)
from kvlatent.model.rotary import LatentRotary

__all__ = ["CarriesItsCode", "latent_classes", "latent_config_of"]


def latent_config_of(config: Any) -> LatentConfig:
    """The parsed `kv_latent` of a transformers config; parsed once, as long as the config keeps that dict.

    Raises:
        ValueError: the config has none, or it does not fit the model's layers and heads.
    """
    if not getattr(config, "kv_latent", None):
        raise ValueError(
            f"config of type {getattr(config, 'model_type', None)!r} has no 'kv_latent': it is not a latent model; "
            "make one with `kvlatent convert`"
        )
    layers = attention_layers_of(config)
    read_from = config.kv_latent, config.model_type, layers, key_value_heads_of(config)
    if (known := getattr(config, "_parsed", None)) is not None:
        latent, parsed_from = known
        if parsed_from[0] is read_from[0] and parsed_from[1:] == read_from[1:]:
            return latent
    latent = LatentConfig.from_dict(config.kv_latent)
    if config.model_type != LATENT_PREFIX + latent.original_model_type:
        raise ValueError(
            f"config.json contradicts itself: model_type={config.model_type!r} but kv_latent was made from "
            f"{latent.original_model_type!r}; restore the file or convert the model again"
        )
    latent.check_model(layers, key_value_heads_of(config))
    config._parsed = latent, read_from
    return latent


def _check_derived(given: dict[str, Any], latent: LatentConfig) -> dict[str, int]:
    """The top-level widths that caches and engines read, checked against what the file said."""
    derived = {"qk_head_dim": latent.max_d_qk, "v_head_dim": latent.max_d_vo}
    derived["head_dim"] = max(derived.values())
    for name, expected in derived.items():
        if given[name] is not None and given[name] != expected:
            raise ValueError(
                f"config.json contradicts itself: {name}={given[name]} but kv_latent says {expected}; kv_latent is "
                "the source of truth, restore the file or convert the model again"
            )
    return derived


def _make_config(base: Any, family_name: str, prefix: str) -> type:
    class Config(base):
        __slots__ = ("_parsed",)  # outside `__dict__`, which is what upstream saves and compares
        model_type = LATENT_PREFIX + family_name
        kv_latent: dict | None = None
        qk_head_dim: int | None = None
        v_head_dim: int | None = None
        original_rope_parameters: dict | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            head_dim = kwargs.get("head_dim", getattr(self, "head_dim", None))
            given = {"qk_head_dim": self.qk_head_dim, "v_head_dim": self.v_head_dim, "head_dim": head_dim}
            super().__post_init__(**kwargs)
            if self.kv_latent:
                for name, width in _check_derived(given, latent_config_of(self)).items():
                    setattr(self, name, width)

    Config.__name__ = Config.__qualname__ = f"KVLatent{prefix}Config"
    return Config


def _install(decoder: Any, config: Any) -> None:
    """Exchange the rotary module and every layer's attention of an upstream decoder, in place."""
    latent, family = latent_config_of(config), family_of(config)
    tables = latent.tables_at(0) if latent.one_table else ()
    if family.rotary:
        if not hasattr(decoder, family.rotary):
            what = f"the module {family.rotary!r} (rotary) in a {type(decoder).__name__}"
            raise ValueError(family.missing(what))
        setattr(decoder, family.rotary, LatentRotary(tables, in_float32=family.rotates_in_float32))
    for index in family.attention_layers(config):
        setattr(decoder.layers[index], family.attention, LatentAttention(config, latent, index))


_HUB_OPTIONS = ("commit_description", "commit_message", "create_pr", "private", "revision", "tags")


class CarriesItsCode:
    """Saving a model adds the modelling file that loads it elsewhere, so `push_to_hub` uploads it too."""

    add_code: Callable[[str, Any], None] | None = None

    def save_pretrained(
        self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As upstream's; the directory also gets the self-contained modelling file, named by `auto_map`."""
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        if "token" in kwargs:
            hub_options["token"] = kwargs["token"]
        super().save_pretrained(save_directory, *args, **kwargs)  # ty: ignore[missing-attribute]
        # No config: a rank that does not write, or an adapter saved alone.
        if self.add_code is not None and (Path(save_directory) / "config.json").is_file():
            self.add_code(save_directory, self.config)  # ty: ignore[missing-attribute]
        if push_to_hub and kwargs.get("is_main_process", True):
            self.push_to_hub(repo_id, **hub_options)  # ty: ignore[missing-attribute]


@cache
def latent_classes(model_type: str) -> tuple[Any, Any, Any]:
    """Config, decoder and causal language model classes for a source `model_type` such as "llama"."""
    family = FAMILIES[model_type]
    config_type = _make_config(family.upstream("Config"), model_type, family.prefix)
    base_model, base_causal = family.upstream("Model"), family.upstream("ForCausalLM")

    class Model(CarriesItsCode, base_model):
        config_class = config_type
        _can_record_outputs = base_model._can_record_outputs | {"attentions": LatentAttention}

        def __init__(self, config: Any) -> None:
            latent_config_of(config)
            super().__init__(config)
            _install(self, config)
            self.post_init()

    class CausalLM(CarriesItsCode, base_causal):
        config_class = config_type

        def __init__(self, config: Any) -> None:
            latent_config_of(config)  # refuse before upstream allocates its default size
            super().__init__(config)
            setattr(self, base_causal.base_model_prefix, Model(config))
            self.post_init()

    for kind, suffix in ((Model, "Model"), (CausalLM, "ForCausalLM")):
        kind.__name__ = kind.__qualname__ = f"KVLatent{family.prefix}{suffix}"
    return config_type, Model, CausalLM


def __getattr__(name: str) -> Any:
    """The classes by name, so that models and configs can be pickled."""
    for family in FAMILIES.values():
        for index, suffix in enumerate(("Config", "Model", "ForCausalLM")):
            if name == f"KVLatent{family.prefix}{suffix}":
                return latent_classes(family.model_type)[index]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

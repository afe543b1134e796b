"""What differs between decoder families, as the fields of one row.

Rows stand in `families`; whatever does not fit one becomes a field here, with its reason, and no `if` on a model's type
stands anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import transformers

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """One architecture: where its attention keeps its parts, and what it does besides.

    Whatever stands around the attention (residuals, norms behind it, multipliers, experts) is upstream's own code, run as
    it is; a field says what the narrow attention, or who looks at one layer alone, has to know of it.

    Args:
        model_type: of the source model, as transformers spells it.
        prefix: of its class names (`Llama` in `LlamaForCausalLM`).
        qkv_bias, o_bias: whether the projections have biases: "never", "always", or the config's field that says so.
        fused_qkv: q, k and v live in one projection: "stacked" (all queries, all keys, all values), "by head" (query, key
            and value of each head), or "" where they are three.
        qk_norm: queries and keys are RMS-normalised before the rotation, over each "head" or over "all heads"; "" if not.
        windowed: "never", "always" (when `config.sliding_window` is set) or "by layer type".
        rotates: the config's field with one number a layer, 0 where nothing is rotated; "" where all layers rotate.
        tables_by_layer_type: `config.rope_parameters` has an entry for each of `config.layer_types`.
        rotates_in_float32: cosines and sines are not rounded to the model's type before they turn queries and keys.
        softmax_scale: the config's field with the factor of the logits; "" for head_dim^-1/2.
        query_scalar: the config's field whose inverse root is that factor; "" where it is not given so.
        output_dropout: the config's field with the dropout, in training, of what the attention puts out.
        residual_multiplier: the config's field with the factor of what the attention adds to the residual stream.
        norms_output: a norm stands between the attention's output and the residual stream.
        embedding_multiplier: of the decoder's and the config's field with the factor of the embeddings.
        logit_divisor: the config's field that logits are divided by.
        attention, attention_norm, ffn, final_norm, rotary: names of modules, the last two of the decoder; `attention_norm`
            comes before the attention, "" where it reads the residual stream as it is; `rotary` is "" where no layer rotates.
        attention_names: (upstream's, ours) for each module of the attention that upstream calls otherwise.
        attention_layer_type: the entry of `config.layer_types` where a layer has attention; "" where all have. The others
            (linear attention, convolutions) are upstream's own and keep their states in upstream's cache.
        gates_output: the query projection also puts out, a head, a gate: its sigmoid multiplies what the head averages.
        norm_offset: what norms add to their weights.
        norm_epsilon: the config's field with what the norms of queries and keys add to the mean square.
        position_axes: how many positions a token of an image has, in a model that holds this family's beside a tower.
        package: transformers' package of the family; "" where it is called like the model type.
        text_classes: suffixes of class names behind a "Text", in a package that holds a multimodal model as well.
        ffn_modules: linear layers of the FFN, the targets of LoRA.
        expert_parameters: weights of experts inside the FFN, [experts, out, in], that no LoRA is put on.
        besides: what its layers have that those of a plain decoder (Llama's, with windows, biases or Qwen3's norms) have
            not, in words that follow "has"; no stock engine takes it then.
        refused: (the config's field, the reason) for each switch that has to be off.
    """

    model_type: str
    prefix: str
    qkv_bias: str = "never"
    o_bias: str = "never"
    fused_qkv: str = ""
    qk_norm: str = ""
    windowed: str = "never"
    rotates: str = ""
    tables_by_layer_type: bool = False
    rotates_in_float32: bool = False
    softmax_scale: str = ""
    query_scalar: str = ""
    output_dropout: str = ""
    residual_multiplier: str = ""
    norms_output: bool = False
    embedding_multiplier: str = ""
    logit_divisor: str = ""
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    ffn: str = "mlp"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    attention_names: tuple[tuple[str, str], ...] = ()
    attention_layer_type: str = ""
    gates_output: bool = False
    norm_offset: float = 0.0
    norm_epsilon: str = "rms_norm_eps"
    position_axes: int = 1
    package: str = ""
    text_classes: tuple[str, ...] = ()
    ffn_modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    expert_parameters: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    besides: str = ""

    @property
    def attention_modules(self) -> tuple[str, ...]:
        """Names of the linear layers of a latent attention."""
        return ("qkv_proj", "o_proj") if self.fused_qkv else ("q_proj", "k_proj", "v_proj", "o_proj")

    def upstream(self, suffix: str) -> Any:
        """transformers' class of this family, e.g. `upstream("ForCausalLM")`.

        Raises:
            ValueError: the installed transformers has none of that name.
        """
        module, package = (
            "configuration" if suffix == "Config" else "modeling",
            self.package or self.model_type,
        )
        path = f"transformers.models.{package}.{module}_{package}"
        name = f"{self.prefix}{'Text' if suffix in self.text_classes else ''}{suffix}"
        try:
            return getattr(import_module(path), name)
        except (ImportError, AttributeError):
            raise ValueError(self.missing(f"the class {name} in {path}")) from None

    def missing(self, what: str) -> str:
        """The sentence for something that the row names and the installed transformers has not."""
        return (
            f"kvlatent's row of {self.model_type!r} names {what}, which transformers {transformers.__version__} does not "
            "have; install a version between 5.23 and 6, or correct the row in kvlatent/model/families.py"
        )

    def biases(self, config: Any) -> tuple[bool, bool]:
        """Whether (q, k, v) and o have biases."""
        given = {"never": False, "always": True}
        qkv, o = (
            given[rule] if rule in given else bool(self.setting(config, rule))
            for rule in (self.qkv_bias, self.o_bias)
        )
        return qkv, o

    def attention_layers(self, config: Any) -> tuple[int, ...]:
        """Numbers of the layers that have attention; lists that go by layer have an entry for each of these.

        Raises:
            ValueError: none has.
        """
        layers = range(config.num_hidden_layers)
        if not self.attention_layer_type:
            return tuple(layers)
        found = tuple(layer for layer in layers if config.layer_types[layer] == self.attention_layer_type)
        if not found:
            raise ValueError(
                f"none of the {len(layers)} layers has attention (layer_types lists no {self.attention_layer_type!r}), so "
                "there is no cache to narrow; use the model as it is"
            )
        return found

    def sliding_window(self, config: Any, layer: int) -> int | None:
        """Window of `layer` in tokens, or None for full attention."""
        if self.windowed == "never":
            return None
        if self.windowed == "by layer type" and config.layer_types[layer] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)

    def number(self, config: Any, field: str, otherwise: float = 1.0) -> float:
        """What the config says in the field that this row's `field` names; `otherwise` where the row names none."""
        name = getattr(self, field)
        return float(self.setting(config, name)) if name else otherwise

    def setting(self, config: Any, name: str) -> Any:
        """The config's field of this name, which the row names."""
        if not hasattr(config, name):
            raise ValueError(self.missing(f"the config's field {name!r}"))
        return getattr(config, name)

    def scaling(self, config: Any, width: int, head_dim: int) -> float:
        """What a latent attention of this key width multiplies logits by: at full width what the original does."""
        if self.query_scalar:
            return self.number(config, "query_scalar") ** -0.5 * (width / head_dim) ** -0.5
        if not self.softmax_scale:
            return width**-0.5
        return self.number(config, "softmax_scale") * (width / head_dim) ** -0.5

    def latent_name(self, name: str) -> str:
        """A parameter's name inside a latent attention, from upstream's."""
        module, _, rest = name.partition(".")
        return f"{dict(self.attention_names).get(module, module)}.{rest}"

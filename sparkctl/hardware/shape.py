"""A model's dimensions as the memory model and the throughput estimate need them, from config.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CHUNK = 64  # tokens of a GatedDeltaNet chunk


def chunks_of(lengths: Iterable[int]) -> int:
    """Chunks of documents of so many tokens: each begins its own."""
    return sum(-(-length // CHUNK) for length in lengths)


def head_dim(text: Mapping[str, Any]) -> int:
    """Of attention: given, or D / heads."""
    given: int | None = text.get("head_dim")
    return given or int(text["hidden_size"]) // int(text["num_attention_heads"])


@dataclass(frozen=True)
class Shape:
    """The text model. Widths are features of a token: `queries` = heads x head_dim, and so on.

    `head_norms`: queries and keys are normalised a head at a time. `gated`: attention's output has a gate.
    `rule_keys` are GatedDeltaNet's keys repeated for each of its `rule_heads` value heads.
    """

    parameters: int  # of the text model, an untied head included
    float32_parameters: int  # of these, published in F32
    hidden: int
    ffn: int
    vocabulary: int
    attention_layers: int
    queries: int
    keys: int
    head_norms: bool
    gated: bool
    tied: bool
    heads: int  # of queries
    rule_layers: int = 0
    rule_heads: int = 0
    rule_keys: int = 0
    rule_values: int = 0
    convolved: int = 0

    @property
    def layers(self) -> int:
        """All of them."""
        return self.attention_layers + self.rule_layers

    @property
    def head_dim(self) -> int:
        """Of attention."""
        return self.queries // self.heads

    @property
    def head_parameters(self) -> int:
        """lm_head, which works on label tokens alone."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """What every token is multiplied with: all but the embedding and the head."""
        return self.parameters - self.head_parameters * (1 if self.tied else 2)

    @classmethod
    def from_config(cls, config: dict[str, Any], parameters: int) -> Shape:
        """The shape that config.json describes, whose text model has so many `parameters`.

        A model published in F32 stays so; the few F32 tensors of one published in bf16 are not worth counting.
        """
        text = config.get("text_config") or config
        kind = str(text.get("model_type", config.get("model_type", "")))
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        width = head_dim(text)
        rules = _rule_layers(text, layers) if "linear_num_value_heads" in text else 0
        value_heads, key_heads = text.get("linear_num_value_heads", 0), text.get("linear_num_key_heads", 0)
        key_dim, value_dim = text.get("linear_key_head_dim", 0), text.get("linear_value_head_dim", 0)
        return cls(
            parameters=parameters,
            float32_parameters=parameters if published_in(config) == "float32" else 0,
            hidden=int(text["hidden_size"]),
            ffn=int(text["intermediate_size"]),
            vocabulary=int(text["vocab_size"]),
            attention_layers=layers - rules,
            queries=heads * width,
            keys=(text.get("num_key_value_heads") or heads) * width,
            head_norms=not kind.startswith(("llama", "mistral", "qwen2")),
            gated=bool(rules) or bool(text.get("attn_output_gate")),
            tied=bool(text.get("tie_word_embeddings", False)),
            heads=heads,
            rule_layers=rules,
            rule_heads=value_heads,
            rule_keys=value_heads * key_dim,
            rule_values=value_heads * value_dim,
            convolved=2 * key_heads * key_dim + value_heads * value_dim,
        )


def _rule_layers(text: dict[str, Any], layers: int) -> int:
    kinds = text.get("layer_types")
    if kinds:
        return sum(kind == "linear_attention" for kind in kinds)
    return layers - layers // int(text.get("full_attention_interval", 4))


def published_in(config: dict[str, Any]) -> str | None:
    """The dtype that config.json says of the weights."""
    parts = (config.get("text_config") or config, config)
    return next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)

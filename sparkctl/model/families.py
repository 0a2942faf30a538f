"""The six families that are counted by formula, as transformers 5.17 builds them: no torch, no weights.

D hidden · F FFN · V vocabulary · Q heads x head_dim · K kv heads x head_dim
GatedDeltaNet: H value heads · X key heads x key dim · U value heads x value dim
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkctl.errors import UsageError

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DELTA = ("in_proj_qkv", "in_proj_z", "out_proj")

# what transformers takes for a key that config.json leaves out; head_dim None is D / heads, kv heads None is heads
_LLAMA: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, head_dim=None, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip
_QWEN2 = _LLAMA | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32)
_QWEN3_5 = dict(
    vocab_size=248320, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16,
    num_key_value_heads=4, head_dim=256, tie_word_embeddings=False, attention_bias=False, full_attention_interval=4,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | dict(intermediate_size=14336, num_key_value_heads=8),
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | dict(head_dim=128),
    "qwen3_5": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
}
_VISION = dict(
    depth=27, hidden_size=1152, intermediate_size=4304, in_channels=3, patch_size=16, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=3584, num_position_embeddings=2304,
)  # fmt: skip
MULTIMODAL = "qwen3_5"


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return self.inputs * self.outputs + self.bias * self.outputs


@dataclass(frozen=True)
class Count:
    """What a config amounts to; the fields are those of `ModelInfo`."""

    parameters: int
    text_parameters: int
    vocab_size: int
    targets: tuple[str, ...]
    adapter_width: int
    config: dict[str, Any]


class _Sizes:
    """The numbers of one part of config.json, at `path`."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def __getitem__(self, key: str) -> int:
        value = self.values[key]
        if type(value) is not int or value < 1:
            raise UsageError(f"`{self.path}` says {key} = {value!r}, which is no size", "restore the published file")
        return value

    def require_multiple(self, key: str, of: str) -> None:
        """Raise UsageError unless the size `key` is a multiple of the size `of`."""
        if self[key] % self[of]:
            raise UsageError(
                f"`{self.path}` says {key} = {self[key]}, which is no multiple of its {of} = {self[of]}",
                "restore the published file",
            )

    def flag(self, key: str) -> bool:
        """A switch that may be absent."""
        return bool(self.values.get(key))

    @property
    def head_dim(self) -> int:
        """Given, or D / heads."""
        given = self.values.get("head_dim") is not None
        return self["head_dim"] if given else self["hidden_size"] // self["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        """Given, or as many as there are heads."""
        return self["num_attention_heads" if self.values["num_key_value_heads"] is None else "num_key_value_heads"]


def count(kind: str, config: dict[str, Any], path: Path) -> Count:
    """Parameters of a model of one of `FAMILIES`. Raises UsageError where a value is no size or does not divide."""
    multimodal = kind == MULTIMODAL
    text = _Sizes(path, FAMILIES[kind] | (_part(config, "text_config", path) if multimodal else config))
    shared = text.values["tie_word_embeddings"] = tied(config)
    kinds = text.values["layer_types"] = _layer_types(kind, text)
    head = text["vocab_size"] * text["hidden_size"]
    body, width, names = head + text["hidden_size"], 0, set()
    for layer in set(kinds):
        linears, rest = _layer(kind, layer, text)
        body += kinds.count(layer) * (sum(linear.parameters for linear in linears) + rest)
        adapted = [linear for linear in linears if linear.name in USUAL + DELTA]
        width += kinds.count(layer) * sum(linear.inputs + linear.outputs for linear in adapted)
        names |= {linear.name for linear in adapted}
    targets = tuple(name for name in USUAL + DELTA if name in names)
    text_parameters = body + head * (not shared)
    if not multimodal:
        return Count(text_parameters, text_parameters, text["vocab_size"], targets, width, text.values)
    vision = _Sizes(path, _VISION | _part(config, "vision_config", path))
    complete = config | dict(text_config=text.values, vision_config=vision.values)
    whole = body + head * (not config.get("tie_word_embeddings")) + _vision(vision)
    return Count(whole, text_parameters, text["vocab_size"], targets, width, complete)


def _part(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise UsageError(f"`{path}` says {name} = {part!r}, which is no object", "restore the published file")
    return part


def tied(config: dict[str, Any]) -> bool:
    """Whether the language model has no head of its own.

    Its own part of config.json says so and nothing else does: the class that is trained reads no other.
    """
    return bool((config.get("text_config") or config).get("tie_word_embeddings", False))


def _layer_types(kind: str, text: _Sizes) -> list[str]:
    """ "linear_attention" or "full_attention" for each layer; sliding windows have the same parameters."""
    layers, given = text["num_hidden_layers"], text.values.get("layer_types")
    if not kind.startswith("qwen3_5"):
        return ["full_attention"] * layers
    if given is None:
        interval = text["full_attention_interval"]
        return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
    if not isinstance(given, list) or len(given) != layers:
        raise UsageError(f"`{text.path}` has {layers} layers but other layer_types", "restore the published file")
    return ["linear_attention" if layer == "linear_attention" else "full_attention" for layer in given]


def _layer(kind: str, layer: str, c: _Sizes) -> tuple[list[Linear], int]:
    """A decoder layer's linear layers, and how many parameters it has beside them."""
    D, F, biased = c["hidden_size"], c["intermediate_size"], kind == "llama" and c.flag("mlp_bias")
    ffn = [Linear("gate_proj", D, F, biased), Linear("up_proj", D, F, biased), Linear("down_proj", F, D, biased)]
    mixer, rest = _delta(c) if layer == "linear_attention" else _attention(kind, c)
    return mixer + ffn, rest + 2 * D


def _attention(kind: str, c: _Sizes) -> tuple[list[Linear], int]:
    """Qwen3.5's queries come with a gate of the same width; Qwen3 and Qwen3.5 normalise queries and keys by head.

    A group of queries shares a key, so the heads have to divide; transformers' Llama wants them to divide D too.
    """
    if c.values["num_key_value_heads"] is not None:
        c.require_multiple("num_attention_heads", "num_key_value_heads")
    if kind == "llama":
        c.require_multiple("hidden_size", "num_attention_heads")
    if c.values.get("sliding_window") is not None and (kind == "mistral" or c.flag("use_sliding_window")):
        c["sliding_window"]  # a size: through a window of none no token sees itself
    D, Q, K = c["hidden_size"], c["num_attention_heads"] * c.head_dim, c.kv_heads * c.head_dim
    out = kind in ("llama", "qwen3", "qwen3_5", "qwen3_5_text") and c.flag("attention_bias")
    biased = out or kind == "qwen2"
    gated, normed = kind.startswith("qwen3_5"), kind.startswith("qwen3")
    linears = [
        Linear("q_proj", D, Q * (1 + gated), biased), Linear("k_proj", D, K, biased), Linear("v_proj", D, K, biased),
        Linear("o_proj", Q, D, out),
    ]  # fmt: skip
    return linears, 2 * c.head_dim * normed


def _delta(c: _Sizes) -> tuple[list[Linear], int]:
    """GatedDeltaNet: beside the linear layers the convolution of queries, keys and values, A_log, dt_bias, norm."""
    c.require_multiple("linear_num_value_heads", "linear_num_key_heads")
    D, H = c["hidden_size"], c["linear_num_value_heads"]
    X, U = c["linear_num_key_heads"] * c["linear_key_head_dim"], H * c["linear_value_head_dim"]
    linears = [
        Linear("in_proj_qkv", D, 2 * X + U), Linear("in_proj_z", D, U), Linear("in_proj_b", D, H),
        Linear("in_proj_a", D, H), Linear("out_proj", U, D),
    ]  # fmt: skip
    return linears, (2 * X + U) * c["linear_conv_kernel_dim"] + 2 * H + c["linear_value_head_dim"]


def _vision(c: _Sizes) -> int:
    """Parameters of Qwen3.5's vision tower: every linear layer has a bias, every norm weight and bias."""
    D, F, merged = c["hidden_size"], c["intermediate_size"], c["hidden_size"] * c["spatial_merge_size"] ** 2
    pixels = c["in_channels"] * c["temporal_patch_size"] * c["patch_size"] ** 2
    block = [Linear("qkv", D, 3 * D, True), Linear("proj", D, D, True)]
    block += [Linear("fc1", D, F, True), Linear("fc2", F, D, True)]
    ends = [Linear("patch", pixels, D, True)]
    ends += [Linear("merger1", merged, merged, True), Linear("merger2", merged, c["out_hidden_size"], True)]
    blocks = c["depth"] * (sum(linear.parameters for linear in block) + 4 * D)
    return blocks + sum(linear.parameters for linear in ends) + c["num_position_embeddings"] * D + 2 * D

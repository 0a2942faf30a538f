"""Which models the native engine computes: what recommend asks before it chooses, and the engine before it loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sparkctl.hardware.shape import head_dim
from sparkctl.model.families import FAMILIES
from sparkctl.model.inspect import ModelInfo, text_part

MOVING_ROPE = ("dynamic", "longrope")  # rotations that change with the longest row of a batch
ROTATED = 0.25  # of a Qwen3.5's head, where its config.json does not say; the other families rotate all of it


def lacking(info: ModelInfo, device: str) -> str | None:
    """What the native engine has nothing for in this model on a `cuda` or a `cpu`; None where it serves it."""
    if info.model_type not in FAMILIES:
        return f"the model type `{info.model_type}`"
    text = text_part(info.config)
    activation = text.get("hidden_act", "silu")
    if activation != "silu":
        return f"the activation `{activation}`"
    kind = _rope(text).get("rope_type", _rope(text).get("type", "default"))
    if kind in MOVING_ROPE:
        return f"`{kind}` rotary embeddings, which change with the length of a batch"
    return unfit(text) if device == "cuda" else None


class Dims(NamedTuple):
    """How wide something is, and from which to which power of two a GPU's kernels take it."""

    what: str
    size: int
    least: int
    most: int


def unfit(text: Mapping[str, Any]) -> str | None:
    """Which of a model's dims the kernels for a GPU cannot compute; a CPU's references compute them all."""
    for what, size, least, most in _dims(text):
        if size.bit_count() != 1 or not least <= size <= most:
            return f"{what} of {size} dims on a GPU, which takes powers of two from {least} to {most}"
    return None


def _dims(text: Mapping[str, Any]) -> Iterator[Dims]:
    """Triton's ranges are powers of two. Attention has tiles for heads up to 256, its products sum 16 values and more;
    flash-linear-attention has states of 256 keys at most, and wants even widths. Wider values were never compiled.
    """
    heads, hybrid = head_dim(text), "linear_key_head_dim" in text
    yield Dims("attention heads", heads, 16, 256)
    if hybrid:
        share = _rope(text).get("partial_rotary_factor", text.get("partial_rotary_factor", ROTATED))
        yield Dims("rotations", -(-int(heads * share) // 2) * 2, 2, 256)  # an odd one turns a dim beside itself
        yield Dims("GatedDeltaNet keys", text["linear_key_head_dim"], 2, 256)
        yield Dims("GatedDeltaNet values", text["linear_value_head_dim"], 2, 1024)


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return found

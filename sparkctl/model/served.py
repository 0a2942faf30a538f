"""Which models the native engine computes: what recommend asks before it chooses, and the engine before it loads."""

from __future__ import annotations

from sparkctl.model.families import FAMILIES
from sparkctl.model.inspect import ModelInfo

MOVING_ROPE = ("dynamic", "longrope")  # rotations that change with the longest row of a batch


def lacking(info: ModelInfo) -> str | None:
    """What the native engine has no layers for in this model; None where it serves it."""
    if info.model_type not in FAMILIES:
        return f"the model type `{info.model_type}`"
    text = info.config.get("text_config") or info.config
    activation = text.get("hidden_act", "silu")
    if activation != "silu":
        return f"the activation `{activation}`"
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in MOVING_ROPE:
        return f"`{kind}` rotary embeddings, which change with the length of a batch"
    return None

"""The MTP head's tensors: their published names and the shapes that a Qwen3.5 config.json gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkctl.errors import UsageError
from sparkctl.model.anew import file_anew

LAYERS = "mtp_num_hidden_layers"
PREFIX = "mtp."
LAYER = f"{PREFIX}layers.0."
SIZES = ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads")
TYPES = ("qwen3_5", "qwen3_5_text")  # model types that may have one
Shapes = dict[str, tuple[int, ...]]


def layers(text: Mapping[str, Any], path: Path = Path("config.json")) -> int:
    """How many layers of MTP head config.json, at `path`, promises. Raises UsageError where it names no number."""
    count = text.get(LAYERS) or 0
    if type(count) is not int or count < 0:
        raise UsageError(f"`{path}` says {LAYERS} = {count!r}, which is no number of layers", file_anew(path))
    return count


def unknown(text: Mapping[str, Any]) -> str | None:
    """What a promised head has that is not known here; None where it is Qwen3.5's."""
    if layers(text) > 1:
        return f"{layers(text)} layers of MTP head ({LAYERS}), not 1"
    if layers(text) and text.get("mtp_use_dedicated_embeddings"):
        return "an MTP head with embeddings of its own (mtp_use_dedicated_embeddings)"
    return None


def shapes(text: Mapping[str, Any]) -> Shapes:
    """The 15 tensors by name: a projection, three norms, and one full-attention layer like the model's own.

    text: config.json's text_config, or config.json itself where that is the text model's.
    """
    hidden, ffn, head_dim, heads, kv_heads = (int(text[name]) for name in SIZES)
    queries, keys = heads * head_dim, kv_heads * head_dim
    return {
        f"{PREFIX}fc.weight": (hidden, 2 * hidden),
        f"{PREFIX}pre_fc_norm_embedding.weight": (hidden,),
        f"{PREFIX}pre_fc_norm_hidden.weight": (hidden,),
        f"{PREFIX}norm.weight": (hidden,),
        f"{LAYER}input_layernorm.weight": (hidden,),
        f"{LAYER}post_attention_layernorm.weight": (hidden,),
        f"{LAYER}self_attn.q_proj.weight": (2 * queries, hidden),  # a head's query, then its gate
        f"{LAYER}self_attn.k_proj.weight": (keys, hidden),
        f"{LAYER}self_attn.v_proj.weight": (keys, hidden),
        f"{LAYER}self_attn.o_proj.weight": (hidden, queries),
        f"{LAYER}self_attn.q_norm.weight": (head_dim,),
        f"{LAYER}self_attn.k_norm.weight": (head_dim,),
        f"{LAYER}mlp.gate_proj.weight": (ffn, hidden),
        f"{LAYER}mlp.up_proj.weight": (ffn, hidden),
        f"{LAYER}mlp.down_proj.weight": (hidden, ffn),
    }

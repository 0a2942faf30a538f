"""The five published Qwen3.5 shapes as config.json would give them: what a benchmark builds without a download."""

from __future__ import annotations

import copy
from typing import Any

from sparkctl.errors import OtherOptions

# hidden, FFN, layers, heads, kv heads, linear-attention value heads, tied; vision: depth, hidden, FFN, heads
_SHAPES = {
    "qwen3.5-0.8b": (1024, 3584, 24, 8, 2, 16, True, (12, 768, 3072, 12)),
    "qwen3.5-2b": (2048, 6144, 24, 8, 2, 16, True, (24, 1024, 4096, 16)),
    "qwen3.5-4b": (2560, 9216, 32, 16, 4, 32, True, (24, 1024, 4096, 16)),
    "qwen3.5-9b": (4096, 12288, 32, 16, 4, 32, False, (27, 1152, 4304, 16)),
    "qwen3.5-27b": (5120, 17408, 64, 24, 4, 48, False, (27, 1152, 4304, 16)),
}
NAMES = tuple(_SHAPES)
BENCHED = "qwen3.5-2b"  # by a benchmark that is told of no other

_TEXT: dict[str, Any] = dict(
    model_type="qwen3_5_text", dtype="bfloat16", vocab_size=248320, head_dim=256, hidden_act="silu",
    rms_norm_eps=1e-6, initializer_range=0.02, max_position_embeddings=262144, eos_token_id=248044,
    attention_bias=False, attention_dropout=0.0, attn_output_gate=True, full_attention_interval=4,
    linear_conv_kernel_dim=4, linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
    mamba_ssm_dtype="float32", mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False,
    rope_parameters=dict(
        rope_type="default", rope_theta=10000000, partial_rotary_factor=0.25, mrope_section=[11, 11, 10],
        mrope_interleaved=True,
    ),
)  # fmt: skip
_VISION: dict[str, Any] = dict(
    model_type="qwen3_5_vision", hidden_act="gelu_pytorch_tanh", in_channels=3, patch_size=16, spatial_merge_size=2,
    temporal_patch_size=2, num_position_embeddings=2304, initializer_range=0.02,
)  # fmt: skip


def config(name: str) -> dict[str, Any]:
    """config.json of the multimodal model called `name`, a copy of the caller's own. Raises UsageError."""
    try:
        hidden, ffn, layers, heads, kv_heads, value_heads, tied, (depth, width, vision_ffn, vision_heads) = _SHAPES[
            name
        ]
    except KeyError:
        raise OtherOptions(f"no shape `{name}`; there are {', '.join(NAMES)}", shape=BENCHED) from None
    text = copy.deepcopy(_TEXT) | dict(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, linear_num_value_heads=value_heads, tie_word_embeddings=tied,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
    )  # fmt: skip
    vision = _VISION | dict(
        depth=depth, hidden_size=width, intermediate_size=vision_ffn, num_heads=vision_heads, out_hidden_size=hidden
    )
    return dict(
        architectures=["Qwen3_5ForConditionalGeneration"], model_type="qwen3_5", tie_word_embeddings=tied,
        image_token_id=248056, video_token_id=248057, vision_start_token_id=248053, vision_end_token_id=248054,
        text_config=text, vision_config=vision,
    )  # fmt: skip

"""`bench synthetic`: a dense model of the 2B's widths, which is as far as the published recipe's speed-up goes.

28 layers of attention and feed-forward, no GatedDeltaNet: nothing but what large products and fused passes make fast.
The recipe (README of DGX_Spark_Unsloth_Lossless_Speedup) gives 4.80 times its stock there with LoRA and 6.12 times in
full fine-tuning, on a GB10; its stock is Unsloth as it comes.
"""

from __future__ import annotations

from typing import Any

from sparkctl.bench.setting import (
    DOCUMENTS,
    TINY_PACK,
    TINY_RANK,
    Setting,
    require_room,
    text_parameters,
    without_gpu,
)
from sparkctl.bench.workload import synthetic
from sparkctl.hardware.machine import this_machine
from sparkctl.manifest.table import Mode

NAME = "28 dense layers"
PUBLISHED: dict[Mode, float] = {"lora": 4.80, "full": 6.12}  # times the recipe's stock
LAYERS = 28
CONFIG: dict[str, Any] = dict(
    model_type="qwen3", dtype="bfloat16", hidden_size=2048, intermediate_size=6144, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, hidden_act="silu", rms_norm_eps=1e-6,
    max_position_embeddings=40960, tie_word_embeddings=True, attention_bias=False, attention_dropout=0.0,
    rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
)  # fmt: skip
TINY: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=1024
)


def synthetic_setting(
    mode: Mode, pack: int, documents: int = DOCUMENTS, rank: int = 128, checkpointing: bool = False
) -> Setting:
    """The dense model and a pack of documents; as many layers, narrow ones, on a machine without a GPU.

    Raises UsageError where the documents do not fit.
    """
    machine, config, note = this_machine(), {**CONFIG, "num_hidden_layers": LAYERS}, None
    if machine.device == "cpu":
        config, pack, rank, note = config | TINY, min(pack, TINY_PACK), min(rank, TINY_RANK), without_gpu()
    require_room(documents, pack)
    work = synthetic(config, mode, pack, documents, rank=rank, checkpointing=checkpointing)
    return Setting(NAME, work, text_parameters(config), machine, note)

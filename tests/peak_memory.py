"""Peak resident memory of an optimiser step of the reference engine, as JSON. Run as a process of its own."""

from __future__ import annotations

import json
import resource
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sparkctl.data.batches import Document, Pack
from sparkctl.model.plain import plain_layers
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.optim import Optimizer

ROWS, LENGTH, RANK, VOCABULARY = 4, 512, 64, 16000
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=2,
    head_dim=64, tie_word_embeddings=True, max_position_embeddings=4096,
)  # fmt: skip
RULE = dict(
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64,
    full_attention_interval=4,
    rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_section=[3, 3, 2],
                         mrope_interleaved=True),
)  # fmt: skip
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} | {
    "in_proj_qkv", "in_proj_z", "out_proj",
}  # fmt: skip


def build(kind: str, mode: str) -> tuple[Any, dict[str, torch.nn.Parameter], dict[str, Any]]:
    """The base model, what is trained of it, and its config."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5TextConfig

    hybrid = kind == "qwen3_5"
    config = Qwen3_5TextConfig(**SIZES, **RULE, num_hidden_layers=8) if hybrid else AutoConfig.for_model(kind, **SIZES, num_hidden_layers=6)  # fmt: skip  # noqa: E501
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if mode == "lora" else torch.float32)
    plain_layers(model)  # an installed fla would need a GPU
    if mode == "lora":
        targets = {name.rpartition(".")[2] for name, _ in model.named_modules()} & PROJECTIONS
        get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model, trained, config.to_dict()


def main(kind: str, mode: str) -> None:
    """One optimiser step of two full packs."""
    torch.manual_seed(0)
    model, trained, config = build(kind, mode)
    count, mine = (sum(p.numel() for p in group) for group in (model.parameters(), trained.values()))
    plan: Any = SimpleNamespace(
        pack_length=ROWS * LENGTH, checkpointing=False, weight_decay=0.0, learning_rate=1e-4, beta1=0.9, beta2=0.999,
        epsilon=1e-8, max_grad_norm=1.0,
    )  # fmt: skip
    engine, optimizer = ReferenceEngine(model, trained, plan, torch.bfloat16), Optimizer(trained, plan)
    random, documents = np.random.RandomState(0), []
    for row in range(ROWS):
        length = LENGTH - row
        documents.append(
            Document(row, random.randint(0, VOCABULARY, length).astype(np.int32), np.arange(length) > LENGTH // 2)
        )
    pack = Pack(documents, sum(len(d.ids) for d in documents), sum(int(d.trained[1:].sum()) for d in documents))
    for _ in range(2):
        engine.micro_step(pack, 0.5 / pack.labels).item()
    optimizer.clip()
    optimizer.step(1e-4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    base = count - mine if mode == "lora" else count
    print(
        json.dumps(
            dict(
                config=config,
                parameters=base,
                trainable=mine,
                rank=RANK if mode == "lora" else 0,
                labels=pack.labels,
                peak=peak,
            )
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

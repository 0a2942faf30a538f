"""Peak resident memory of an optimiser step of an engine, as JSON. Run as a process of its own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sparkctl.data.batches import Document, Pack
from sparkctl.manifest.schema import Lora
from sparkctl.model.plain import plain_layers
from sparkctl.train.engines import cpu
from sparkctl.train.engines.reference import ReferenceEngine
from sparkctl.train.optim import Optimizer

AREA, RANK, VOCABULARY = 2048, 64, 16000
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


NARROW = dict(
    vocab_size=2048, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_hidden_layers=2,
)  # fmt: skip


def model_of(kind: str, mode: str, narrow: bool = False) -> Any:
    """A random model of transformers, bf16 under adapters, fp32 to be trained whole."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5TextConfig

    sizes: dict[str, Any] = dict(SIZES, num_hidden_layers=6) | (NARROW if narrow else {})
    hybrid = kind == "qwen3_5"
    config = Qwen3_5TextConfig(**SIZES, **RULE, num_hidden_layers=8) if hybrid else AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if mode == "lora" else torch.float32)
    plain_layers(model)  # an installed fla would need a GPU
    return model


def reference(model: Any, mode: str, plan: Any, rank: int = RANK) -> ReferenceEngine:
    """The reference engine on it."""
    from peft import LoraConfig, get_peft_model

    if mode == "lora":
        targets = {name.rpartition(".")[2] for name, _ in model.named_modules()} & PROJECTIONS
        get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return ReferenceEngine(model, trained, plan, torch.bfloat16)


def native(model: Any, mode: str, plan: Any) -> Any:
    """The native engine on it."""
    from sparkctl.train.engines.native.engine import from_model

    lora = Lora(r=RANK, alpha=RANK) if mode == "lora" else None
    return from_model(model, lora=lora, checkpointing=plan.checkpointing)


def peak_resident() -> int:
    """Bytes, of this process alone: getrusage's figure begins with that of the process it was forked from."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def pack_of(rows: int, number: int, vocabulary: int) -> Pack:
    """A full pack of `rows` documents, whose lengths are like no other number's."""
    random, documents = np.random.RandomState(number), []
    for row in range(rows):
        length = AREA // rows - row - rows * number
        documents.append(
            Document(row, random.randint(0, vocabulary, length).astype(np.int32), np.arange(length) > length // 2)
        )
    return Pack(documents, sum(len(d.ids) for d in documents), sum(int(d.trained[1:].sum()) for d in documents))


def main(
    kind: str, mode: str, engine_name: str = "reference", rows: str = "4", checkpointing: str = "", packs: str = ""
) -> None:
    """One optimiser step of two full packs of `rows` documents; or, on a narrow model, of so many different `packs`."""
    torch.manual_seed(0)
    model = model_of(kind, mode, narrow=bool(packs))
    config, parameters = model.config.to_dict(), sum(p.numel() for p in model.parameters())
    plan: Any = SimpleNamespace(
        pack_length=AREA, checkpointing=bool(checkpointing), weight_decay=0.0, learning_rate=1e-4, beta1=0.9,
        beta2=0.999, epsilon=1e-8, max_grad_norm=1.0,
    )  # fmt: skip
    engine = (native if engine_name == "native" else reference)(model, mode, plan)
    cpu.settle(model.config.hidden_size, {})  # as whoever loads a model for an engine does
    trained = engine.parameters()
    optimizer = Optimizer(trained, plan)
    pack = pack_of(int(rows), 0, config["vocab_size"])
    for number in range(int(packs or 0)):
        engine.micro_step(pack_of(int(rows), number, config["vocab_size"]), 0.5 / pack.labels).item()
    for _ in range(2):
        engine.micro_step(pack, 0.5 / pack.labels).item()
    optimizer.clip()
    optimizer.step(1e-4)
    print(
        json.dumps(
            dict(
                config=config,
                parameters=parameters,
                trainable=sum(p.numel() for p in trained.values()),
                rank=RANK if mode == "lora" else 0,
                longest=AREA // int(rows),
                labels=pack.labels,
                peak=peak_resident(),
            )
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

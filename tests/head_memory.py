"""Peak resident memory of optimiser steps of an MTP head's training, as JSON. Run as a process of its own."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peak_memory import RULE, SIZES, peak_resident

from sparkctl.data.batches import Document, Pack
from sparkctl.model.plain import plain_layers
from sparkctl.mtp.drafter import Drafter
from sparkctl.mtp.engine import HeadEngine
from sparkctl.train.optim import Optimizer


def engine_of(steps: int, loss: Any, widths: dict[str, int]) -> tuple[HeadEngine, dict[str, Any], int]:
    """A random head on a random frozen hybrid; the model's config, and its parameters."""
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**SIZES | widths, **RULE, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain_layers(model)  # an installed fla would need a GPU
    text = {**config.to_dict(), "mtp_num_hidden_layers": 1}
    drafter = Drafter.of(model, text)
    drafter.head.begin_anew(0)
    return HeadEngine(drafter, steps=steps, decay=0.6, loss=loss), text, sum(p.numel() for p in model.parameters())


def main(area: str, rows: str, steps: str = "3", loss: str = "kl", widths: str = "{}") -> None:
    """Two optimiser steps of two full packs of `rows` documents, labels on their second halves."""
    torch.manual_seed(0)
    engine, config, parameters = engine_of(int(steps), loss, json.loads(widths))
    plan: Any = SimpleNamespace(
        weight_decay=0.0, learning_rate=1e-4, beta1=0.9, beta2=0.999, epsilon=1e-8, max_grad_norm=1.0
    )
    optimizer = Optimizer(engine.parameters(), plan)
    random, documents, longest = np.random.RandomState(0), [], int(area) // int(rows)
    for row in range(int(rows)):
        ids = random.randint(0, config["vocab_size"], longest).astype(np.int32)
        documents.append(Document(row, ids, np.arange(longest) > longest // 2))
    pack = Pack(documents, longest * len(documents), sum(int(d.trained[1:].sum()) for d in documents))
    for _ in range(2):  # the moments' memory is there from the first update on
        for _ in range(2):
            engine.micro_step(pack, 0.5 / pack.labels).item()
        optimizer.clip()
        optimizer.step(1e-4)
    print(
        json.dumps(
            dict(config=config, parameters=parameters, longest=longest, labels=pack.labels, peak=peak_resident())
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

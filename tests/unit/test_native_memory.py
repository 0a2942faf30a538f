"""The memory model of the native engine beside what the engine allocates: tensors counted at the published sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparkctl_kernels.attention import op as attention

from sparkctl.bench.setting import text_parameters
from sparkctl.bench.workload import synthetic
from sparkctl.hardware import heads, memory, native
from sparkctl.hardware.load import BF16, FP32, MULTIPROCESSORS, Load, splitting
from sparkctl.hardware.shape import Shape, chunks_of
from sparkctl.model import catalog

A100, HOPPER, SPARK = "8.0", "9.0", "12.1"  # compute capabilities

# size, mode, tokens, documents, checkpointing, GPU
CASES = [
    ("0.8b", "lora", 5376, 12, False, A100),
    ("0.8b", "lora", 32768, 1, True, A100),
    ("2b", "lora", 16384, 1, False, A100),
    ("2b", "lora", 16384, 1, False, HOPPER),
    ("2b", "lora", 5376, 12, True, SPARK),
    ("2b", "lora", 32768, 1, True, SPARK),
    ("2b", "full", 5376, 12, False, SPARK),
    ("4b", "lora", 32768, 1, True, SPARK),
    ("4b", "full", 16384, 1, False, A100),
    ("27b", "lora", 8192, 2, True, SPARK),
    ("2b", "lora", 16384, 400, False, HOPPER),
    ("4b", "full", 16384, 400, True, SPARK),
]
HEADS = [("2b", 8192, 12, SPARK), ("4b", 8192, 1, A100), ("4b", 8192, 200, SPARK)]


@pytest.fixture(scope="module")
def counted() -> list[dict[str, int]]:
    """Of all cases, by one process."""
    asked: list[dict[str, Any]] = [
        dict(
            kind="native",
            work=synthetic(
                catalog.config(f"qwen3.5-{size}"), mode, pack, documents, checkpointing=checkpointing
            ).dumps(),
            multiprocessors=splitting(gpu, 256),
            hopper=gpu == HOPPER,
        )
        for size, mode, pack, documents, checkpointing, gpu in CASES
    ]
    for size, pack, documents, gpu in HEADS:
        work = synthetic(catalog.config(f"qwen3.5-{size}"), "full", pack, documents, draft_steps=3)
        asked.append(dict(kind="head", work=work.dumps(), multiprocessors=splitting(gpu, 256)))
    script = Path(__file__).parents[1] / "allocations.py"
    done = subprocess.run([sys.executable, str(script)], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_what_a_training_allocates(number: int, counted: list[dict[str, int]]) -> None:
    """Term by term. Seen: weights and gradients equal to 4 digits, the work .3 % under to 1.3 % over."""
    size, mode, pack, documents, checkpointing, gpu = CASES[number]
    found, config = counted[number], catalog.config(f"qwen3.5-{size}")
    work, shape = synthetic(config, mode, pack, documents), Shape.from_config(config, text_parameters(config))
    load = Load(
        mode, found["trainable"], work.rank if work.lora else 0, pack, max(work.lengths), sum(work.labels),
        checkpointing, "cuda", fla=True, engine="native", multiprocessors=splitting(gpu, 256),
        chunks=chunks_of(work.lengths),
    )  # fmt: skip
    terms = memory.peak(shape, load)
    assert terms.weights + terms.masters == pytest.approx(found["weights"], rel=0.005)
    assert terms.gradients == pytest.approx(found["gradients"], rel=0.005)
    assert 0.99 * found["work"] <= terms.activations + terms.logits <= 1.03 * found["work"]


@pytest.mark.parametrize("number", range(len(HEADS)), ids=[" ".join(map(str, case)) for case in HEADS])
def test_what_a_head_s_training_allocates(number: int, counted: list[dict[str, int]]) -> None:
    """Seen: .6 % under and 1.3 % over."""
    size, pack, documents, gpu = HEADS[number]
    found, config = counted[len(CASES) + number], catalog.config(f"qwen3.5-{size}")
    work, shape = synthetic(config, "full", pack, documents), Shape.from_config(config, text_parameters(config))
    load = (pack, max(work.lengths), sum(work.labels), 3, "cuda")
    total = heads.peak(shape, *load, fla=True, multiprocessors=splitting(gpu, 256), chunks=chunks_of(work.lengths))
    total -= memory.CUDA_RUNTIME
    everything = found["weights"] + found["gradients"] + found["work"] + 2 * FP32 * found["trainable"]
    assert 0.98 * everything <= total <= 1.03 * everything


def test_one_long_document_costs_more_where_attention_splits_its_sums() -> None:
    """8 heads on 108 multiprocessors: 14 parts; two documents of half the length: 7."""
    config = catalog.config("qwen3.5-2b")
    shape = Shape.from_config(config, text_parameters(config))
    one, two, none = (
        native.attention_hand(
            shape, Load("lora", 0, 128, 16384, longest, 0, True, "cuda", True, "native", splitting(gpu, 256))
        )
        for longest, gpu in ((16384, A100), (8192, A100), (16384, SPARK))
    )
    assert one - two == 7 * FP32 * shape.queries
    assert one - none == 14 * FP32 * shape.queries + BF16 * shape.keys
    assert splitting(None, 256) == splitting(SPARK, 256) == 0
    assert (splitting("9.0", 256), splitting("9.0", 128)) == (0, 132)
    assert splitting("12.1", 128) == 48


@pytest.mark.parametrize("capability", [*MULTIPROCESSORS, "7.5"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sums_are_split_where_dispatch_takes_flash(
    capability: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the memory model believes of a GPU that need not be here, and what the operator would choose on it."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(map(int, capability.split("."))))
    chosen = attention.choice(torch.device("cuda"), head_dim).kernel
    assert (chosen == "flash") == bool(splitting(capability, head_dim))

"""What planner tests start from: the published sizes, stores of given lengths, machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparkctl.hardware.shape import Shape
from sparkctl.manifest.schema import AnalysisTable, Choices, Histogram, Machine, ModelTable
from sparkctl.plan.estimates import Model
from sparkctl.plan.request import Situation, Wishes

GB = 10**9

SPARK = Machine(name="NVIDIA GB10", device="cuda", capability="12.1", memory=115 * GB, unified_memory=True, cores=20)
H200 = Machine(name="NVIDIA H200", device="cuda", capability="9.0", memory=140 * GB, cores=16)
CPU = Machine(name="a processor", device="cpu", capability=None, memory=24 * GB, cores=2)

# hidden, layers, heads, kv heads, value heads, FFN, tied, all parameters, text parameters, LoRA parameters with r = 1
SIZES: dict[str, tuple[Any, ...]] = {
    "0.8b": (1024, 24, 8, 2, 16, 3584, True, 0.853e9, 752_393_024, 638_976),
    "2b": (2048, 24, 8, 2, 16, 6144, True, 2.213e9, 1_881_825_088, 976_896),
    "4b": (2560, 32, 16, 4, 32, 9216, True, 4.539e9, 4_205_751_296, 1_904_640),
    "9b": (4096, 32, 16, 4, 32, 12288, False, 9.410e9, 8_953_803_264, 2_506_752),
    "27b": (5120, 64, 24, 4, 48, 17408, False, 27.357e9, 26_895_998_464, 6_799_360),
}


def config(size: str) -> dict[str, Any]:
    """The text part of a published config.json."""
    hidden, layers, heads, kv_heads, value_heads, ffn, tied, *_ = SIZES[size]
    text = dict(
        model_type="qwen3_5_text", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        head_dim=256, num_key_value_heads=kv_heads, linear_num_key_heads=16, linear_num_value_heads=value_heads,
        vocab_size=248320, linear_key_head_dim=128, linear_value_head_dim=128, intermediate_size=ffn,
        full_attention_interval=4,
    )  # fmt: skip
    return dict(model_type="qwen3_5", text_config=text, tie_word_embeddings=tied)


def model(size: str) -> Model:
    """The model's numbers."""
    *_, parameters, text, adapters = SIZES[size]
    return Model(Shape.from_config(config(size), int(text)), int(text), int(adapters), 2 * int(parameters))


@dataclass
class Store:
    """As much of a token store as planning reads."""

    lengths: np.ndarray
    share: float = 0.35
    held: int = 0
    folder: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        self.lengths = np.asarray(self.lengths, dtype=np.int32)
        self.label_counts = (self.lengths * self.share).astype(np.int32)
        self.held_out = np.arange(len(self.lengths)) < self.held

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, row: int) -> str:
        return f"chats.jsonl:{row + 1}"


def analysis(store: Store, **other: Any) -> AnalysisTable:
    """The analysis of such a store; `other` overrides."""
    tokens, count, held = int(store.lengths.sum()), len(store), int(store.held_out.sum())
    mean = tokens / count
    values = dict(
        examples=count, train_examples=count - held, eval_examples=held, tokens=tokens,
        assistant_tokens=int(store.label_counts.sum()), train_tokens=tokens, train_assistant_tokens=0, mean=mean,
        p50=0, p90=0, p95=0, p99=0, max=int(store.lengths.max()), mean_length_128=-(-int(np.ceil(mean)) // 128) * 128,
        histogram=Histogram(edges=[0, 1], counts=[1]), duplicates=0, turns=1.0, seconds=0.0, made_from="a" * 16,
    )  # fmt: skip
    return AnalysisTable.model_validate(values | other)


def table(size: str) -> ModelTable:
    """[model]."""
    return ModelTable(
        source="model", config_sha256=f"config of {size}", model_type="qwen3_5", parameters=int(SIZES[size][7]),
        vocab_size=248320, tokenizer_sha256="", chat_template={"file": "chat_template.jinja", "sha256": ""},
    )  # fmt: skip


def situation(
    store: Store, size: str = "2b", machine: Machine = SPARK, *, disk: int = 10**12, fla: bool = True, **analysed: Any
) -> Situation:
    """Everything a plan is made for."""
    return Situation(
        run=Path("runs/r1"),
        analyze="sparkctl analyze chats.jsonl --run runs/r1",
        analysis=analysis(store, **analysed),
        table=table(size),
        model=model(size),
        store=store,
        machine=machine,
        disk=disk,
        store_bytes=1000,
        fla=fla,
    )


def wishes(recipe: Choices | None = None, parent: Any = None, auto: tuple[str, ...] = (), **flags: Any) -> Wishes:
    """What was asked for."""
    return Wishes(Choices(**flags), frozenset(auto), recipe, "mine" if recipe else None, parent)

"""What planner tests start from: the published sizes, stores of given lengths, machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparkctl.hardware.shape import Shape
from sparkctl.manifest.schema import AnalysisTable, Choices, Histogram, Machine, ModelTable
from sparkctl.model import catalog, families
from sparkctl.model.families import Count
from sparkctl.plan.estimates import Model
from sparkctl.plan.request import Situation, Wishes

GB = 10**9

SPARK = Machine(name="NVIDIA GB10", device="cuda", capability="12.1", memory=115 * GB, unified_memory=True, cores=20)
H200 = Machine(name="NVIDIA H200", device="cuda", capability="9.0", memory=140 * GB, cores=16)
CPU = Machine(name="a processor", device="cpu", capability=None, memory=24 * GB, cores=2)


def config(size: str) -> dict[str, Any]:
    """A published config.json, by its size: "2b"."""
    return catalog.config(f"qwen3.5-{size}")


def count(size: str) -> Count:
    """What that config.json amounts to."""
    return families.count("qwen3_5", config(size), Path("config.json"))


def model(size: str) -> Model:
    """The model's numbers."""
    of = count(size)
    return Model(
        Shape.from_config(of.config, of.text_parameters), of.text_parameters, of.adapter_width, 2 * of.parameters
    )


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
        source="model", config_sha256=f"config of {size}", model_type="qwen3_5", parameters=count(size).parameters,
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

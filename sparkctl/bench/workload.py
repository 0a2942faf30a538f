"""What a measured step computes: a model's shape, one pack of documents, and what is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparkctl.data.batches import Document, Pack
from sparkctl.manifest.schema import Lora
from sparkctl.manifest.table import Mode

if TYPE_CHECKING:
    import torch

LABEL_SHARE = 0.35  # of each document, at its end: the answer


@dataclass(frozen=True)
class Workload:
    """One micro-step. lengths: tokens of the pack's documents; config: config.json of the model.

    draft_steps: of the MTP head, which is trained in place of the model; 0: the model is, in `mode`. checkpoint: the
    folder with the model's weights; None: random ones.
    """

    config: dict[str, Any]
    mode: Mode
    lengths: tuple[int, ...]
    labels: tuple[int, ...]  # label tokens of each document, its last
    rank: int = 128
    checkpointing: bool = False
    seed: int = 0
    draft_steps: int = 0
    checkpoint: str | None = None

    @classmethod
    def loads(cls, text: str) -> Workload:
        """From what `dumps` wrote."""
        values = json.loads(text)
        return cls(**{**values, "lengths": tuple(values["lengths"]), "labels": tuple(values["labels"])})

    def dumps(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))

    @property
    def text(self) -> dict[str, Any]:
        """The text model's config."""
        text: dict[str, Any] = self.config.get("text_config") or self.config
        return text

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return sum(self.lengths)

    @property
    def trained(self) -> Mode | Literal["mtp"]:
        """The mode, or mtp: the head of a frozen model."""
        return "mtp" if self.draft_steps else self.mode

    @property
    def lora(self) -> Lora | None:
        """Adapters of the rank, at scale 1; None in full fine-tuning."""
        return Lora(r=self.rank, alpha=self.rank) if self.mode == "lora" else None

    def pack(self) -> Pack:
        """Random ids in these documents."""
        random, vocabulary = np.random.RandomState(self.seed), int(self.text["vocab_size"])
        documents = []
        for id, (length, labels) in enumerate(zip(self.lengths, self.labels, strict=True)):
            ids = random.randint(0, vocabulary, length).astype(np.int32)
            documents.append(Document(id, ids, np.arange(length) >= length - labels))
        return Pack(documents, self.tokens, sum(self.labels))


def synthetic(config: dict[str, Any], mode: Mode, pack: int, documents: int, **rest: Any) -> Workload:
    """`documents` of uneven lengths that fill `pack` to the token, labels on the last 35 % of each, one at least."""
    lengths = spread(pack, documents)
    return Workload(config, mode, lengths, tuple(max(1, int(n * LABEL_SHARE)) for n in lengths), **rest)


def spread(total: int, count: int, seed: int = 1) -> tuple[int, ...]:
    """`count` lengths of at least 2 that sum to `total`, log-normal as chats are (σ = 0.8)."""
    weights = np.exp(0.8 * np.random.RandomState(seed).randn(count))
    lengths = 2 + np.floor((total - 2 * count) * weights / weights.sum()).astype(int)
    lengths[np.argmax(lengths)] += total - lengths.sum()
    return tuple(int(n) for n in lengths)


def model_of(workload: Workload, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' text model, frozen: of the workload's checkpoint, else random weights. Raises SparkError."""
    if workload.checkpoint is None:
        return random_model(workload, device, dtype)
    from sparkctl.model.load import load_text_model

    return load_text_model(Path(workload.checkpoint), dtype=dtype, device=device)


def random_model(workload: Workload, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' text model of the shape with random weights, made on the device: no checkpoint is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = str(workload.text.get("model_type", workload.config.get("model_type")))
    config = AutoConfig.for_model(kind, **{k: v for k, v in workload.text.items() if k != "model_type"})
    torch.manual_seed(workload.seed)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model.requires_grad_(False)


def checkpoint_folder(workload: Workload, folder: Path, device: torch.device) -> Path:
    """The workload's checkpoint, or a random model as a folder that any tool loads, with the demo's tokenizer: for
    stacks that take no model."""
    if workload.checkpoint is not None:
        return Path(workload.checkpoint)
    import torch

    from sparkctl.demo.model import write_files

    random_model(workload, device, torch.bfloat16).save_pretrained(folder)
    config = (folder / "config.json").read_text()
    write_files(folder)
    (folder / "config.json").write_text(config)
    return folder

"""Runs that are ready to train, made by hand: manifest, token store and plan without `analyze` or `recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparkctl.data.stats import describe
from sparkctl.data.tokens import Row, TokenStore, TokenStoreWriter
from sparkctl.files import sha256_bytes, sha256_file
from sparkctl.manifest import schema
from sparkctl.manifest.schema import Lora, MemoryTerms, PlanTable
from sparkctl.manifest.store import Run, now

VOCABULARY = 272
HELD_OUT = 8  # one document in so many


def plan(**changes: Any) -> PlanTable:
    """A plan of a few quick steps on a CPU; `changes` are its fields."""
    zero = MemoryTerms(weights=0, masters=0, gradients=0, optimizer=0, activations=0, logits=0, runtime=0)
    values = dict(
        mode="lora", engine="reference", tokens_per_step=256, pack_length=64, gradient_accumulation=4, epochs=2,
        steps=8, learning_rate=1e-2, schedule="cosine", warmup_steps=2, min_lr_fraction=0.1, weight_decay=0.01,
        max_grad_norm=1.0, checkpointing=False, save_every=3, keep=2, seed=7,
        estimates=schema.Estimates(
            steps=8, seconds=10, start_seconds=4, tokens_per_second=100, throughput_from="test", peak_memory=1,
            memory=zero, disk=1, trainable_parameters=1,
        ),
        machine=schema.Machine(name="test", device="cpu", memory=1 << 33, cores=1), made_from="test",
    )  # fmt: skip
    values |= changes
    if values["mode"] == "lora":
        values.setdefault("lora", Lora(r=4, alpha=6))  # a scale that is not 1
    return PlanTable(**values)


def documents(count: int, *, longest: int = 40, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and trained masks; the sequences count upwards by three, so that there is something to learn."""
    random = np.random.RandomState(seed)
    made = []
    for _ in range(count):
        length = random.randint(6, longest + 1)
        ids = ((random.randint(0, 200) + 3 * np.arange(length)) % 256).astype(np.int32)
        made.append((ids, np.arange(length) >= length // 3))
    return made


def store(folder: Path, made: list[tuple[np.ndarray, np.ndarray]], held_out: np.ndarray | None = None) -> TokenStore:
    """A token store of these documents."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = TokenStoreWriter(folder)
    for i, (ids, trained) in enumerate(made):
        writer.add(Row(ids, trained, i, i.to_bytes(16, "big"), f"chats.jsonl:{i + 1}"))
    if held_out is None:
        held_out = np.arange(len(made)) % HELD_OUT == 0
    writer.finish(held_out)
    return TokenStore.open(folder)


def run(
    root: Path, model: Path, *, parent: Run | None = None, continues: bool = False, count: int = 40, seed: int = 0,
    **changes: Any,
) -> Run:  # fmt: skip
    """A run with everything that `train` reads. `seed` is that of its documents; `changes` go into the plan."""
    made = Run.create(root, parent=parent, continues=continues)
    tokens = store(root / "tokens", documents(count, seed=seed))
    numbers = describe(
        tokens.lengths, tokens.label_counts, tokens.held_out, token_keys=np.arange(count, dtype=np.uint64),
        turns=tokens.turns,
    )  # fmt: skip
    (root / "chat_template.jinja").write_text("template")
    with made.edit() as manifest:
        manifest.model = schema.ModelTable(
            source=made.relative(model), config_sha256=sha256_file(model / "config.json"), model_type="test",
            parameters=1, vocab_size=VOCABULARY, tokenizer_sha256="test",
            chat_template=schema.ChatTemplate(file="chat_template.jinja", sha256=sha256_bytes(b"template")),
        )  # fmt: skip
        manifest.data = schema.DataTable(files=[])
        manifest.analysis = schema.AnalysisTable(
            **{name: getattr(numbers, name) for name in type(numbers).__dataclass_fields__},
            digest=tokens.digest, seconds=0, made_from="test",
        )  # fmt: skip
        manifest.plan = plan(**changes)
        manifest.checkpoints = [
            schema.Checkpoint(id="base", kind="base", path=manifest.model.source, created=now(), digest="test")
        ]
    return made

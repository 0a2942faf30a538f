"""Runs as training leaves them, made by hand: manifest and checkpoints, no token store."""

from __future__ import annotations

from pathlib import Path

import merging
import torch
from safetensors.torch import load_file

from sparkctl.files import sha256_bytes, sha256_file
from sparkctl.manifest import schema
from sparkctl.manifest.schema import Checkpoint, Lora, PlanTable
from sparkctl.manifest.store import Run, now
from sparkctl.train import state
from sparkctl.train.optim import Optimizer

LORA = Lora(r=4, alpha=6)


def trained_run(root: Path, model: Path, *, steps: tuple[int, ...] = (3, 6), parent: Run | None = None) -> Run:
    """A LoRA run whose best checkpoint is the first of `steps`, its last the last; held-out losses are step / 10."""
    run = Run.create(root, parent=parent)
    template = (model / "chat_template.jinja").read_bytes()
    (root / "chat_template.jinja").write_bytes(template)
    entries = []
    for step in steps:
        trained = merging.adapters(model, root / "t.safetensors", LORA, seed=step)
        entries.append(
            save(run, load_file(trained), state.State(mode="lora", lora=LORA, step=step, eval_loss=step / 10))
        )
        trained.unlink()
    with run.edit() as manifest:
        manifest.model = schema.ModelTable(
            source=run.relative(model), config_sha256=sha256_file(model / "config.json"), model_type="qwen3_5",
            parameters=1, vocab_size=272, tokenizer_sha256="test",
            chat_template=schema.ChatTemplate(file="chat_template.jinja", sha256=sha256_bytes(template)),
        )  # fmt: skip
        manifest.data = schema.DataTable(
            files=[schema.DataFile(path="../../secret/chats.jsonl", sha256="ab" * 32, size=9, mtime_ns=1, examples=40)]
        )
        manifest.analysis = schema.AnalysisTable(
            examples=40, train_examples=35, eval_examples=5, tokens=1000, assistant_tokens=500, train_tokens=900,
            train_assistant_tokens=400, mean=25, p50=25, p90=30, p95=31, p99=32, max=33, mean_length_128=128,
            histogram=schema.Histogram(edges=[0, 40], counts=[40]), duplicates=0, turns=1, seconds=1, made_from="test",
        )  # fmt: skip
        manifest.plan = plan(steps[-1])
        manifest.train = schema.TrainTable(
            status="done", started=now(), engine="reference", versions={}, made_from="x", step=steps[-1],
            steps=steps[-1], trainable_parameters=1, first_loss=3.0, final_loss=0.5, first_eval_loss=2.5,
            best_eval_loss=steps[0] / 10, best_checkpoint=entries[0].id, last_checkpoint=entries[-1].id,
            estimated_seconds=1, estimated_peak_memory=1,
        )  # fmt: skip
        manifest.checkpoints = entries
    return run


def save(run: Run, weights: dict[str, torch.Tensor], at: state.State) -> Checkpoint:
    """Save a checkpoint of these fp32 weights; its entry for the manifest."""
    optimizer = Optimizer({name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}, plan(at.step))
    path = state.save(run.root / "checkpoints", at, optimizer)
    return Checkpoint(
        id=path.name, kind="step", parent="base", path=run.relative(path), step=at.step, created=now(),
        digest=state.digest(path), eval_loss=at.eval_loss,
    )  # fmt: skip


def plan(steps: int) -> PlanTable:
    """A plan of `steps` steps on a CPU."""
    nothing = schema.MemoryTerms(weights=0, masters=0, gradients=0, optimizer=0, activations=0, logits=0, runtime=0)
    return PlanTable(
        mode="lora", engine="reference", lora=LORA, tokens_per_step=256, pack_length=64, gradient_accumulation=4,
        epochs=2, steps=steps, learning_rate=1e-2, schedule="cosine", warmup_steps=2, min_lr_fraction=0.1,
        weight_decay=0.01, max_grad_norm=1.0, checkpointing=False, save_every=3, keep=2, seed=7,
        estimates=schema.Estimates(
            steps=steps, seconds=10, tokens_per_second=100, throughput_from="test", peak_memory=1, memory=nothing,
            disk=1, trainable_parameters=1,
        ),
        machine=schema.Machine(name="test", device="cpu", memory=1 << 33, cores=1), made_from="test",
    )  # fmt: skip

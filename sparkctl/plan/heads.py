"""The plan of an MTP head's training: the run's own plan, with what is different for a head that is trained whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparkctl.data.batches import Schedule
from sparkctl.hardware import heads
from sparkctl.hardware.load import BF16, Load, splitting
from sparkctl.hardware.measurements import Kind, lookup
from sparkctl.hardware.shape import Shape
from sparkctl.hardware.throughput import MARGIN, operations
from sparkctl.manifest.schema import HeadPlan, PlanTable
from sparkctl.manifest.table import HeadLoss
from sparkctl.plan import estimates, rules
from sparkctl.plan.estimates import Documents

if TYPE_CHECKING:
    from sparkctl.data.tokens import TokenStore

LEARNING_RATE = 1e-4  # a head is small and starts from one that is nearly right: five times full fine-tuning's
PACK = 8192  # tokens: the frozen model keeps nothing for a backward, so that longer packs cost no memory to speak of
EPOCHS, SAVES, KEEP = 1, 5, 1


@dataclass(frozen=True)
class HeadWishes:
    """The flags of `sparkctl mtp train`; None leaves a choice to the rules."""

    steps: int = 3
    loss: HeadLoss = "kl"
    fresh: bool = False
    pack_length: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    learning_rate: float | None = None


def plan_head(plan: PlanTable, shape: Shape, store: TokenStore, wishes: HeadWishes, model_key: str) -> HeadPlan:
    """The plan for the head of the model that `plan` trained. model_key: [model] config_sha256."""
    documents = Documents.of(store)
    length = wishes.pack_length or usual_pack(documents.longest, plan.tokens_per_step)
    accumulation = rules.accumulation(plan.tokens_per_step, length)
    epochs = wishes.epochs or EPOCHS
    steps = Schedule(
        store, pack_length=length, gradient_accumulation=accumulation, epochs=epochs, seed=plan.seed,
        max_steps=wishes.max_steps,
    ).steps  # fmt: skip
    labels = documents.most_labels(length, plan.seed)
    fla = plan.machine.device == "cuda"
    return HeadPlan(
        tokens_per_step=plan.tokens_per_step,
        pack_length=length,
        gradient_accumulation=accumulation,
        epochs=epochs,
        max_steps=wishes.max_steps,
        steps=steps,
        learning_rate=wishes.learning_rate or LEARNING_RATE,
        schedule="cosine",
        warmup_steps=rules.warmup_steps(float(rules.warmup_fraction(steps).value), steps),
        min_lr_fraction=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_every=-(-steps // SAVES),
        keep=KEEP,
        seed=plan.seed,
        machine=plan.machine,
        draft_steps=wishes.steps,
        loss=wishes.loss,
        fresh=wishes.fresh,
        estimated_seconds=seconds(plan, shape, documents, wishes, model_key),
        estimated_start_seconds=start_seconds(shape),
        estimated_peak_memory=heads.peak(
            shape, length, documents.longest, labels, wishes.steps, plan.machine.device,
            fla=fla, multiprocessors=splitting(plan.machine.capability, shape.head_dim),
            chunks=documents.most_chunks(length, plan.seed),
        ),
    )  # fmt: skip


def usual_pack(longest: int, tokens_per_step: int) -> int:
    """Tokens of a pack where nobody asks for others."""
    return max(rules.round_up(longest), min(PACK, rules.round_up(tokens_per_step)))


def wishes_of(plan: HeadPlan, longest: int) -> HeadWishes:
    """What was asked for where this plan was made. longest: tokens of the longest example."""

    def unless(usual: float, value: float) -> Any:
        return None if value == usual else value

    return HeadWishes(
        plan.draft_steps, plan.loss, plan.fresh, unless(usual_pack(longest, plan.tokens_per_step), plan.pack_length),
        unless(EPOCHS, plan.epochs), plan.max_steps, unless(LEARNING_RATE, plan.learning_rate),
    )  # fmt: skip


def disk_bytes(shape: Shape, merged: int) -> int:
    """In mtp/ the head's checkpoints, as the rehearsal of `mtp train` asks room for them, and the head; in served/ the
    merged model once more (of so many bytes) and the head.
    """
    head = heads.parameters(shape)
    return estimates.checkpoint_bytes(head) * min(KEEP + 2, SAVES) + 2 * BF16 * head + merged


def seconds(plan: PlanTable, shape: Shape, documents: Documents, wishes: HeadWishes, model_key: str) -> float:
    """Of `mtp train`: by its own rate where it was measured here, else the model's rate by operations a token."""
    measured = lookup(plan.machine, Kind(model_key, "mtp", wishes.steps, False))
    if measured:
        rate = MARGIN * max(m.tokens_per_second for m in measured)
    else:
        rate = plan.estimates.tokens_per_second * _model_operations(plan, shape, documents)
        rate /= heads.operations(shape, documents.label_share, wishes.steps)
    trained = (wishes.epochs or EPOCHS) * documents.tokens
    if wishes.max_steps:
        trained = min(trained, wishes.max_steps * plan.tokens_per_step)
    tokens = trained + (1 + SAVES) * estimates.EVAL_SHARE * documents.held_out_tokens
    return start_seconds(shape) + tokens / rate + SAVES * estimates.save_seconds(heads.parameters(shape))


def start_seconds(shape: Shape) -> float:
    """Of them, what comes before the first step."""
    return estimates.start_seconds(estimates.save_seconds(heads.parameters(shape)))


def _model_operations(plan: PlanTable, shape: Shape, documents: Documents) -> float:
    """Operations a token of the training that `plan` describes."""
    area = plan.pack_length
    load = Load(
        plan.mode, plan.estimates.trainable_parameters, plan.lora.r if plan.lora else 0, area, documents.longest,
        int(documents.label_share * area), plan.checkpointing, plan.machine.device, engine=plan.engine,
    )  # fmt: skip
    return operations(shape, load)

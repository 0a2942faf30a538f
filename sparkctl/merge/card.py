"""The model card: what this is, what it came from, over all rounds, and how to serve it, without a local path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from sparkctl import __version__
from sparkctl.manifest.schema import Checkpoint, DataTable, Lora, Manifest, ModelTable, PlanTable, TrainTable

SERVE = "## Serve\n\n```sh\n"


@dataclass(frozen=True)
class Made:
    """What was made of a training checkpoint: a whole model, or an adapter for the class named."""

    adapter: str | None  # "multimodal" or "text"; None: a whole model
    checkpoint: Checkpoint
    changed: Sequence[str]  # base tensors that training reached
    tensors: int
    lora: Lora | None
    serve: str


def card(made: Made, rounds: Sequence[Manifest]) -> str:
    """README.md. rounds: the run's manifest, then its parent's, and so on to the first."""
    run = rounds[0]
    assert run.model
    name = f"{run.run.name}, adapter" if made.adapter else run.run.name
    parts = [
        f"---\n{_front_matter(made, run.model)}\n---",
        f"# {name}",
        f"{_model(run.model)}, fine-tuned with sparkctl {__version__}. "
        f"Made from checkpoint `{made.checkpoint.id}` of run `{run.run.id}` (digest `{made.checkpoint.digest[:16]}`).",
        f"## What changed\n\n{_changed(made)}",
        f"{SERVE}{made.serve}\n```",
        f"## Training\n\n{_training(run, made.checkpoint)}",
        f"## Lineage\n\nFrom this round back to the first.\n\n{_lineage(rounds)}",
        f"## Data\n\n{_data(rounds)}",
    ]
    return "\n\n".join(parts) + "\n"


def with_head(card: str, serve: str, head: str) -> str:
    """The card of a model that got an MTP head: served by another command, and a section that says which head it is."""
    section = f"## MTP head\n\n{head}"
    before, found, rest = card.partition(SERVE)
    if not found:  # another tool's
        return f"{card.rstrip()}\n\n{section}\n\n{SERVE}{serve}\n```\n"
    _, _, after = rest.partition("\n```")
    return f"{before}{SERVE}{serve}\n```\n\n{section}{after}"


def base_name(model: ModelTable) -> str:
    """The base as others may know it: the hub id, or the folder's own name."""
    return model.source if model.revision else PurePath(model.source).name


def _front_matter(made: Made, model: ModelTable) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_name(model),
        base_model_relation="adapter" if made.adapter else "finetune",
        library_name="peft" if made.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sparkctl", model.model_type, *(["lora"] if made.adapter else [])],
    )
    return data.to_yaml().strip()


def _model(model: ModelTable) -> str:
    return f"`{base_name(model)}`" + (f" at revision `{model.revision}`" if model.revision else "")


def _changed(made: Made) -> str:
    kinds = ", ".join(f"`{kind}`" for kind in sorted({_kind(name) for name in made.changed}))
    lora = made.lora
    scale = f"{lora.alpha}/{lora.r}" if lora else ""
    if made.adapter and lora:
        return (
            f"An adapter of rank {lora.r} in fp32, as trained, for the {made.adapter} class, on "
            f"{len(made.changed)} of the base's {made.tensors} tensors: {kinds}. It adds {scale} · B·A to each."
        )
    how = f"W + {scale} · B·A, computed in fp32" if lora else "the fp32 masters"
    return (
        f"{len(made.changed)} of {made.tensors} tensors ({kinds}): {how}, rounded once to the base's dtype. "
        "Every other tensor is the base's, byte for byte."
    )


def _kind(tensor: str) -> str:
    parts = tensor.removesuffix(".weight").split(".")
    return parts[-1]


def _training(run: Manifest, checkpoint: Checkpoint) -> str:
    rows: list[tuple[str, object]] = []
    if run.plan:
        rows += _plan(run.plan)
    if run.train:
        rows += _losses(run.train, checkpoint)
    return _table(("", ""), rows)


def _plan(plan: PlanTable) -> list[tuple[str, object]]:
    lora = f", r {plan.lora.r}, alpha {plan.lora.alpha}" if plan.lora else ""
    decay = f"{plan.schedule}, {plan.warmup_steps} warm-up steps"
    return [
        ("mode", plan.mode + lora),
        ("engine", plan.engine),
        ("epochs", plan.epochs if plan.steps != plan.max_steps else f"at most {plan.epochs}"),
        ("steps", plan.steps),
        ("tokens per step", f"{plan.gradient_accumulation} × {plan.pack_length:,}"),
        ("learning rate", f"{plan.learning_rate:g}, {decay}"),
        ("weight decay", f"{plan.weight_decay:g}"),
        ("gradient clipping", f"{plan.max_grad_norm:g}"),
        ("seed", plan.seed),
    ]


def _losses(train: TrainTable, checkpoint: Checkpoint) -> list[tuple[str, object]]:
    values = [
        ("training loss at the start", train.first_loss),
        ("training loss at the end", train.final_loss),
        ("held-out loss of the base", train.first_eval_loss),
        ("held-out loss of this checkpoint", checkpoint.eval_loss),
    ]
    return [(name, f"{value:.4f}") for name, value in values if value is not None]


def _lineage(rounds: Sequence[Manifest]) -> str:
    rows = [(run.run.name, f"`{run.run.id}`", run.run.created[:10], _examples(run), _result(run)) for run in rounds]
    return _table(("run", "id", "created", "examples", "best held-out loss"), rows)


def _examples(run: Manifest) -> str:
    return f"{run.analysis.examples:,}" if run.analysis else ""


def _result(run: Manifest) -> str:
    loss = run.train.best_eval_loss if run.train else None
    start = "continues the parent's checkpoint" if run.run.continues else "from the base"
    return f"{start}: {loss:.4f}" if loss is not None else start


def _data(rounds: Sequence[Manifest]) -> str:
    rows = [
        (run.run.name, PurePath(file.path).name, f"{file.examples:,}", f"`{file.sha256}`")
        for run in rounds
        for file in (run.data or DataTable(files=[])).files
    ]
    return _table(("run", "file", "examples", "sha256"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

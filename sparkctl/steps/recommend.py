"""`sparkctl recommend`: analysis, model and machine to [plan]."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sparkctl.errors import UsageError
from sparkctl.hardware.load import BF16
from sparkctl.hardware.machine import disk_free, has_fla, this_machine
from sparkctl.hardware.shape import Shape
from sparkctl.manifest.schema import Choices, ModelTable, PlanTable
from sparkctl.manifest.store import Run, now
from sparkctl.plan.estimates import Model
from sparkctl.plan.recipes import SUFFIX, load_recipe
from sparkctl.plan.recommend import made_from
from sparkctl.plan.recommend import recommend as make_plan
from sparkctl.plan.request import Situation, Wishes
from sparkctl.progress import Progress, silent
from sparkctl.steps.bases import require_files
from sparkctl.steps.inputs import TOKENS, analysed, analyze_command, base_moved, recorded_parent
from sparkctl.steps.training import FREE
from sparkctl.words import quoted


@dataclass(frozen=True)
class Request:
    """The command line of `sparkctl recommend`. auto: choices that the rules make, whatever recipe and parent say."""

    run: Path
    flags: Choices
    auto: frozenset[str] = frozenset()
    recipe: str | None = None


@dataclass(frozen=True)
class Result:
    """The plan as the manifest has it, or would."""

    run: Path
    plan: PlanTable
    up_to_date: bool = False


def recommend(request: Request, *, force: bool = False, dry_run: bool = False, progress: Progress = silent) -> Result:
    """Plan the run's training, unless that is done. Under `dry_run` nothing is written."""
    run = Run.open(request.run)
    with nullcontext() if dry_run else run.step("recommend"):
        table, _, analysis = analysed(run)
        wishes, machine = _wishes(request, run), this_machine()
        plan, origin = run.manifest.plan, made_from(analysis, table, wishes, machine)
        if plan and not force and plan.made_from == origin and plan.estimates.peak_memory <= machine.memory:
            return Result(request.run, plan, up_to_date=True)
        new = make_plan(_situation(request.run, run, table, progress), wishes)
        new.created = now()
        refusal = None if force else _refusal(request.run, run, new, wishes)
        if dry_run and refusal:
            progress.say(f"without `--dry-run` this is refused: {refusal.message}")
        elif refusal:
            raise refusal
        if not dry_run:
            with run.edit() as manifest:
                manifest.plan = new
        return Result(request.run, new)


def _wishes(request: Request, run: Run) -> Wishes:
    """Flags, the recipe and the parent's plan."""
    name, recipe = _recipe(request, run)
    parent = recorded_parent(run)
    plan = parent.manifest.plan if parent else None
    return Wishes(request.flags, request.auto, recipe, name, plan, request.recipe)


def _recipe(request: Request, run: Run) -> tuple[str | None, Choices | None]:
    """The flag's recipe, else the one that `analyze` was given; a file is kept relative to the run."""
    if request.recipe is not None:
        recipe = load_recipe(request.recipe)
        path = os.path.relpath(Path(request.recipe).absolute(), run.root)
        return path if request.recipe.endswith(SUFFIX) else request.recipe, recipe.choices()
    _, data, _ = analysed(run)
    if data.recipe is None:
        return None, None
    name = str(run.resolve(data.recipe)) if data.recipe.endswith(SUFFIX) else data.recipe
    return data.recipe, load_recipe(name).choices()


def _situation(shown: Path, run: Run, table: ModelTable, progress: Progress) -> Situation:
    """What the plan is made for. `shown`: the run as the user named it."""
    from sparkctl.data.tokens import TokenStore

    store = TokenStore.open(run.root / TOKENS)
    return Situation(
        run=shown,
        analyze=analyze_command(run, shown=shown),
        analysis=analysed(run)[2],
        table=table,
        model=_model(run, table, progress),
        store=store,
        machine=this_machine(),
        disk=disk_free(run.root),
        store_bytes=sum(file.stat().st_size for file in store.folder.iterdir()),
        fla=has_fla(),
    )


def _model(run: Run, table: ModelTable, progress: Progress) -> Model:
    """The model's numbers, from config.json; the size of its weights where they are here, else what they will be."""
    from sparkctl.model import mtp
    from sparkctl.model.hub import locate
    from sparkctl.model.inspect import full_parameters, inspect, lora_parameters, text_part
    from sparkctl.model.served import lacking

    source = locate(table.source, revision=table.revision, base=run.root, moved=base_moved(run), progress=progress)
    require_files(source)
    folder = source.folder
    info = inspect(folder, allow_unknown=table.allow_unknown)
    full = full_parameters(info)
    return Model(
        shape=Shape.from_config(info.config, full),
        full=full,
        adapters_by_rank=lora_parameters(info, 1),
        lacking=lacking(info, this_machine().device),
        drafts=info.model_type in mtp.TYPES and mtp.layers(text_part(info.config)) == 1,
        bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) or BF16 * table.parameters,
    )


def _refusal(shown: Path, run: Run, new: PlanTable, wishes: Wishes) -> UsageError | None:
    """Why the plan is not replaced: a training carried it out so far, and by the new one it would learn otherwise."""
    trained, before = run.manifest.train, run.manifest.plan
    if trained is None or before is None or (trained.step == 0 and trained.status != "done"):
        return None

    def learning(plan: PlanTable) -> dict[str, object]:
        return {name: value for name, value in plan.model_dump().items() if name not in FREE}

    if trained.status != "done" and learning(before) == learning(new):
        return None
    return UsageError(
        f"`{shown}` has been trained by its plan, up to step {trained.step} of {trained.steps}",
        f"plan a new round, `sparkctl analyze DATA --run NEW --parent {quoted(shown)}`, or begin this anew: "
        f"`{wishes.command(shown)} --force`",
    )

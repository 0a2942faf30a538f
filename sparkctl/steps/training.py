"""A run's training as its manifest plans it: what `train`, `resume` and the gate start from. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparkctl.errors import SparkError, UsageError
from sparkctl.files import sha256_file
from sparkctl.hardware.measurements import Kind
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import BaseTable, Manifest, ModelTable, PlanTable, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import CheckpointKind, EngineName
from sparkctl.progress import Progress
from sparkctl.steps.bases import read_base, require_whole, same_base
from sparkctl.steps.inputs import TOKENS, analysed, analyze_command, base_moved, recommend_command, recorded_parent
from sparkctl.train import state
from sparkctl.train.ranks import Ranks, joined
from sparkctl.words import counted, quoted

if TYPE_CHECKING:
    from sparkctl.data.tokens import TokenStore
    from sparkctl.train.session import Session

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
# how a plan is carried out, not what comes of it: these may change between a start and a resume
FREE = {
    "tokens_per_step", "steps", "checkpointing", "save_every", "keep", "recipe", "asked", "reasons", "origin",
    "estimates", "machine", "created", "made_from",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A training that can be started: its tables are there and fit each other and the token store."""

    run: Run
    plan: PlanTable
    model: ModelTable
    parent: tuple[Run, Path] | None  # the run and the checkpoint that `--continue` starts from
    made_from: str
    allow_slow: bool = False  # a GPU may compute in plain torch what lacks its fast kernel

    kind: ClassVar[CheckpointKind] = "step"
    prefix: ClassVar[str] = ""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run.root / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """A line for every step."""
        return self.run.root / METRICS

    @property
    def before(self) -> TrainTable | None:
        """What is recorded of it."""
        return self.run.manifest.train

    @property
    def again(self) -> str:
        """The command that goes on with it."""
        return f"sparkctl resume {quoted(self.run.root)}"

    @property
    def parent_id(self) -> str:
        """The checkpoint that it starts from, as [[checkpoints]] calls it."""
        return f"{self.parent[0].manifest.run.id}:{self.parent[1].name}" if self.parent else "base"

    def estimates(self) -> tuple[EngineName, float, int]:
        """(engine, seconds of the loop, peak memory) as planned."""
        costs = self.plan.estimates
        return self.plan.engine, costs.seconds - costs.start_seconds, costs.peak_memory

    def alike(self, processes: int) -> Kind:
        """What its rate tells of."""
        plan = self.plan
        rank = plan.lora.r if plan.lora else 0
        return Kind(self.model.config_sha256, plan.mode, rank, plan.checkpointing, processes)

    def note(self, manifest: Manifest, table: TrainTable) -> None:
        """Write down what has become of it."""
        manifest.train = table

    def base(self, checkpoint: Path | None, progress: Progress) -> BaseTable | None:
        """The weights to train on.

        Raises UsageError where the tokenizer is another, or a training that goes on began with other weights,
        SparkError where one that begins could not be merged, or would continue a damaged checkpoint.
        """
        folder = self.model_folder(progress)
        if checkpoint is None:
            require_whole(folder)
            if self.parent:
                state.verify(self.parent[1])
        require_tokenizer(self.run, self.model, folder)
        same = same_base(self.run, self.before, folder, self.model, progress) if checkpoint and self.before else None
        return same or read_base(folder, self.model, None, progress)

    def open(self, choices: dict[str, str] | None, ranks: Ranks, progress: Progress) -> Session:
        """It in memory, before step 1. choices: those of an earlier start that it goes on with."""
        from sparkctl.train.session import Session, advice

        session = Session.open(
            self.plan, self.model_folder(progress), whole_store(self.run), choices=choices, ranks=ranks,
            name=quoted(self.run.root), allow_slow=self.allow_slow,
            advice=advice(recommend_command(self.run), analyze_command(self.run), analysed(self.run)[2].max),
        )  # fmt: skip
        if self.parent:
            session.start_from(self.parent[1])
        return session

    def store(self) -> TokenStore:
        """The run's tokens."""
        from sparkctl.data.tokens import TokenStore

        return TokenStore.open(self.run.root / TOKENS)

    def model_folder(self, progress: Progress) -> Path:
        """The base model with its weights, as it was analysed. Raises UsageError where it is another by now."""
        return model_folder(self.run, self.model, progress)


def whole_store(run: Run) -> TokenStore:
    """The run's tokens, each byte of them as `analyze` wrote it. Raises SparkError where one is not."""
    from sparkctl.data.tokens import TokenStore, intact

    store = TokenStore.open(run.root / TOKENS)
    if not intact(store.folder):
        raise SparkError(
            f"`{store.folder}` is damaged: its rows are not those that `analyze` wrote",
            analyze_command(run, "--force"),
        )
    return store


def model_folder(run: Run, model: ModelTable, progress: Progress) -> Path:
    """The folder of a run's base model, downloaded where needed."""
    from sparkctl.model.hub import locate

    source = locate(
        model.source, revision=model.revision, base=run.root, weights=True, moved=base_moved(run), progress=progress
    )
    if sha256_file(source.folder / "config.json") != model.config_sha256:
        raise UsageError(
            f"`{source.folder / 'config.json'}` is not the one that `analyze` saw",
            analyze_command(run, "--force"),
        )
    return source.folder


def require_tokenizer(run: Run, model: ModelTable, folder: Path) -> None:
    """Raise UsageError where the base's tokenizer is not the one that `analyze` read the chats with: what was trained
    on its ids would be merged beside another. An earlier version's run does not know its files."""
    from sparkctl.data.tokenizer import file_digests, load_tokenizer

    if model.tokenizer_files in (None, fingerprint(file_digests(folder))):
        return
    if load_tokenizer(folder).sha256 != model.tokenizer_sha256:
        raise UsageError(
            f"the tokenizer in `{folder}` is not the one that `analyze` read the chats with",
            f"put it back, or read them anew: `{analyze_command(run, '--force')}`",
        )


@contextmanager
def claimed(run: Run, step: str) -> Iterator[Ranks]:
    """The run held for a step, and the processes that work on it: of several, the first holds it, and the others see
    it as it was then."""
    with joined() as ranks, run.step(step) if ranks.writes else nullcontext():
        ranks.meet()
        if not ranks.writes:
            run.read()
        yield ranks


def planned(run: Run, allow_slow: bool = False) -> Job:
    """The run's training. Raises UsageError naming the step that is missing or has to be done again."""
    from sparkctl.data.tokens import stored_digest

    model, _, analysis = analysed(run)
    plan = run.manifest.plan
    if plan is None:
        raise UsageError(f"no [plan] in `{run.root}`", f"sparkctl recommend {quoted(run.root)}")
    check_fresh(run, plan)
    if stored_digest(run.root / TOKENS) != analysis.digest:
        raise UsageError(f"`{run.root / 'tokens'}` is not what `analyze` wrote", analyze_command(run, "--force"))
    parent = continued(run, plan) if run.manifest.run.continues else None
    start = state.digest(parent[1]) if parent else None
    settings = {name: value for name, value in plan.model_dump(mode="json").items() if name not in FREE}
    made_from = fingerprint(settings, analysis.digest, model.config_sha256, start)
    return Job(run, plan, model, parent, made_from, allow_slow)


def check_fresh(run: Run, plan: PlanTable) -> None:
    """Raise UsageError where the analysis is not the one that the plan was made from."""
    from sparkctl.plan.recommend import is_made_from

    if not is_made_from(plan, analysed(run)[2]):
        raise UsageError(f"the plan of `{run.root}` was made from another analysis", recommend_command(run))


def complete(job: Job) -> bool:
    """Whether the checkpoints that [train] speaks of are there as they were written: what is newer is read."""
    trained = job.run.manifest.train
    wanted = {id for id in (trained.best_checkpoint, trained.last_checkpoint) if id} if trained else set()
    for id in wanted:
        entry, path = job.run.manifest.checkpoint(id), job.checkpoints / id
        if not entry or not state.intact(path) or state.digest(path) != entry.digest:
            return False
    return bool(wanted)


def parent_of(run: Run) -> tuple[Run, Path]:
    """The round before and its best checkpoint. Raises UsageError where either is not there, or where the parent was
    trained on what is held out here.
    """
    parent = recorded_parent(run)
    if parent is None:
        raise UsageError(f"`{run.root}` has no parent", analyze_command(run, "--parent", "RUN"))
    trained = parent.manifest.train
    if trained is None or trained.best_checkpoint is None:
        raise UsageError(f"the parent `{parent.root}` has no checkpoint", f"sparkctl train {quoted(parent.root)}")
    checkpoint = parent.root / CHECKPOINTS / trained.best_checkpoint
    if not checkpoint.is_dir():
        raise UsageError(
            f"the parent's best checkpoint `{checkpoint}` is gone", f"sparkctl resume {quoted(parent.root)}"
        )
    _require_unseen(run, parent)
    return parent, checkpoint


def _require_unseen(run: Run, parent: Run) -> None:
    """Raise UsageError where examples held out here are the parent's to train on, so that their loss flatters it."""
    import numpy as np

    from sparkctl.data.tokens import TokenStore

    if not (parent.root / TOKENS).is_dir():
        return
    ours, theirs = TokenStore.open(run.root / TOKENS), TokenStore.open(parent.root / TOKENS)
    seen = np.isin(ours.prompt_keys[ours.held_out], theirs.prompt_keys[~theirs.held_out])
    if not seen.any():
        return
    here, there = (owner.manifest.data.eval_fraction for owner in (run, parent) if owner.manifest.data)
    fraction = there if there < here else 0.0
    command = analyze_command(run, "--eval-fraction", f"{fraction:g}", "--force")
    raise UsageError(
        f"the parent `{parent.root}` was trained on {np.count_nonzero(seen):,} of the "
        f"{counted(len(seen), 'example')} that `{run.root}` holds out, so their loss would flatter it",
        command if fraction else f"`{command}` holds none out; then nothing is measured, and `--gate` has to go",
    )


def continued(run: Run, plan: PlanTable) -> tuple[Run, Path]:
    """Where `--continue` starts. Raises UsageError unless base, tokenizer, mode and rank are the parent's."""
    parent, checkpoint = parent_of(run)
    model, theirs, trained = analysed(run)[0], analysed(parent)[0], state.read_state(checkpoint)
    differences = [
        what
        for what, same in (
            ("base model", model.config_sha256 == theirs.config_sha256),
            ("tokenizer", model.tokenizer_sha256 == theirs.tokenizer_sha256),
            ("mode", plan.mode == trained.mode),
            ("LoRA rank and alpha", plan.lora == trained.lora),
        )
        if not same
    ]
    if differences:
        raise UsageError(
            f"`{run.root}` cannot continue `{parent.root}`: another {' and another '.join(differences)}",
            f"plan it alike, as `sparkctl recommend {quoted(run.root)}` does, or analyze without `--continue`",
        )
    return parent, checkpoint

"""The training of a run's MTP head, as steps/record.py carries it out. Loads no torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparkctl.hardware.measurements import Kind
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import BaseTable, HeadPlan, Manifest, MtpTable, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import CheckpointKind, EngineName
from sparkctl.plan.heads import HeadWishes, wishes_of
from sparkctl.progress import Progress
from sparkctl.steps.inputs import TOKENS
from sparkctl.steps.training import CHECKPOINTS, METRICS, whole_store
from sparkctl.train.ranks import Ranks
from sparkctl.words import quoted

if TYPE_CHECKING:
    from sparkctl.data.tokens import TokenStore
    from sparkctl.mtp.source import HeadSource
    from sparkctl.train.session import Session

FOLDER = "mtp"
HEAD = f"{FOLDER}/head.safetensors"
# how a plan is carried out, not what comes of it
FREE = {
    "tokens_per_step", "steps", "save_every", "keep", "machine", "estimated_seconds", "estimated_start_seconds",
    "estimated_peak_memory",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The command line of `sparkctl mtp train`."""

    run: Path
    wishes: HeadWishes = field(default_factory=HeadWishes)
    prompts: int = 64
    allow_slow: bool = False

    def again(self, *options: str) -> str:
        """The command line once more, with more options; one that is given twice counts as the last says."""
        words, usual = ["sparkctl", "mtp", "train", str(self.run)], HeadWishes()
        for name, value in vars(self.wishes).items():
            if value != getattr(usual, name):
                flag = f"--{name.replace('_', '-')}"
                words += [flag] if value is True else [flag, f"{value}"]
        words += ["--prompts", f"{self.prompts}"] if self.prompts != Request.prompts else []
        return shlex.join([*words, *["--allow-slow"] * self.allow_slow, *options])

    @classmethod
    def recorded(cls, run: Run, shown: Path) -> Request:
        """What was asked for where [mtp] plan was made; the usual where there is none. shown: the run's folder."""
        plan, analysis = run.manifest.mtp.plan if run.manifest.mtp else None, run.manifest.analysis
        return cls(shown, wishes_of(plan, analysis.max if analysis else 0)) if plan else cls(shown)


@dataclass(frozen=True)
class HeadJob:
    """A head's training that can be started. merged: the frozen model; shipped: the base's head, None where there is
    none; parent_id: the merged model in [[checkpoints]]; again: the command that goes on with it.
    """

    run: Run
    plan: HeadPlan
    model_key: str
    merged: Path
    merged_digest: str
    shipped: HeadSource | None
    parent_id: str
    made_from: str
    again: str
    allow_slow: bool = False

    kind: ClassVar[CheckpointKind] = "mtp-head"
    prefix: ClassVar[str] = "mtp-"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.run.root / FOLDER / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """A line for every step."""
        return self.run.root / FOLDER / METRICS

    @property
    def head(self) -> Path:
        """The file with the result."""
        return self.run.root / HEAD

    @property
    def before(self) -> TrainTable | None:
        """What is recorded of it."""
        return self.run.manifest.mtp.train if self.run.manifest.mtp else None

    def estimates(self) -> tuple[EngineName, float, int]:
        """(engine, seconds of the loop, peak memory) as planned."""
        plan = self.plan
        return "native", plan.estimated_seconds - plan.estimated_start_seconds, plan.estimated_peak_memory

    def alike(self, processes: int) -> Kind:
        """What its rate tells of."""
        return Kind(self.model_key, "mtp", self.plan.draft_steps, False, processes)

    def note(self, manifest: Manifest, table: TrainTable) -> None:
        """Write down what has become of it; what was measured of another head is forgotten."""
        old = manifest.mtp if manifest.mtp and manifest.mtp.made_from == self.made_from else None
        manifest.mtp = MtpTable(
            mode="training", plan=self.plan, train=table, resumes=old.resumes if old else [],
            merged=self.merged_digest, made_from=self.made_from,
        )  # fmt: skip

    def base(self, checkpoint: Path | None, progress: Progress) -> BaseTable | None:
        """None: the merged folder has a seal of its own."""
        return None

    def store(self) -> TokenStore:
        """The run's tokens."""
        from sparkctl.data.tokens import TokenStore

        return TokenStore.open(self.run.root / TOKENS)

    def open(self, choices: dict[str, str] | None, ranks: Ranks, progress: Progress) -> Session:
        """It in memory, before step 1. choices: those of an earlier start that it goes on with."""
        from sparkctl.mtp.drafter import Drafter
        from sparkctl.mtp.engine import HeadEngine
        from sparkctl.train.rehearsal import Advice
        from sparkctl.train.session import Session
        from sparkctl.train.state import State

        plan = self.plan

        def engine() -> HeadEngine:
            drafter = Drafter.load(
                self.merged, None, plan.machine.device, choices=choices, allow_slow=self.allow_slow,
                name=quoted(self.run.root),
            )  # fmt: skip
            if plan.fresh or self.shipped is None:
                drafter.head.begin_anew(plan.seed)
            else:
                files = self.shipped.tensors
                drafter.head.load({name: file.read(name) for name, file in files.items()}, self.shipped.origin)
            return HeadEngine(drafter, steps=plan.draft_steps, decay=plan.decay, loss=plan.loss)

        advice = Advice(
            model="a machine with more memory: the whole model has to be there beside its head",
            pack=f"`{self.again} --pack-length {max(128, plan.pack_length // 2)}`, or fewer draft steps: "
            f"`{self.again} --steps 1`",
            disk=f"free some space there, then `{self.again}`",
            rate=f"{self.again} --force --learning-rate",
        )
        return Session.of(plan, whole_store(self.run), engine, State(mode="mtp"), advice, ranks)


def plan_settings(plan: HeadPlan) -> dict[str, Any]:
    """What of a plan decides what comes of it."""
    return {name: value for name, value in plan.model_dump(mode="json").items() if name not in FREE}


def head_fingerprint(plan: HeadPlan, tokens: str | None, merged: str, shipped: HeadSource | None) -> str:
    """What a trained head is made from: how, on which tokens, for which model, from which head."""
    return fingerprint(plan_settings(plan), tokens, merged, shipped.digest() if shipped and not plan.fresh else None)


def note_skip(run: Run, why: str) -> None:
    """Write down that there is no head, where [mtp] says nothing else and does not say so already."""
    recorded = run.manifest.mtp
    if recorded is None or (recorded.mode == "skipped" and recorded.skipped != why):
        with run.edit() as manifest:
            manifest.mtp = MtpTable(mode="skipped", skipped=why, made_from=fingerprint(why))

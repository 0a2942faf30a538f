"""`sparkctl mtp eval`: how much of an MTP head's drafts a server would accept, before tuning, after it, and with the
head that `mtp train` made; [mtp] acceptance. `mtp train` asks for it at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.errors import UsageError
from sparkctl.files import sha256_file
from sparkctl.manifest.evidence import Acceptance
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.store import Run, now
from sparkctl.progress import Progress, silent
from sparkctl.steps.inputs import TOKENS, analysed, hold_out_command
from sparkctl.steps.merged import merged_model
from sparkctl.steps.mtp_training import HEAD, note_skip
from sparkctl.steps.mtp_training import Request as HeadRequest
from sparkctl.steps.training import model_folder
from sparkctl.words import here, quoted

if TYPE_CHECKING:
    from sparkctl.mtp.accept import Subject
    from sparkctl.mtp.prompts import Prompt

FORMAT = 1  # of what is counted: a change here makes every recorded row stale
BASE, SHIPPED, TRAINED = "base's head on base", "base's head on tuned", "trained head on tuned"
NOT_HELPED = "training did not help: the base's head is kept"


@dataclass(frozen=True)
class Request:
    """The command line of `sparkctl mtp eval`. draft_length: tokens of the longest draft."""

    run: Path
    prompts: int = 64
    max_tokens: int = 128
    draft_length: int = 3
    allow_slow: bool = False


@dataclass(frozen=True)
class Result:
    """`rows` as measured, or as recorded where that is still true; `notes` say what is not there, and why.

    skipped: why there is nothing to measure. Under --dry-run there are only the rows that are true already.
    """

    names: list[str] = field(default_factory=list)
    rows: list[Acceptance] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None
    seconds: float = 0.0
    up_to_date: bool = False


def mtp_eval(request: Request, *, force: bool = False, dry_run: bool = False, progress: Progress = silent) -> Result:
    """Measure, and write it down where the run has an [mtp]. Raises SparkError where an earlier step is missing."""
    from sparkctl.mtp.source import NoHead

    run, began = Run.open(request.run), time.monotonic()
    with run.step("mtp eval"):
        try:
            job = gather(run, request, progress=progress)
        except NoHead as missing:
            if not (dry_run or run.read_only):
                note_skip(run, missing.message)
            return Result(skipped=missing.message)
        if not job.prompts:
            raise UsageError(
                f"`{request.run}` holds no example out to measure on",
                hold_out_command(run, request.run),
            )
        names, known = [subject.name for subject in job.subjects], [] if force else job.recorded()
        if done := len(known) == len(job.subjects):
            rows = job.table
            if TRAINED in {row.name for row in rows} - set(names):
                job.notes.append(f"`{TRAINED}` is the row of the head that was given up")
        else:
            if not dry_run and run.manifest.mtp:
                run.require_writable()
            rows = known if dry_run else measure(job, known, progress)
        if not (dry_run or done):
            job.notes.extend(_record(job, rows))
        return Result(names, rows, job.prompts, job.notes, None, round(time.monotonic() - began, 3), done)


@dataclass(frozen=True)
class Job:
    """A measurement with everything decided: whose heads on which models, over which prompts."""

    run: Run
    request: Request
    subjects: list[Subject]
    prompts: list[Prompt]
    notes: list[str]

    @property
    def table(self) -> list[Acceptance]:
        """The rows of the manifest. One more than is wanted may be there: of a trained head that did not help."""
        return self.run.manifest.mtp.acceptance if self.run.manifest.mtp else []

    def recorded(self) -> list[Acceptance]:
        """Rows of the manifest that are still true, of those that are wanted."""
        known = {row.made_from: row for row in self.table}
        return [known[subject.made_from] for subject in self.subjects if subject.made_from in known]


def gather(run: Run, request: Request, own: Path | None = None, *, progress: Progress = silent) -> Job:
    """What can be measured in a run that is merged. own: the file of the trained head; None: the one of [mtp].

    Raises NoHead where neither the base has a head nor one was trained, UsageError where the merged model is missing.
    """
    from sparkctl.data.tokens import TokenStore
    from sparkctl.model import mtp
    from sparkctl.model.inspect import inspect, text_part
    from sparkctl.mtp.accept import Subject
    from sparkctl.mtp.prompts import held_out_prompts
    from sparkctl.mtp.source import NoHead, from_file, from_folder, require_promise

    model = analysed(run)[0]
    base = model_folder(run, model, progress)
    require_promise(base, model.source)
    tuned, seal = merged_model(run, request.run)
    wanted = mtp.shapes(text_part(inspect(base, allow_unknown=True).config))
    again = HeadRequest.recorded(run, request.run).again("--force")
    own, lacking = (own, "") if own else _recorded_head(run, request)
    store = TokenStore.open(run.root / TOKENS)
    notes, made = [], _fingerprints(_weights(run, base), seal.made_from, store.digest, request)
    subjects: list[Subject] = []
    try:
        shipped = from_folder(base, wanted, model.source)
        pairs = ((BASE, base), (SHIPPED, tuned))
        subjects = [Subject(name, folder, base, made(name, shipped.digest())) for name, folder in pairs]
    except NoHead as missing:
        if own is None:
            raise
        notes.append(f"no row for the base's head: {missing.message}")
    trained = made(TRAINED, from_file(own, wanted, again).digest()) if own else None
    if own and trained and not (subjects and trained == made(TRAINED, shipped.digest())):
        subjects.append(Subject(TRAINED, tuned, own, trained))
    elif trained:  # the file holds the base's head
        notes.append(NOT_HELPED)
    else:
        notes.append(f"no row for a trained head: {lacking}")
    return Job(run, request, subjects, held_out_prompts(store, request.prompts), notes)


def _recorded_head(run: Run, request: Request) -> tuple[Path | None, str]:
    """The file of the head that `mtp train` ended with; or None, and why there is none."""
    table, own = run.manifest.mtp, run.root / HEAD
    asked = HeadRequest.recorded(run, request.run)
    if table is None or table.mode == "skipped" or not (own.is_file() or table.head):
        return None, f"`{asked.again()}` makes one"
    if table.mode == "training":
        return None, f"its training has not ended, `{asked.again()}` goes on with it"
    if not own.is_file() or sha256_file(own) != table.digest:
        return None, f"`{here(own)}` is not what `mtp train` wrote there, `{asked.again('--force')}` trains one anew"
    return own, ""


def _weights(run: Run, base: Path) -> list[tuple[str, str | int]]:
    """What the base's weights are: their digests where training noted them, else their sizes."""
    noted = run.manifest.train.base if run.manifest.train else None
    if noted:
        return [(file.name, file.sha256) for file in noted.files]
    return [(path.name, path.stat().st_size) for path in sorted(base.glob("*.safetensors"))]


def _fingerprints(
    weights: list[tuple[str, str | int]], tuned: str, tokens: str, request: Request
) -> Callable[[str, str], str]:
    """Of what a row, by its name and its head's digest, is made: the weights, the head, the prompts, and their use."""
    asked = (tokens, request.prompts, request.max_tokens, request.draft_length)

    def made_from(name: str, head: str) -> str:
        return fingerprint(FORMAT, name, weights if name == BASE else tuned, head, *asked)

    return made_from


def measure(job: Job, known: Sequence[Acceptance] = (), progress: Progress = silent) -> list[Acceptance]:
    """The rows of all subjects, in order; those that are `known` are not measured again.

    Raises SparkError where memory runs out, or where a GPU lacks a fast kernel that `allow_slow` does not forgive.
    """
    from sparkctl.hardware.machine import this_machine
    from sparkctl.mtp import accept
    from sparkctl.train import guard
    from sparkctl.train.watch import watched_alone

    there = {row.made_from: row for row in known}
    missing = [subject for subject in job.subjects if subject.made_from not in there]
    if missing:
        request, machine = job.request, this_machine()
        guard.release()  # what a training in this process has left
        guard.limit_memory(machine)
        setting = accept.Setting(
            request.max_tokens, request.draft_length, machine.device, request.allow_slow, quoted(request.run)
        )
        smaller = f"sparkctl mtp eval {quoted(request.run)} --prompts {max(1, request.prompts // 4)}"
        with watched_alone(machine, "drafts were measured"), guard.memory("the model and its answers", smaller):
            made = accept.measure(missing, [prompt.ids for prompt in job.prompts], setting, progress)
        there |= {row.made_from: row.model_copy(update={"created": now()}) for row in made}
    return [there[subject.made_from] for subject in job.subjects]


def _record(job: Job, rows: list[Acceptance]) -> list[str]:
    """Write the rows into [mtp]; what is to be said where there is none."""
    if job.run.manifest.mtp is None:
        return [f"not written down: `{job.request.run}` has no [mtp] yet"]
    with job.run.edit() as manifest:
        assert manifest.mtp
        manifest.mtp.acceptance = rows
    return []

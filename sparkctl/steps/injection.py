"""What `sparkctl mtp inject` is about to do: which model gets which head, and how many tokens that should draft."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sparkctl.errors import SparkError, UsageError
from sparkctl.files import sha256_file
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import Checkpoint, ServedTable
from sparkctl.manifest.store import Run
from sparkctl.merge.companions import companions
from sparkctl.merge.seal import SealedFile, read_seal
from sparkctl.merge.serve import model_length
from sparkctl.model import mtp
from sparkctl.model.hub import is_hub_id
from sparkctl.model.inspect import inspect
from sparkctl.mtp.draft_length import DraftLength, choose, cost, serve_drafting
from sparkctl.mtp.fetch import find_head
from sparkctl.mtp.inject import ServedSeal, Target, read_target
from sparkctl.mtp.source import HeadSource, NoHead, from_file
from sparkctl.progress import Progress
from sparkctl.steps.inputs import analysed
from sparkctl.steps.merged import back_to, merged_entry, merged_model
from sparkctl.steps.mtp_eval import SHIPPED, TRAINED
from sparkctl.steps.mtp_training import Request as HeadRequest
from sparkctl.words import here

FORMAT = 1  # of what an injection writes: a change here makes every served folder stale
FOLDER = "served"


@dataclass(frozen=True)
class Request:
    """The command line of `sparkctl mtp inject`."""

    run: Path
    mode: Literal["trained", "default"]
    into: Path | None = None  # None: the merged model
    source: str | None = None  # of the default head; None: the run's base
    out: Path | None = None  # None: served/ in the run
    link: bool = False

    @property
    def other_head(self) -> str:
        """The command line that takes another published head."""
        return replace(self, source="HUB_ID").again()

    @property
    def other_model(self) -> str:
        """The command line that takes another model."""
        return replace(self, into=Path("FOLDER")).again()

    def again(self, *options: str) -> str:
        """The command line once more, with other options."""
        words = ["sparkctl", "mtp", "inject", str(self.run), "--mode", self.mode]
        words += ["--into", str(self.into)] if self.into else []
        words += ["--from", self.source] if self.source else []
        words += ["--out", str(self.out)] if self.out and "--out" not in options else []
        return shlex.join([*words, *["--link"] * self.link, *options])


def recorded(run: Run, shown: Path, table: ServedTable) -> Request:
    """The command line that [served] was written by. shown: the run as the user named it."""
    base, into = run.manifest.model, None if table.merged else Path(here(run.resolve(table.model)))
    name, _, commit = table.source.partition("@")
    head = name if is_hub_id(name) and commit else here(run.resolve(table.source))
    own = base and base.source in (name, table.source)
    out = None if table.folder == FOLDER else Path(here(run.resolve(table.folder)))
    return Request(shown, table.mode, into, None if own or table.mode == "trained" else head, out, table.link)


class Skip(Exception):
    """There is no head for this model. hint: the way to one, where there is any."""

    def __init__(self, why: str, hint: str | None = None) -> None:
        super().__init__(why)
        self.why, self.hint = why, hint


@dataclass(frozen=True)
class Model:
    """The folder that gets the head. `known`: digests by its seal; `identity`: what it is, comparable."""

    folder: Path
    known: Mapping[str, SealedFile]
    identity: str
    merged: Checkpoint | None


@dataclass(frozen=True)
class Job:
    """An injection with everything decided."""

    run: Run
    request: Request
    model: Model
    target: Target
    head: HeadSource
    head_digest: str
    drafts: DraftLength
    started: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> Path:
        return (self.request.out or self.run.root / FOLDER).absolute()

    @property
    def shipped(self) -> bool:
        """Whether the head that `mtp train` left is the base's, since training did not help."""
        table = self.run.manifest.mtp
        return self.request.mode == "trained" and table is not None and table.mode == "shipped"

    @property
    def shown(self) -> Path:
        """`out` in the user's own words."""
        return self.request.out or self.request.run / FOLDER

    @property
    def made_from(self) -> str:
        return fingerprint(FORMAT, self.request.mode, self.head_digest, self.model.identity)

    @property
    def source(self) -> str:
        """Where the head is from, as it is written down: a hub id with its commit, or a path from the run."""
        head = self.head
        return f"{head.origin}@{head.revision}" if head.revision else self.run.relative(Path(head.origin))

    def serve(self, folder: str) -> str:
        """The command that serves `folder`."""
        length = model_length(self.target.folder, analysed(self.run)[2].max)
        return serve_drafting(folder, self.run.manifest.run.name, length, self.drafts.tokens)


def decide(run: Run, request: Request, look: bool, progress: Progress) -> Job:
    """Raises Skip, UsageError where an earlier step is missing, SparkError where model and head do not fit.

    look: no head is fetched, see `find_head`.
    """
    table, recorded = analysed(run)[0], run.manifest.mtp
    if request.into is None and table.model_type not in mtp.TYPES:
        raise Skip(f"the base is of type `{table.model_type}`, and only Qwen3.5 has an MTP head")
    if request.mode == "trained" and recorded and recorded.mode == "skipped":
        raise Skip(recorded.skipped or "the base has no MTP head")
    model = _foreign(request, request.into) if request.into else _merged(run, request)
    target = read_target(model.folder, request.other_model)
    try:
        head = _head(run, request, model, target.head, look, progress)
    except NoHead as error:
        if request.source:
            raise
        raise Skip(error.message, request.other_head) from None
    info, measure = inspect(model.folder), shlex.join(["sparkctl", "mtp", "eval", str(request.run)])
    drafts = choose(cost(info), _accepted(run, request), measure)
    job = Job(run, request, model, target, head, head.digest(), drafts)
    return replace(job, head_digest=_digest_there(job)) if head.unread else job


def _digest_there(job: Job) -> str:
    """Of a head that was not fetched: what the folder says that has the head of that commit already, or nothing."""
    sealed = read_seal(job.out, ServedSeal)
    return sealed.head_digest if sealed and sealed.source == job.source else ""


def _merged(run: Run, request: Request) -> Model:
    """The run's merged model."""
    folder, sealed = merged_model(run, request.run)
    return Model(folder, sealed.files, sealed.digest, merged_entry(run, folder))


def _foreign(request: Request, folder: Path) -> Model:
    """A folder of another tool's: known by its small files' digests, and by size and time of its weights."""
    if not folder.is_dir():
        what = f"`{folder}` is a file" if folder.exists() else f"no folder `{folder}`"
        raise UsageError(f"{what}, and `--into` names the folder of a model", request.other_model)
    weights = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    files = {name: sha256_file(folder / name) for name in companions(folder)}
    identity = fingerprint([(name, status.st_size, status.st_mtime_ns) for name, status in weights], files)
    return Model(folder, {}, identity, None)


def _head(run: Run, request: Request, model: Model, wanted: mtp.Shapes, look: bool, progress: Progress) -> HeadSource:
    """The head that the mode means."""
    base = analysed(run)[0]
    if request.mode == "trained":
        mend = HeadRequest.recorded(run, request.run).again("--force")
        return from_file(_trained(run, request, model, progress), wanted, mend)
    mend = request.other_head
    if request.source:
        return find_head(request.source, wanted, look=look, mend=mend, progress=progress)
    return find_head(
        base.source, wanted, revision=base.revision, base=run.root, look=look, mend=mend, progress=progress
    )


def _trained(run: Run, request: Request, model: Model, progress: Progress) -> Path:
    """The file that `mtp train` left. Raises SparkError where it has not ended, or was for another merged model."""
    recorded, train = run.manifest.mtp, HeadRequest.recorded(run, request.run)
    if recorded is None or recorded.mode == "training" or recorded.head is None:
        raise UsageError(
            f"`{request.run}` has no trained MTP head yet",
            f"`{train.again()}` trains one; `--mode default` takes the base's",
        )
    if model.merged and recorded.merged not in (None, model.identity):
        other, anew = back_to(run, request.run, recorded.merged), train.again("--force")
        raise UsageError(
            f"the MTP head of `{request.run}` was trained for another merged model",
            f"`{other}` takes that one again; `{anew}` trains a head for this one" if other else anew,
        )
    if recorded.mode == "shipped":
        progress.say("training the MTP head did not help: `mtp train` kept the base's own")
    path = run.resolve(recorded.head)
    if not path.is_file() or sha256_file(path) != recorded.digest:
        raise SparkError(f"`{here(path)}` is not what `mtp train` wrote there", train.again("--force"))
    return path


def _accepted(run: Run, request: Request) -> list[float] | None:
    """Tokens accepted where 1, 2, … are drafted, as `mtp eval` measured it with this head; None where it has not."""
    recorded, name = run.manifest.mtp, TRAINED if request.mode == "trained" else SHIPPED
    if recorded is None or request.into or request.source:
        return None
    if recorded.mode == "shipped":
        name = SHIPPED
    return next((row.by_length for row in recorded.acceptance if row.name == name), None)

"""`sparkctl merge`: a checkpoint of training as a folder to serve, or as an adapter; [merge], [adapter] and
[adapter_text].

The folder itself says what it was made from (`sparkctl.json` in it), so any target can be found up to date, not the
last one alone. A merge holds the run's step lock: it does not read a run whose training is going on.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparkctl.errors import UsageError
from sparkctl.files import sha256_bytes, sha256_file, sweep_stages
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import Checkpoint, MergedFolder, MergeTable, ModelTable, TrainTable
from sparkctl.manifest.store import Run, now
from sparkctl.merge.companions import companions
from sparkctl.merge.seal import Seal, SealedFile, intact, read_seal, sealed_files, untouched, write_seal
from sparkctl.merge.serve import load_text_adapter, model_length, serve_adapter, serve_model
from sparkctl.progress import Progress, silent
from sparkctl.steps.bases import same_base
from sparkctl.steps.inputs import analysed, analyze_command
from sparkctl.steps.training import CHECKPOINTS, model_folder, planned, require_tokenizer
from sparkctl.steps.written import with_folder
from sparkctl.train import state
from sparkctl.words import here, quoted

if TYPE_CHECKING:
    from sparkctl.merge.adapter import AdapterClass
    from sparkctl.merge.merge import Merged

FORMAT = 1  # of what a merge writes: a change here makes every merged folder stale
FOLDERS = {None: "merged", "multimodal": "adapter", "text": "adapter-text"}
TABLES: dict[AdapterClass | None, Literal["merge", "adapter", "adapter_text"]] = {
    None: "merge", "multimodal": "adapter", "text": "adapter_text",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The command line of `sparkctl merge`."""

    run: Path
    checkpoint: str = "best"  # best, last or an id
    out: Path | None = None  # None: merged/, adapter/ or adapter-text/ in the run
    adapter: AdapterClass | None = None  # None: the whole model

    def again(self, *options: str) -> str:
        """The command line once more, with more options; one that is given twice counts as the last says."""
        words = ["sparkctl", "merge", str(self.run)]
        words += ["--checkpoint", self.checkpoint] if self.checkpoint != "best" else []
        words += ["--adapter-only=text" if self.adapter == "text" else "--adapter-only"] if self.adapter else []
        words += ["--out", str(self.out)] if self.out and "--out" not in options else []
        return shlex.join([*words, *options])


def recorded(run: Run, shown: Path, adapter: AdapterClass | None = None) -> Request:
    """The command line that wrote [merge], or that adapter's table; the usual one where there is none.

    A checkpoint that was named and is gone gives way to the best. shown: the run as the user named it.
    """
    table: MergeTable | None = getattr(run.manifest, TABLES[adapter])
    return request_of(run, shown, adapter, table) if table else Request(shown, adapter=adapter)


def request_of(run: Run, shown: Path, adapter: AdapterClass | None, table: MergedFolder) -> Request:
    """The command line that wrote what `table` speaks of."""
    there = table.asked == "last" or run.manifest.checkpoint(table.asked) is not None
    out = None if table.folder == FOLDERS[adapter] else Path(here(run.resolve(table.folder)))
    return Request(shown, table.asked if there else "best", out, adapter)


def folders(run: Run, adapter: AdapterClass | None) -> list[MergedFolder]:
    """What is recorded of every folder that such merges wrote, the last one first."""
    table: MergeTable | None = getattr(run.manifest, TABLES[adapter])
    return [MergedFolder(**table.model_dump(exclude={"others"})), *(table.others or ())] if table else []


def superseded(run: Run, table: MergedFolder) -> str | None:
    """The checkpoint that the command which wrote `table` takes by now, where it is another one of the same training.

    What an earlier training gave is not superseded: the merge may be all that is left of it.
    """
    train = run.manifest.train
    if train is None or table.created <= train.started:
        return None
    wanted = wanted_id(train, table.asked)
    return wanted if wanted != table.checkpoint else None


def wanted_id(train: TrainTable, asked: str) -> str | None:
    """The id of a checkpoint that is named best, last or by its id; None where there is none yet."""
    return {"best": train.best_checkpoint or train.last_checkpoint, "last": train.last_checkpoint}.get(asked, asked)


@dataclass(frozen=True)
class Result:
    """`serve`: the command line that puts the folder to use; `created`: when the folder was written. Under --dry-run it
    need not be there.
    """

    folder: Path
    checkpoint: str
    tensors: int
    changed_tensors: int
    bytes: int
    serve: str
    seconds: float = 0.0
    created: str = ""
    up_to_date: bool = False


def merge(request: Request, *, force: bool = False, dry_run: bool = False, progress: Progress = silent) -> Result:
    """Merge the run's checkpoint. Raises SparkError or OSError where that cannot be done; the target is as it was."""
    run = Run.open(request.run)
    with run.step("merge"):
        job = _decide(run, request, progress)
        sealed = read_seal(job.out)
        if sealed and not force and sealed.made_from == job.made_from and intact(job.out, sealed):
            if not (dry_run or run.read_only):
                _record(job, sealed)
            _tell_training(run, progress)
            return job.result(sealed, up_to_date=True)
        if not (dry_run or run.read_only):
            sweep_stages(job.out.parent, job.out.name)
        _check_target(job, sealed, force, progress)
        require_tokenizer(run, job.model, job.base)
        state.verify(job.trained)
        if dry_run:
            return _dry_run(job)
        run.require_writable()
        written = _write(job, force, progress)
        _tell_training(run, progress)
        return job.result(written)


@dataclass(frozen=True)
class _Job:
    """A merge with everything decided."""

    run: Run
    request: Request
    model: ModelTable
    base: Path
    trained: Path  # the training checkpoint
    at: state.State
    template: str
    out: Path
    made_from: str
    started: float = field(default_factory=time.monotonic)

    @property
    def target(self) -> Path:
        """`out` in the user's own words."""
        return self.request.out or self.request.run / FOLDERS[self.request.adapter]

    @property
    def base_source(self) -> str:
        """The base as peft and vLLM find it on this machine."""
        return self.model.source if self.model.revision else str(self.base)

    def result(self, sealed: Seal, up_to_date: bool = False) -> Result:
        """What the seal of the target says."""
        return Result(
            folder=self.target,
            checkpoint=sealed.checkpoint,
            tensors=sealed.tensors,
            changed_tensors=sealed.changed_tensors,
            bytes=sealed.bytes,
            serve=_use(self, str(self.target), self.base_source),
            seconds=sealed.seconds,
            created=sealed.created,
            up_to_date=up_to_date,
        )


def _decide(run: Run, request: Request, progress: Progress) -> _Job:
    """Raises UsageError where an earlier step or the checkpoint is missing, or the base is not the one trained on."""
    model, _, _ = analysed(run)
    trained = _checkpoint(run, request, progress)
    at = state.read_state(trained)
    if request.adapter and at.lora is None:
        raise UsageError(
            f"`{run.root}` was fully fine-tuned: there is no adapter", replace(request, adapter=None).again()
        )
    assert run.manifest.train
    base = model_folder(run, model, progress)
    same_base(run, run.manifest.train, base, model, progress)
    template = (run.root / model.chat_template.file).read_bytes()
    if sha256_bytes(template) != model.chat_template.sha256:
        raise UsageError(
            f"`{run.root / model.chat_template.file}` is not the template that the run was analysed with",
            analyze_command(run, "--force"),
        )
    weights = sorted((path.name, path.stat().st_size) for path in base.glob("*.safetensors"))
    files = {name: sha256_file(base / name) for name in companions(base)}
    named = model.source if model.revision else str(base) if request.adapter else base.name  # in what is written
    made_from = fingerprint(
        FORMAT, state.digest(trained), weights, files, model.chat_template.sha256, request.adapter, named
    )
    out = (request.out or run.root / FOLDERS[request.adapter]).absolute()
    return _Job(run, request, model, base, trained, at, template.decode(), out, made_from)


def _checkpoint(run: Run, request: Request, progress: Progress) -> Path:
    """The training checkpoint that is wanted."""
    wanted, train = request.checkpoint, run.manifest.train
    there = {path.name: path for path in state.listed(run.root / CHECKPOINTS)}
    if train is None:
        raise UsageError(f"`{run.root}` has not been trained yet", f"sparkctl train {quoted(run.root)}")
    if train.gate and not train.gate.passed:
        loss = f"{train.gate.loss:.4f} held-out loss"
        progress.say(f"warning: the gate of `{run.root}` did not let this training through: {loss}")
    id = wanted_id(train, wanted)
    if wanted == "best" and train.best_checkpoint is None and id:
        progress.say(f"note: no held-out loss was measured, so there is no best checkpoint: taking the last, {id}")
    if id is None:
        raise UsageError(f"`{run.root}` has no checkpoint yet", f"sparkctl resume {quoted(run.root)}")
    if id not in there:
        mend = replace(request, checkpoint=list(there)[-1]).again() if there else f"sparkctl resume {quoted(run.root)}"
        raise UsageError(f"no checkpoint `{id}` in `{run.root}`; there: {', '.join(there) or 'none'}", mend)
    return there[id]


def _check_target(job: _Job, sealed: Seal | None, force: bool, progress: Progress) -> None:
    """Raise UsageError where the target exists, unless it is a merge's that is outdated or that `force` replaces."""
    out, root = job.out, job.run.root.resolve()
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"`{job.target}` is a file", job.request.again("--out", "FOLDER"))
    if not any(out.iterdir()):
        return
    if sealed is None:
        raise UsageError(f"`{job.target}` exists, and no merge wrote it", job.request.again("--out", "FOLDER"))
    if not force and not _outdated(job, sealed):
        again = job.request.again("--force")
        raise UsageError(f"`{job.target}` {_kept(job, sealed)}", f"`{again}` replaces it; or `--out FOLDER`")
    if root.is_relative_to(out.resolve()) or job.base.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"`{job.target}` holds what the merge reads", job.request.again("--out", "FOLDER"))
    if not force:
        progress.say(f"`{job.target}` was made from {sealed.checkpoint}: it is made anew from {job.trained.name}")


def _outdated(job: _Job, sealed: Seal) -> bool:
    """Whether this command wrote the target from an earlier checkpoint of the training, and nobody changed it since."""
    asked = (sealed.made_from, job.run.relative(job.out), job.request.checkpoint)
    wrote = [t for t in folders(job.run, job.request.adapter) if (t.made_from, t.folder, t.asked) == asked]
    return any(superseded(job.run, table) for table in wrote) and untouched(job.out, sealed)


def _kept(job: _Job, sealed: Seal) -> str:
    """Why the target, a merge's, is not replaced: the one thing that tells it from what would be written."""
    run, train, path = job.run, job.run.manifest.train, job.run.relative(job.out)
    if sealed.run != run.manifest.run.id:
        return "is the merge of another run"
    if not untouched(job.out, sealed):
        return "was changed since it was written"
    for adapter in TABLES:
        for table in folders(run, adapter):
            if adapter != job.request.adapter and (table.made_from, table.folder) == (sealed.made_from, path):
                return f"was written by `{request_of(run, job.request.run, adapter, table).again()}`"
    if train and sealed.created <= train.started:
        return f"was made from {sealed.checkpoint} of an earlier training"
    if sealed.checkpoint != job.trained.name:
        return f"was made from {sealed.checkpoint}, not from {job.trained.name}"
    return f"was made from {sealed.checkpoint} with other files of the base"


def _tell_training(run: Run, progress: Progress) -> None:
    """Say so where the training is another one than the run plans by now, or not at its end."""
    train = run.manifest.train
    try:
        now_planned = planned(run).made_from
    except UsageError:
        now_planned = None
    if train and train.made_from != now_planned:
        progress.say(
            f"warning: the training of `{run.root}` was by another plan or other data than it holds now: "
            f"`sparkctl train {quoted(run.root)} --force` trains it anew"
        )
    elif train and train.status != "done":
        progress.say(
            f"warning: the training stopped at step {train.step} of {train.steps}: "
            f"`sparkctl resume {quoted(run.root)}` ends it"
        )


def _dry_run(job: _Job) -> Result:
    from sparkctl.merge.adapter import describe_adapter
    from sparkctl.merge.merge import describe, prepare

    trained = job.trained / state.TRAINABLE
    found = prepare(job.base, trained, job.at.lora)
    merged = describe_adapter(*found, trained) if job.request.adapter else describe(*found)
    return job.result(_seal(job, merged, {}))


def _write(job: _Job, force: bool, progress: Progress) -> Seal:
    """The folder, then the manifest."""
    from sparkctl.merge.adapter import write_adapter
    from sparkctl.merge.merge import merge_checkpoint

    seals: list[Seal] = []

    def finish(stage: Path, merged: Merged) -> None:
        (stage / "README.md").write_text(_card(job, merged), encoding="utf-8")
        seals.append(_seal(job, merged, sealed_files(stage)))
        write_seal(stage, seals[0])

    replace, trained = force or job.out.exists(), job.trained / state.TRAINABLE
    if job.request.adapter and job.at.lora:
        write_adapter(
            job.base, trained, job.out, lora=job.at.lora, kind=job.request.adapter, source=job.base_source,
            revision=job.model.revision, replace=replace, finish=finish, progress=progress,
        )  # fmt: skip
    else:
        merge_checkpoint(
            job.base, trained, job.out, lora=job.at.lora, template=job.template, replace=replace, finish=finish,
            progress=progress,
        )  # fmt: skip
    _record(job, seals[0])
    return seals[0]


def _seal(job: _Job, merged: Merged, files: dict[str, SealedFile]) -> Seal:
    return Seal(
        made_from=job.made_from,
        run=job.run.manifest.run.id,
        checkpoint=job.trained.name,
        tensors=merged.tensors,
        changed_tensors=len(merged.changed),
        bytes=merged.bytes,
        seconds=round(time.monotonic() - job.started, 3),
        created=now(),
        files=files,
    )


def _record(job: _Job, sealed: Seal) -> None:
    """The result's table, and a merged model among [[checkpoints]]; nothing where they say so already."""
    path = job.run.relative(job.out)
    others = [t for t in folders(job.run, job.request.adapter) if t.folder != path and _still_holds(job.run, t)]
    table = MergeTable(
        checkpoint=sealed.checkpoint, asked=job.request.checkpoint, digest=state.digest(job.trained), folder=path,
        tensors=sealed.tensors, changed_tensors=sealed.changed_tensors, bytes=sealed.bytes, seconds=sealed.seconds,
        created=sealed.created, made_from=sealed.made_from, others=others or None,
    )  # fmt: skip
    entry = Checkpoint(
        id=f"merged-{job.at.step:06d}", kind="merged", parent=job.trained.name, path=path, step=job.at.step,
        created=sealed.created, digest=sealed.digest, eval_loss=job.at.eval_loss,
    )  # fmt: skip
    name = TABLES[job.request.adapter]
    if table == getattr(job.run.manifest, name):
        return
    with job.run.edit() as manifest:
        setattr(manifest, name, table)
        if job.request.adapter is None:
            manifest.checkpoints = with_folder(job.run, manifest, entry)


def _still_holds(run: Run, table: MergedFolder) -> bool:
    """Whether the folder is the merge that `table` speaks of, not one that something else wrote there since."""
    seal = read_seal(run.resolve(table.folder))
    return seal is not None and seal.made_from == table.made_from


def _card(job: _Job, merged: Merged) -> str:
    from sparkctl.manifest.lineage import ancestors
    from sparkctl.merge.card import Made, base_name, card

    checkpoint = job.run.manifest.checkpoint(job.trained.name)
    assert checkpoint
    use = _use(job, ".", base_name(job.model))
    made = Made(job.request.adapter, checkpoint, merged.changed, merged.tensors, job.at.lora, use)
    return card(made, [job.run.manifest, *(run.manifest for run in ancestors(job.run))])


def _use(job: _Job, folder: str, base: str) -> str:
    """The command that serves `folder`."""
    name, length = job.run.manifest.run.name, model_length(job.base, analysed(job.run)[2].max)
    if job.at.lora is None or job.request.adapter is None:
        return serve_model(folder, name, length)
    if job.request.adapter == "text" and job.model.model_type == "qwen3_5":
        return load_text_adapter(base, folder)
    return serve_adapter(base, folder, name, length, job.at.lora.r)

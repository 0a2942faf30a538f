"""`sparkctl mtp inject`: the merged model, or another folder, with an MTP head in it; [served].

A base without a head is no error: [mtp] says so, and the merged model is served as it is. The folder is sealed as a
merge's is (`sparkctl.json`), so that it can be found up to date without torch.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sparkctl.errors import UsageError
from sparkctl.files import sweep_stages
from sparkctl.manifest.schema import Checkpoint, ServedTable
from sparkctl.manifest.store import Run, now
from sparkctl.merge.card import with_head
from sparkctl.merge.seal import SealedFile, intact, read_seal, sealed_files, write_seal
from sparkctl.merge.serve import model_length, serve_model
from sparkctl.mtp.inject import ServedSeal, inject_head, linked
from sparkctl.progress import Progress, silent
from sparkctl.steps.injection import Job, Request, Skip, decide
from sparkctl.steps.inputs import analysed
from sparkctl.steps.mtp_training import note_skip
from sparkctl.steps.written import with_folder
from sparkctl.words import counted, here, quoted

CARD = "README.md"


@dataclass(frozen=True)
class Result:
    """`serve`: the command that serves the folder; `reason`: why it drafts so many tokens; `created`: when it was
    written. `shipped`: the head of mode `trained` is the base's, since training did not help. `unlinked`: why
    `--link` left shards that are no links, and what makes them. `skipped`: why there is no head, where `folder` is the
    merged model. Under --dry-run the folder need not be there.
    """

    mode: str
    folder: str
    serve: str
    model: str = ""
    source: str = ""
    shipped: bool = False
    tensors: int = 0
    linked: int = 0
    unlinked: str = ""
    bytes: int = 0
    head_digest: str = ""
    draft_length: int = 0
    reason: str = ""
    seconds: float = 0.0
    created: str = ""
    up_to_date: bool = False
    skipped: str | None = None


def inject(request: Request, *, force: bool = False, dry_run: bool = False, progress: Progress = silent) -> Result:
    """Write the served folder. Raises SparkError or OSError where that cannot be done; the target is as it was."""
    if request.mode == "trained" and request.source:
        raise UsageError("`--from` names a published head", "take it with `--mode default`")
    run = Run.open(request.run)
    with run.step("mtp inject"):
        try:
            job = decide(run, request, dry_run, progress)
        except Skip as skip:
            return _skip(run, request, skip, dry_run, progress)
        sealed = read_seal(job.out, ServedSeal)
        if sealed and not force and sealed.made_from == job.made_from and intact(job.out, sealed):
            if not (dry_run or run.read_only):
                _record(job, sealed)
            return _result(job, sealed, up_to_date=True)
        if not (dry_run or run.read_only):
            sweep_stages(job.out.parent, job.out.name)
        _check_target(job, sealed, force)
        if dry_run:
            return _result(job, _seal(job, {}), written=False)
        run.require_writable()
        return _write(job, force, progress)


def _result(job: Job, sealed: ServedSeal, up_to_date: bool = False, written: bool = True) -> Result:
    """What the seal says, and what is seen of the folder where it is written."""
    links = linked(job.target, job.out) if written else 0
    return Result(
        mode=job.request.mode,
        folder=str(job.shown),
        serve=job.serve(str(job.shown)),
        model=here(job.target.folder),
        source=job.head.origin if job.head.revision else here(Path(job.head.origin)),
        shipped=job.shipped,
        tensors=sealed.tensors,
        linked=links,
        unlinked=_unlinked(job, links, up_to_date, written) if job.request.link else "",
        bytes=sealed.bytes,
        head_digest=sealed.head_digest,
        draft_length=job.drafts.tokens,
        reason=job.drafts.reason,
        seconds=sealed.seconds,
        created=sealed.created,
        up_to_date=up_to_date,
    )


def _unlinked(job: Job, links: int, up_to_date: bool, written: bool) -> str:
    """Why a shard is no link although `--link` asked for it, and the command that makes it one; empty where all are."""
    mixed = [f"`{shard.file.path.name}`" for shard in job.target.shards if not shard.whole]
    copies = len(job.target.shards) - len(mixed) - links if written else 0
    if mixed:
        then = replace(job.request, into=job.shown, out=None).again("--out", "FOLDER")
        holds = "holds" if len(mixed) == 1 else "hold"
        anew = "and is written anew without it" if len(mixed) == 1 else "and are written anew without it"
        return (
            f"{', '.join(mixed)} {holds} an MTP head among other tensors, {anew}; with the head in a file of its own, "
            f"as in `{job.shown}`, a model is linked: `{then}`"
        )
    if copies and up_to_date:
        return f"the folder was written without links; `{job.request.again('--force')}` makes them"
    if copies:
        there = f"the file system of `{job.shown}` takes no hard link to `{here(job.target.folder)}`"
        return f"{there}; `{job.request.again('--out', 'FOLDER')}` with a folder beside the model can"
    return ""


def _check_target(job: Job, sealed: ServedSeal | None, force: bool) -> None:
    """Raise UsageError where the target exists, unless it is an injection's and `force` replaces it."""
    out, elsewhere = job.out, job.request.again("--out", "FOLDER")
    if out.is_file():
        raise UsageError(f"`{job.shown}` is a file", elsewhere)
    if above := next((parent for parent in out.parents if parent.is_file()), None):
        raise UsageError(f"`{here(above)}` is a file: `{job.shown}` cannot be in it", elsewhere)
    if not out.exists() or not any(out.iterdir()):
        return
    if sealed is None:
        raise UsageError(f"`{job.shown}` exists, and no `mtp inject` wrote it", elsewhere)
    if not force:
        what = "exists already" if sealed.made_from == job.made_from else "was made from another model or another head"
        again = job.request.again("--force")
        raise UsageError(f"`{job.shown}` {what}", f"`{again}` replaces it; or `--out FOLDER`")
    read = [job.run.root, job.target.folder, *(file.path for file in job.head.tensors.values())]
    if any(path.resolve().is_relative_to(out.resolve()) for path in read):
        raise UsageError(f"`{job.shown}` holds what is to be read", elsewhere)


def _write(job: Job, force: bool, progress: Progress) -> Result:
    """The folder, then the manifest."""
    seals: list[ServedSeal] = []

    def finish(stage: Path, digests: dict[str, SealedFile]) -> None:
        card = job.target.folder / CARD
        if card.is_file():
            as_it_is = {"encoding": "utf-8", "errors": "surrogateescape"}  # another tool's may be in any encoding
            text = with_head(card.read_text(**as_it_is), job.serve("."), _described(job))
            (stage / CARD).write_text(text, **as_it_is)
        seals.append(_seal(job, sealed_files(stage, digests)))
        write_seal(stage, seals[0])

    inject_head(
        job.target, job.head, job.out, known=job.model.known, link=job.request.link, replace=force or job.out.exists(),
        merge=f"sparkctl merge {quoted(job.request.run)} --force",
        elsewhere=f"`{job.request.again('--out', 'FOLDER')}`", finish=finish, progress=progress,
    )  # fmt: skip
    _record(job, seals[0])
    return _result(job, seals[0])


def _described(job: Job) -> str:
    """The head, for the model card: without a path of this machine."""
    trained = job.request.mode == "trained" and not job.shipped
    origin = "trained for this model" if trained else "as the base was published with it"
    return f"The MTP head ({origin}, digest `{job.head_digest[:16]}`). {counted(job.drafts.tokens, 'token')} to draft."


def _seal(job: Job, files: dict[str, SealedFile]) -> ServedSeal:
    merged = job.run.manifest.merge
    return ServedSeal(
        made_from=job.made_from,
        run=job.run.manifest.run.id,
        checkpoint=merged.checkpoint if merged and job.model.merged else "",
        tensors=job.target.tensors,
        changed_tensors=len(job.target.head),
        bytes=job.target.bytes + job.head.bytes,
        seconds=round(time.monotonic() - job.started, 3),
        created=now(),
        files=files,
        mode=job.request.mode,
        source=job.source if job.head.revision else os.path.basename(job.head.origin),
        head_digest=job.head_digest,
    )


def _record(job: Job, sealed: ServedSeal) -> None:
    """[served], and the folder among [[checkpoints]]; nothing where they say so already."""
    path, merged = job.run.relative(job.out), job.model.merged
    table = ServedTable(
        mode=sealed.mode, shipped=job.shipped, source=job.source, model=job.run.relative(job.target.folder),
        merged=None if job.request.into else job.model.identity, folder=path, link=job.request.link,
        head_digest=sealed.head_digest, tensors=sealed.tensors, bytes=sealed.bytes, draft_length=job.drafts.tokens,
        draft_reason=job.drafts.reason, seconds=sealed.seconds, created=sealed.created, made_from=sealed.made_from,
    )  # fmt: skip
    if table == job.run.manifest.served:
        return
    step = merged.step if merged else None
    entry = Checkpoint(
        id=f"served-{step:06d}" if step is not None else "served", kind="served", parent=merged.id if merged else None,
        path=path, step=step, created=sealed.created, digest=sealed.digest,
        eval_loss=merged.eval_loss if merged else None,
    )  # fmt: skip
    with job.run.edit() as manifest:
        manifest.served = table
        manifest.checkpoints = with_folder(job.run, manifest, entry)


def _skip(run: Run, request: Request, skip: Skip, dry_run: bool, progress: Progress) -> Result:
    """Say that there is no head, and write it down where [mtp] says nothing else."""
    why = skip.why
    if not (dry_run or run.read_only):
        note_skip(run, why)
    progress.say(f"skipped: {why}; the merged model is served as it is")
    if skip.hint:
        progress.say(f"hint: {skip.hint}")
    merge = run.manifest.merge
    if merge is None:
        return Result(request.mode, "", "", skipped=why)
    folder = run.resolve(merge.folder)
    length = model_length(folder, analysed(run)[2].max)
    return Result(request.mode, here(folder), serve_model(here(folder), run.manifest.run.name, length), skipped=why)

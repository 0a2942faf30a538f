"""The run's merged model as `merge` wrote it: what its MTP head is trained against and measured on."""

from __future__ import annotations

from pathlib import Path

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import Checkpoint
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import Seal, sealed_as
from sparkctl.steps.merge import Request, folders, recorded, request_of, wanted_id
from sparkctl.steps.training import CHECKPOINTS
from sparkctl.train import state
from sparkctl.words import here, quoted


def merged_model(run: Run, shown: Path) -> tuple[Path, Seal]:
    """Its folder and its seal. Raises UsageError where there is none, or another than [merge] speaks of.

    shown: the run as the user named it.
    """
    merge = run.manifest.merge
    if merge is None:
        raise UsageError(f"`{shown}` has no merged model yet", f"sparkctl merge {quoted(shown)}")
    folder = run.resolve(merge.folder)
    seal = sealed_as(folder, merge.made_from)
    if seal is None:
        what = "is not what `merge` wrote" if folder.exists() else "is gone"
        raise UsageError(f"`{here(folder)}` {what}", recorded(run, shown).again("--force"))
    return folder, seal


def merged_entry(run: Run, folder: Path) -> Checkpoint | None:
    """The merged model in that folder among [[checkpoints]]."""
    return next((c for c in run.manifest.checkpoints if c.kind == "merged" and run.resolve(c.path) == folder), None)


def back_to(run: Run, shown: Path, digest: str | None) -> str | None:
    """The command that has [merge] speak again of the merged model of that digest, which is in another folder.

    None where it is in none, or the command takes another checkpoint by now.
    """
    for table in folders(run, None)[1:]:
        request, seal = request_of(run, shown, None, table), sealed_as(run.resolve(table.folder), table.made_from)
        if seal and seal.digest == digest and _takes(run, request, table.digest):
            return request.again()
    return None


def _takes(run: Run, request: Request, digest: str | None) -> bool:
    """Whether the checkpoint that the command merges is there, and is the one of that digest."""
    train = run.manifest.train
    id = wanted_id(train, request.checkpoint) if train else None
    path = run.root / CHECKPOINTS / (id or "")
    return (path / state.DIGESTS).is_file() and state.digest(path) == digest

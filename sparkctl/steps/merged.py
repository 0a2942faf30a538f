"""The run's merged model as `merge` wrote it: what its MTP head is trained against and measured on."""

from __future__ import annotations

from pathlib import Path

from sparkctl.errors import UsageError
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import Seal, sealed_as
from sparkctl.steps.merge import recorded
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

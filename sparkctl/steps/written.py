"""Folders that steps wrote for good, among [[checkpoints]]: an entry a folder, whatever `--out` named since."""

from __future__ import annotations

from sparkctl.manifest.schema import Checkpoint, Manifest
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import CheckpointKind
from sparkctl.merge.seal import Seal, read_seal
from sparkctl.mtp.inject import ServedSeal

SEALS: dict[CheckpointKind, type[Seal]] = {"merged": Seal, "served": ServedSeal}


def with_folder(run: Run, manifest: Manifest, entry: Checkpoint) -> list[Checkpoint]:
    """[[checkpoints]] with a folder that was written, in the place of what its path held; one that is gone, or that
    something else has written since, is forgotten.

    A folder that is made anew from the same step keeps its id; where another one has it, it gets a number:
    merged-000003-2.
    """
    same = (entry.kind, entry.path)
    others = [c for c in manifest.checkpoints if (c.kind, c.path) != same and _is_there(run, c)]
    known = next((c.id for c in manifest.checkpoints if (c.kind, c.path, c.step) == (*same, entry.step)), None)
    taken = {c.id for c in others}
    free = [id for id in (entry.id, *(f"{entry.id}-{n + 2}" for n in range(len(taken)))) if id not in taken]
    return [*others, entry.model_copy(update={"id": known or free[0]})]


def _is_there(run: Run, checkpoint: Checkpoint) -> bool:
    """Whether the folder's seal is the one that was written with it; of what has no seal nothing is asked."""
    if checkpoint.kind not in SEALS:
        return True
    seal = read_seal(run.resolve(checkpoint.path), SEALS[checkpoint.kind])
    return seal is not None and seal.digest == checkpoint.digest

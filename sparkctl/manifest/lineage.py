"""Which run came from which: from a round back to the first."""

from __future__ import annotations

from sparkctl.errors import SparkError
from sparkctl.manifest.store import Run


def ancestors(run: Run) -> list[Run]:
    """The parent of `run`, its parent, and so on; the row ends where a run has none or its folder is gone."""
    found, seen = [], {run.root.resolve()}
    while (parent := _parent(run)) is not None and parent.root.resolve() not in seen:
        seen.add(parent.root.resolve())
        found.append(parent)
        run = parent
    return found


def missing_parent(run: Run) -> str | None:
    """The parent's folder as the manifest names it, where it cannot be opened."""
    link = run.manifest.run.parent
    return str(run.resolve(link)) if link and _parent(run) is None else None


def _parent(run: Run) -> Run | None:
    link = run.manifest.run.parent
    if link is None:
        return None
    try:
        return Run.open(run.resolve(link))
    except SparkError:
        return None

"""Small words of messages: counts with their noun, bytes, paths."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def counted(count: int, noun: str) -> str:
    """1 example, 1,200 examples."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """Bytes for a person: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def earlier(title: str, made: str | None) -> str:
    """The title of a result that was there already. made: when, as the manifest writes instants; None: not noted."""
    of = f"the result of {made[:10]} {made[11:16]} UTC" if made else "an earlier result"
    return f"{title} (up to date: nothing was done, this is {of})"


def heading(title: str, *, dry_run: bool, up_to_date: bool, made: str | None) -> str:
    """The title of a result: whether it is only shown, or was there already; see `earlier`."""
    return earlier(title, made) if up_to_date else title + (" (dry run: nothing written)" if dry_run else "")


def here(path: Path) -> str:
    """A path as it can be opened from the working folder, the short way; as it is where that folder is gone."""
    try:
        return min(os.path.relpath(path), os.path.abspath(path), key=len)
    except FileNotFoundError:
        return str(path)


def quoted(path: Path | str) -> str:
    """A path as a command line takes it, blanks and all."""
    return shlex.quote(str(path))

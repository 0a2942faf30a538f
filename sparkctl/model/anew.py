"""How a file or a folder of a model is had anew: what a hint says where one is damaged or not whole."""

from __future__ import annotations

from pathlib import Path

from sparkctl.words import quoted

BLOBS, SNAPSHOTS = "blobs", "snapshots"  # folders of the hub's cache: files by their digest, links to them by commit
THEN = "then run the same command again, which downloads what is missing"


def file_anew(path: Path) -> str:
    """The way to a whole file in the place of `path`."""
    file = path.resolve()
    if file.parent.name == BLOBS:
        return f"rm {quoted(path)} {quoted(file)}, {THEN}"
    return f"cp WHOLE_COPY {quoted(path)}, or take the model from its publisher again"


def folder_anew(folder: Path) -> str:
    """The way to a whole model in the place of `folder`."""
    if folder.parent.name == SNAPSHOTS:
        return f"rm -r {quoted(folder.parent.parent)}, {THEN}"
    return f"hf download ORG/NAME --local-dir {quoted(folder)}, or save the model there again"

"""Where a head's 15 tensors are: in the shards of a model's folder, or in one file; and whether they fit a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparkctl.errors import SparkError
from sparkctl.model import mtp
from sparkctl.model.anew import file_anew, folder_anew
from sparkctl.model.inspect import read_config, text_part
from sparkctl.model.weights import TensorFile, read_layout

FLOATS = ("BF16", "F16", "F32")
NAMED = 3  # tensors that a message names
Specs = Mapping[str, tuple[str, tuple[int, ...]]]  # name → (dtype, shape)


class NoHead(SparkError):
    """The model has no MTP head, as opposed to a damaged or an unknown one."""


@dataclass(frozen=True)
class HeadSource:
    """A head's tensors and the file that each is in. `origin`: the folder, the file or the hub id they come from, of
    which `revision` is the commit. unread: bytes of a head that was only looked at on the hub; it has no tensors here.
    mend: the command that takes another head in its place.
    """

    origin: str
    tensors: Mapping[str, TensorFile]
    revision: str | None = None
    unread: int = 0
    mend: str = ""

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return self.unread or sum(file.nbytes(name) for name, file in self.tensors.items())

    def digest(self) -> str:
        """Of names, dtypes, shapes and bytes: the same wherever the head lies. Empty where it was not read."""
        if self.unread:
            return ""
        digest = hashlib.sha256()
        for name, file in sorted(self.tensors.items()):
            digest.update(f"{name} {file.dtype(name)} {list(file.shape(name))}\n".encode())
            for piece in file.pieces(name):
                digest.update(piece)
        return digest.hexdigest()


def from_folder(folder: Path, wanted: mtp.Shapes, origin: str, mend: str | None = None) -> HeadSource:
    """The head of the model in `folder`; only the shards that it is in have to be there.

    wanted: shapes by name, of the model that is to have it. mend: the command that takes another head; None where there
    is none but to have the folder anew. Raises NoHead, or SparkError where it does not fit.
    """
    anew = folder_anew(folder)
    mend = mend or anew
    require_promise(folder, origin, mend)
    layout = read_layout(folder)
    tensors = {name: file for name, file in layout.where.items() if name.startswith(mtp.PREFIX)}
    if layout.problems and wanted.keys() - tensors.keys():
        raise SparkError("; ".join(layout.problems), anew)
    return _source(origin, tensors, wanted, anew, mend)


def from_file(path: Path, wanted: mtp.Shapes, mend: str | None = None) -> HeadSource:
    """The head in a file of its own. mend: as in `from_folder`. Raises SparkError where it does not fit."""
    file, mend = TensorFile(path), mend or file_anew(path)
    return _source(str(path), dict.fromkeys(file.names(), file), wanted, mend, mend)


def _source(origin: str, tensors: dict[str, TensorFile], wanted: mtp.Shapes, anew: str, mend: str) -> HeadSource:
    found = {name: (file.dtype(name), file.shape(name)) for name, file in tensors.items()}
    require_fit(origin, found, wanted, anew, mend)
    return HeadSource(origin, tensors, mend=mend)


def require_promise(folder: Path, origin: str, mend: str | None = None) -> None:
    """Raise NoHead where config.json in `folder` promises no head, SparkError where it is one unknown here."""
    config, mend = read_config(folder), mend or folder_anew(folder)
    text = text_part(config)
    if unknown := mtp.unknown(text):
        raise SparkError(f"`{origin}` has {unknown}, which is unknown here", mend)
    if config.get("model_type") not in mtp.TYPES:
        raise NoHead(f"`{origin}` is of type `{config.get('model_type')}`, and only Qwen3.5 has an MTP head", mend)
    if not mtp.layers(text):
        raise NoHead(f"`{origin}` has no MTP head: its config.json promises none", mend)


def require_fit(origin: str, found: Specs, wanted: mtp.Shapes, anew: str, mend: str) -> None:
    """Raise NoHead where nothing was found, SparkError unless it is exactly what is wanted, in floats.

    anew: how this head is had whole; mend: how another one is.
    """
    if not found:
        lost = f"none of its tensors is called `{mtp.PREFIX}…` (transformers saves a model without its head)"
        raise NoHead(f"`{origin}` has no MTP head: {lost}", mend)
    absent = [f"`{name}`" for name in wanted if name not in found]
    if absent:
        raise SparkError(f"the MTP head of `{origin}` is not whole: it lacks {some(absent)}", anew)
    strange = [f"`{name}`" for name in found if name not in wanted]
    if strange:
        raise SparkError(f"the MTP head of `{origin}` has tensors that are unknown here: {some(strange)}", mend)
    other = [f"`{n}` {list(found[n][1])} for {list(shape)}" for n, shape in wanted.items() if found[n][1] != shape]
    if other:
        raise SparkError(f"the MTP head of `{origin}` has other dimensions than the model: {some(other)}", mend)
    stored = [f"`{name}` in {dtype}" for name, (dtype, _) in found.items() if dtype not in FLOATS]
    if stored:
        raise SparkError(f"the MTP head of `{origin}` is quantised: {some(stored)}", mend)


def some(items: list[str], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = len(items) - NAMED
    return between.join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")

"""The head of a model named by a folder or a hub id. Of a hub model no more is fetched than config.json, the index
and the head's own bytes: 0.1 GB of the 2B's 4.5.

What is fetched lies in the user's cache as one safetensors file a commit. It grows under another name, in the order in
which its bytes come, so that its length says how far a broken fetch got.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from sparkctl import env
from sparkctl.errors import SparkError
from sparkctl.files import naming, sync_folder
from sparkctl.model import mtp
from sparkctl.model.download import Hub
from sparkctl.model.format import BITS, Entry, header_bytes, read_entries, read_header
from sparkctl.model.hub import INDEX, SINGLE, ModelSource, locate
from sparkctl.model.ranges import RangesIgnored, RemoteFile
from sparkctl.model.weights import read_weight_map
from sparkctl.mtp.source import HeadSource, NoHead, from_file, from_folder, require_fit, require_promise
from sparkctl.progress import Progress, silent

HEAD, PARTIAL = "head.safetensors", "head.safetensors.partial"


def find_head(
    source: str,
    wanted: mtp.Shapes,
    *,
    revision: str | None = None,
    base: Path | None = None,
    progress: Progress = silent,
) -> HeadSource:
    """The MTP head of `source`, a folder or ORG/NAME on the hub.

    wanted: shapes by name, of the model that is to have it. revision, base: as in `model.hub.locate`. Raises NoHead,
    UsageError where there is no such folder or model, SparkError where the head cannot be had or does not fit.
    """
    found = locate(source, revision=revision, base=base, small=["config.json", INDEX])
    if found.revision is None:
        return from_folder(found.folder, wanted, str(found.folder))
    return from_hub(found, wanted, progress)


def from_hub(model: ModelSource, wanted: mtp.Shapes, progress: Progress = silent) -> HeadSource:
    """The head of a commit of the hub: out of the cache, of shards that are there, or fetched."""
    return replace(_of_commit(model, wanted, progress), origin=model.source, revision=model.revision)


def _of_commit(model: ModelSource, wanted: mtp.Shapes, progress: Progress) -> HeadSource:
    require_promise(model.folder, model.source)
    assert model.revision
    kept = env.user_cache_folder() / "mtp" / model.source.replace("/", "--") / model.revision / HEAD
    if kept.is_file():
        return from_file(kept, wanted)
    shards = _shards(model, wanted)
    if all((model.folder / shard).is_file() for shard in shards):
        return from_folder(model.folder, wanted, model.source)
    hub = Hub(model.source, env.hub_endpoint(), env.hub_cache(), offline=env.hub_offline())
    if hub.offline:
        raise SparkError(
            f"the MTP head of `{model.source}` was never fetched, and HF_HUB_OFFLINE forbids it",
            "unset HF_HUB_OFFLINE, and run the same command again",
        )
    try:
        _fetch([RemoteFile(hub, model.revision, shard, progress) for shard in shards], wanted, model, kept, progress)
    except RangesIgnored:
        progress.say(f"`{hub.shown}` sends whole files only: downloading {', '.join(shards)}")
        hub.weights(model.revision, shards, progress)
        return from_folder(model.folder, wanted, model.source)
    return from_file(kept, wanted)


def _shards(model: ModelSource, wanted: mtp.Shapes) -> list[str]:
    """The files that the head is in."""
    index = model.folder / INDEX
    if not index.is_file():
        return [SINGLE]
    shards = {shard for name, shard in read_weight_map(index).items() if name.startswith(mtp.PREFIX)}
    if not shards:
        raise NoHead(f"`{model.source}` has no MTP head: its index names none", "name a model that has one")
    return sorted(shards)


@dataclass(frozen=True)
class _Part:
    """A tensor and where its bytes are, counted from its file's beginning."""

    name: str
    file: RemoteFile
    entry: Entry
    start: int
    stop: int


def _fetch(files: list[RemoteFile], wanted: mtp.Shapes, model: ModelSource, kept: Path, progress: Progress) -> None:
    """Write `kept`. What is there of it from an earlier try stays, where it is of the same files."""
    parts = [part for file in files for part in _parts(file)]
    require_fit(model.source, {part.name: (part.entry.dtype, part.entry.shape) for part in parts}, wanted)
    parts.sort(key=lambda part: (-BITS[part.entry.dtype], part.file.name, part.start))  # the widest first: aligned
    header = header_bytes(_layout(parts), _metadata(model, files))
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial, total = kept.with_name(PARTIAL), sum(part.stop - part.start for part in parts)
    with FileLock(kept.with_name(".lock")):
        if kept.is_file():  # another process was quicker
            return
        done = _begun(partial, header, total)
        with naming(partial), progress.task(f"fetching the MTP head of {model.source}", total, "B") as task:
            task.advance(done)
            with partial.open("ab") as out:
                for piece in _pieces(parts, done):
                    out.write(piece)
                    task.advance(len(piece))
                out.flush()
                os.fsync(out.fileno())
        from_file(partial, wanted)
        os.replace(partial, kept)
        sync_folder(kept.parent)


def _parts(file: RemoteFile) -> Iterator[_Part]:
    """The head's tensors in a shard, by its header."""
    path = Path(file.shown)
    first = file.read(0, 8)
    assert file.size is not None
    hint = "it is damaged where it is published: take the head of another model, `--from HUB_ID`"
    header = read_header(path, _Reader(file, first), file.size, hint)
    for name, entry in read_entries(path, header, file.size - len(header), hint).items():
        if name.startswith(mtp.PREFIX):
            yield _Part(name, file, entry, len(header) + entry.start, len(header) + entry.stop)


class _Reader:
    """As much of a file object as a header's reader uses; `first` are bytes that are here already."""

    def __init__(self, file: RemoteFile, first: bytes) -> None:
        self._file, self._first, self._at = file, first, 0

    def read(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        return self._first if (start, count) == (0, len(self._first)) else self._file.read(start, self._at)


def _layout(parts: list[_Part]) -> dict[str, Entry]:
    """The tensors one behind the other."""
    layout, end = {}, 0
    for part in parts:
        size = part.stop - part.start
        layout[part.name] = Entry(part.entry.dtype, part.entry.shape, end, end + size)
        end += size
    return layout


def _metadata(model: ModelSource, files: list[RemoteFile]) -> dict[str, str]:
    """What the bytes are of: with another commit or other files the header differs, and a fetch begins anew."""
    return {"source": model.source, "revision": str(model.revision)} | {
        f"etag {file.name}": file.etag for file in files
    }


def _begun(partial: Path, header: bytes, total: int) -> int:
    """Bytes of data that `partial` holds behind this header; it is begun anew where it holds another."""
    if partial.is_file():
        with partial.open("rb") as file:
            there = partial.stat().st_size - len(header)
            if file.read(len(header)) == header and 0 <= there <= total:
                return there
    with naming(partial):
        partial.write_bytes(header)
    return 0


def _pieces(parts: list[_Part], done: int) -> Iterator[bytes]:
    """The parts' bytes behind the first `done`; neighbours come by one request."""
    for file, start, stop in _runs(parts):
        skipped = min(done, stop - start)
        done -= skipped
        if start + skipped < stop:
            yield from file.pieces(start + skipped, stop)


def _runs(parts: list[_Part]) -> list[tuple[RemoteFile, int, int]]:
    runs: list[tuple[RemoteFile, int, int]] = []
    for part in parts:
        if runs and runs[-1][0] is part.file and runs[-1][2] == part.start:
            runs[-1] = (part.file, runs[-1][1], part.stop)
        else:
            runs.append((part.file, part.start, part.stop))
    return runs

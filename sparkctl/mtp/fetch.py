"""The head of a model named by a folder or a hub id. Of a hub model no more is fetched than config.json, the index
and the head's own bytes: 0.1 GB of the 2B's 4.5.

What is fetched lies in the user's cache as one safetensors file a commit, with its sha256 beside it. It grows
under another name, in the order in which its bytes come, so that its length says how far a broken fetch got.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from sparkctl import env
from sparkctl.errors import SparkError
from sparkctl.files import naming, sha256_file, sync_folder, write_atomic
from sparkctl.hardware.load import BF16, FP32
from sparkctl.hardware.shape import published_in
from sparkctl.model import mtp
from sparkctl.model.download import Hub
from sparkctl.model.format import BITS, Entry, header_bytes, read_entries, read_header
from sparkctl.model.hub import INDEX, SINGLE, ModelSource, locate
from sparkctl.model.inspect import read_config
from sparkctl.model.ranges import RangesIgnored, RemoteFile
from sparkctl.model.weights import read_weight_map
from sparkctl.mtp.source import HeadSource, NoHead, from_file, from_folder, require_fit, require_promise
from sparkctl.progress import Progress, silent

ANOTHER = "name a model that has one: `--from HUB_ID`"
HEAD, PARTIAL, DIGEST = "head.safetensors", "head.safetensors.partial", "head.sha256"


def find_head(
    source: str,
    wanted: mtp.Shapes,
    *,
    revision: str | None = None,
    base: Path | None = None,
    look: bool = False,
    mend: str | None = None,
    progress: Progress = silent,
) -> HeadSource:
    """The MTP head of `source`, a folder or ORG/NAME on the hub.

    wanted: shapes by name, of the model that is to have it. revision, base: as in `model.hub.locate`. look: of a head
    that would have to be fetched, no more than that it fits. mend: the command that takes another head. Raises NoHead,
    UsageError where there is no such folder or model, SparkError where the head cannot be had or does not fit.
    """
    found = locate(source, revision=revision, base=base, small=["config.json", INDEX])
    if found.revision is None:
        return from_folder(found.folder, wanted, str(found.folder), mend)
    head = _of_commit(found, wanted, look, mend or ANOTHER, progress)
    return replace(head, origin=found.source, revision=found.revision)


def _of_commit(model: ModelSource, wanted: mtp.Shapes, look: bool, mend: str, progress: Progress) -> HeadSource:
    """The head of a commit of the hub: out of the cache, of shards that are there, or fetched."""
    require_promise(model.folder, model.source, mend)
    assert model.revision
    kept = env.user_cache_folder() / "mtp" / model.source.replace("/", "--") / model.revision / HEAD
    if _intact(kept):
        return from_file(kept, wanted, mend)
    shards = _shards(model, mend)
    if all((model.folder / shard).is_file() for shard in shards):
        return from_folder(model.folder, wanted, model.source, mend)
    state = _state(kept)
    hub = Hub(model.source, env.hub_endpoint(), env.hub_cache(), offline=env.hub_offline())
    if hub.offline:
        raise SparkError(
            f"the MTP head of `{model.source}` {state}, and HF_HUB_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE, and run the same command again",
        )
    if kept.is_file():
        progress.say(f"the MTP head of `{model.source}` {state}: fetching it anew")
    files = [RemoteFile(hub, model.revision, shard, progress) for shard in shards]
    try:
        parts = _fitting(files, wanted, model, mend)
        if not look:
            _fetch(parts, _metadata(model, files), wanted, model, kept, progress)
    except RangesIgnored:
        whole = f"`{hub.shown}` sends whole files only: {', '.join(shards)}"
        if look:
            progress.say(f"{whole}; nothing was downloaded, so whether the head fits is not known")
            return HeadSource(model.source, {}, unread=_promised(model.folder, wanted))
        progress.say(f"{whole}, body and all")
        hub.weights(model.revision, shards, progress)
        return from_folder(model.folder, wanted, model.source, mend)
    if look:
        return HeadSource(model.source, {}, unread=sum(part.stop - part.start for part in parts))
    return from_file(kept, wanted, mend)


def _promised(folder: Path, wanted: mtp.Shapes) -> int:
    """Bytes of a head in the dtype that the config says of the model."""
    each = FP32 if published_in(read_config(folder)) == "float32" else BF16
    return sum(each * math.prod(shape) for shape in wanted.values())


def _intact(kept: Path) -> bool:
    """Whether it is there, with the bytes that were fetched."""
    noted = kept.with_name(DIGEST)
    return kept.is_file() and noted.is_file() and noted.read_bytes() == sha256_file(kept).encode()


def _state(kept: Path) -> str:
    """Why the head in the cache is not taken."""
    if not kept.is_file():
        return "was never fetched"
    return "is damaged in the cache" if kept.with_name(DIGEST).is_file() else "has no digest beside it in the cache"


def _shards(model: ModelSource, mend: str) -> list[str]:
    """The files that the head is in."""
    index = model.folder / INDEX
    if not index.is_file():
        return [SINGLE]
    shards = {shard for name, shard in read_weight_map(index).items() if name.startswith(mtp.PREFIX)}
    if not shards:
        raise NoHead(f"`{model.source}` has no MTP head: its index names none", mend)
    return sorted(shards)


@dataclass(frozen=True)
class _Part:
    """A tensor and where its bytes are, counted from its file's beginning."""

    name: str
    file: RemoteFile
    entry: Entry
    start: int
    stop: int


def _fitting(files: list[RemoteFile], wanted: mtp.Shapes, model: ModelSource, mend: str) -> list[_Part]:
    """The head's tensors by the files' headers, in the order in which they are kept. Raises SparkError where
    they do not fit."""
    parts = [part for file in files for part in _parts(file, mend)]
    require_fit(model.source, {part.name: (part.entry.dtype, part.entry.shape) for part in parts}, wanted, mend, mend)
    return sorted(parts, key=lambda p: (-BITS[p.entry.dtype], p.file.name, p.start))  # the widest first: aligned


def _fetch(
    parts: list[_Part], metadata: dict[str, str], wanted: mtp.Shapes, model: ModelSource, kept: Path, progress: Progress
) -> None:
    """Write `kept`. What is there of it from an earlier try stays, where it is of the same files."""
    header = header_bytes(_layout(parts), metadata)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial, total = kept.with_name(PARTIAL), sum(part.stop - part.start for part in parts)
    with FileLock(kept.with_name(".lock")):
        if _intact(kept):  # another process was quicker
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
        write_atomic(kept.with_name(DIGEST), sha256_file(partial).encode())
        os.replace(partial, kept)
        sync_folder(kept.parent)


def _parts(file: RemoteFile, mend: str) -> Iterator[_Part]:
    """The head's tensors in a shard, by its header. mend: where it is damaged, which it is where it is published."""
    path = Path(file.shown)
    first = file.read(0, 8)
    assert file.size is not None
    header = read_header(path, _Reader(file, first), file.size, mend)
    for name, entry in read_entries(path, header, file.size - len(header), mend).items():
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

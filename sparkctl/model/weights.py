"""Safetensors checkpoints a tensor, a few rows or a chunk at a time: memory stays small whatever the model's size.

Files are read with plain reads into the tensors' own memory. A memory map would count every page that it touched as
ours, and a damaged disk would be a signal instead of an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from sparkctl.errors import SparkError
from sparkctl.files import CHUNK, naming
from sparkctl.model.anew import file_anew, folder_anew
from sparkctl.model.format import (
    BITS,
    Entry,
    header_bytes,
    read_entries,
    read_header,
    safetensors_dtype,
    torch_dtype,
)  # fmt: skip
from sparkctl.words import quoted

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorFile:
    """One safetensors file. Raises SparkError naming it where it is no such file, cut, or otherwise damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.header = read_header(path, file, size, file_anew(path))
        except OSError as error:
            raise SparkError(f"`{path}` cannot be read: {error.strerror}", file_anew(path)) from error
        self._entries = read_entries(path, self.header, size - len(self.header), file_anew(path))

    def names(self) -> KeysView[str]:
        """The tensors in the order of their bytes."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """As the format spells it: "BF16"."""
        return self._entries[name].dtype

    def elements(self, name: str) -> int:
        return self._entries[name].elements

    def nbytes(self, name: str) -> int:
        return self._entries[name].stop - self._entries[name].start

    def metadata(self) -> dict[str, str] | None:
        """What the header says beside the tensors."""
        return json.loads(self.header[8:]).get("__metadata__")

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        entry = self._entries[name]
        return self._tensor(entry, entry.start, entry.stop, entry.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first axis; only their bytes are read."""
        entry = self._entries[name]
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {name} {entry.shape}")
        row = (entry.stop - entry.start) // max(1, entry.shape[0])
        shape = (stop - start, *entry.shape[1:])
        return self._tensor(entry, entry.start + start * row, entry.start + stop * row, shape)

    def copy_bytes(self, name: str, target: BinaryIO, advance: Callable[[int], None]) -> None:
        """Append the tensor's bytes to `target` as they are; `advance` hears of each chunk."""
        for piece in self.pieces(name):
            target.write(piece)
            advance(len(piece))

    def pieces(self, name: str) -> Iterator[bytearray]:
        """The tensor's bytes as they are, a chunk at a time."""
        entry = self._entries[name]
        with self.path.open("rb", buffering=0) as file:
            for start in range(entry.start, entry.stop, CHUNK):
                buffer = bytearray(min(CHUNK, entry.stop - start))
                self._fill(file, start, memoryview(buffer))
                yield buffer

    def _tensor(self, entry: Entry, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        data = torch.empty(stop - start, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            self._fill(file, start, data.numpy().data)
        return data.view(torch_dtype(entry.dtype)).view(shape)

    def _fill(self, file: Any, start: int, buffer: memoryview) -> None:
        file.seek(len(self.header) + start)
        done = 0
        while done < len(buffer):
            with naming(self.path):
                count = file.readinto(buffer[done:])
            if not count:
                raise SparkError(f"`{self.path}` was cut short while it was read", file_anew(self.path))
            done += count


class Checkpoint:
    """The safetensors of a model folder: one file, or shards and their index.

    but: how the names begin of tensors that are looked past, whether or not the index is right about them. Raises
    SparkError where there are none, or where index and shards do not agree on where a listed tensor is.
    """

    def __init__(self, folder: Path, *, but: str | None = None) -> None:
        layout = read_layout(folder, but=but)
        if layout.problems:
            raise SparkError("; ".join(layout.problems), folder_anew(folder))
        self.folder, self.sharded = folder, layout.sharded
        self._shards, self._where = layout.shards, layout.where

    def names(self) -> KeysView[str]:
        """Every tensor, in the index's order, or the file's."""
        return self._where.keys()

    def shards(self) -> list[Path]:
        """The files, sorted by name."""
        return [shard.path for shard in self._shards]

    def file(self, name: str) -> TensorFile:
        """The file that a tensor is in."""
        return self._where[name]

    def dtype(self, name: str) -> str:
        return self._where[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape(name)

    def nbytes(self, name: str) -> int:
        return self._where[name].nbytes(name)


@dataclass(frozen=True)
class Layout:
    """Which tensor is in which file, and what keeps that from being whole."""

    sharded: bool
    shards: list[TensorFile]
    where: dict[str, TensorFile]
    problems: list[str]


def read_layout(folder: Path, *, but: str | None = None) -> Layout:
    """Headers and index of a model folder, with every problem in them. Raises SparkError where there are no weights.

    but: as in `Checkpoint`; of a single file nothing is looked past.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder, but)
    if (folder / SINGLE).is_file():
        file = TensorFile(folder / SINGLE)
        return Layout(False, [file], dict.fromkeys(file.names(), file), [])
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise SparkError(
            f"`{folder}` holds its weights as pickles, which can run code; only safetensors are read",
            "take a revision of the model with safetensors, or convert it where you trust it",
        )
    raise SparkError(f"`{folder}` holds no weights: neither `{SINGLE}` nor `{INDEX}` is there", folder_anew(folder))


def _sharded(folder: Path, but: str | None) -> Layout:
    weight_map = read_weight_map(folder / INDEX)
    if (folder / SINGLE).is_file() and SINGLE not in weight_map.values():  # transformers takes it, vLLM the shards
        raise SparkError(
            f"`{folder}` holds two models: `{SINGLE}`, and the shards of `{INDEX}`",
            f"take one of them away: `mv {quoted(folder / INDEX)} ELSEWHERE`, or the other",
        )
    weight_map = {name: shard for name, shard in weight_map.items() if but is None or not name.startswith(but)}
    shards: dict[str, TensorFile] = {}
    problems = []
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            problems.append(f"`{folder / shard}`, which the index names, is missing")
            continue
        try:
            shards[shard] = TensorFile(folder / shard)
        except SparkError as error:
            problems.append(error.message)
    where = {}
    for name, shard in weight_map.items():
        if shard in shards and name in shards[shard].names():
            where[name] = shards[shard]
        elif shard in shards:
            problems.append(f"`{folder / shard}` lacks `{name}`, which the index says is in it")
    return Layout(True, list(shards.values()), where, problems)


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor → file name, of an index. Raises SparkError where it is none."""
    try:
        weight_map = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError, OSError):
        raise SparkError(f"`{path}` is no index: it holds no weight_map that can be read", file_anew(path)) from None
    strays = [shard for shard in weight_map.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if strays:
        raise SparkError(f"`{path}` names `{strays[0]}`, which is no file beside it", file_anew(path))
    if not weight_map:
        raise SparkError(f"`{path}` names no tensor", file_anew(path))
    return weight_map


class ShardWriter:
    """Writes one safetensors file tensor by tensor; only a chunk of a tensor is ever held beside it.

    layout: name → (dtype, shape), dtype a torch.dtype or the format's word. In the file wider dtypes come first, so
    that every tensor is aligned, otherwise the layout's order stands; `write` may be called in any order. The same
    tensors give the same bytes. On an error in the block the file is removed; a tensor left out is a ValueError.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[Any, Any]], metadata: dict[str, str] | None = None
    ) -> None:
        self._path, self._entries, end = path, {}, 0
        wanted = {name: (safetensors_dtype(dtype), tuple(shape)) for name, (dtype, shape) in layout.items()}
        for name, (dtype, shape) in sorted(wanted.items(), key=lambda item: -BITS[item[1][0]]):
            size = math.prod(shape) * BITS[dtype] // 8
            self._entries[name] = Entry(dtype, shape, end, end + size)
            end += size
        self._left = set(self._entries)
        self._header = header_bytes(self._entries, metadata)

    def __enter__(self) -> ShardWriter:
        self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write_all(self._handle, memoryview(self._header))
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The tensor's bytes to their place. ValueError where it is not what the layout says, or comes twice."""
        import torch

        entry = self._entries[name]
        got = (safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        if got != (entry.dtype, entry.shape) or name not in self._left:
            raise ValueError(f"{name}: {got} for {entry}, still to come: {name in self._left}")
        os.lseek(self._handle, len(self._header) + entry.start, os.SEEK_SET)
        for part in _parts(tensor.detach()):
            _write_all(self._handle, part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._left.discard(name)

    def write_bytes(self, name: str, pieces: Iterable[bytes | bytearray]) -> None:
        """The tensor's bytes as another file has them. ValueError where they are too few or many, or come twice."""
        entry = self._entries[name]
        os.lseek(self._handle, len(self._header) + entry.start, os.SEEK_SET)
        left = entry.stop - entry.start
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                break
            _write_all(self._handle, memoryview(piece))
        if left or name not in self._left:
            raise ValueError(f"{name}: {left} bytes too few for {entry}, still to come: {name in self._left}")
        self._left.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or self._left:
            self._abandon()
        else:
            os.close(self._handle)
        if error is None and self._left:
            raise ValueError(f"never written to {self._path}: {sorted(self._left)}")

    def _abandon(self) -> None:
        os.close(self._handle)
        self._path.unlink(missing_ok=True)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in row-major order, about CHUNK bytes at a time; views, not copies."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    row = max(1, flat[:1].numel() * flat.element_size())
    yield from flat.split(max(1, CHUNK // row))


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]

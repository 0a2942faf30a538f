"""The safetensors format: a length, a JSON of names, dtypes, shapes and byte ranges, then the bytes of each tensor."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparkctl.errors import SparkError

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 100_000_000  # bytes, the format's own
ALIGNMENT = 8
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}  # all set: not finite


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `start` and `stop` are bytes from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


class Readable(Protocol):
    """As much of an open file as a header takes."""

    def read(self, count: int, /) -> bytes: ...


def read_header(path: Path, file: Readable, size: int, hint: str) -> bytes:
    """The length and the JSON behind it, as they are in the file. hint: how another one is had, for the SparkError."""
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else None
    if length is None or length > HEADER_LIMIT:
        raise SparkError(f"`{path}` is no safetensors file", hint)
    if 8 + length > size:
        raise SparkError(f"`{path}` is cut short: its header says {length} bytes, and {size - 8} follow", hint)
    return first + file.read(length)


def read_entries(path: Path, header: bytes, size: int, hint: str) -> dict[str, Entry]:
    """The tensors by their place; their bytes have to cover the file's `size` bytes of data, each once."""
    try:
        values = json.loads(header[8:].decode(), object_pairs_hook=_unique)
        values.pop("__metadata__", None)
        entries = {name: _entry(value) for name, value in values.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SparkError(f"`{path}` has a header that cannot be read ({error})", hint) from None
    end = 0
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    for name, entry in ordered.items():
        if entry.start != end:
            what = "overlap" if entry.start < end else "leave a gap"
            raise SparkError(f"`{path}` is damaged: the bytes of `{name}` {what} with those before them", hint)
        end = entry.stop
    if end != size:
        what = "is cut short" if end > size else "has bytes that belong to no tensor"
        raise SparkError(f"`{path}` {what}: its tensors take {end} bytes, and {size} follow the header", hint)
    return ordered


def _entry(value: dict[str, Any]) -> Entry:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError("sizes and offsets are whole numbers from 0")
    if 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{stop - start} bytes for {dtype} {list(shape)}")
    return Entry(dtype, shape, start, stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice")
    return values


def finite(data: bytes | bytearray, dtype: str) -> bool:
    """Whether every number in these bytes is, by its exponent; without torch. dtype: one of `EXPONENTS`."""
    import numpy as np

    word, exponent = EXPONENTS[dtype]
    return bool(((np.frombuffer(data, word) & exponent) != exponent).all())


def torch_dtype(dtype: str) -> torch.dtype:
    """torch's dtype for the format's word. Raises SparkError where torch has none."""
    found = _torch_dtypes().get(dtype)
    if found is None:
        raise SparkError(
            f"tensors in {dtype} cannot be read", "take the unquantised model, whose tensors are in BF16, F16 or F32"
        )
    return found


def safetensors_dtype(dtype: torch.dtype | str) -> str:
    """The format's word for torch's dtype, or the word itself."""
    if isinstance(dtype, str):
        return dtype
    return next(word for word, known in _torch_dtypes().items() if known == dtype)


def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip


def header_bytes(entries: dict[str, Entry], metadata: dict[str, str] | None) -> bytes:
    values: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, entry in entries.items():
        values[name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop],
        }  # fmt: skip
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

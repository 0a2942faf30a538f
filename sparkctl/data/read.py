"""Chat files as a stream of examples: JSONL, the same compressed with gzip, Parquet. A bad line is named by its number.

A file is read once, from front to back, in pieces of bounded size; what a record must look like is in `messages.py`.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sparkctl.data.messages import A_LINE_EACH, SKIP, BadLine, Example, Refused, as_example
from sparkctl.errors import SparkError, UsageError
from sparkctl.words import quoted

__all__ = ["BadLine", "Example", "read_examples"]

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
UNREAD = {  # the first bytes of other compressed files, and who unpacks them
    b"\x28\xb5\x2f\xfd": "zstd -d", b"\xfd7zX": "xz -dk", b"BZh": "bunzip2 -k", b"PK\x03\x04": "unzip",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
BUFFER = 1 << 18
REPORT = 1 << 20  # bytes between two calls of `on_bytes`
ROWS = 64  # Parquet rows turned into Python objects at a time
COLUMNS = (
    "messages", "conversations", "system", "tools", "chat_template_kwargs", "images", "image", "videos", "audios",
)  # fmt: skip

OnBytes = Callable[[int], None]
Record = tuple[str, Any]  # the place, and either a parsed object or the Refused that came instead


def read_examples(
    paths: Iterable[Path],
    skip_bad: bool = False,
    on_bad: Callable[[BadLine], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[Example]:
    """The examples of all files, in order.

    The first bad line is raised as BadLine; with `skip_bad` each is told to `on_bad` and left out. A file that cannot
    be read to its end raises SparkError in either case. `on_bytes` is told how many bytes of the files on disk were
    read since the last call; they sum to the files' sizes.
    """
    for path in paths:
        folder = str(path).removesuffix(Path(path).name)
        for place, record in _records(Path(path), on_bytes):
            try:
                if isinstance(record, Refused):
                    raise record
                yield as_example(record, place, folder)
            except Refused as refused:
                bad = BadLine(f"{folder}{place}: {refused.message}", f"{refused.hint}; {SKIP}", place)
                if not skip_bad:
                    raise bad from None
                if on_bad:
                    on_bad(bad)


def _records(path: Path, on_bytes: OnBytes | None) -> Iterator[Record]:
    """Every non-blank line or row of a file."""
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(4)
            file.seek(0)
            counted = _Counted(file, on_bytes)
            if start == PARQUET:
                yield from _rows(path, counted)
            elif path.suffix.lower() == ".parquet":
                raise SparkError(f"`{path}` is not a Parquet file", "write it again, or name it as what it is")
            elif start[:2] == GZIP:
                yield from _unzipped_lines(path, counted)
            elif path.suffix.lower() == ".gz" and start:
                raise SparkError(f"`{path}` is not a gzip file", "compress it again, or name it as what it is")
            elif command := next((UNREAD[magic] for magic in UNREAD if start.startswith(magic)), None):
                raise SparkError(
                    f"`{path}` is packed in a way that is not read here", f"unpack it first: `{command} {quoted(path)}`"
                )
            else:
                yield from _lines(path, io.BufferedReader(counted, BUFFER))
            counted.finish()
    except FileNotFoundError:
        raise UsageError(f"no file `{path}`", "give JSONL, .jsonl.gz or Parquet files") from None
    except OSError as error:
        raise SparkError(f"`{path}` cannot be read: {error.strerror or error}", "check the file") from None


class _Counted(io.RawIOBase):
    """A raw file that tells how far it was read, every REPORT bytes."""

    def __init__(self, file: io.FileIO, tell: OnBytes | None) -> None:
        self._file, self._tell = file, tell
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._read = self._told = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.reached(self._read + count)
        return count

    def reached(self, position: int) -> None:
        """The file is read up to `position`, about."""
        self._read = min(position, self._size)
        if self._read - self._told >= REPORT:
            self._report()

    def finish(self) -> None:
        """The file is read."""
        self._read = self._size
        self._report()

    def share(self, done: int, whole: int) -> None:
        """`done` of `whole` rows are read."""
        self.reached(self._size * done // max(whole, 1))

    def _report(self) -> None:
        if self._tell and self._read > self._told:
            self._tell(self._read - self._told)
        self._told = max(self._told, self._read)


def _unzipped_lines(path: Path, counted: _Counted) -> Iterator[Record]:
    place = f"the beginning of `{path}`"
    hint = "copy or compress the file again: `gzip -t` says whether it is whole"
    try:
        with gzip.GzipFile(fileobj=io.BufferedReader(counted, BUFFER), mode="rb") as unzipped:
            for place, record in _lines(path, io.BufferedReader(unzipped, BUFFER)):
                yield place, record
    except EOFError:
        raise SparkError(f"the gzip file `{path}` ends too early, after {place}", hint) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise SparkError(f"the gzip file `{path}` is damaged after {place}: {error}", hint) from None


def _lines(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            _check_encoding(path, line[:4])
            line = line.removeprefix(BOM)
        if line.isspace() or not line:
            continue
        yield f"{path.name}:{number}", _parsed(line)


def _check_encoding(path: Path, start: bytes) -> None:
    """Refuse a file of two or four bytes a character, known by its byte order mark or the zeros in its first ones."""
    encoding = json.detect_encoding(start) if any(start) else "utf-8"
    if not encoding.startswith("utf-8"):
        name = encoding.replace("-le", "le").replace("-be", "be")  # as iconv calls it
        hint = f"save the file as UTF-8: `iconv -f {name} -t utf-8 OLD > NEW`"
        raise SparkError(f"`{path}` is {encoding[:6].upper()}, not UTF-8", hint)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip(" \t\r\n"))
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
        return Refused(f"not UTF-8: {where}", "save the file as UTF-8: `iconv -f latin1 -t utf-8 OLD > NEW`")
    except json.JSONDecodeError as error:
        hint = A_LINE_EACH if line.lstrip().startswith(b"[") else "write one JSON object a line, all on one line"
        return Refused(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}", hint)
    except RecursionError:
        return Refused("not usable JSON: nested too deeply", "write one chat a line")
    except ValueError as error:  # a number with more digits than Python takes
        return Refused(f"not usable JSON: {error}", "write one chat a line")


def _rows(path: Path, counted: _Counted) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # a stream of its own, since Arrow reads from back to front and jumps
        with pq.ParquetFile(str(path), pre_buffer=False, buffer_size=BUFFER) as file:
            whole = file.metadata.num_rows
            columns = [column for column in file.schema_arrow.names if column in COLUMNS]
            if not {"messages", "conversations"} & set(columns):
                found = ", ".join(f"`{column}`" for column in file.schema_arrow.names[:8])
                raise SparkError(
                    f"`{path}` has no column `messages` or `conversations`, but {found or 'none'}",
                    "name the column of chats `messages`",
                )
            for batch in file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                for row in _as_objects(batch):
                    number += 1
                    yield f"{path.name}:{number}", row
                counted.share(number, whole)
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparkError(f"the Parquet file `{path}` is damaged after row {number}: {said}", "write it again") from None


def _as_objects(batch: Any) -> Iterator[Any]:
    """The rows as JSON would have given them: no null-filled fields, a map as an object."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _as_objects(batch.slice(i, 1))
            return
        yield Refused("not UTF-8: a text of this row has other bytes", "write the file's texts as UTF-8")
        return
    for row in rows:
        yield _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value

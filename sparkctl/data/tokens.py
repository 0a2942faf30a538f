"""The token store: what `analyze` tokenised, once, as an Arrow folder of the datasets library that later steps map.

A row is a document: its ids, the spans of ids that are trained, and what split, packs and rounds need to know of it.
The folder holds one Arrow stream and the two JSON files of datasets' own format, so `datasets.load_from_disk(folder)`
reads it. Rows are written as they come; only what the split and the statistics need stays in memory, some bytes a row.
Beside them lies, in a later round, what the rounds before held out: so a child asks its parent alone, and older runs
may be deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sparkctl.errors import SparkError
from sparkctl.files import sha256_file
from sparkctl.words import quoted

if TYPE_CHECKING:
    import pyarrow as pa

ARROW = "data-00000-of-00001.arrow"
INFO = "dataset_info.json"
STATE = "state.json"
INHERITED = "held_out_before.npy"
ROWS_A_BATCH = 1024  # rows of a record batch: a thousand batches a million rows
TOKENS_A_BATCH = 1 << 18  # or so many tokens, 1 MB of ids, where documents are long


class Row(NamedTuple):
    """One document on its way into the store."""

    input_ids: np.ndarray  # int32 [L]
    trained: np.ndarray  # bool [L]
    prompt_key: int  # uint64: hash of the turns that are not the model's
    row_hash: bytes  # 16 bytes: hash of the whole example, by which a later round knows it again
    place: str  # "chats.jsonl:12"
    turns: int = 1  # assistant turns
    holds_markers: bool = False  # its text holds the template's own markers


def label_count(trained: np.ndarray) -> int:
    """Labels that a loss really sees: trained tokens but the first of the document, which nothing predicts."""
    return int(np.count_nonzero(trained[1:]))


def spans(trained: np.ndarray) -> np.ndarray:
    """A bool mask as flat int32 [start, end, start, end, …]."""
    edges = np.diff(np.concatenate(([False], trained, [False])).astype(np.int8))
    return np.flatnonzero(edges).astype(np.int32)


def mask(flat: np.ndarray, length: int) -> np.ndarray:
    """The bool mask [length] of flat spans."""
    steps = np.zeros(length + 1, dtype=np.int8)
    steps[flat[0::2]] = 1
    steps[flat[1::2]] = -1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def _features() -> Any:
    from datasets import Features, Value
    from datasets.features import List

    return Features(
        {
            "input_ids": List(Value("int32")),
            "trained": List(Value("int32")),
            "length": Value("int32"),
            "labels": Value("int32"),
            "prompt_key": Value("uint64"),
            "row_hash": Value("binary"),
            "place": Value("string"),
            "turns": Value("int32"),
            "holds_markers": Value("bool"),
            "held_out": Value("bool"),
        }
    )


class TokenStoreWriter:
    """Writes a store into `folder`, a stage that the caller renames once `finish` has returned.

    Which rows are held out is known only when all were seen, so the rows go to a first file, and `finish` streams
    them, with that column added, into the one that stays.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder = folder
        self._features = _features()
        full = self._features.arrow_schema
        self._schema = pa.schema([field for field in full if field.name != "held_out"])
        self._first = folder / "rows.arrow"
        self._file = pa.OSFile(str(self._first), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        self._pending: list[Row] = []
        self._tokens = 0  # of the pending rows

    def add(self, row: Row) -> None:
        """Append one document."""
        self._pending.append(row)
        self._tokens += len(row.input_ids)
        if len(self._pending) >= ROWS_A_BATCH or self._tokens >= TOKENS_A_BATCH:
            self._flush()

    def finish(self, held_out: np.ndarray, inherited: np.ndarray | None = None) -> str:
        """Write the final file with `held_out` (bool [N]) and datasets' JSON; returns the content's digest.

        inherited: uint64 prompt keys that earlier rounds held out, whether or not a row here has them.
        """
        import pyarrow as pa

        self._flush()
        self._writer.close()
        self._file.close()
        digest, at = hashlib.sha256(), 0
        schema = self._features.arrow_schema
        with (
            pa.OSFile(str(self._first), "rb") as source,
            pa.ipc.open_stream(source) as rows,
            pa.OSFile(str(self._folder / ARROW), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            for batch in rows:
                column = pa.array(held_out[at : at + batch.num_rows], type=pa.bool_())
                whole = pa.record_batch([*batch.columns, column], schema=schema)
                writer.write_batch(whole)
                digest.update(whole.serialize())
                at += batch.num_rows
        assert at == len(held_out), "a held-out flag for each row"
        self._first.unlink()
        if inherited is not None and len(inherited):
            np.save(self._folder / INHERITED, inherited.astype(np.uint64), allow_pickle=False)
        self._describe(digest.hexdigest())
        return digest.hexdigest()

    def close(self) -> None:
        """Let the files go, also where the work failed half-way; the stage's owner removes them."""
        if not self._file.closed:
            self._file.close()

    def _flush(self) -> None:
        import pyarrow as pa

        rows, self._pending, self._tokens = self._pending, [], 0
        if not rows:
            return
        columns = [
            _list_array([row.input_ids for row in rows]),
            _list_array([spans(row.trained) for row in rows]),
            pa.array([len(row.input_ids) for row in rows], type=pa.int32()),
            pa.array([label_count(row.trained) for row in rows], type=pa.int32()),
            pa.array([row.prompt_key for row in rows], type=pa.uint64()),
            pa.array([row.row_hash for row in rows], type=pa.binary()),
            pa.array([row.place for row in rows], type=pa.string()),
            pa.array([row.turns for row in rows], type=pa.int32()),
            pa.array([row.holds_markers for row in rows], type=pa.bool_()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def _describe(self, digest: str) -> None:
        from datasets import DatasetInfo

        path = self._folder / ARROW
        sums = {ARROW: {"num_bytes": path.stat().st_size, "checksum": sha256_file(path)}}
        info = DatasetInfo(features=self._features, dataset_size=path.stat().st_size, download_checksums=sums)
        info.write_to_directory(str(self._folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": ARROW}],
            "_fingerprint": digest,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._folder / STATE).write_text(json.dumps(state, indent=2))


def _list_array(values: list[np.ndarray]) -> pa.Array:
    """Arrays of int32 as one Arrow list column, without a Python object a token."""
    import pyarrow as pa

    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate(values).astype(np.int32, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


class TokenStore:
    """A store on disk, mapped: opening a million rows reads headers, lengths and flags, not the tokens."""

    def __init__(self, folder: Path, table: pa.Table, digest: str) -> None:
        self.folder = folder
        self.digest = digest  # sha256 of the content, also in a copy elsewhere
        self.lengths: np.ndarray = _numbers(table, "length")  # int32 [N]
        self.label_counts: np.ndarray = _numbers(table, "labels")  # int32 [N]
        self.held_out: np.ndarray = _numbers(table, "held_out")  # bool [N]
        self.prompt_keys: np.ndarray = _numbers(table, "prompt_key")  # uint64 [N]
        self.turns: np.ndarray = _numbers(table, "turns")  # int32 [N]
        self.holds_markers: np.ndarray = _numbers(table, "holds_markers")  # bool [N]
        self._ids = _Lists(table.column("input_ids"))
        self._spans = _Lists(table.column("trained"))
        self._places = table.column("place")
        self._hashes = table.column("row_hash")

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`. Raises SparkError where there is none or it cannot be read."""
        import pyarrow as pa

        folder = Path(folder)
        hint = f"sparkctl analyze DATA --run {quoted(folder.parent)} --force"
        if not (folder / ARROW).is_file():
            raise SparkError(f"`{folder}` holds no token store", hint)
        digest = stored_digest(folder)
        if digest is None:
            raise SparkError(f"the token store `{folder}` is damaged: `{ARROW}` was cut or its JSON is broken", hint)
        try:
            with pa.memory_map(str(folder / ARROW)) as source:
                table = pa.ipc.open_stream(source).read_all()
            return cls(folder, table, digest)
        except (KeyError, pa.ArrowException) as error:
            raise SparkError(f"the token store `{folder}` is damaged: {error}", hint) from None

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [L] (a view of the file) and trained bool [L] of row `i`."""
        ids = self._ids[i]
        return ids, mask(self._spans[i], len(ids))

    def place(self, i: int) -> str:
        """Where row `i` was read: "chats.jsonl:12"."""
        return self._places[i].as_py()

    def held_out_keys(self) -> np.ndarray:
        """Prompt keys, uint64, sorted, that this round or one before it held out."""
        before = self.folder / INHERITED
        keys = [np.load(before, allow_pickle=False)] if before.is_file() else []
        return np.unique(np.concatenate([self.prompt_keys[self.held_out], *keys]))

    def row_hashes(self) -> np.ndarray:
        """The hashes of all rows: uint64 [N, 2]."""
        return np.frombuffer(b"".join(self._hashes.to_pylist()), dtype="<u8").reshape(-1, 2)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    parts: Iterable[np.ndarray] = (chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks)
    return np.concatenate([*parts]) if column.num_chunks else np.zeros(0, dtype=column.type.to_pandas_dtype())


class _Lists:
    """A chunked Arrow list column whose items are numpy views of the mapped file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._firsts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]

    def __getitem__(self, i: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._firsts, i, side="right")) - 1
        start, end = self._offsets[chunk][i - self._firsts[chunk] :][:2]
        return self._values[chunk][start:end]


def intact(folder: Path) -> bool:
    """Whether every byte of a store is as it was written: its file is read. True where no checksum was noted."""
    sums = json.loads((folder / INFO).read_text()).get("download_checksums") or {}
    return ARROW not in sums or sha256_file(folder / ARROW) == sums[ARROW]["checksum"]


def stored_digest(folder: Path) -> str | None:
    """The digest of a whole store, read without Arrow; None where there is none or its file was cut."""
    try:
        if (folder / ARROW).stat().st_size != json.loads((folder / INFO).read_text())["dataset_size"]:
            return None
        return str(json.loads((folder / STATE).read_text())["_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""Chat files for the tests of reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparkctl.data.read import Example, read_examples

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yo"}
CHAT = {"messages": [ASK, SAY]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}


def write(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    return path


def read(*paths: Path, **options: Any) -> list[Example]:
    return list(read_examples(paths, **options))


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path, **options)
    return path

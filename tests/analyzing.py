"""What the tests of `sparkctl analyze` share: an answer of the command line, and small files of chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Analyze = Callable[..., "Answer"]


class Answer:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def lines(path: Path, *examples: Any) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" if not isinstance(e, str) else e + "\n" for e in examples))
    return path


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

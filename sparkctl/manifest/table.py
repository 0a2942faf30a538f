"""What every table of `run.toml` is made of, and the words that its keys may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

Mode = Literal["lora", "full"]
EngineName = Literal["native", "reference", "unsloth"]
HeadLoss = Literal["kl", "ce"]
Schedule = Literal["cosine", "linear"]
CheckpointKind = Literal["base", "step", "merged", "mtp-head", "served"]


class FromTheRun:
    """Marks a path that is counted from the run's folder, and anew when that is moved."""


RunPath = Annotated[str, FromTheRun()]
MaybeRunPath = Annotated[str | None, FromTheRun()]


class Table(BaseModel):
    """An unknown key is an error; assignments are checked like a file's values."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*")
    @classmethod
    def _no_zero_byte(cls, value: Any) -> Any:
        """Many of the texts are paths, and no name of a file holds a zero byte."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a zero byte")
        return value


def run_paths(table: BaseModel) -> Iterator[tuple[BaseModel, str, str]]:
    """Every path of a table and of those within it that is counted from the run: (its table, its key, the path)."""
    for key, field in type(table).model_fields.items():
        value = getattr(table, key)
        if isinstance(value, str) and any(isinstance(mark, FromTheRun) for mark in field.metadata):
            yield table, key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from run_paths(inner)

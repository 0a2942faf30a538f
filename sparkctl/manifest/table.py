"""What every table of `run.toml` is made of, and the words that its keys may hold."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

Mode = Literal["lora", "full"]
EngineName = Literal["native", "reference", "unsloth"]
HeadLoss = Literal["kl", "ce"]
Schedule = Literal["cosine", "linear"]
CheckpointKind = Literal["base", "step", "merged", "mtp-head", "served"]


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

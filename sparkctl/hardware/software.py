"""The libraries that are installed here, by their metadata alone. Nothing is imported for it."""

from __future__ import annotations

from importlib import metadata
from platform import python_version

LIBRARIES = ("torch", "triton", "transformers", "peft", "safetensors", "flash-linear-attention", "unsloth")
UNREADABLE = "unreadable"
DAMAGED = (UnicodeDecodeError, KeyError, TypeError)  # what importlib raises where the file is broken, or not there


def versions() -> dict[str, str]:
    """Python and the libraries that compute."""
    found = {name: installed(name) for name in LIBRARIES}
    return {"python": python_version()} | {name: version for name, version in found.items() if version}


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed, UNREADABLE where its metadata cannot be read."""
    try:
        return metadata.version(name) or UNREADABLE
    except metadata.PackageNotFoundError:
        return None
    except DAMAGED:
        return UNREADABLE


def requirements(name: str) -> list[str]:
    """What a distribution asks of others; nothing where it is not installed, or its metadata cannot be read."""
    try:
        return metadata.requires(name) or []
    except (metadata.PackageNotFoundError, *DAMAGED):
        return []

"""The libraries that compute, as installed here. Nothing is imported for it."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

LIBRARIES = ("torch", "triton", "transformers", "peft", "safetensors", "flash-linear-attention", "unsloth")


def versions() -> dict[str, str]:
    """Python and the libraries that compute."""
    found = {"python": python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

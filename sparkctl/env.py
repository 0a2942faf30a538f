"""The one place that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path


def hub_endpoint() -> str:
    """Where hub ids are looked up (HF_ENDPOINT)."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_offline() -> bool:
    """True where HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids asking the hub."""
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.strip().upper() in {"1", "ON", "YES", "TRUE"}


def hub_cache() -> Path:
    """Where models of the hub are kept (HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub)."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    hub = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def user_data_folder() -> Path:
    """Where measurements of this machine are kept across runs (SPARKCTL_HOME, else XDG_DATA_HOME/sparkctl)."""
    if home := os.environ.get("SPARKCTL_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share")) / "sparkctl"


def visible_gpu() -> str | None:
    """Number or UUID of the first GPU that CUDA may use (CUDA_VISIBLE_DEVICES); None where it hides them all."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return None if first in ("", "-1") else first


def world_size() -> int:
    """Processes that torchrun started (WORLD_SIZE); 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those that torchrun started on this box (LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def everything() -> dict[str, str]:
    """All of it, for a process that is started with a few variables more."""
    return dict(os.environ)

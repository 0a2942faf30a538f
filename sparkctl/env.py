"""The one place that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path

PTXAS = ("ptxas", "ptxas-blackwell")  # the assemblers that Triton carries


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


def user_cache_folder() -> Path:
    """Where parts of hub models are kept that the hub's own cache has no place for (XDG_CACHE_HOME/sparkctl)."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparkctl"


def user_data_folder() -> Path:
    """Where measurements of this machine are kept across runs (SPARKCTL_HOME, else XDG_DATA_HOME/sparkctl)."""
    if home := os.environ.get("SPARKCTL_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share")) / "sparkctl"


def visible_gpu() -> str | None:
    """Number or UUID of the first GPU that CUDA may use (CUDA_VISIBLE_DEVICES); None where it hides them all."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return None if first in ("", "-1") else first


def triton_ptxas() -> dict[str, Path]:
    """What stands in for Triton's own assemblers, by name (TRITON_PTXAS_PATH, TRITON_PTXAS_BLACKWELL_PATH)."""
    asked = {name: os.environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH") for name in PTXAS}
    return {name: Path(path) for name, path in asked.items() if path}


def triton_cache() -> Path:
    """Where Triton keeps compiled kernels (TRITON_CACHE_DIR, else TRITON_HOME/.triton/cache)."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache"


def cuda_home() -> Path | None:
    """The CUDA toolkit that was chosen (CUDA_HOME, else CUDA_PATH); None where none was."""
    folder = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(folder) if folder else None


def settle_unsloth() -> None:
    """Unsloth writes compiled code into the user's cache, not into the folder at hand, and reports to nobody
    (UNSLOTH_COMPILE_LOCATION, UNSLOTH_DISABLE_STATISTICS; what the user has set stays)."""
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(user_cache_folder() / "unsloth"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")


def keep_few_products() -> None:
    """On a CPU torch keeps 64 compiled products of each of its two caches, not 1,024
    (ONEDNN_PRIMITIVE_CACHE_CAPACITY, LRU_CACHE_CAPACITY; what the user has set stays). Read at the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def world_size() -> int:
    """Processes that torchrun started (WORLD_SIZE); 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all that torchrun started (RANK); the first, 0, is the one that answers."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def lacking() -> list[str]:
    """What torchrun sets beside WORLD_SIZE and is not set here: where the processes meet, and as which."""
    return [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]


def local_rank() -> int:
    """This process's number among those that torchrun started on this box (LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes that torchrun started on this box (LOCAL_WORLD_SIZE); where nothing says so, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def everything() -> dict[str, str]:
    """All of it, for a process that is started with a few variables more."""
    return dict(os.environ)

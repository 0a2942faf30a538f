"""Engines: three ways to compute a micro-step's loss and gradients, behind the interface in base.py."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.errors import UsageError
from sparkctl.manifest.schema import PlanTable

if TYPE_CHECKING:
    from sparkctl.train.engines.base import Engine

# an engine's module holds `load(plan, folder, choices, *, allow_slow, name) -> Engine`
ENGINES = {
    "native": "sparkctl.train.engines.native.engine",
    "reference": "sparkctl.train.engines.reference",
    "unsloth": "sparkctl.train.engines.unsloth",
}


def import_first(engine: str) -> None:
    """Import what patches transformers, before anything else imports that. Raises UsageError where it is missing."""
    if engine == "unsloth":
        import_module(ENGINES[engine]).language_model()


def make_engine(
    plan: PlanTable, folder: Path, choices: dict[str, str] | None = None, name: str = "RUN", allow_slow: bool = False
) -> Engine:
    """The plan's engine with the model of `folder` on the plan's device.

    choices: those of an earlier start of the same training, to be kept; None lets the engine choose. name: the run
    in hints. allow_slow: a GPU may compute in plain torch what lacks its fast kernel.
    Raises UsageError where the engine or the device is not there.
    """
    if plan.engine not in ENGINES:
        known = ", ".join(f"`{name}`" for name in ENGINES)
        raise UsageError(
            f"the engine `{plan.engine}` is not in this version, which has {known}",
            f"sparkctl recommend {name} --engine reference",
        )
    return import_module(ENGINES[plan.engine]).load(plan, folder, choices or {}, allow_slow=allow_slow, name=name)

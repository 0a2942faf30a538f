"""`sparkctl verify leaks`: operators, engines and installed transformers, on small models of a run's architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkctl.errors import SparkError
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import EngineName, Mode
from sparkctl.progress import Progress, silent
from sparkctl.steps.inputs import analysed
from sparkctl.steps.leaks_process import leaks_apart
from sparkctl.steps.training import model_folder
from sparkctl.verify.leaks import Finding, engine_leaks
from sparkctl.words import quoted

DEFAULT = "qwen3.5-0.8b"  # whose architecture is looked at without a run


def verify_leaks(
    folder: Path | None, *, engine: EngineName | None = None, allow_slow: bool = False, progress: Progress = silent
) -> list[Finding]:
    """Everything that was looked at. Raises SparkError where the engine that was asked for cannot be."""
    import torch

    from sparkctl.hardware.machine import this_machine
    from sparkctl.verify.operators import operator_leaks
    from sparkctl.verify.stack import stack_leaks

    config, mode = _architecture(folder, progress)
    machine = this_machine()
    device, name = torch.device(machine.device), quoted(folder or "RUN")
    stack, found = stack_leaks(config, device), operator_leaks(config, device)
    for one in [engine] if engine else _engines():
        look = leaks_apart if one == "unsloth" else engine_leaks
        try:
            found += look(config, one, mode, machine, progress, allow_slow=allow_slow, name=name)
        except SparkError as error:
            if engine:
                raise
            found.append(Finding(f"{one} engine", "whole model", refused=error.message))
    return found + stack


def _engines() -> tuple[EngineName, ...]:
    from sparkctl.plan.rules import engines

    return engines()


def _architecture(folder: Path | None, progress: Progress) -> tuple[dict[str, Any], Mode]:
    """(config.json, lora or full) of the run; of Qwen3.5 where none is named."""
    from sparkctl.model import catalog
    from sparkctl.model.inspect import read_config

    if folder is None:
        return catalog.config(DEFAULT), "lora"
    run = Run.open(folder)
    plan = run.manifest.plan
    return read_config(model_folder(run, analysed(run)[0], progress)), plan.mode if plan else "lora"

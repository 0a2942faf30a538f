"""`sparkctl verify leaks`: operators, engines and installed transformers, on small models of a run's architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparkctl.errors import SparkError
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import EngineName
from sparkctl.plan import rules
from sparkctl.progress import Progress, silent
from sparkctl.steps.inputs import analysed, recommend_command
from sparkctl.steps.leaks_process import leaks_apart
from sparkctl.steps.training import model_folder
from sparkctl.verify.leaks import Finding, engine_leaks
from sparkctl.words import quoted

DEFAULT = "qwen3.5-0.8b"  # whose architecture is looked at without a run


@dataclass(frozen=True)
class Looked:
    """Everything that was looked at; hint: how to train where something leaks."""

    findings: list[Finding]
    hint: str


def verify_leaks(
    folder: Path | None, *, engine: EngineName | None = None, allow_slow: bool = False, progress: Progress = silent
) -> Looked:
    """Look at that engine, else at all that are here. Raises SparkError where that one, or the one that a training
    would take, cannot be looked at.
    """
    import torch

    from sparkctl.hardware.machine import this_machine
    from sparkctl.verify.operators import operator_leaks
    from sparkctl.verify.stack import stack_leaks

    run = Run.open(folder) if folder else None
    plan = run.manifest.plan if run else None
    config, mode = _config(run, progress), plan.mode if plan else "lora"
    usual, machine = engine or (plan.engine if plan else rules.AVAILABLE_ENGINES[0]), this_machine()
    device, name = torch.device(machine.device), quoted(folder or "RUN")
    without = f"sparkctl verify leaks{f' {name}' if folder else ''} --engine native{' --allow-slow' * allow_slow}"
    stack, found = stack_leaks(config, device), operator_leaks(config, device)
    for one in [engine] if engine else rules.engines():
        look = partial(leaks_apart, without=without) if one == "unsloth" else engine_leaks
        try:
            found += look(config, one, mode, machine, progress, allow_slow=allow_slow, name=name)
        except SparkError as error:
            if one == usual:
                if run is None and name in (error.hint or ""):  # a command for a run, and there is none
                    error.hint = without
                raise
            found.append(Finding(f"{one} engine", "whole model", refused=error.message))
    safe = recommend_command(run, shown=folder, engine="reference") if run else "plan with `--engine reference`"
    return Looked(found + stack, safe)


def _config(run: Run | None, progress: Progress) -> dict[str, Any]:
    """config.json of the run's model; of Qwen3.5 where there is no run."""
    from sparkctl.model import catalog
    from sparkctl.model.inspect import read_config

    if run is None:
        return catalog.config(DEFAULT)
    return read_config(model_folder(run, analysed(run)[0], progress))

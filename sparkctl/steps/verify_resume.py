"""`sparkctl verify resume`: the run's plan for a few steps straight, and again killed and resumed, then compared.

Each part is a process of its own, as in life. They work on copies of the run, in a scratch folder inside it: the disk
that its checkpoints go to has room for these. Nothing of the run itself is changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkctl.errors import SparkError, UsageError
from sparkctl.files import sweep_stages
from sparkctl.manifest.schema import PlanTable
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress, silent
from sparkctl.steps.inputs import TOKENS, recommend_command
from sparkctl.steps.killing import killed_training
from sparkctl.steps.training import Job, planned
from sparkctl.words import quoted

STEPS, SAVE_EVERY, KILL_AFTER = 4, 2, 1  # killed at step 3, resumed from step 2, compared at step 4
SCRATCH = "verify-resume"


@dataclass(frozen=True)
class Result:
    """What was done and what differs; empty where the resumed training went on from its checkpoint, and is the straight
    one, byte for byte."""

    run: Path
    steps: int
    killed_at: int
    resumed_from: int
    differences: list[str]


def verify_resume(folder: Path, *, allow_slow: bool = False, progress: Progress = silent) -> Result:
    """Prove it on this machine. Raises SparkError where a training fails or has too few steps to be killed in."""
    from sparkctl.verify.resume import differences

    run = Run.open(folder)
    with run.step("verify"):
        job = planned(run, allow_slow)
        if job.plan.steps < STEPS:
            raise UsageError(
                f"`{run.root}` is trained in {job.plan.steps} steps; to be killed and resumed takes {STEPS}",
                recommend_command(run, **_longer(job.plan)),
            )
        sweep_stages(run.root, SCRATCH)
        scratch = Path(tempfile.mkdtemp(prefix=f".{SCRATCH}.", suffix=".tmp", dir=run.root))
        try:
            hint = f"mend what it says, then prove it again: `sparkctl verify resume {quoted(folder)}`"
            with progress.task("resuming, proved", 3) as task:
                straight, resumed = (_copy(job, scratch / name, progress) for name in ("straight", "resumed"))
                launch("train", straight, "--no-certificate", hint=hint, slow=allow_slow)
                task.advance()
                killed_at = killed_training(resumed, KILL_AFTER, allow_slow=allow_slow)
                task.advance()
                launch("resume", resumed, hint=hint, slow=allow_slow)
                task.advance()
            resumes = Run.open(resumed).manifest.resumes
            resumed_from = resumes[-1].step if resumes else 0
            found = differences(straight, resumed, STEPS)
            if resumed_from != SAVE_EVERY:  # another way to the same bytes
                found.insert(0, f"resumed from step {resumed_from}; the checkpoint is of step {SAVE_EVERY}")
            return Result(run.root, STEPS, killed_at, resumed_from, found)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _longer(plan: PlanTable) -> dict[str, Any]:
    """Choices of a plan with steps enough."""
    epochs = {"epochs": plan.epochs * -(-STEPS // plan.steps)}
    return epochs if plan.max_steps is None else epochs | {"max_steps": STEPS}


def launch(command: str, run: Path, *options: str, hint: str, slow: bool = False) -> None:
    """`sparkctl COMMAND RUN` in a process of its own. Raises SparkError with what it said and `hint` where it fails."""
    line = [sys.executable, "-m", "sparkctl", command, str(run), *options, *["--allow-slow"] * slow]
    done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SparkError(f"`sparkctl {command}` ended with status {done.returncode}:\n{done.stderr.strip()}", hint)


def _copy(job: Job, root: Path, progress: Progress) -> Path:
    """The run anew under `root`, planned for a few steps; its tokens are linked, its model named by its folder."""
    run, model = job.run, job.model_folder(progress)
    parent = job.parent[0] if job.parent else None
    made = Run.create(root, parent=parent, continues=run.manifest.run.continues)
    (root / TOKENS).symlink_to((run.root / TOKENS).absolute(), target_is_directory=True)
    short = {"max_steps": STEPS, "steps": STEPS, "save_every": SAVE_EVERY, "keep": 2}
    with made.edit() as manifest:
        manifest.data, manifest.analysis = run.manifest.data, run.manifest.analysis
        manifest.model = job.model.model_copy(update={"source": made.relative(model), "revision": None})
        manifest.plan = job.plan.model_copy(update=short)
    return root

"""Checkpoints: complete or absent, streamed tensor by tensor, each file with its digest.

    checkpoints/step-000200/
      trainable.safetensors   fp32: adapters "<module path>.lora_A.weight" [r, in], ".lora_B.weight" [out, r] by the
                              checkpoint's module paths, or the masters by the checkpoint's tensor names
      optimizer.safetensors   "exp_avg.<name>", "exp_avg_sq.<name>" in fp32, "random.<generator>"
      state.json              where training stands (`State`)
      digests.json            {file: sha256}

A folder gets its name by a rename once all of it is synced, and loses it by a rename before anything in it is removed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, ValidationError

from sparkctl.errors import SparkError
from sparkctl.files import Sealing, naming, sha256_file, staged_folder
from sparkctl.manifest.schema import Lora
from sparkctl.manifest.table import Mode, Table
from sparkctl.train import random

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

    from sparkctl.train.optim import Optimizer

TRAINABLE, OPTIMIZER, STATE, DIGESTS = "trainable.safetensors", "optimizer.safetensors", "state.json", "digests.json"
FORMAT: Final = 1
RECENT = 10  # losses that the final one is the mean of
RANDOM = "random."
ALONE = "there is no other whole checkpoint"


class CheckpointDamaged(SparkError):
    """A file of a checkpoint is missing, changed or not ours."""


class State(Table):
    """state.json: where a training stands after `step` optimiser steps."""

    format: Literal[1] = FORMAT
    mode: Mode | Literal["mtp"] = Field(description="what is trained: the model, or its MTP head")
    lora: Lora | None = None
    step: int = 0
    epoch: int = 0
    tokens: int = 0
    seconds: float = Field(default=0.0, description="of training, evaluations and saves, over all resumes")
    first_loss: float | None = None
    recent_losses: list[float] = Field(default_factory=list, description="of the last ten steps")
    first_eval_loss: float | None = None
    eval_loss: float | None = Field(default=None, description="held-out loss at this step, where it was measured")
    best_eval_loss: float | None = None
    best_checkpoint: str | None = None
    peak_memory: int | None = None


def checkpoint_id(step: int) -> str:
    """step-000200."""
    return f"step-{step:06d}"


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder by their names, oldest first; none is looked into."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def save(folder: Path, state: State, optimizer: Optimizer) -> Path:
    """Write the checkpoint of `state.step` under `folder` and give it its name. Raises OSError naming it and leaves
    nothing.
    """
    final = folder / checkpoint_id(state.step)
    with naming(final), staged_folder(final, replace=True) as stage:
        write(stage, state, optimizer)
    return final


def write(stage: Path, state: State, optimizer: Optimizer) -> None:
    """The four files, into a folder that is there; the disk has them then."""
    randoms = {RANDOM + name: value for name, value in random.capture().items()}
    with Sealing() as sealing:
        _write_tensors(stage / OPTIMIZER, {**dict(optimizer.moments()), **randoms})  # first, being the longest to seal
        sealing.add(stage / OPTIMIZER)
        _write_tensors(stage / TRAINABLE, dict(optimizer.parameters))
        sealing.add(stage / TRAINABLE)
        (stage / STATE).write_bytes(_canonical(state.model_dump(mode="json", exclude_none=True)))
        sealing.add(stage / STATE)
        (stage / DIGESTS).write_bytes(_canonical(sealing.digests()))


def digest(checkpoint: Path) -> str:
    """One digest for the whole checkpoint."""
    return sha256_file(checkpoint / DIGESTS)


def verify(checkpoint: Path) -> None:
    """Read every byte. Raises CheckpointDamaged naming the first file that is not what was written."""
    if problem := _problem(checkpoint):
        raise CheckpointDamaged(problem, _without(checkpoint))


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with the first file that is not what was written, every byte read; None where it is whole."""
    path = checkpoint / DIGESTS
    try:
        data = path.read_bytes()
        digests = json.loads(data)
    except (OSError, ValueError):
        return f"`{path}` is missing or broken"
    if not isinstance(digests, dict) or set(digests) != {OPTIMIZER, STATE, TRAINABLE} or _canonical(digests) != data:
        return f"`{path}` is damaged"
    for name, wanted in digests.items():
        if not (checkpoint / name).is_file():
            return f"`{checkpoint / name}` is missing"
        if sha256_file(checkpoint / name) != wanted:
            return f"`{checkpoint / name}` is damaged: its digest is not the one in {DIGESTS}"
    return None if _state(checkpoint) else f"`{checkpoint / STATE}` is of another version"


def _without(checkpoint: Path) -> str:
    """What to do without that checkpoint, whose run is two folders up."""
    if name := another(checkpoint):
        return shlex.join(["sparkctl", "resume", str(checkpoint.parent.parent), "--from", name])
    return f"`{anew(checkpoint)}` begins anew: {ALONE}"


def another(checkpoint: Path) -> str | None:
    """The name of the newest other one beside it that is whole: every byte of it is read."""
    beside = (path for path in reversed(listed(checkpoint.parent)) if path.name != checkpoint.name)
    return next((path.name for path in beside if _problem(path) is None), None)


def anew(checkpoint: Path) -> str:
    """The command that trains its run from the start."""
    return shlex.join(["sparkctl", "train", str(checkpoint.parent.parent), "--force"])


def intact(checkpoint: Path) -> bool:
    """Whether it still is what was written, as sizes and times tell: only a file newer than its digests is read."""
    from sparkctl.model.weights import TensorFile

    try:
        written = (checkpoint / DIGESTS).stat().st_mtime_ns
        for name, wanted in json.loads((checkpoint / DIGESTS).read_bytes()).items():
            path = checkpoint / name
            if path.suffix == ".safetensors":
                TensorFile(path)  # its header says how long it has to be
            if path.stat().st_mtime_ns > written and sha256_file(path) != wanted:
                return False
    except (OSError, ValueError, SparkError):
        return False
    return True


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that is whole; what is wrong with those after it."""
    damaged: list[str] = []
    for checkpoint in reversed(listed(folder)):
        problem = _problem(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(problem)
    return None, damaged


def with_whole_best(at: State, folder: Path) -> tuple[State, list[str]]:
    """`at`, its best checkpoint one in `folder` that is whole; why that is not the one it names.

    Where that one is damaged, or gone (a better one came after it, and the training then went back behind that), the
    best is, of those up to this step, the one of the least held-out loss; where none is left, there is none.
    """
    named = at.best_checkpoint
    if named in (None, checkpoint_id(at.step)):
        return at, []
    states = {path.name: _state(path) for path in listed(folder) if step_of(path) <= at.step and path.name != named}
    measured = {id: found.eval_loss for id, found in states.items() if found and found.eval_loss is not None}
    problems: list[str] = []
    for id, loss in [(named, at.best_eval_loss), *sorted(measured.items(), key=lambda item: item[1])]:
        problem = _problem(folder / id) if (folder / id).is_dir() else f"`{folder / id}` is no longer there"
        if problem is None:
            return at.model_copy(update={"best_checkpoint": id, "best_eval_loss": loss}), problems
        problems.append(problem)
    return at.model_copy(update={"best_checkpoint": None, "best_eval_loss": None}), problems


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, a tensor at a time: no second copy of the weights in memory."""
    from sparkctl.model.weights import ShardWriter

    with ShardWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_state(checkpoint: Path) -> State:
    """state.json. Raises CheckpointDamaged where it does not hold."""
    if found := _state(checkpoint):
        return found
    raise CheckpointDamaged(f"`{checkpoint / STATE}` is missing or broken", _without(checkpoint))


def _state(checkpoint: Path) -> State | None:
    try:
        return State.model_validate_json((checkpoint / STATE).read_bytes())
    except (OSError, ValidationError):
        return None


def load(checkpoint: Path, optimizer: Optimizer) -> State:
    """Fill the live parameters and moments, one tensor at a time, and put the random states back."""
    from safetensors import safe_open

    state = read_state(checkpoint)
    load_trainable(checkpoint, optimizer.parameters)
    with safe_open(checkpoint / OPTIMIZER, framework="pt") as file:
        for name, moment in optimizer.moments():
            moment.copy_(file.get_tensor(name))
        saved = (name for name in file.keys() if name.startswith(RANDOM))  # noqa: SIM118 (not a dict)
        random.restore({name.removeprefix(RANDOM): file.get_tensor(name) for name in saved})
    optimizer.set_step(state.step)
    return state


def load_trainable(checkpoint: Path, parameters: dict[str, Parameter]) -> None:
    """Copy a checkpoint's trained tensors into the live ones. Raises SparkError where names or shapes differ."""
    import torch
    from safetensors import safe_open

    with safe_open(checkpoint / TRAINABLE, framework="pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if shapes != {name: list(parameter.shape) for name, parameter in parameters.items()}:
            raise SparkError(
                f"`{checkpoint}` holds other tensors than this model trains",
                f"`{anew(checkpoint)}` begins anew",
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))


def prune(folder: Path, keep: int, best: str | None) -> list[str]:
    """Remove all but the newest `keep` checkpoints and the best; the ids that went."""
    checkpoints = listed(folder)
    gone = [checkpoint for checkpoint in checkpoints[:-keep] if checkpoint.name != best]
    for checkpoint in gone:
        remove(checkpoint)
    return [checkpoint.name for checkpoint in gone]


def remove(checkpoint: Path) -> None:
    """Take the name away, then the files: a kill between leaves a stage, never half a checkpoint."""
    trash = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of the files in a checkpoint."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _canonical(value: object) -> bytes:
    # one spelling of each value: a flipped bit anywhere is another text
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

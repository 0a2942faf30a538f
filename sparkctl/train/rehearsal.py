"""Before step 1: the heaviest packs, one eval batch, one checkpoint. Memory and disk fail here, in minute one."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparkctl.errors import AGAIN, SparkError
from sparkctl.files import naming
from sparkctl.train import guard, random, state
from sparkctl.words import size

if TYPE_CHECKING:
    from sparkctl.data.batches import Pack
    from sparkctl.train.engines.base import Engine
    from sparkctl.train.optim import Optimizer
    from sparkctl.train.state import State


class Advice(NamedTuple):
    """What mends what a rehearsal finds: where the model itself is too much, a pack of it, its checkpoints; and the
    command that sets another learning rate, without the rate.
    """

    model: str
    pack: str
    disk: str
    rate: str


def rehearse(
    engine: Engine, optimizer: Optimizer, heaviest: Sequence[Pack], held_out: Sequence[Pack], folder: Path, now: State,
    *, checkpoints: int, advice: Advice, writes: bool = True, accumulates: bool = True,
) -> None:  # fmt: skip
    """Try everything once; weights, moments and random states are afterwards what they were.

    checkpoints: how many will lie in `folder` at once. writes: whether this rank saves.
    accumulates: whether a step has several packs.
    """
    with random.untouched():
        waiting = heaviest[:1] if accumulates else []  # its gradients wait while the others are computed: the peak
        for pack in (*waiting, *heaviest):
            what = f"a pack of {pack.tokens:,} tokens (longest document {_longest(pack):,})"
            with guard.memory(what, advice.pack):
                engine.micro_step(pack, 1 / max(1, pack.labels)).item()
            if not accumulates:
                optimizer.clear()
        optimizer.clear()
        if held_out:
            largest = max(held_out, key=lambda pack: pack.tokens)
            with guard.memory(f"the largest held-out pack ({largest.tokens:,} tokens)", advice.pack):
                engine.eval_sum(largest).item()
        if writes:
            check_disk(optimizer, folder, now, checkpoints, advice.disk)


def check_disk(optimizer: Optimizer, folder: Path, now: State, checkpoints: int, hint: str) -> None:
    """Write a checkpoint and remove it. Raises SparkError where that, or room for `checkpoints` of them, is lacking."""
    folder.mkdir(exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".rehearsal.", suffix=".tmp", dir=folder))
    try:
        there = sum(state.size(path) for path in state.listed(folder))
        with naming(folder):
            state.write(stage, now, optimizer)
        each = state.size(stage)
        wanted = each * checkpoints
        room = shutil.disk_usage(stage).free + each + there
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SparkError(
            f"the disk of `{folder}` is full: not even one checkpoint fits", f"free some space there, then {AGAIN}"
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    if room < wanted:
        raise SparkError(
            f"`{folder}` has room for {size(room)} of checkpoints; the plan keeps {checkpoints} of "
            f"{size(each)} at a time",
            hint,
        )


def _longest(pack: Pack) -> int:
    return max(len(document.ids) for document in pack.documents)

"""The processes that train together, as torch.distributed has them; one process is a group of one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from sparkctl import env
from sparkctl.errors import Interrupted, SparkError, UsageError
from sparkctl.train.guard import handled
from sparkctl.words import counted

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter


@dataclass(frozen=True)
class Ranks:
    """This process's place. All ranks hold the same weights; each computes its share of a step's packs."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As torch.distributed was initialised, else one process."""
        if "torch" not in sys.modules:
            return cls()
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Add up every `.grad` over the ranks, in fp32; a rank without a gradient brings zeros."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            if work is not None:
                work.wait()

    def sum(self, values: Sequence[float], device: torch.device | str) -> list[float]:
        """Add numbers up over the ranks, in fp64."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def of_the_first(self, words: dict[str, str]) -> dict[str, str]:
        """What the first rank holds."""
        import torch.distributed as dist

        if self.size == 1:
            return words
        told = [words]
        dist.broadcast_object_list(told)
        return told[0]

    def meet(self, device: torch.device | str = "cpu") -> None:
        """Wait until every rank has come this far."""
        self.sum([0.0], device)

    @contextmanager
    def interrupted_together(self) -> Iterator[None]:
        """Out of the block, which all were asked to leave, comes Interrupted once every rank is done in it: torchrun
        ends the others when one has left, the first too, while it saves."""
        try:
            yield
        except Interrupted:
            self.meet()
            raise


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, joined for the length of the block; without torchrun, this one alone."""
    if env.world_size() == 1:
        yield Ranks.current()
        return
    if lacking := env.lacking():
        raise UsageError(
            f"WORLD_SIZE is {env.world_size()}, without {', '.join(lacking)}",
            "start this by `torchrun`, or `unset WORLD_SIZE`",
        )
    import torch
    import torch.distributed as dist

    # These take the group of the moment as an argument's default. Imported later, by fla or transformers, they would
    # keep it beyond its end, and its threads would abort the process (SIGABRT, now and then) once Python has shut down.
    import torch.distributed.fsdp
    import torch.distributed.nn
    import torch.distributed.optim

    compute_on_own_gpu()
    try:
        # handlers of ours would not be called while this waits for a rank that has failed before it
        with handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_DFL)):
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        yield Ranks.current()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise SparkError(
            f"rank {env.rank()} lost another rank in the middle", "that one's own words say what ended it"
        ) from None
    dist.destroy_process_group()  # not after a failure: NCCL's waits for every rank, of which one may wait for this one


def leave(status: int) -> NoReturn:
    """End this process: one of several that failed at once, its group as it is, so that torchrun ends the others."""
    if status and env.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def compute_on_own_gpu() -> None:
    """Of several processes on a box each takes the GPU of its number. Raises UsageError where there is none."""
    if env.world_size() == 1:
        return
    import torch

    if torch.cuda.is_available():
        mine, gpus = env.local_rank(), torch.cuda.device_count()
        if mine >= gpus:
            raise UsageError(
                f"no GPU for process {mine + 1} of this machine, which has {counted(gpus, 'GPU')}",
                f"start as many: `torchrun --nproc-per-node {gpus} …`",
            )
        torch.cuda.set_device(mine)

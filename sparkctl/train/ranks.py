"""The processes that train together, as torch.distributed has them; one process is a group of one."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

    def sum(self, values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
        """Add numbers up over the ranks, in fp64."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def of_the_first(self, words: dict[str, str]) -> dict[str, str]:
        """What the first rank holds."""
        if self.size == 1:
            return words
        import torch
        import torch.distributed as dist

        told = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)
        length = torch.tensor(len(told))
        dist.broadcast(length, 0)
        told = told if self.writes else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(told, 0)
        heard: dict[str, str] = json.loads(bytes(told.tolist()))
        return heard

    def command(self, line: str) -> str:
        """A command line of `sparkctl` as these processes were started."""
        return line if self.size == 1 else f"torchrun --nproc-per-node {env.local_world_size()} -m {line}"

    def meet(self) -> None:
        """Wait until every rank has come this far."""
        self.sum([0.0])

    @contextmanager
    def interrupted_together(self) -> Iterator[None]:
        """Out of the block, which all were asked to leave, comes Interrupted once every rank is done in it: torchrun
        ends the others when one has left, the first too, while it saves."""
        try:
            yield
        except Interrupted:
            with suppress(RuntimeError):  # another left at once: what this one saved is saved
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
        ours = (number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN)
        with handled(dict.fromkeys(ours, signal.SIG_DFL)):
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        yield Ranks.current()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise SparkError(
            f"rank {env.rank()} lost another rank, or never met it: {str(error).strip().splitlines()[0]}",
            "the other's own words may say what ended it",
        ) from None
    dist.destroy_process_group()  # not after a failure: NCCL's waits for every rank, of which one may wait for this one


def leave(status: int) -> NoReturn:
    """End this process: one of several that failed at once, its group as it is, so that torchrun ends the others."""
    if status and env.world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def compute_on_own_gpu() -> None:
    """Of several processes on a box each takes the GPU of its number. Raises UsageError in all where some have none."""
    if env.world_size() == 1:
        return
    import torch

    if torch.cuda.is_available():
        processes, gpus = env.local_world_size(), torch.cuda.device_count()
        if processes > gpus:
            raise UsageError(
                f"{processes} processes for {counted(gpus, 'GPU')} of this machine",
                f"start as many: `torchrun --nproc-per-node {gpus} …`",
            )
        torch.cuda.set_device(env.local_rank())

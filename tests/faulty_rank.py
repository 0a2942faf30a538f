"""`sparkctl COMMAND RUN` as one of the processes that torchrun starts, in the second of which a fault strikes.

python -m torch.distributed.run --nproc-per-node 2 tests/faulty_rank.py FAULT COMMAND RUN
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from striking import at_step

from sparkctl.cli import app
from sparkctl.train.engines.native.engine import NativeEngine

AT = 7  # micro-steps of a rank


def lose(engine: NativeEngine) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(engine: NativeEngine) -> None:
    signal.raise_signal(signal.SIGTERM)


def fill(engine: NativeEngine) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def poison(engine: NativeEngine) -> None:
    next(iter(engine.parameters().values())).data.fill_(float("nan"))


FAULTS: dict[str, Callable[[NativeEngine], None]] = {"lose": lose, "stop": stop, "fill": fill, "poison": poison}


def main(fault: str, command: str, run: str) -> None:
    if os.environ["RANK"] == "1":
        at_step(pytest.MonkeyPatch(), NativeEngine, AT, FAULTS[fault])
    sys.argv = ["sparkctl", command, run, "--json"]
    app.main()


if __name__ == "__main__":
    main(*sys.argv[1:])

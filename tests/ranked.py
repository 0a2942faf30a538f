"""A training of the native engine in fp32, as one of the processes that torchrun starts.

python -m torch.distributed.run --nproc-per-node 2 tests/ranked.py MODEL FOLDER MODE
"""

from __future__ import annotations

import sys
from pathlib import Path

import ready
import torch
from gradient_cases import engine
from looping import Training

from sparkctl.train.engines.native import engine as native
from sparkctl.train.ranks import Ranks, joined


def training(model: Path, folder: Path, mode: str, ranks: Ranks) -> Training:
    """Ready to run; adapters are not zero."""
    changes = {} if mode == "lora" else {"mode": mode}
    plan = ready.plan(engine="native", learning_rate=1e-3, max_steps=6, **changes)
    return Training(folder, engine=engine(native.load, model, **changes), plan=plan, ranks=ranks)


def main(model: str, folder: str, mode: str) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        training(Path(model), Path(folder), mode, ranks).run()
    assert not _group_threads(), "the process group outlived its block: its threads may abort the process at its end"


def _group_threads() -> list[str]:
    """Threads of this process, by name, that work for gloo's process group."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if name.startswith("pt_gloo")]


if __name__ == "__main__":
    main(*sys.argv[1:])

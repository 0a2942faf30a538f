"""Twenty steps of the tiny hybrid give the same losses to the last digit, on each kind of machine that has a file here.

`python tests/golden/test_golden.py` writes this machine's file: after a change that is meant to change numbers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
STEPS = 20


def kind() -> str:
    """What decides the bits on a CPU: its instruction set, its maker (libraries ask for it), and torch's version."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    wide = [
        flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in facts.get("flags", facts.get("Features", ""))
    ]
    parts = [os.uname().machine, facts.get("vendor_id", ""), torch.backends.cpu.get_cpu_capability(), *wide[:2]]
    return "-".join(["cpu", *filter(None, parts), "torch" + torch.__version__.split("+")[0]]).lower()


ENGINES = ("reference", "native")


def losses(model: Path, tokens: Path, engine: str, mode: str) -> list[float]:
    """Of each step, and the held-out loss at the end."""
    import ready

    from sparkctl.train.guard import Signals
    from sparkctl.train.session import Session

    plan = ready.plan(engine=engine, mode=mode, gradient_accumulation=2, epochs=8, max_steps=STEPS, save_every=STEPS)
    session = Session.open(plan, model, ready.store(tokens, ready.documents(24)), choices={"threads": "1"})
    found: list[float] = []

    class Lines:
        def write(self, **values: float) -> None:
            found.extend(values[key] for key in ("loss", "eval_loss") if key in values)

    session.loop(tokens / "checkpoints", Lines(), Signals("", print), lambda *saved: None).run()
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_losses_are_equal_to_the_digit(mode: str, engine: str, qwen35_folder: Path, tmp_path: Path) -> None:
    path = HERE / f"{kind()}.json"
    got = losses(qwen35_folder, tmp_path / "first", engine, mode)
    assert len(got) == STEPS + 2
    assert got[-1] < got[0] - 0.1
    if path.exists():
        wanted = json.loads(path.read_text())[engine][mode]
    else:
        wanted = losses(qwen35_folder, tmp_path / "second", engine, mode)
    assert got == wanted


def write(folder: Path) -> None:
    """This machine's golden file."""
    import tiny

    model = tiny.qwen35(folder / "model")
    values = {
        engine: {mode: losses(model, folder / f"{engine}-{mode}", engine, mode) for mode in ("lora", "full")}
        for engine in ENGINES
    }
    (HERE / f"{kind()}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    sys.path.insert(0, str(HERE.parent))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))

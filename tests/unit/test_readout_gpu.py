"""On a GPU: the host waits for what it reads, and for nothing that the device was given since."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import ready
import torch
from looping import Bigrams, Training

from sparkctl.data.batches import Pack
from sparkctl.train.readout import Moment, Readout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")
CYCLES = 200_000_000  # a tenth of a second


def sleeping(tenths: int) -> torch.cuda.Event:
    """Keep the device busy; the event of its end."""
    torch.cuda._sleep(tenths * CYCLES)
    end = torch.cuda.Event()
    end.record()
    return end


def test_work_that_was_given_later_is_not_waited_for() -> None:
    sleeping(2)
    number = Readout([torch.full((), 7.0, device=GPU)], GPU)
    later = sleeping(8)
    after = Moment(GPU)
    assert number.read() == [7.0]
    assert not later.query()
    began = time.monotonic()
    after.wait()
    waited = time.monotonic() - began
    assert later.query()
    assert after.since(number.there) == pytest.approx(waited, rel=0.2)


def test_a_step_is_read_while_the_device_is_busy_with_the_next(tmp_path: Path) -> None:
    """Steps 1 to 3 are, when 2 to 4 were given; the fourth is saved, and read at once."""
    engine = Bigrams(GPU)
    training = Training(tmp_path, engine, ready.plan(max_steps=4, save_every=9), ahead=True)
    micro_step, check = engine.micro_step, training.numbers.check
    ends: list[torch.cuda.Event] = []
    busy: dict[int, bool] = {}

    def slow(pack: Pack, scale: float) -> torch.Tensor:
        loss = micro_step(pack, scale)
        ends.append(sleeping(2))
        return loss

    def checking(number: int, packs: Sequence[Pack], losses: Sequence[float]) -> None:
        busy[number] = not ends[-1].query()
        check(number, packs, losses)

    engine.micro_step, training.numbers.check = slow, checking
    training.run()
    assert busy == {1: True, 2: True, 3: True, 4: False}

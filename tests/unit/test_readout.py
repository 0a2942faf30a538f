"""What the host reads of a device's work; on a GPU: test_readout_gpu.py."""

from __future__ import annotations

import math
import time

import torch

from sparkctl.train.readout import Moment, Readout

CPU = torch.device("cpu")


def test_values_are_those_of_float() -> None:
    scalars = [torch.tensor(0.1), torch.tensor(math.nan), torch.tensor(3.0, dtype=torch.float64) / 7]
    single, none, double = Readout(scalars, CPU).read()
    assert single == float(scalars[0])
    assert math.isnan(none)
    assert double == 3 / 7


def test_a_value_that_is_changed_later_stays_as_it_was() -> None:
    loss = torch.tensor(2.0)
    readout = Readout([loss], CPU)
    loss.add_(1)
    assert readout.read() == [2.0]


def test_a_cpu_is_where_its_host_is() -> None:
    began, before = time.monotonic(), Moment(CPU)
    time.sleep(0.02)
    after, ended = Moment(CPU), time.monotonic()
    time.sleep(0.02)
    after.wait()
    assert 0.02 <= after.since(before) <= ended - began

"""How time is measured: whole calls by the wall clock, GPU-busy time and launches by the profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

PERCENTILES = (20, 50, 80)


@dataclass(frozen=True)
class Times:
    """Seconds of single calls."""

    seconds: list[float]

    def percentile(self, p: int) -> float:
        """The call at `p` percent, nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))]


@dataclass(frozen=True)
class Busy:
    """One call on the GPU. kernels: {name: (milliseconds, launches)}; times are a call's mean."""

    milliseconds: float
    launches: float
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)


def wait(device: Any) -> None:
    """Let the device finish."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls(work: Callable[[], Any], device: Any, count: int) -> Times:
    """Time `count` calls, each with the device idle before and after it."""
    seconds = []
    for _ in range(count):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return Times(seconds)


def in_a_row(work: Callable[[], Any], device: Any, count: int) -> Times:
    """Time `count` calls as training makes them: the host runs ahead of the device. By CUDA events on a GPU."""
    import torch

    if device.type != "cuda":
        return calls(work, device, count)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    wait(device)
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    wait(device)
    return Times([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)])


def busy(work: Callable[[], Any], device: Any, count: int) -> Busy | None:
    """GPU-busy time of a call: the union of its kernels' and copies' intervals. None without a GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            work()
        wait(device)
    spans: list[tuple[float, float]] = []
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            kernels[event.name].append(event.time_range.elapsed_us())
    table = {name: (sum(us) / 1e3 / count, len(us) / count) for name, us in kernels.items()}
    return Busy(union(spans) / 1e3 / count, len(spans) / count, table)


def union(spans: list[tuple[float, float]]) -> float:
    """Length covered by intervals that may overlap."""
    covered, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        covered += max(0.0, b - max(a, end))
        end = max(end, b)
    return covered


def process_age() -> float:
    """Seconds since this process was started, imports included (Linux: /proc)."""
    import os

    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of the line: ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started

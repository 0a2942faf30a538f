"""The machine and the fast path of `sparkctl doctor` as names and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparkctl.words import here, size

if TYPE_CHECKING:
    from sparkctl.doctor.device import Device
    from sparkctl.doctor.fastpath import FastPath
    from sparkctl.hardware.nvml import Gpu

GIB = 1 << 30
Rows = Iterator[tuple[str, str]]


def rows(device: Device) -> Rows:
    """What the machine is."""
    yield "processor", f"{device.processor}, {device.cores} cores"
    if device.gpu:
        yield from _gpu(device.gpu, device.toolkit)
    else:
        yield "GPU", f"none: {device.problem}" + ("; one is fitted" if device.fitted else "")
    yield "memory", _memory(device)
    yield "swap", "none" if not device.swap else f"{_gib(device.swap)}, {_gib(device.swap_used or 0)} in use"
    for disk in device.disks:
        if disk.free is None:
            yield f"disk, {disk.name}", f"{disk.folder} cannot be used: {disk.problem}"
        else:
            yield f"disk, {disk.name}", f"{size(disk.free)} free at {here(disk.folder)}"


def _gpu(gpu: Gpu, toolkit: str | None) -> Rows:
    several = f", the first of {gpu.count}" if gpu.count > 1 else ""
    yield "GPU", f"{gpu.name}, compute capability {gpu.capability}{several}"
    runs = f", runs CUDA {gpu.cuda[0]}.{gpu.cuda[1]}" if gpu.cuda else ""
    yield "driver", f"{gpu.driver or 'unknown'}{runs}; toolkit {toolkit or 'none'}"
    held = ", ".join(gpu.throttled)
    yield "clocks", f"{_of(gpu.clock, gpu.most_clock)} MHz, " + (f"held down: {held}" if held else "not held down")
    power = _of(gpu.power, gpu.power_limit)
    yield "power", f"{power} W" + (f", {gpu.temperature} °C" if gpu.temperature is not None else "")
    if gpu.processes:
        each = (f"{p.pid} ({_gib(p.bytes) if p.bytes is not None else 'unknown'})" for p in gpu.processes)
        yield "processes on it", ", ".join(each)


def _memory(device: Device) -> str:
    """MemAvailable beside what CUDA claims, which is MemFree where they share."""
    total = _gib(device.memory) if device.memory is not None else "unknown"
    host = f"{_gib(device.available)} of {total} available"
    claims, gpu = device.claims, device.gpu
    claimed = f"CUDA claims {_gib(claims.free)} free" if claims and claims.free is not None else "CUDA was not asked"
    if gpu is None:
        return host
    if device.unified:
        return f"{host}, shared with the GPU ({claimed})"
    own = f"{_gib(gpu.memory)} of the GPU's own" if gpu.memory else "the GPU's own is unknown"
    used = f", {_gib(gpu.used)} in use" if gpu.used is not None else ""
    return f"{own}{used} ({claimed}); the host: {host}"


def fast_path(found: FastPath) -> Rows:
    """Each operator, the proof and the rates."""
    for one in found.operators:
        yield one.operator, f"{'SLOW ' if one.slow else ''}{one.kernel}: {one.reason}"
    proof, speed = found.proof, found.speed
    if proof:
        yield (
            "gradients",
            f"{proof.ratio:.2f} times as far from fp32 as eager's at worst, {proof.median:.2f} in the median",
        )
        same = "equal bits" if not proof.differing else f"{len(proof.differing)} differ"
        yield "repeats", f"{proof.repeats} of a forward and backward: {same}"
    if speed:
        yield "bf16 products", f"{speed.operations / 1e12:.3g} TFLOP/s{_share(speed.operations_share)}"
        if speed.load:
            yield "meanwhile", speed.load
        yield "copies", f"{speed.bytes / 1e9:.3g} GB/s{_share(speed.bytes_share)}"
    yield from found.problems.items()


def _share(share: float | None) -> str:
    return "" if share is None else f", {share:.0%} of what the device should reach"


def _of(now: float | None, most: float | None) -> str:
    shown = [f"{value:,.0f}" if value is not None else "?" for value in (now, most)]
    return " of ".join(shown)


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"

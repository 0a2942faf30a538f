"""What may be wrong with a machine itself: each rule looks at one thing and says how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from sparkctl.doctor.device import Device, Disk
from sparkctl.doctor.findings import Finding, Weight
from sparkctl.doctor.targets import of_capability
from sparkctl.words import here

GB, GIB = 10**9, 1 << 30
BF16 = (8, 0)  # the compute capability from which tensor cores take bf16
LEAST = {"runs here": 20 * GB, "models' cache": 20 * GB, "kernels' cache": GB, "temporary files": GB}  # bytes free
NOTHING = GB // 10  # bytes: less, and the first file that is written fails
HELD = GIB  # bytes that others may hold on the GPU unnoticed
SCARCE = 0.25  # share of the host's memory that should be available
CAPPED = 0.95  # share of its usual power below which a limit was set by someone
SPARK = "https://github.com/parallelArchitect/spark-gpu-throttle-check"
SUPPLY = "a Spark's supply that is unplugged from wall and machine for a minute often ends it"
NEEDED, CONTAINER = "NVIDIA's driver 580 or newer is needed", "a container sees a GPU with `--gpus all`"
OVERTIME = "did not end"  # in the problem of a driver that was given up on
USUAL = "software power cap"  # of a large GPU at work: it says nothing by itself


def judge(device: Device, *, quick: bool = False) -> list[Finding]:
    """Everything that is wrong with the machine.

    quick: its driver had so little time that silence is no fault. One that sleeps, without persistence mode, takes
    about 2 s a GPU to wake up.
    """
    found = [finding for rule in RULES for finding in rule(device)]
    if quick and OVERTIME in (device.problem or ""):
        return [
            replace(one, weight=Weight.NOTE, what=_unasked(device)) if one.subject == "driver" else one for one in found
        ]
    return found


def _unasked(device: Device) -> str:
    return f"a GPU is fitted, and its driver did not answer a quick look: {device.problem}"


def _driver(device: Device) -> Iterator[Finding]:
    problem = device.problem or ""
    if device.gpu:
        return
    if not device.fitted:
        what = f"no GPU ({problem}): training runs on the CPU, for models as small as the demo's"
        yield Finding("GPU", Weight.NOTE, what, "sparkctl demo")
    elif "hides" in problem:
        yield Finding("GPU", Weight.SLOW, problem, "`unset CUDA_VISIBLE_DEVICES`")
    else:
        why, mend = _unusable(problem)
        yield Finding("driver", Weight.NEEDED, f"a GPU is fitted and cannot be used: {problem} ({why})", mend)


def _unusable(problem: str) -> tuple[str, str | None]:
    """Why a driver does not serve the GPU that is fitted, and the command that mends it, where one does."""
    if "mismatch" in problem:
        return "it was updated while it was loaded", "`sudo reboot`"
    if OVERTIME in problem:
        return "without `--quick` it is given longer", "`nvidia-smi` says why"
    if "died" in problem:
        return "a restart of the machine may mend it", "`sudo dmesg | grep -i nvrm` says why"
    if "too old" in problem:
        return NEEDED, None
    if "permission" in problem:
        return f"its files are for some users alone; {CONTAINER}", "`ls -l /dev/nvidia*` says why"
    return f"{NEEDED}; {CONTAINER}", None


def _cuda(device: Device) -> Iterator[Finding]:
    problem = device.claims.problem if device.claims else None
    if problem and "OUT_OF_MEMORY" in problem:
        pids = " ".join(str(process.pid) for process in device.gpu.processes) if device.gpu else ""
        what = "no memory is left on the GPU, not even for a start"
        yield Finding("GPU", Weight.NEEDED, what, f"`kill {pids}`" if pids else "`nvidia-smi` says why")
    elif problem:
        what = f"CUDA does not start: {problem} ({CONTAINER})"
        yield Finding("CUDA", Weight.NEEDED, what, "`nvidia-smi` says why")


def _capability(device: Device) -> Iterator[Finding]:
    gpu = device.gpu
    if gpu and tuple(int(part) for part in gpu.capability.split(".")) < BF16:
        what = f"{gpu.name} has compute capability {gpu.capability} and no bf16 in its tensor cores, which 8.0 has"
        yield Finding("GPU", Weight.NEEDED, what)
    elif gpu and of_capability(gpu.capability) is None:
        what = f"{gpu.name} has compute capability {gpu.capability}, unknown here: its features are not looked at"
        yield Finding("GPU", Weight.NOTE, what, "`pip install -U dgx-sparkctl`")


def _processes(device: Device) -> Iterator[Finding]:
    held = [p for p in device.gpu.processes if p.bytes] if device.gpu else []
    total = sum(process.bytes or 0 for process in held)
    if total > HELD:
        pids = ",".join(str(process.pid) for process in held)
        who = f"{len(held)} other processes hold" if len(held) > 1 else "another process holds"
        what = f"{who} {total / GIB:.1f} GiB of the GPU's memory: training has the rest"
        yield Finding("GPU", Weight.SLOW, what, f"`ps -o pid,user,cmd -p {pids}`")


def _throttled(device: Device) -> Iterator[Finding]:
    """One finding for heat and one for power: the reasons of each come together."""
    reasons = device.gpu.throttled if device.gpu else ()
    hot = [reason for reason in reasons if "thermal" in reason]
    if hot:
        what = f"clocks are held down: {', '.join(hot)} (the machine is too hot: it needs air)"
        yield Finding("clocks", Weight.SLOW, what)
    capped = [reason for reason in reasons if reason not in hot]
    if capped:
        what = f"clocks are held down: {', '.join(capped)}"
        weight = Weight.NOTE if capped == [USUAL] else Weight.SLOW
        if device.unified:
            yield Finding("clocks", weight, f"{what}; {SUPPLY}", source=SPARK)
        else:
            yield Finding("clocks", weight, what, "`nvidia-smi -q -d PERFORMANCE,POWER` says why")


def _power(device: Device) -> Iterator[Finding]:
    gpu = device.gpu
    if gpu and gpu.power_limit and gpu.default_limit and gpu.power_limit < CAPPED * gpu.default_limit:
        what = f"power is capped at {gpu.power_limit:.0f} W, of {gpu.default_limit:.0f} W"
        yield Finding("power", Weight.SLOW, what, f"`sudo nvidia-smi -pl {gpu.default_limit:.0f}`")


def _memory(device: Device) -> Iterator[Finding]:
    if device.memory and device.available < SCARCE * device.memory and (device.unified or not device.gpu):
        what = f"{device.available / GIB:.1f} of {device.memory / GIB:.1f} GiB of memory are available"
        yield Finding("memory", Weight.SLOW, what, "`ps aux --sort=-rss | head` says why")


def _swap(device: Device) -> Iterator[Finding]:
    if device.unified and device.swap:
        used = (device.swap_used or 0) > GIB
        what = "swap is on: memory that runs out in training hangs the whole machine before anything is stopped"
        yield Finding("swap", Weight.SLOW if used else Weight.NOTE, what, "`sudo swapoff -a`")


def _disks(device: Device) -> Iterator[Finding]:
    for disk in device.disks:
        if disk.free is None:
            what = f"the folder for {disk.name.removesuffix(' here')}, `{disk.folder}`, cannot be used: {disk.problem}"
            yield Finding("disk", Weight.NEEDED, what, _elsewhere(disk) or "`cd ~`")
        elif disk.free < LEAST[disk.name]:
            name, least = disk.name.removesuffix(" here"), LEAST[disk.name] / GB
            what = f"{disk.free / GB:.1f} GB are free for {name} in `{here(disk.folder)}`: {least:.0f} may be needed"
            yield Finding("disk", Weight.NEEDED if disk.free < NOTHING else Weight.SLOW, what, _elsewhere(disk))


def _elsewhere(disk: Disk) -> str | None:
    return f"`export {disk.variable}=FOLDER_WITH_ROOM`" if disk.variable else None


RULES: tuple[Callable[[Device], Iterator[Finding]], ...] = (
    _driver, _cuda, _capability, _processes, _throttled, _power, _memory, _swap, _disks,
)  # fmt: skip

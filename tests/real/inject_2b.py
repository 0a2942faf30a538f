"""An MTP head into a model of Qwen3.5-2B's size, measured: python tests/real/inject_2b.py [FOLDER]

Makes and merges what merge_2b.py does, then injects by the installed command: linked, copied from the merged folder,
and copied from a folder of another tool. Prints time, rate and peak memory (of its largest process) of each from the
command's start to its end, with imports, audit and fsync; beside them `cp` and `sync` on the same disk, and the
machine's load. Removes everything. Takes 16 GB of disk and some minutes.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import merge_2b

WAYS = {"linked": ["--link"], "copied": [], "copied, another tool's": ["--into", "base"]}


def main(folder: Path) -> None:
    """Only children load torch: a child's peak memory counts what its parent had when it was forked."""
    subprocess.run([sys.executable, merge_2b.__file__, "make", str(folder)], check=True)
    os.chdir(folder)
    subprocess.run([sys.executable, "-m", "sparkctl", "merge", "run", "--json"], check=True, stdout=subprocess.DEVNULL)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    size = sum(path.stat().st_size for path in Path("run/merged").glob("*.safetensors"))
    copy(size)
    for kind, options in WAYS.items():
        measure(kind, options)
    copy(size)


def copy(size: int) -> None:
    """What the disk allows: the merged folder copied, and on the disk."""
    os.sync()
    started = time.monotonic()
    subprocess.run(["cp", "-r", "run/merged", "copy"], check=True)
    os.sync()
    took = time.monotonic() - started
    print(f"cp and sync: {took:.1f} s, {size / took / 1e6:.0f} MB/s, load {os.getloadavg()[0]:.1f}", flush=True)
    shutil.rmtree("copy")


def measure(kind: str, options: list[str]) -> None:
    """One injection."""
    os.sync()
    size, wall, used = inject(options)
    peak, busy = used.ru_maxrss * 1024, used.ru_utime + used.ru_stime
    print(
        f"{kind}: {size / 1e9:.2f} GB in {wall:.1f} s, {size / wall / 1e6:.0f} MB/s; {busy:.1f} s of a core, ", end=""
    )
    print(f"peak memory {peak / 1e6:.0f} MB, load {os.getloadavg()[0]:.1f}", flush=True)
    shutil.rmtree("out")


def inject(options: list[str]) -> tuple[int, float, resource.struct_rusage]:
    """By the installed command, in a process of its own: bytes of the folder, seconds, what the process used."""
    command = [sys.executable, "-m", "sparkctl", "mtp", "inject", "run", "--mode", "default", "--out", "out", "--json"]
    started = time.monotonic()
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    answer = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"inject failed: {answer}")
    return answer["bytes"], time.monotonic() - started, used


if __name__ == "__main__":
    work = Path(tempfile.mkdtemp(prefix="sparkctl-inject-", dir=sys.argv[1] if len(sys.argv) > 1 else None)).resolve()
    try:
        main(work)
    finally:
        shutil.rmtree(work)

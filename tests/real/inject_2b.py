"""An MTP head into a model of Qwen3.5-2B's size, measured: python tests/real/inject_2b.py [FOLDER]

Makes and merges what merge_2b.py does, then injects by the installed command: copied from the merged folder, copied
from a folder of another tool, and linked. Prints time, rate and peak memory of each, and of `cp` and `sync` on the same
disk; removes everything. Takes 16 GB of disk and some minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import merge_2b

KINDS: dict[str, list[str]] = {
    "copied": [],
    "copied, another tool's": ["--into", "base"],
    "linked": ["--link"],
}


def main(folder: Path) -> None:
    """Only children load torch: a child's peak memory counts what its parent had when it was forked."""
    subprocess.run([sys.executable, merge_2b.__file__, "make", str(folder)], check=True)
    os.chdir(folder)
    subprocess.run([sys.executable, "-m", "sparkctl", "merge", "run", "--json"], check=True, stdout=subprocess.DEVNULL)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    size = sum(path.stat().st_size for path in Path("run/merged").glob("*.safetensors"))
    os.sync()
    started = time.monotonic()
    subprocess.run(["cp", "-r", "run/merged", "copy"], check=True)
    os.sync()
    took = time.monotonic() - started
    print(f"cp and sync: {took:.1f} s, {size / took / 1e6:.0f} MB/s")
    shutil.rmtree("copy")
    for kind, options in KINDS.items():
        measure(kind, options)


def measure(kind: str, options: list[str]) -> None:
    """One injection in a process of its own."""
    os.sync()
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "sparkctl",
        "mtp",
        "inject",
        "run",
        "--mode",
        "default",
        "--out",
        "out",
        "--json",
        *options,
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    answer = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)
    wall, peak = time.monotonic() - started, used.ru_maxrss * 1024
    if status:
        raise SystemExit(f"inject failed: {answer}")
    rate = f"{answer['bytes'] / wall / 1e6:.0f} MB/s"
    print(f"{kind}: {answer['bytes'] / 1e9:.2f} GB in {wall:.1f} s, {rate}, peak memory {peak / 1e6:.0f} MB")
    shutil.rmtree("out")


if __name__ == "__main__":
    work = Path(tempfile.mkdtemp(prefix="sparkctl-inject-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        main(work)
    finally:
        shutil.rmtree(work)

"""An image tried at the end of its build, where there is no GPU: what is installed is what was meant, and runs.

    python smoke.py spark|baseline

Reads constraints.txt and base.json, which docker/constraints.py wrote, from the folder that it lies in. Prints a line a
check; exit status 1 where one fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FAST = ("fla", "causal_conv1d", "unsloth")  # what the baseline must not have: stock runs without
VOLUMES = ("/cache", "/work/runs")
TARGET = "sm_121a"

Check = Callable[[], str]


def main() -> None:
    """Run the checks of an image."""
    kind = sys.argv[1]
    checks: dict[str, Check] = {
        "user": user,
        "base": lambda: base(json.loads((HERE / "base.json").read_text())),
        "pins": lambda: pinned((HERE / "constraints.txt").read_text().splitlines()),
        "imports": imports if kind == "spark" else without_fast_path,
        "numpy": numpy_and_torch,
        "chip": chip,
        "volumes": lambda: writable([Path(path) for path in VOLUMES]),
        "command": command,
        **({"kernels": kernels} if kind == "spark" else {}),
    }
    sys.exit(sum(not passes(name, check) for name, check in checks.items()) > 0)


def passes(name: str, check: Check) -> bool:
    """Run a check and say what came of it."""
    try:
        said, passed = check(), True
    except Exception as error:  # whatever an import raises is the answer
        said, passed = f"{type(error).__name__}: {error}", False
    print(f"{'ok    ' if passed else 'FAILED'} {name}: {said}", flush=True)
    return passed


def user() -> str:
    """Not root."""
    if os.getuid() == 0:
        raise RuntimeError("the image runs as root")
    return f"uid {os.getuid()}"


def base(own: dict[str, str]) -> str:
    """NVIDIA's builds are what they were in the base image, and torch is loaded from there."""
    import torch

    replaced = {name: f"{before}, now {version(name)}" for name, before in own.items() if version(name) != before}
    if replaced:
        raise RuntimeError(f"replaced: {replaced}")
    if Path(torch.__file__).is_relative_to(sys.prefix):
        raise RuntimeError(f"another torch was installed: {torch.__file__}")
    return ", ".join(f"{name} {before}" for name, before in own.items())


def pinned(constraints: list[str]) -> str:
    """Each package of the constraints that is installed has the version that they name."""
    wrong, right = [], 0
    for line in constraints:
        name, wanted = line.split("==")
        try:
            found = version(name)
        except PackageNotFoundError:  # another profile's, or the developers'
            continue
        same = found == wanted or (wanted.endswith(".*") and found.startswith(wanted[:-1]))
        right += same
        wrong += [] if same else [f"{name} {found}, the lock has {wanted}"]
    if wrong or not right:
        raise RuntimeError("; ".join(wrong) or "nothing of the lock is installed")
    return f"{right} packages as in the lock"


def imports() -> str:
    """The fast path loads; unsloth wants a GPU for that, so it is only there."""
    import causal_conv1d
    import fla

    if find_spec("unsloth") is None:
        raise RuntimeError("unsloth is not installed")
    return f"fla {fla.__version__}, causal_conv1d {causal_conv1d.__version__}"


def without_fast_path() -> str:
    """None of what makes training fast is there."""
    there = [name for name in FAST if find_spec(name)]
    if there:
        raise RuntimeError(f"installed: {', '.join(there)}")
    import peft
    import transformers

    return f"transformers {transformers.__version__}, peft {peft.__version__}"


def numpy_and_torch() -> str:
    """They exchange arrays: a torch that was built for numpy 1 cannot with numpy 2."""
    import numpy
    import torch

    if torch.from_numpy(numpy.arange(3)).numpy().tolist() != [0, 1, 2]:
        raise RuntimeError("an array came back changed")
    return f"numpy {numpy.__version__}"


def chip() -> str:
    """The assembler at hand knows the chip, and says of it what is known."""
    features = [each for each in doctor()["features"] if each["found"] is not None]
    wrong = [each["name"] for each in features if each["found"] != each["expected"]]
    if wrong or not features:
        raise RuntimeError(f"not as expected: {', '.join(wrong) or 'nothing could be assembled'}")
    return f"{len(features)} features of {TARGET} as expected"


def kernels() -> str:
    """Every Triton kernel compiles for the chip."""
    said = doctor("--kernels")
    if not said["ok"] or not said["kernels"]:
        raise RuntimeError(f"faults: {said['faults']}")
    return f"{len(said['kernels'])} for {TARGET}"


def doctor(*options: str) -> dict[str, Any]:
    """What `sparkctl doctor` says of the chip, which need not be there."""
    words = [sys.executable, "-m", "sparkctl", "doctor", "--target", TARGET, "--json", *options]
    done = subprocess.run(words, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def writable(folders: list[Path]) -> str:
    """Caches and runs can be written by whoever runs the image."""
    for folder in folders:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if folder.stat().st_mode & 0o1777 != 0o1777:
            raise RuntimeError(f"{folder} is not open to every user (`docker run --user`)")
    return ", ".join(map(str, folders))


def command() -> str:
    """The command starts."""
    said = subprocess.run(["sparkctl", "--help"], check=True, capture_output=True, text=True).stdout
    if "analyze" not in said:
        raise RuntimeError("`sparkctl --help` names no commands")
    return "sparkctl --help"


if __name__ == "__main__":
    main()

"""The assemblers of PTX that are here, CUDA's and the two that Triton carries, and what each makes of a probe."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from sparkctl import child, env
from sparkctl.doctor.targets import Target
from sparkctl.errors import SparkError, reason

SECONDS = 20.0  # an assembler that takes longer for ten lines hangs
TRITON = {"ptxas": "triton's ptxas", "ptxas-blackwell": "triton's ptxas-blackwell"}
# how ptxas says that the target lacks an instruction, rather than that the PTX is wrong
LACKING = re.compile(r"not supported on \.?target|requires \.?target|cannot be compiled for architecture")
BLACKWELL = 100  # from this architecture on Triton calls its ptxas-blackwell
OUTDATED = "is too old for this probe"
WROTE_NOTHING = "ended well and wrote no code"
TOO_NEW = re.compile(r"Unsupported \.version|is not defined for option 'gpu-name'")


@dataclass(frozen=True)
class Assembler:
    """One ptxas. name: for a person; release: of CUDA, "13.0"; targets: whose code it makes."""

    name: str
    path: Path
    release: str
    targets: frozenset[str] = field(repr=False)

    def knows(self, target: Target) -> bool:
        """Whether it makes code for the target."""
        return str(target) in self.targets

    def newest(self) -> str:
        """The last of its targets."""
        return max(self.targets, key=lambda name: (_order(name), name.endswith("a")), default="nothing")

    def __str__(self) -> str:
        return f"{self.name} {self.release}"


@dataclass(frozen=True)
class Assembled:
    """What came of a probe. accepted: None where the assembler could not judge it; why: it was not accepted."""

    accepted: bool | None
    cubin: bytes = b""
    why: str | None = None


def find(seconds: float = SECONDS) -> list[Assembler]:
    """Every ptxas here that answers, newest first; a file that is met twice counts once. seconds: for each answer."""
    found: dict[Path, tuple[str, Path]] = {}
    for name, path in _places():
        if os.path.isfile(path):  # False too where it may not be looked at
            found.setdefault(path.resolve(), (name, path))
    with child.at_once(4) as pool:
        asked = [one for one in pool.map(lambda place: ask(place[0], place[1], seconds), found.values()) if one]
    return sorted(asked, key=lambda one: _order(one.release), reverse=True)


def _places() -> list[tuple[str, Path]]:
    on_path, chosen = shutil.which("ptxas"), env.cuda_home()
    system = [Path(on_path)] if on_path else []
    system += [folder / "bin" / "ptxas" for folder in (chosen, Path("/usr/local/cuda")) if folder]
    return [*of_triton(), *((f"`{path}`", path) for path in system if os.path.isfile(path))][: len(TRITON) + 1]


def of_triton() -> list[tuple[str, Path]]:
    """(name, path) of the two that Triton calls: its own, or the file that the environment puts in their place."""
    spec = find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    chosen = {name: path for name, path in env.triton_ptxas().items() if os.path.isfile(path)}
    places = {name: chosen.get(name) or (folder / name if folder else None) for name in TRITON}
    return [(TRITON[name], path) for name, path in places.items() if path]


def ask(name: str, path: Path, seconds: float = SECONDS) -> Assembler | None:
    """The assembler at `path`; None where it does not run or is none."""
    said = child.run([str(path), "--version"], seconds=seconds)
    release = re.search(r"release (\d+\.\d+)", said.out)
    if said.problem or not release:
        return None
    helped = child.run([str(path), "--help"], seconds=seconds)
    return Assembler(name, path, release[1], frozenset(re.findall(r"'(sm_\d+[af]?)'", helped.out)))


def choose(target: Target, here: list[Assembler]) -> Assembler:
    """The newest that knows the target. Raises SparkError where none does, saying which would."""
    for one in here:
        if one.knows(target):
            return one
    stops = ", ".join(f"{one} stops at {one.newest()}" for one in here)
    raise SparkError(
        f"no ptxas here knows {target}" + (f": {stops}" if stops else ""),
        f"ptxas of CUDA {target.release} or newer does: take that toolkit's, or `pip install 'triton>=3.6'`",
    )


def assemble(source: str, target: Target, by: Assembler) -> Assembled:
    """Machine code of the PTX for the target."""
    try:
        with tempfile.TemporaryDirectory(prefix="sparkctl-ptx-") as folder:
            text, cubin = Path(folder, "probe.ptx"), Path(folder, "probe.cubin")
            text.write_text(source)
            ended = child.run([str(by.path), f"-arch={target}", str(text), "-o", str(cubin)], seconds=SECONDS)
            if ended.problem is None:
                written = cubin.exists()
                return Assembled(True, cubin.read_bytes()) if written else Assembled(None, why=f"{by} {WROTE_NOTHING}")
    except OSError as error:
        return Assembled(None, why=f"no temporary file can be written: {reason(error)}")
    errors = re.findall(r"; error\s*: (.*)", ended.err)
    lacking = [error for error in errors if LACKING.search(error)]
    if errors and len(lacking) == len(errors):
        return Assembled(False, why=lacking[0])
    if TOO_NEW.search(ended.err):
        return Assembled(None, why=f"{by} {OUTDATED}")
    return Assembled(None, why=f"{by}: {errors[0] if errors else ended.problem}")


def too_old(why: str | None) -> bool:
    """Whether a probe could not be judged because the assembler is older than its PTX."""
    return why is not None and why.endswith(OUTDATED)


def _order(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))

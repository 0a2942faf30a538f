"""The memory model held against a GPU: python tests/real/memory_gpu.py [--reference] [--only WORDS] [--json FILE]

    python tests/real/memory_gpu.py --json peaks.jsonl       # 0.8B, 2B and 4B on the native engine, and MTP heads
    python tests/real/memory_gpu.py --reference              # transformers, peft and fla, which tunes for 2 minutes
    python tests/real/memory_gpu.py --read peaks.jsonl       # judge what was measured by the model as it is now: no GPU
    python tests/real/memory_gpu.py --device cpu             # tries the script out on a tiny shape, and judges nothing

Each case trains a model of random weights in a process of its own: two packs whose gradients add up, clipping, AdamW,
another step whose first pack is shorter, an evaluation. What it took is what the device must have had free:

    peak = what torch had reserved at most since the model was loaded + all else that the process took of the device

The latter is CUDA's context, the loaded kernels and libraries. Where GPU and host share their memory the host's own
part (column "host") comes out of what `recommend` leaves to the host. The estimate is right where it is between 5 %
under the peak and 10 % over it. The 0.8B and the 2B were there when its constants were fitted; the 4B judges them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from sparkctl.bench.setting import text_parameters
from sparkctl.bench.workload import Workload, synthetic
from sparkctl.demo.model import config as demo_config
from sparkctl.hardware import heads, memory
from sparkctl.hardware.load import Load, splitting
from sparkctl.hardware.machine import find_gpu
from sparkctl.hardware.shape import Shape, chunks_of
from sparkctl.manifest.schema import MemoryTerms
from sparkctl.manifest.table import Mode
from sparkctl.model import catalog

SCRIPT = Path(__file__).parents[1] / "gpu_peak.py"
GIB = 1 << 30
LIMIT = 300  # seconds a case may take
TINY = "demo"
LEAST, MOST = 0.95, 1.10  # of the estimate over the peak
SIZES = {"0.8b": "fit", "2b": "fit", "4b": "judge"}
FULLEST = 0.97  # of the device: a case that is estimated to take more is left out

# mode, tokens of the pack, documents in it, checkpointing: what tells most comes first
FIRST: list[tuple[Mode, int, int, bool]] = [
    ("lora", 5376, 12, False),
    ("full", 5376, 12, False),
    ("lora", 16384, 1, False),
    ("lora", 32768, 1, True),
    ("full", 32768, 1, True),
]
THEN: list[tuple[Mode, int, int, bool]] = [
    ("lora", 5376, 12, True),
    ("full", 16384, 1, False),
    ("lora", 5376, 1, False),
]
SHORT: list[tuple[Mode, int, int, bool]] = [  # each document begins a chunk of the delta rule
    ("lora", 16384, 400, False),
    ("lora", 16384, 400, True),
]
HEADS, HEAD_PACK = ("2b", "4b"), (8192, 12)
REFERENCE: list[tuple[Mode, int, int, bool]] = [
    ("lora", 5376, 12, False),
    ("lora", 5376, 1, True),
    ("lora", 16384, 1, False),
    ("full", 5376, 12, False),
]


@dataclass(frozen=True)
class Case:
    """One training. kind: "native", "reference" or "head", what trains; pack: its tokens, in so many documents; use:
    "fit" or "judge".
    """

    kind: str
    size: str
    mode: Mode
    pack: int
    documents: int
    checkpointing: bool = False
    use: str = "judge"

    @property
    def name(self) -> str:
        """2b lora 5376/12 checkpointing."""
        what = {"native": self.mode, "reference": f"{self.mode} reference", "head": "head"}[self.kind]
        return f"{self.size} {what} {self.pack}/{self.documents}{' checkpointing' if self.checkpointing else ''}"

    @property
    def work(self) -> Workload:
        """What a micro-step of it computes."""
        config = demo_config() if self.size == TINY else catalog.config(f"qwen3.5-{self.size}")
        return synthetic(
            config, self.mode, self.pack, self.documents, rank=16 if self.size == TINY else 128,
            checkpointing=self.checkpointing, draft_steps=3 if self.kind == "head" else 0,
        )  # fmt: skip

    def estimate(
        self, trainable: int | None = None, device: str = "cuda", capability: str | None = None
    ) -> MemoryTerms | int:
        """What the model says; of a head only the whole. trainable: its parameters, where they were counted."""
        work = self.work
        shape = Shape.from_config(work.config, text_parameters(work.config))
        longest, labels, chunks = max(work.lengths), sum(work.labels), chunks_of(work.lengths)
        processors = splitting(capability, shape.head_dim)
        if self.kind == "head":
            load = (work.tokens, longest, labels, work.draft_steps, device)
            return heads.peak(shape, *load, fla=device == "cuda", multiprocessors=processors, chunks=chunks)
        if trainable is None:  # near enough to see whether it fits
            trainable = shape.parameters if work.mode == "full" else shape.layer_parameters // 10
        load = Load(
            mode=work.mode, trainable=trainable, rank=work.rank if work.lora else 0, area=work.tokens, longest=longest,
            labels=labels, checkpointing=work.checkpointing, device=device, fla=device == "cuda",
            engine="reference" if self.kind == "reference" else "native", multiprocessors=processors,
            chunks=chunks,
        )  # fmt: skip
        return memory.peak(shape, load)


def cases(reference: bool, tiny: bool) -> list[Case]:
    """What is measured; all sizes of a pack in a row, so that time that runs out takes no size away."""
    if tiny:
        modes: tuple[Mode, ...] = ("lora", "full")
        both = [Case(kind, TINY, mode, 256, 3) for mode in modes for kind in ("native", "reference")]
        return [*both, Case("head", TINY, "full", 256, 3)]
    if reference:
        return [Case("reference", "2b", *rest) for rest in REFERENCE]
    first, then = (
        [Case("native", size, *rest, use) for rest in some for size, use in SIZES.items()] for some in (FIRST, THEN)
    )
    short = (Case("native", size, *rest) for rest in SHORT for size in ("2b", "4b"))
    return [*first, *(Case("head", size, "full", *HEAD_PACK, use=SIZES[size]) for size in HEADS), *short, *then]


class Process:
    """A process that waits for its case: it is started while the one before still measures."""

    def __init__(self) -> None:
        # fla keeps what its tuners find for the cases after the first
        variables = {**os.environ, "TRITON_CACHE_AUTOTUNING": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=variables,
        )  # fmt: skip

    def begin(self, case: Case, device: str) -> None:
        """Give it the case."""
        assert self._process.stdin
        line = json.dumps(dict(kind=case.kind, work=case.work.dumps(), device=device))
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def ready(self) -> None:
        """Wait until it has imported what it needs."""
        assert self._process.stdout
        self._process.stdout.readline()

    def answer(self) -> dict[str, Any]:
        """What it measured; where it failed, the last line of its words."""
        try:
            out, words = self._process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return dict(failed=f"more than {LIMIT} s")
        if self._process.returncode or not out.strip():
            return dict(failed=(words.strip().splitlines() or [f"exit status {self._process.returncode}"])[-1])
        return json.loads(out.strip().splitlines()[-1])

    def close(self) -> None:
        """It is not wanted any more."""
        self._process.communicate()


def measured(asked: Sequence[Case], device: str, seconds: float) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case and what it took; none is begun after so many seconds."""
    following, started = Process(), time.monotonic()
    for case in asked:
        process = following
        process.ready()
        began = time.monotonic()
        if began - started > seconds:
            break
        process.begin(case, device)
        following = Process()
        answer = process.answer()
        yield case, answer | dict(seconds=round(time.monotonic() - began, 1))
    following.close()


def judged(case: Case, answer: dict[str, Any]) -> dict[str, Any]:
    """The case's line: estimate and peak in bytes, by terms where the model has them, and whether it holds."""
    line = dict(name=case.name, **asdict(case), **answer)
    if "failed" in answer:
        return line | dict(holds=False)
    device = "cuda" if "reserved" in answer else "cpu"
    estimate = case.estimate(answer["trainable"], device, answer.get("capability"))
    total = estimate if isinstance(estimate, int) else estimate.total
    if "reserved" not in answer:  # a CPU's own test is tests/unit/test_memory.py
        return line | dict(estimate=total, peak=answer["host"], ratio=total / answer["host"], holds=True)
    peak = answer["reserved"] + answer["context"]
    static = answer["weights"] + answer["optimizer"] + answer["gradients"]
    line |= dict(estimate=total, peak=peak, ratio=total / peak, holds=LEAST <= total / peak <= MOST)
    if isinstance(estimate, MemoryTerms):
        line["terms"] = {
            "weights": (estimate.weights + estimate.masters, answer["weights"]),
            "gradients": (estimate.gradients, answer["gradients"]),
            "moments": (estimate.optimizer, answer["optimizer"]),
            "work": (estimate.activations + estimate.logits, answer["allocated"] - static),
            "runtime": (estimate.runtime, peak - answer["allocated"]),
        }
    return line


JUDGED = {"name", "estimate", "peak", "ratio", "holds", "terms"}
HEADER = (
    f"{'case':32} {'use':5} {'estimate':>8} {'peak':>7} {'ratio':>6}   estimated/measured GiB: weights, gradients, "
    "moments, work, runtime (context); host, s"
)


def shown(line: dict[str, Any]) -> str:
    """A row of the table, GiB."""
    if "failed" in line:
        return f"{line['name']:32} {line['use']:5} FAILED {line['failed'][:150]}"
    terms = [f"{e / GIB:.2f}/{m / GIB:.2f}" for e, m in line.get("terms", {}).values()]
    context = [f"({line['context'] / GIB:.2f})"] if "context" in line else []
    rest = " ".join([*terms, *context, f"{line['host'] / GIB:.2f}", str(line.get("seconds", ""))])
    figures = f"{line['estimate'] / GIB:8.2f} {line['peak'] / GIB:7.2f} {line['ratio']:6.3f}"
    return f"{line['name']:32} {line['use']:5} {figures} {' ' if line['holds'] else '!'} {rest}"


def fitted(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the constants in sparkctl/hardware/memory.py come from: CUDA_RUNTIME is the context and what is allocated
    beside the tensors that the model counts, SLACK the share of the work that is reserved beyond what is allocated.
    """
    for use in ("fit", "judge"):
        some = [line for line in lines if line["use"] == use]
        if some:
            context = [line["context"] / GIB for line in some]
            beside = [(line["allocated"] - line["estimate"] + line["terms"]["runtime"][0]) / GIB for line in some]
            share = [(line["reserved"] - line["allocated"]) / line["terms"]["work"][1] for line in some]
            each = {"context GiB": context, "allocated beside the tensors GiB": beside, "reserved beyond share": share}
            found = [f"{name} {min(x):.3f} {median(x):.3f} {max(x):.3f}" for name, x in each.items()]
            yield f"{use}: least, median and most of {'; '.join(found)}"


def recorded(path: Path) -> Iterator[tuple[Case, dict[str, Any]]]:
    """What an earlier run wrote."""
    own = {field.name for field in fields(Case)}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        case = Case(**{name: line[name] for name in own})
        yield case, {name: value for name, value in line.items() if name not in own | JUDGED}


def main() -> int:
    """Exit status 1 where an estimate does not hold or a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true", help="the reference engine in place of the native one")
    parser.add_argument("--only", default="", help="cases whose names have all these words")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="write a line a case there")
    parser.add_argument("--read", type=Path, help="judge these lines again, measure nothing")
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after so many (240)")
    asked = parser.parse_args()
    gpu = find_gpu() if asked.device == "cuda" and not asked.read else None
    if asked.device == "cuda" and not asked.read and gpu is None:
        raise SystemExit("no GPU here: `--device cpu` tries the script out, `--read FILE` judges what was measured")
    words = asked.only.split()
    wanted = [case for case in cases(asked.reference, asked.device == "cpu") if set(words) <= set(case.name.split())]
    print(HEADER, flush=True)
    if gpu and gpu.memory:
        sizes = {case: whole(case.estimate(capability=gpu.capability)) for case in wanted}
        for case, size in sizes.items():
            if size > FULLEST * gpu.memory:
                print(f"{case.name:32} left out: about {size / GIB:.0f} GiB of {gpu.memory / GIB:.0f}")
                wanted.remove(case)
    lines = []
    for case, answer in recorded(asked.read) if asked.read else measured(wanted, asked.device, asked.seconds):
        lines.append(judged(case, answer))
        print(shown(lines[-1]), flush=True)
        if asked.json:
            with asked.json.open("a" if len(lines) > 1 else "w") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    wrong = [line["name"] for line in lines if not line["holds"]]
    devices = {f"{line['device']}, torch {line['torch']}" for line in lines if "device" in line}
    if devices:
        print(f"{len(lines) - len(wrong)} of {len(lines)} hold, {LEAST} to {MOST} of the peak; {'; '.join(devices)}")
    for words in fitted([line for line in lines if "terms" in line and line["kind"] == "native"]):
        print(words)
    unseen = [] if asked.read else [case.name for case in wanted[len(lines) :]]
    if unseen:
        print(f"no time was left for {', '.join(unseen)}")
    return 1 if wrong or unseen or not lines else 0


def whole(estimate: MemoryTerms | int) -> int:
    """All terms together."""
    return estimate if isinstance(estimate, int) else estimate.total


if __name__ == "__main__":
    sys.exit(main())

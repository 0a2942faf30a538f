"""A retrain round as the README's script plays it, and full fine-tuning from data to merged model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from sparkctl.cli.app import run
from sparkctl.demo import chats, model
from sparkctl.manifest.store import Run

AFTERWARDS = ["merge r4", "mtp train r4", "mtp inject r4 --mode trained", "show r4"]
SCRIPT = Path(__file__).parents[2] / "docs" / "retrain.sh"


def play(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def retrain(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script, with the `sparkctl` that `folder` or this environment has."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)


def test_a_round_takes_model_and_plan_from_its_parent(tmp_path: Path) -> None:
    data = chats.training_chats()
    old = chats.write_jsonl(tmp_path / "old.jsonl", data[:120])
    new = chats.write_jsonl(tmp_path / "new.jsonl", data[120:200])
    r1, r2 = tmp_path / "runs" / "r1", tmp_path / "runs" / "r2"
    play("analyze", old, "--run", r1, "--model", model.write_model(tmp_path / "model"))
    play("recommend", r1, "--max-steps", 3, "--learning-rate", 0.001, "--seed", 7)
    play("train", r1)

    done = retrain(tmp_path, r1, r2, new, old)
    assert done.returncode == 0, done.stderr
    parent, child = Run.open(r1).manifest, Run.open(r2).manifest
    assert child.run.parent == "../r1"
    assert child.data
    assert child.analysis
    assert child.plan
    assert child.train
    assert len(child.data.files) == 2
    assert child.analysis.reused >= 110
    assert (child.plan.max_steps, child.plan.learning_rate, child.plan.seed) == (3, 0.001, 7)
    assert child.plan.origin["max_steps"] == "parent"
    assert child.train.gate
    assert child.train.gate.passed
    assert parent.model
    assert child.model
    assert child.model.config_sha256 == parent.model.config_sha256
    assert child.mtp
    assert child.mtp.head
    assert child.served
    assert (r2 / "served" / "config.json").exists()

    with Run.open(r2).edit() as manifest:  # as a training that was interrupted leaves it
        assert manifest.train
        manifest.train.status, manifest.train.gate = "interrupted", None
    shutil.rmtree(r2 / "merged")
    done = retrain(tmp_path, r1, r2, new, old)
    assert done.returncode == 0, done.stderr
    again = Run.open(r2).manifest
    assert len(again.resumes) == 1
    assert again.train
    assert (again.train.status, again.train.gate) == ("done", child.train.gate)
    assert (r2 / "merged" / "config.json").exists()
    assert again.mtp == child.mtp  # of the same merged model: up to date


def test_a_round_ends_where_the_gate_closes(tmp_path: Path) -> None:
    """Nothing is merged after a `train` that exits 1."""
    log = tmp_path / "log"
    stand_in = tmp_path / "sparkctl"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >>{log}\n[ "$1" != train ]\n')
    stand_in.chmod(0o755)
    assert retrain(tmp_path, "r3", "r4", "new.jsonl", "old.jsonl").returncode == 1
    assert log.read_text().splitlines() == [
        "analyze new.jsonl old.jsonl --run r4 --parent r3", "recommend r4", "show r4 --get train.status",
        "train r4 --gate 0.02",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "command"),
    [("interrupted", "resume r4"), ("running", "resume r4"), ("failed", "resume r4"), ("done", "train r4 --gate 0.02")],
)
def test_a_round_goes_on_where_it_stopped(tmp_path: Path, status: str, command: str) -> None:
    log = tmp_path / "log"
    stand_in = tmp_path / "sparkctl"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >>{log}\n[ "$1 $3" != "show --get" ] || echo {status}\n')
    stand_in.chmod(0o755)
    assert retrain(tmp_path, "r3", "r4", "new.jsonl").returncode == 0
    assert log.read_text().splitlines()[3:] == [command, *AFTERWARDS]


@pytest.mark.parametrize("arguments", [(), ("r3",), ("r3", "r4")])
def test_the_script_says_how_it_is_called(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = retrain(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_full_fine_tuning_ends_in_a_folder_that_transformers_loads(tmp_path: Path, qwen35_folder: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from sparkctl.model.plain import plain_layers

    r1 = tmp_path / "full"
    play("analyze", tiny.chats(tmp_path / "chats.jsonl", 30), "--run", r1, "--model", qwen35_folder)
    play("recommend", r1, "--mode", "full", "--max-steps", 2, "--learning-rate", 0.01)
    play("train", r1)
    play("merge", r1)

    merged = r1 / "merged"
    assert json.loads((merged / "config.json").read_text()) == json.loads((qwen35_folder / "config.json").read_text())
    changed, kept = set(), set()
    for name, shard in json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"].items():
        before = json.loads((qwen35_folder / "model.safetensors.index.json").read_text())["weight_map"][name]
        with safe_open(merged / shard, "pt") as new, safe_open(qwen35_folder / before, "pt") as old:
            (kept if torch.equal(new.get_tensor(name), old.get_tensor(name)) else changed).add(name)
    assert {name for name in kept if name.startswith(("mtp.", "model.visual."))} == {
        name for name in kept | changed if name.startswith(("mtp.", "model.visual."))
    }
    assert "model.language_model.embed_tokens.weight" in changed
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in changed
    model = plain_layers(AutoModelForCausalLM.from_pretrained(merged))
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()

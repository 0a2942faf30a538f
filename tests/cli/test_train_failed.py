"""A training whose loss is no number, and one whose driver ends: what is said can be pasted, what was done stays."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from safetensors.torch import load_file, save_file

from sparkctl.cli import app
from sparkctl.errors import SparkError
from sparkctl.hardware import machine, measurements
from sparkctl.manifest.store import Run
from sparkctl.train.engines.reference import ReferenceEngine


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """A training of four steps of three packs, a checkpoint after the third step."""
    return ready.run(tmp_path / "run", llama_folder, count=24)


def test_the_hint_at_a_loss_that_is_no_number_can_be_pasted(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At first, when the plan that is given up has been trained by for a few steps, and of a training that goes on."""
    original, calls = ReferenceEngine.micro_step, [0]
    planned = run.manifest.plan

    def micro_step(self: ReferenceEngine, pack: Any, scale: float) -> torch.Tensor:
        calls[0] += 1
        return original(self, pack, scale) * (float("nan") if calls[0] >= 14 else 1.0)

    monkeypatch.setattr(ReferenceEngine, "micro_step", micro_step)
    for command in ("train", "resume"):
        capsys.readouterr()
        assert app.run([command, str(run.root)]) == 1
        said = capsys.readouterr().err
        assert "loss of step" in said
        words = shlex.split(said.rpartition("hint: ")[2].split("`")[1])
        assert words.count("--force") == 1
        assert app.run(words[1:]) == 0, capsys.readouterr().err
        with Run.open(run.root).edit() as manifest:
            assert manifest.plan.learning_rate == planned.learning_rate / 2
            manifest.plan = planned  # as if it had not been pasted


@pytest.mark.parametrize("engine", ["reference", "native"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_base_that_holds_no_number_is_named_and_no_example_blamed(
    engine: str, name: str, tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[name][-40:, 3] = float("inf")  # of the embedding, rows of a few tokens
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = ready.run(tmp_path / "run", model, count=24, engine=engine)
    assert app.run(["train", str(run.root)]) == 1
    said = capsys.readouterr().err
    assert f"error: `{name}` in `{model}/model.safetensors` holds NaN or an infinite value" in said
    assert "--learning-rate" not in said
    assert f"hint: cp WHOLE_COPY {model}/model.safetensors" in said


def test_a_driver_that_ends_meanwhile_costs_the_rate_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise SparkError("the GPU cannot be asked: NVML: driver/library version mismatch", "sparkctl doctor")

    monkeypatch.setattr(measurements, "ENOUGH", 1)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(machine, "find_gpu", gone)
    assert app.run(["train", str(run.root)]) == 0
    assert Run.open(run.root).manifest.train.status == "done"

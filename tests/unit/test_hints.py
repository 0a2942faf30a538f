"""Hints of what lies deep: a command that mends it, with the folders that the user named, and it does mend it."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import hub_server
import merging_run
import pytest
import torch
from hub_server import SHARDS, HubServer
from safetensors.torch import load_file, save_file

from sparkctl.errors import SparkError
from sparkctl.merge.merge import merge_checkpoint
from sparkctl.model.anew import THEN, folder_anew
from sparkctl.model.hub import locate
from sparkctl.model.load import load_text_model
from sparkctl.model.lora import add_adapters
from sparkctl.model.weights import TensorFile
from sparkctl.train import state

ID = "org/tiny"


def test_a_damaged_file_of_the_hub_is_had_anew(hub: HubServer, tmp_path: Path) -> None:
    folder = hub_server.repository(tmp_path / "repository")
    hub.publish(ID, folder)
    path = locate(ID, weights=True).folder / SHARDS[0]
    path.resolve().write_bytes(b"{")
    with pytest.raises(SparkError, match="no safetensors file") as caught:
        TensorFile(path)
    command, then = (caught.value.hint or "").split(", ", 1)
    assert then == THEN
    subprocess.run(shlex.split(command), check=True)
    assert (locate(ID, weights=True).folder / SHARDS[0]).read_bytes() == (folder / SHARDS[0]).read_bytes()


def test_a_model_of_the_hub_that_is_not_whole_is_had_anew(hub: HubServer, tmp_path: Path) -> None:
    hub.publish(ID, hub_server.repository(tmp_path / "repository"))
    source = locate(ID, weights=True)
    command, then = folder_anew(source.folder).split(", ", 1)
    assert then == THEN
    subprocess.run(shlex.split(command), check=True)
    assert not source.folder.exists()
    assert locate(ID, weights=True) == source


@pytest.fixture
def checkpoints(tmp_path: Path, qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those of `my run`, steps 3 and 6, as the user names them."""
    monkeypatch.chdir(tmp_path)
    return merging_run.trained_run(Path("my run"), qwen35_folder).root / "checkpoints"


def test_a_checkpoint_without_its_state_names_another(checkpoints: Path) -> None:
    (checkpoints / "step-000003" / state.STATE).unlink()
    with pytest.raises(state.CheckpointDamaged, match="missing or broken") as caught:
        state.read_state(checkpoints / "step-000003")
    assert caught.value.hint == "sparkctl resume 'my run' --from step-000006"


def test_a_checkpoint_of_another_model_is_begun_anew(checkpoints: Path) -> None:
    with pytest.raises(SparkError, match="other tensors") as caught:
        state.load_trainable(checkpoints / "step-000003", {"w": torch.nn.Parameter(torch.ones(1))})
    assert caught.value.hint == "sparkctl train 'my run' --force begins anew"


def test_weights_that_cannot_be_merged_name_another_checkpoint(checkpoints: Path, qwen35_folder: Path) -> None:
    trained = checkpoints / "step-000003" / state.TRAINABLE
    save_file({name: tensor * torch.nan for name, tensor in load_file(trained).items()}, trained)

    def refused() -> str | None:
        with pytest.raises(SparkError, match="not finite") as caught:
            merge_checkpoint(qwen35_folder, trained, Path("out"), lora=merging_run.LORA)
        return caught.value.hint

    assert refused() == "sparkctl merge 'my run' --checkpoint step-000006"
    state.remove(checkpoints / "step-000006")
    assert refused() == "sparkctl train 'my run' --force begins anew: there is no other checkpoint"


def test_a_model_without_modules_to_adapt_is_trained_whole(llama_folder: Path) -> None:
    model = load_text_model(llama_folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    with pytest.raises(SparkError, match="no module to adapt") as caught:
        add_adapters(model, 4, 4, 0, ["nothing"], "runs/r1")
    assert caught.value.hint == "train it whole: `sparkctl recommend runs/r1 --mode full`"

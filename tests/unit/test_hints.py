"""Hints of what lies deep: a command that mends it, with the folders that the user named, and it does mend it."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import merging_run
import pytest
import ready
import torch
import typer
from hub_server import SHARDS, HubServer
from safetensors.torch import load_file, save_file

import sparkctl
from sparkctl.cli.app import register
from sparkctl.errors import SparkError
from sparkctl.manifest.schema import Asked, Choices, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.merge.merge import merge_checkpoint
from sparkctl.model.anew import THEN, folder_anew
from sparkctl.model.hub import locate
from sparkctl.model.load import load_text_model
from sparkctl.model.lora import add_adapters
from sparkctl.model.weights import TensorFile
from sparkctl.plan.heads import HeadWishes
from sparkctl.plan.request import Wishes
from sparkctl.steps import inputs, merge, mtp_train
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


def test_a_damaged_checkpoint_names_none_that_is_damaged_too(checkpoints: Path) -> None:
    for number, hint in ((6, "sparkctl resume 'my run' --from step-000003"), (3, "`sparkctl train 'my run' --force`")):
        file = checkpoints / state.checkpoint_id(number) / state.TRAINABLE
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        with pytest.raises(state.CheckpointDamaged, match="is damaged") as caught:
            state.verify(file.parent)
        assert str(caught.value.hint).startswith(hint)


def test_a_checkpoint_of_another_model_is_begun_anew(checkpoints: Path) -> None:
    with pytest.raises(SparkError, match="other tensors") as caught:
        state.load_trainable(checkpoints / "step-000003", {"w": torch.nn.Parameter(torch.ones(1))})
    assert caught.value.hint == "`sparkctl train 'my run' --force` begins anew"


def test_weights_that_cannot_be_merged_name_another_checkpoint(checkpoints: Path, qwen35_folder: Path) -> None:
    trained = checkpoints / "step-000003" / state.TRAINABLE
    save_file({name: tensor * torch.nan for name, tensor in load_file(trained).items()}, trained)

    def refused() -> str | None:
        with pytest.raises(SparkError, match="not finite") as caught:
            merge_checkpoint(qwen35_folder, trained, Path("out"), lora=merging_run.LORA)
        return caught.value.hint

    assert refused() == "sparkctl merge 'my run' --checkpoint step-000006"
    (checkpoints / "step-000006" / state.OPTIMIZER).write_bytes(b"")
    assert refused() == "`sparkctl train 'my run' --force` begins anew: there is no other whole checkpoint"


def test_a_model_without_modules_to_adapt_is_trained_whole(llama_folder: Path) -> None:
    model = load_text_model(llama_folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    with pytest.raises(SparkError, match="no module to adapt") as caught:
        add_adapters(model, 4, 4, 0, ["nothing"], "runs/r1")
    assert caught.value.hint == "train it whole: `sparkctl recommend runs/r1 --mode full`"


def test_a_merge_is_said_again_as_it_was_asked_for() -> None:
    asked = merge.Request(Path("my run"), "last", Path("out"), "text")
    line = "sparkctl merge 'my run' --checkpoint last --adapter-only=text"
    assert asked.again("--force") == f"{line} --out out --force"
    assert asked.again("--out", "FOLDER") == f"{line} --out FOLDER"
    assert merge.Request(Path("r1"), adapter="multimodal").again() == "sparkctl merge r1 --adapter-only"


def test_a_head_s_training_is_said_again_as_it_was_asked_for() -> None:
    wishes = HeadWishes(steps=2, fresh=True, pack_length=4096, learning_rate=5e-5)
    asked = mtp_train.Request(Path("my run"), wishes, prompts=8, allow_slow=True)
    assert asked.again("--force") == (
        "sparkctl mtp train 'my run' --steps 2 --fresh --pack-length 4096 --learning-rate 5e-05 --prompts 8 "
        "--allow-slow --force"
    )
    assert mtp_train.Request(Path("r1")).again() == "sparkctl mtp train r1"


def test_an_analysis_is_said_again_as_it_was_asked_for() -> None:
    asked = inputs.Request(
        (Path("a b.jsonl"), Path("c.jsonl")), Path("r1"), "org/tiny", Path("r0"), continues=True, eval_fraction=0.0,
        skip_bad=True, show=2,
    )  # fmt: skip
    assert asked.again("--force") == (
        "sparkctl analyze 'a b.jsonl' c.jsonl --run r1 --model org/tiny --parent r0 --continue --eval-fraction 0.0 "
        "--skip-bad --show 2 --force"
    )
    assert inputs.Request((Path("c.jsonl"),), Path("r1")).again() == "sparkctl analyze c.jsonl --run r1"


def test_a_plan_is_said_again_as_it_was_asked_for(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = Choices(epochs=2, lora_r=4, checkpointing=False, warmup_fraction=0.00004)
    asked = Asked(flags=flags, auto=["engine", "mode"], recipe="../my recipe.toml")
    run = ready.run(tmp_path / "r1", llama_folder, count=12, asked=asked)
    said = inputs.recommend_command(Run.open(run.root), shown=Path("r1"))
    assert said.startswith("sparkctl recommend r1 --recipe 'my recipe.toml' --engine auto --mode auto --lora-r 4 ")
    parse = command("recommend").make_context("recommend", shlex.split(said)[2:]).params
    assert {name: parse[name] for name in ("epochs", "lora_r", "checkpointing", "warmup_fraction")} == {
        "epochs": 2, "lora_r": 4, "checkpointing": False, "warmup_fraction": 0.00004,
    }  # fmt: skip
    assert (parse["mode"], parse["engine"], parse["recipe"]) == ("auto", "auto", "my recipe.toml")
    other = inputs.recommend_command(run, engine="reference", epochs=3, shown=Path("r1"))
    kept = said.replace("--engine auto ", "").replace("--epochs 2", "--epochs 3")
    assert other == f"{kept} --engine reference"
    with run.edit() as manifest:
        manifest.train = TrainTable(
            status="done", started="now", engine="native", versions={}, made_from="x", step=8, steps=8,
            trainable_parameters=1, estimated_seconds=1, estimated_peak_memory=1,
        )  # fmt: skip
        assert manifest.plan
        manifest.plan.asked = Asked(recipe="2b-lora")
    assert inputs.recommend_command(run, keep=1) == f"sparkctl recommend {run.root} --recipe 2b-lora --keep 1 --force"


def test_the_hint_of_a_refusal_and_the_plan_s_own_are_one_command(tmp_path: Path, llama_folder: Path) -> None:
    wishes = Wishes(Choices(seed=3), frozenset({"mode"}), Choices(), "2b-lora", recipe_flag="2b-lora")
    run = ready.run(tmp_path / "r1", llama_folder, count=12, asked=wishes.asked)
    assert inputs.recommend_command(run, keep=1) == wishes.command(run.root, keep=1)


def command(name: str) -> Any:
    return typer.main.get_command(register()).commands[name]  # type: ignore[attr-defined]


def hints() -> Iterator[tuple[str, str]]:
    """(where, text) of every hint that is written out where its error is made; values in it are X."""
    for file in sorted(Path(sparkctl.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                for hint in node.args[1:2]:
                    if isinstance(hint, ast.Constant | ast.JoinedStr):
                        parts = hint.values if isinstance(hint, ast.JoinedStr) else [hint]
                        said = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
                        yield f"{file.name}:{node.lineno}", said


def prose(hint: str) -> bool:
    """Whether a hint that begins as a command ends otherwise, so that pasting it fails."""
    return hint.startswith("sparkctl ") and re.search(r"[,;:] |`| begins | does ", hint) is not None


def test_a_hint_is_a_command_or_has_it_in_backticks() -> None:
    assert prose("sparkctl train X --force begins anew")
    assert prose("sparkctl train X, without `--gate`")
    assert not prose("sparkctl train X --force")
    assert not prose("`sparkctl train X --force` begins anew")
    found = list(hints())
    assert len(found) > 100
    assert [(where, hint) for where, hint in found if prose(hint)] == []

"""What was trained on a tokenizer's ids is neither trained on, nor merged beside, another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ready
import tiny

from sparkctl.cli import app
from sparkctl.data.tokenizer import load_tokenizer
from sparkctl.errors import UsageError
from sparkctl.files import sha256_file
from sparkctl.manifest.store import Run
from sparkctl.steps.inputs import analyze_command
from sparkctl.steps.training import require_tokenizer

Said = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Run:
    """A training of four steps."""
    run = ready.run(tmp_path_factory.mktemp("straight") / "run", llama_folder, count=24)
    assert app.run(["train", str(run.root)]) == 0
    return Run.open(run.root)


def test_a_tokenizer_that_changed_since_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    """A file that changes no id does not matter."""
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    words = ("analyze", tiny.chats(tmp_path / "chats.jsonl"), "--run", tmp_path / "r1", "--model", model)
    assert app.run([*map(str, words)]) == 0
    run = Run.open(tmp_path / "r1")
    table = run.manifest.model
    assert table
    require_tokenizer(run, table, model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    require_tokenizer(run, table, model)
    known = json.loads((model / "tokenizer.json").read_text())
    vocabulary = known["model"]["vocab"]
    first, second, *_ = sorted(vocabulary, key=vocabulary.__getitem__)
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (model / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(UsageError, match=r"the tokenizer in .* is not the one that `analyze` read") as refused:
        require_tokenizer(run, table, model)
    assert f"`{analyze_command(run, '--force')}`" in (refused.value.hint or "")


def test_a_round_cannot_continue_what_was_trained_on_another_tokenizer_s_ids(
    straight: Run, tmp_path: Path, llama_folder: Path, capsys: Said
) -> None:
    child = ready.run(tmp_path / "child", llama_folder, parent=straight, continues=True, count=24)
    with child.edit() as manifest:
        manifest.model.tokenizer_sha256 = "another"
    assert app.run(["train", str(child.root)]) == 2
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "merge"])
def test_a_tokenizer_that_is_not_the_analysed_one_is_refused(
    straight: Run, tmp_path: Path, llama_folder: Path, capsys: Said, command: str
) -> None:
    run = Run.open(shutil.copytree(straight.root, tmp_path / "run")) if command == "merge" else None
    run = run or ready.run(tmp_path / "run", llama_folder, count=24)
    with run.edit() as manifest:
        manifest.model.source = str(llama_folder)
        manifest.model.chat_template.sha256 = sha256_file(run.root / manifest.model.chat_template.file)
        manifest.model.tokenizer_files = "others"
    assert app.run([command, str(run.root)]) == 2
    refused = f"error: the tokenizer in `{llama_folder}` is not the one that `analyze` read the chats with"
    assert refused in capsys.readouterr().err
    with run.edit() as manifest:
        manifest.model.tokenizer_sha256 = load_tokenizer(llama_folder).sha256  # other files, the same tokenizer
    assert app.run([command, str(run.root)]) == 0, capsys.readouterr().err

"""What config.json promises, made in another process: the same as here, awaited in time, and no folder without it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heads
import merging
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sparkctl import child
from sparkctl.errors import SparkError
from sparkctl.manifest.schema import Lora
from sparkctl.merge import merge
from sparkctl.model import promise
from sparkctl.model.audit import audit
from sparkctl.model.promise import promising
from sparkctl.mtp import inject
from sparkctl.mtp.source import from_file

LORA = Lora(r=4, alpha=6)
SOON = 5.0  # seconds; what is waited for takes 300


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command, where transformers is not imported yet."""
    monkeypatch.setattr(promise, "imported", lambda: False)


@pytest.fixture
def folder(qwen35_folder: Path, tmp_path: Path) -> Path:
    """A whole Qwen3.5 with its head, alone in a folder."""
    return Path(shutil.copytree(qwen35_folder, tmp_path / "model"))


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the other process do something else."""

    def put(lines: str) -> None:
        monkeypatch.setattr(child, "_line", lambda *_: [sys.executable, "-c", lines])

    return put


def injected(folder: Path) -> None:
    """A head into `folder`, as its neighbour `out`."""
    target = inject.read_target(folder)
    source = from_file(heads.head_file(folder.parent / "head.safetensors"), target.head)
    inject.inject_head(target, source, folder.parent / "out", known={}, finish=lambda *_: None)


def merged(folder: Path) -> None:
    """Adapters into `folder`, as its neighbour `out`."""
    trained = merging.adapters(folder, folder.parent / "trained.safetensors", LORA)
    merge.merge_checkpoint(folder, trained, folder.parent / "out", lora=LORA)


WRITERS = {"merge": (merged, merge, "write_weights"), "inject": (injected, inject, "_write_head")}
writers = pytest.mark.parametrize("writer", WRITERS)


def nothing_left(folder: Path) -> bool:
    return {path.name for path in folder.parent.iterdir()} <= {"model", "head.safetensors", "trained.safetensors"}


def test_another_process_promises_the_same(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models = (folder, tiny.dense(tmp_path / "llama", "llama"))
    capfd.readouterr()
    for model in models:
        with promising(model) as promised:
            told = promised()
        assert told == promise.promise(model)
        assert (list(told.shapes), told.wrong) == (list(promise.promise(model).shapes), "")
        assert audit(model, promised=lambda told=told: told, counted=False) == []
        assert told.optional or told.ignored  # what JSON has no word for came through
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_built_is_the_audits_finding(folder: Path) -> None:
    heads.configured(folder, hidden_size="x")
    with promising(folder) as promised:
        found = audit(folder, promised=promised)
    assert found == audit(folder)
    assert ["config.json" in problem for problem in found] == [True]


def test_a_promise_of_another_config_is_none(folder: Path, tmp_path: Path) -> None:
    before = promise.promise(folder)
    heads.configured(folder, mtp_num_hidden_layers=0)
    assert ["was changed" in problem for problem in audit(folder, promised=lambda: before)] == [True]


@writers
def test_a_whole_folder_gets_its_name(writer: str, folder: Path) -> None:
    WRITERS[writer][0](folder)
    assert audit(folder.parent / "out", counted=False) == []


@writers
def test_an_audit_that_finds_something_leaves_no_folder(
    writer: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, module, name = WRITERS[writer]
    write = getattr(module, name)

    def other_dimensions(*arguments: Any) -> None:
        write(*arguments)
        [stage] = folder.parent.glob(".out.*.tmp")
        shard = stage / inject.HEAD_SHARD
        save_file(load_file(shard) | {"mtp.norm.weight": torch.ones(33)}, shard)

    monkeypatch.setattr(module, name, other_dimensions)
    with pytest.raises(SparkError, match=r"`mtp\.norm\.weight` has shape \[33\]"):
        work(folder)
    assert nothing_left(folder)


@writers
def test_a_process_that_dies_is_the_commands_error(writer: str, folder: Path, instead: Callable[[str], None]) -> None:
    instead("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(SparkError, match=r"config\.json` promises failed: died of SIGKILL") as caught:
        WRITERS[writer][0](folder)
    assert "run the same command again" in (caught.value.hint or "")
    assert nothing_left(folder)


@writers
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_the_copying_stops_the_process_at_once(
    stop: BaseException, writer: str, folder: Path, instead: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, module, name = WRITERS[writer]
    running = []

    def stopped(*_: Any) -> None:
        running.extend(child._running)
        raise stop

    instead("import time; time.sleep(300)")
    monkeypatch.setattr(module, name, stopped)
    began = time.monotonic()
    with pytest.raises(type(stop) if isinstance(stop, OSError) else KeyboardInterrupt):
        work(folder)
    assert time.monotonic() - began < SOON
    assert [process.poll() for process in running] == [-9]
    assert nothing_left(folder)

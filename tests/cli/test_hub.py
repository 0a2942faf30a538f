"""A model of the hub through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hub_server
import pytest
import tiny
from hub_server import HubServer

from sparkctl.cli import app
from sparkctl.manifest.store import Run

ID, SECRET = "org/tiny", "hf_secret"


def test_from_the_hub_to_a_trained_model(
    hub: HubServer, qwen35_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """analyze records the commit, later steps keep to it, train brings the weights, and all works offline then."""
    commit = hub.publish(ID, qwen35_folder)
    data, run = tiny.chats(tmp_path / "chats.jsonl", 20), tmp_path / "r1"

    def sparkctl(*arguments: object) -> dict[str, Any]:
        assert app.run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    analysed = sparkctl("analyze", data, "--run", run, "--model", ID)
    assert (analysed["model"]["source"], analysed["model"]["revision"]) == (ID, commit)
    table = Run.open(run).manifest.model
    assert table
    assert (table.source, table.revision) == (ID, commit)
    newer = Path(shutil.copytree(qwen35_folder, tmp_path / "newer"))
    (newer / "config.json").write_text((newer / "config.json").read_text() + "\n")
    assert hub.publish(ID, newer) != commit
    hub.requests.clear()
    assert sparkctl("analyze", data, "--run", run, "--model", ID)["up_to_date"]
    sparkctl("recommend", run, "--epochs", 1)
    assert hub.requests == []
    sparkctl("train", run)
    assert any("safetensors" in line for line in hub.requests)
    assert all(commit in line for line in hub.requests)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub_server.free_port()}")
    merged = sparkctl("merge", run)
    assert merged["changed_tensors"] > 0
    again = sparkctl("analyze", data, "--run", tmp_path / "r2", "--parent", run)
    assert again["model"]["revision"] == commit


def test_the_command_line_says_what_is_wrong(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    data = tiny.chats(tmp_path / "chats.jsonl")
    assert app.run(["analyze", str(data), "--run", str(tmp_path / "r1"), "--model", "org/none"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: no model `org/none`")
    assert "\nhint: " in said.err
    assert SECRET not in said.out + said.err
    assert hub.tokens == {f"Bearer {SECRET}"}
    assert not (tmp_path / "r1").exists()

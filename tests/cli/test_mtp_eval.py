"""`sparkctl mtp eval` from the command line: its rows, what is recorded and when it is true, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import heads
import merging_run
import numpy as np
import pytest
import ready
import tiny
from safetensors.torch import load_file, save_file

from sparkctl.cli.app import run as sparkctl
from sparkctl.demo.chats import held_out_questions
from sparkctl.demo.model import write_model
from sparkctl.files import sha256_file
from sparkctl.manifest.schema import MtpTable
from sparkctl.manifest.store import Run
from sparkctl.mtp import accept
from sparkctl.steps.mtp_eval import BASE, NOT_HELPED, SHIPPED, TRAINED

Said = pytest.CaptureFixture[str]
FEW = ("--prompts", "3", "--max-tokens", "8")


@pytest.fixture
def said(capsys: Said) -> Said:
    return capsys


@pytest.fixture
def run(qwen35_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A merged run with held-out documents, no head trained yet."""
    made = merging_run.trained_run(tmp_path / "r1", qwen35_folder)
    ready.store(made.root / "tokens", ready.documents(40))
    monkeypatch.chdir(tmp_path)
    assert sparkctl(["merge", "r1", "--json"]) == 0
    return Run.open(made.root)


def answer(said: Said, *arguments: str) -> dict[str, Any]:
    said.readouterr()
    assert sparkctl(["mtp", "eval", "r1", *FEW, *arguments, "--json"]) == 0
    return json.loads(said.readouterr().out)


def refused(said: Said, status: int, *arguments: str) -> str:
    said.readouterr()
    assert sparkctl(["mtp", "eval", "r1", *FEW, *arguments]) == status
    text = said.readouterr().err
    assert text.startswith("error: ")
    assert "Traceback" not in text
    return text


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def with_head(run: Run, **of: int) -> Path:
    """A head as `mtp train` leaves it; what was measured stays written down."""
    path = heads.head_file(run.root / "mtp" / "head.safetensors", **of)
    noted(run, path)
    return path


def noted(run: Run, path: Path) -> None:
    before = Run.open(run.root).manifest.mtp
    with run.edit() as manifest:
        manifest.mtp = MtpTable(
            mode="trained", head="mtp/head.safetensors", digest=sha256_file(path), made_from="test",
            acceptance=before.acceptance if before else [],
        )  # fmt: skip


def test_rows_before_and_after_tuning(run: Run, said: Said) -> None:
    found = answer(said)
    assert names(found["rows"]) == [BASE, SHIPPED]
    assert found["notes"] == [
        "no row for a trained head: `sparkctl mtp train r1` makes one", "not written down: `r1` has no [mtp] yet",
    ]  # fmt: skip
    for row in found["rows"]:
        assert (row["prompts"], len(row["positions"]), len(row["by_draft_length"])) == (3, 3, 3)
        assert 3 <= row["tokens"] <= 24
        assert row["mean_acceptance_length"] == pytest.approx(1 + row["mean_accepted"])
        assert row["mean_accepted"] == pytest.approx(sum(p["cumulative"] for p in row["positions"]), abs=1e-5)
    held_out = [i for i in range(40) if i % ready.HELD_OUT == 0]
    assert [prompt["row"] for prompt in found["prompts"]] == held_out[:3]
    assert Run.open(run.root).manifest.mtp is None


def test_the_demos_head_on_its_own_model_and_on_a_changed_one(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    made = merging_run.trained_run(tmp_path / "r1", tmp_path / "model")
    ready.store(made.root / "tokens", [asked(tokenizer, q, a) for q, a in held_out_questions()[:6]], np.ones(6, bool))
    monkeypatch.chdir(tmp_path)
    assert sparkctl(["merge", "r1", "--json"]) == 0
    base, tuned = ([p["cumulative"] for p in row["positions"]] for row in answer(said, "--prompts", "6")["rows"])
    assert base[0] > 0.9
    assert 1 >= base[0] >= base[1] >= base[2] > 0.2
    assert tuned[0] < 0.7  # random adapters of any size


def asked(tokenizer: Any, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """A chat of one turn: ids, and which of them are the model's."""
    chat: list[dict[str, str]] = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ids = np.array(prompt + tokenizer.encode(answer), dtype=np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


def test_three_rows_are_recorded_and_stay_true(run: Run, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    with_head(run)
    first = answer(said)
    assert names(first["rows"]) == [BASE, SHIPPED, TRAINED]
    table = Run.open(run.root).manifest.mtp
    assert table
    assert [row.name for row in table.acceptance] == [BASE, SHIPPED, TRAINED]
    assert not first["up_to_date"]
    with monkeypatch.context() as patch:
        patch.setattr(accept, "measure", None)  # nothing is computed
        again = answer(said)
    assert again["up_to_date"]
    assert again["rows"] == first["rows"]
    assert sparkctl(["mtp", "eval", "r1", *FEW]) == 0
    assert "prompts (up to date: nothing was done, this is the result of 20" in said.readouterr().out


def test_another_head_is_measured_anew_and_only_it(run: Run, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    with_head(run)
    first, asked, measure = answer(said), [], accept.measure

    def watched(subjects: Any, *rest: Any) -> Any:
        asked.extend(subject.name for subject in subjects)
        return measure(subjects, *rest)

    monkeypatch.setattr(accept, "measure", watched)
    with_head(run, seed=6)
    second = answer(said)
    assert asked == [TRAINED]
    assert second["rows"][:2] == first["rows"][:2]
    asked.clear()
    answer(said, "--draft-length", "2")
    assert asked == [BASE, SHIPPED, TRAINED]
    asked.clear()
    answer(said, "--draft-length", "2", "--force")
    assert asked == [BASE, SHIPPED, TRAINED]


def test_the_bases_head_kept_by_training_is_no_trained_head(run: Run, said: Said, qwen35_folder: Path) -> None:
    path = run.root / "mtp" / "head.safetensors"
    path.parent.mkdir()
    save_file(load_file(qwen35_folder / "model-mtp.safetensors"), path)
    noted(run, path)
    found = answer(said)
    assert names(found["rows"]) == [BASE, SHIPPED]
    assert found["notes"] == [NOT_HELPED]
    with Run.open(run.root).edit() as manifest:  # as `mtp train` leaves it: the row of the head that was given up
        assert manifest.mtp
        rows = manifest.mtp.acceptance
        manifest.mtp.acceptance = [*rows, rows[1].model_copy(update={"name": TRAINED, "made_from": "given up"})]
    found = answer(said)
    assert names(found["rows"]) == [BASE, SHIPPED, TRAINED]
    assert found["notes"] == [NOT_HELPED, f"`{TRAINED}` is the row of the head that was given up"]


def test_a_row_a_person_reads(run: Run, said: Said) -> None:
    said.readouterr()
    assert sparkctl(["mtp", "eval", "r1", *FEW, "--draft-length", "2"]) == 0
    text = said.readouterr().out
    assert "over 3 held-out prompts" in text
    assert "token 2" in text
    assert "token 3" not in text
    assert SHIPPED in text


def test_dry_run_measures_nothing(run: Run, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    with_head(run)
    monkeypatch.setattr(accept, "measure", None)
    before = (run.root / "run.toml").read_bytes()
    found = answer(said, "--dry-run")
    assert (found["rows"], found["wanted"]) == ([], [BASE, SHIPPED, TRAINED])
    assert (run.root / "run.toml").read_bytes() == before


def test_without_a_merged_model(run: Run, said: Said) -> None:
    (run.root / "merged" / "config.json").unlink()
    text = refused(said, 2)
    assert "is not what `merge` wrote\nhint: sparkctl merge r1 --force" in text
    shutil.rmtree(run.root / "merged")
    assert "error: `r1/merged` is gone\nhint: sparkctl merge r1 --force" in refused(said, 2)
    with run.edit() as manifest:
        manifest.merge = None
    assert "error: `r1` has no merged model yet\nhint: sparkctl merge r1\n" in refused(said, 2)


def test_without_held_out_examples(run: Run, said: Said) -> None:
    shutil.rmtree(run.root / "tokens")
    ready.store(run.root / "tokens", ready.documents(9), np.zeros(9, dtype=bool))
    text = refused(said, 2)
    assert "error: `r1` holds no example out to measure on\nhint: sparkctl analyze" in text
    assert "--eval-fraction 0.086 --force" in text  # three of 35
    with run.edit() as manifest:
        assert manifest.analysis
        manifest.analysis = manifest.analysis.model_copy(update={"train_examples": 9})  # 2 % of nine is none again
    assert "--eval-fraction 0.33 --force" in refused(said, 2)


def test_a_trained_head_of_other_dimensions(run: Run, said: Said) -> None:
    with_head(run, ffn=32)
    assert "other dimensions" in refused(said, 1)


def test_a_base_without_a_head_is_skipped(tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    made = merging_run.trained_run(tmp_path / "r1", tiny.hybrid(tmp_path / "bare", mtp_num_hidden_layers=0))
    monkeypatch.chdir(tmp_path)
    found = answer(said)
    assert found["rows"] == []
    assert "has no MTP head" in found["skipped"]
    table = Run.open(made.root).manifest.mtp
    assert table
    assert (table.mode, table.skipped) == ("skipped", found["skipped"])


def test_a_head_that_no_ended_training_wrote_is_no_trained_one(run: Run, said: Said) -> None:
    """The one before is still there while another is trained; or the file was changed."""
    path = with_head(run)
    with run.edit() as manifest:
        assert manifest.mtp
        manifest.mtp.mode, manifest.mtp.head, manifest.mtp.digest = "training", None, None
    found = answer(said)
    assert names(found["rows"]) == [BASE, SHIPPED]
    assert found["notes"] == [
        "no row for a trained head: its training has not ended, `sparkctl mtp train r1` goes on with it"
    ]
    noted(run, path)
    assert names(answer(said)["rows"]) == [BASE, SHIPPED, TRAINED]
    heads.head_file(path, seed=7)
    note = answer(said)["notes"][0]
    assert "`r1/mtp/head.safetensors` is not what `mtp train` wrote there, `sparkctl mtp train r1 --force`" in note

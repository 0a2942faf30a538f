"""`resume` where the best checkpoint of the one that it goes on from was removed: a better one came after it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import ready
from damaging import Said, flip, said

from sparkctl.errors import Interrupted
from sparkctl.manifest.store import Run
from sparkctl.steps.train import train
from sparkctl.train import state


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Step → held-out loss; a test changes it."""
    values = {0: 3.0, 1: 1.0, 2: 1.2, 3: 0.9}
    monkeypatch.setattr("sparkctl.train.loop.held_out_loss", lambda *given: values[int(given[-1].split()[-1])])
    return values


@pytest.fixture
def run(losses: dict[int, float], tmp_path: Path, llama_folder: Path) -> Run:
    """A training of three steps that kept the last two: step 1 was the best one when step 2 was saved, then step 3."""
    made = ready.run(tmp_path / "run", llama_folder, count=24, save_every=1, keep=2, max_steps=3)
    train(made.root)
    assert there(made) == ["step-000002", "step-000003"]
    return Run.open(made.root)


def there(run: Run) -> list[str]:
    return [path.name for path in state.listed(run.root / "checkpoints")]


def best(run: Run) -> tuple[str | None, float | None]:
    trained = Run.open(run.root).manifest.train
    assert trained.status == "done"
    return trained.best_checkpoint, trained.best_eval_loss


def test_behind_a_damaged_newest_the_one_before_is_gone_on_from(run: Run, capsys: Said) -> None:
    newest = run.root / "checkpoints" / "step-000003" / state.TRAINABLE
    whole = newest.read_bytes()
    flip(newest)
    status, text = said(capsys, "resume", run.root)
    assert status == 0, text
    assert f"`{newest}` is damaged" in text
    assert "resuming from step-000002" in text
    assert "step-000001` is no longer there; the best checkpoint is step-000002 now" in text
    assert "is missing or broken" not in text
    assert (best(run), there(run)) == (("step-000003", 0.9), ["step-000002", "step-000003"])
    assert newest.read_bytes() == whole


def test_stopped_after_going_back_it_goes_on_from_there(
    run: Run, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: object) -> float:
        raise Interrupted("stopped", "again", signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("sparkctl.train.loop.held_out_loss", stopped)  # of step 3, before it is saved
        status, text = said(capsys, "resume", run.root, "--from", "step-000002")
    assert status == 143, text
    assert there(run) == ["step-000002"]
    stopped = Run.open(run.root).manifest.train
    assert (stopped.status, stopped.step, stopped.best_checkpoint) == ("interrupted", 2, "step-000002")
    status, text = said(capsys, "resume", run.root)
    assert status == 0, text
    assert "resuming from step-000002" in text
    assert (best(run), there(run)) == (("step-000003", 0.9), ["step-000002", "step-000003"])


@pytest.mark.parametrize(("loss", "wanted"), [(1.1, "step-000003"), (1.3, "step-000002")])
def test_a_finished_one_that_went_back_has_a_best_that_is_there(
    run: Run, losses: dict[int, float], capsys: Said, loss: float, wanted: str
) -> None:
    """Where step 3 is no better than what was removed, once it is better than step 2 and once not."""
    losses[3] = loss
    assert said(capsys, "resume", run.root, "--from", "step-000002")[0] == 0
    assert best(run) == (wanted, min(loss, losses[2]))
    assert state.read_state(run.root / "checkpoints" / "step-000003").best_checkpoint == wanted
    status, text = said(capsys, "merge", run.root, "--json")
    assert status == 0, text
    assert json.loads(text)["checkpoint"] == wanted
    status, text = said(capsys, "resume", run.root)
    assert status == 0, text
    assert "up to date" in text
    assert there(run) == ["step-000002", "step-000003"]

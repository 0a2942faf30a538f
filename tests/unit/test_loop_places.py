"""The loop at the places where it may be stopped, and whose time is counted: with the device behind it and without."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ready
import torch
from looping import Training, id_of
from two_ranks import two_ranks

from sparkctl.data.batches import Pack, share
from sparkctl.errors import Interrupted
from sparkctl.train import loop, metrics, readout, state
from sparkctl.train.ranks import joined


@pytest.mark.parametrize("ahead", [False, True])
def test_no_step_s_time_is_that_of_an_evaluation_or_a_save(
    tmp_path: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that a pack moves on by 1 s, an evaluation and a checkpoint by more."""
    training, now = Training(tmp_path, plan=ready.plan(save_every=2, max_steps=5), ahead=ahead), [0.0]

    def read() -> float:
        now[0] += 1e-6
        return now[0]

    for module in (loop, readout):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=read))

    def taking(work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            now[0] += seconds
            return work(*arguments)

        return slow

    training.engine.before = taking(lambda pack: None, 1.0)
    training.engine.eval_sum = taking(training.engine.eval_sum, 100.0)
    monkeypatch.setattr(state, "save", taking(state.save, 1000.0))
    end = training.run()
    seconds, packs = training.lines("seconds"), [len(training.schedule.step(n)) for n in range(5)]
    assert list(seconds) == [1, 2, 3, 4, 5]
    assert list(seconds.values()) == pytest.approx(packs, abs=0.01)
    evaluated = 100.0 * len(training.held_out) * 4
    assert end.seconds == pytest.approx(sum(packs) + evaluated + 3 * 1000.0, abs=0.01)  # the last save's as well


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_step_may_be_saved(tmp_path: Path, ahead: bool, steps: int) -> None:
    plan = ready.plan(learning_rate=0.3, save_every=1, keep=9, max_steps=steps)
    training = Training(tmp_path, plan=plan, ahead=ahead)
    end = training.run()
    assert end.step == steps
    assert [name for name, _, _ in training.saved] == [f"step-00000{n}" for n in range(1, steps + 1)]
    assert list(training.lines("loss")) == list(range(1, steps + 1))
    assert list(training.lines("eval_loss")) == list(range(steps + 1))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("where", ["evaluation", "save", "last pack"])
def test_a_signal_at_any_place_ends_with_the_last_step_saved(tmp_path: Path, where: str, ahead: bool) -> None:
    """What is saved is what the optimiser has done: the resumed training ends in the straight one's bits."""
    straight = Training(tmp_path / "straight")
    straight.run()
    training = Training(tmp_path / "stopped", ahead=ahead)
    eval_sum, at = training.engine.eval_sum, training.state

    def evaluating(pack: Pack) -> torch.Tensor:
        if where == "evaluation" and at.step == 3 and training.signals.received is None:
            signal.raise_signal(signal.SIGTERM)
        return eval_sum(pack)

    def before(pack: Pack) -> None:
        last = id_of(share(training.schedule.step(4), 0, 1)[-1])
        if where == "last pack" and id_of(pack) == last and training.signals.received is None:
            signal.raise_signal(signal.SIGTERM)

    training.engine.eval_sum, training.engine.before = evaluating, before
    training.on_saved = lambda name: signal.raise_signal(signal.SIGTERM) if where == "save" else None
    with pytest.raises(Interrupted, match="saved") as caught, training.signals.caught():
        training.run()
    assert caught.value.exit_status == 143
    newest = state.listed(tmp_path / "stopped" / "checkpoints")[-1]
    assert newest.name == ("step-000005" if where == "last pack" else "step-000003")
    again = Training(tmp_path / "stopped", ahead=ahead)
    again.state = state.load(newest, again.optimizer)
    metrics.truncate(tmp_path / "stopped" / "metrics.jsonl", again.state.step)
    again.run()
    assert again.lines("loss") == straight.lines("loss")
    assert torch.equal(again.engine.table, straight.engine.table)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failure_of_a_step_saves_nothing_of_it(tmp_path: Path, ahead: bool) -> None:
    """As a failed allocation: the step before it may be unread, and what was saved last is what there is."""
    training = Training(tmp_path, ahead=ahead)
    asked = {id_of(pack): n for n in range(6) for pack in training.schedule.step(n)}

    def before(pack: Pack) -> None:
        if asked[id_of(pack)] == 4:
            raise MemoryError

    training.engine.before = before
    with pytest.raises(MemoryError):
        training.run()
    assert [name for name, _, _ in training.saved] == ["step-000003"]
    assert list(training.lines("loss")) == list(range(1, 4 if ahead else 5))


def _rank_that_is_stopped(rank: int, folder: str) -> None:
    """The second alone is told to stop, in step 4, of which the first hears before step 5."""
    torch.set_num_threads(1)
    with joined() as ranks:
        training = Training(Path(folder), plan=ready.plan(learning_rate=0.3), ranks=ranks, ahead=True)

        def before(pack: Pack) -> None:
            if rank == 1 and training.state.step == 3:
                training.signals.received = signal.SIGTERM

        training.engine.before = before
        with pytest.raises(Interrupted, match="after step 4 of 6; saved"):
            training.run()


def test_ranks_that_go_ahead_stop_after_the_same_step(tmp_path: Path) -> None:
    alone = Training(tmp_path / "alone", plan=ready.plan(learning_rate=0.3))
    ready.store(tmp_path / "two" / "tokens", ready.documents(40))
    alone.run()
    two_ranks(_rank_that_is_stopped, str(tmp_path / "two"))
    found = Training(tmp_path / "two").lines("loss")
    wanted = {step: loss for step, loss in alone.lines("loss").items() if step <= 4}
    assert found == pytest.approx(wanted, rel=1e-6)
    assert state.listed(tmp_path / "two" / "checkpoints")[-1].name == "step-000004"

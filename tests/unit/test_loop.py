"""The loop with an engine of one matrix: what it evaluates, saves, keeps, stops at, and shares between ranks."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ready
import torch
from looping import Training, id_of
from two_ranks import two_ranks
from untimed import untimed

from sparkctl.data.batches import Pack
from sparkctl.errors import Interrupted, SparkError, refused_by_system
from sparkctl.train import metrics, state
from sparkctl.train.ranks import joined


def test_held_out_loss_at_the_start_at_each_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    training = Training(tmp_path, plan=ready.plan(learning_rate=0.3, save_every=4, epochs=4, keep=1, max_steps=11))
    end = training.run()
    losses, evals = training.lines("loss"), training.lines("eval_loss")
    assert list(losses) == list(range(1, training.schedule.steps + 1))
    assert list(evals) == [0, 4, 8, 11]
    assert evals[0] == pytest.approx(np.log(ready.VOCABULARY))
    assert losses[1] == pytest.approx(np.log(ready.VOCABULARY))
    assert evals[11] < evals[4] < evals[0]
    assert training.saved[0] == ("step-000004", evals[4], [])
    assert (end.best_checkpoint, end.best_eval_loss, end.step) == ("step-000011", evals[11], 11)
    assert (end.first_loss, end.first_eval_loss) == (losses[1], evals[0])
    assert end.recent_losses == [losses[n] for n in range(2, 12)]
    assert [p.name for p in state.listed(tmp_path / "checkpoints")] == ["step-000011"]
    rates = training.lines("learning_rate")
    assert rates[1] == pytest.approx(0.15)
    assert max(rates.values()) == pytest.approx(0.3)
    keys = {"step", "loss", "grad_norm", "learning_rate", "tokens", "labels", "tokens_per_second", "seconds", "memory"}
    assert set(metrics.read(tmp_path / "metrics.jsonl")[1]) == keys


def test_the_best_is_kept_when_the_loss_rises_again(tmp_path: Path) -> None:
    training = Training(tmp_path, plan=ready.plan(learning_rate=0.3, save_every=2, epochs=4, keep=1, max_steps=11))
    measured = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    labels = sum(pack.labels for pack in training.held_out)
    count = len(training.held_out)
    losses: list[float] = []

    def eval_sum(pack: Pack) -> torch.Tensor:
        if not losses:
            losses.extend([next(measured) * labels / count] * count)
        return torch.tensor(losses.pop(), dtype=torch.float64)

    training.engine.eval_sum = eval_sum
    end = training.run()
    assert (end.best_checkpoint, end.best_eval_loss) == ("step-000004", pytest.approx(4.0))
    assert [p.name for p in state.listed(tmp_path / "checkpoints")] == ["step-000004", "step-000011"]
    assert state.read_state(tmp_path / "checkpoints" / "step-000004").best_checkpoint == "step-000004"


def test_each_step_is_made_at_its_rate_and_counted_in_its_epoch(tmp_path: Path) -> None:
    training = Training(tmp_path, plan=ready.plan(save_every=1, keep=9))
    rates: list[float] = []
    step = training.optimizer.step
    training.optimizer.step = lambda rate: rates.append(rate) or step(rate)
    training.run()
    assert rates == list(training.lines("learning_rate").values())
    states = [state.read_state(path) for path in state.listed(tmp_path / "checkpoints")]
    epochs = [training.schedule.epoch(n) for n in range(training.schedule.steps)]
    assert [at.epoch for at in states] == epochs
    assert set(epochs) == {0, 1}


def test_a_norm_is_written_as_it_was_before_it_was_clipped(tmp_path: Path) -> None:
    norms = []
    for name, most in (("free", 1e9), ("clipped", 1e-3)):
        (tmp_path / name).mkdir()
        training = Training(tmp_path / name, plan=ready.plan(max_grad_norm=most, max_steps=1))
        training.run()
        norms.append(training.lines("grad_norm")[1])
    assert norms[0] == norms[1] > 1e-3


def test_the_peak_is_that_of_all_resumes(tmp_path: Path) -> None:
    training = Training(tmp_path, plan=ready.plan(max_steps=3))
    training.state.peak_memory = 1 << 50
    assert training.run().peak_memory == 1 << 50


def test_without_held_out_documents_the_newest_is_the_best(tmp_path: Path) -> None:
    ready.store(tmp_path / "tokens", ready.documents(40), np.zeros(40, dtype=bool))
    training = Training(tmp_path)
    end = training.run()
    assert training.lines("eval_loss") == {}
    assert end.best_checkpoint == state.listed(tmp_path / "checkpoints")[-1].name
    assert end.best_eval_loss is None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_never_saved_nor_written(tmp_path: Path, poison: float, ahead: bool) -> None:
    """Step 6 is the one that would be saved; step 5 is poisoned, of which a loop that goes ahead hears after it."""
    training = Training(tmp_path, ahead=ahead)
    bad = training.schedule.step(4)[1]
    asked: list[int] = []

    def before(pack: Pack) -> None:
        asked.append(training.state.step)
        same = [d.id for d in pack.documents] == [d.id for d in bad.documents]
        training.engine.poison = poison if same else 1.0

    training.engine.before = before
    with pytest.raises(SparkError, match=r"the loss of step 5 is (nan|inf) in the pack of documents") as caught:
        training.run()
    for document in bad.documents:
        assert f" {document.id} (chats.jsonl:{document.id + 1})" in caught.value.message
    other = next(d for pack in training.schedule.step(4) if pack != bad for d in pack.documents)
    assert f" {other.id} (chats" not in caught.value.message
    assert len(asked) == sum(len(training.schedule.step(n)) for n in range(6 if ahead else 5))
    assert max(training.lines("loss")) == 4
    newest, damaged = state.newest_complete(tmp_path / "checkpoints")
    assert (newest, damaged) == (tmp_path / "checkpoints" / "step-000003", [])
    assert state.read_state(newest).recent_losses == list(training.lines("loss").values())[:3]


def test_going_ahead_of_the_device_changes_no_bit_and_no_line(tmp_path: Path) -> None:
    """Each step is given before the numbers of the one before it are read, but for what is evaluated and saved."""
    plan = ready.plan(learning_rate=0.3, save_every=4, epochs=4, keep=9, max_steps=11)
    plain, ahead = (Training(tmp_path / name, plan=plan, ahead=name == "ahead") for name in ("plain", "ahead"))
    read: list[tuple[int, int]] = []
    starts = {id_of(ahead.schedule.step(n)[0]): n for n in range(11)}

    def before(pack: Pack) -> None:
        if id_of(pack) in starts:
            read.append((starts[id_of(pack)], ahead.state.step))

    ahead.engine.before = before
    ends = [training.run() for training in (plain, ahead)]
    assert torch.equal(plain.engine.table, ahead.engine.table)
    assert [(n, n if n % 4 == 0 else n - 1) for n in range(11)] == read
    timeless = [untimed(one.folder / "metrics.jsonl") for one in (plain, ahead)]
    assert timeless[0] == timeless[1]
    assert plain.saved == ahead.saved
    differing = {"seconds", "peak_memory"}
    assert ends[0].model_dump(exclude=differing) == ends[1].model_dump(exclude=differing)
    for name in ("step-000004", "step-000008", "step-000011"):
        a, b = (one.folder / "checkpoints" / name / state.TRAINABLE for one in (plain, ahead))
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 3])
def test_a_held_out_loss_that_is_no_number_is_named_and_never_written(tmp_path: Path, poison: float, step: int) -> None:
    training = Training(tmp_path, plan=ready.plan(pack_length=40))
    assert len(training.held_out) > 1
    bad, eval_sum = training.held_out[-1], training.engine.eval_sum
    training.engine.eval_sum = lambda pack: (
        torch.tensor(poison) if pack is bad and training.state.step == step else eval_sum(pack)
    )
    with pytest.raises(SparkError, match=rf"the held-out loss after step {step}, in one pack, is (nan|inf)") as caught:
        training.run()
    for document in bad.documents:
        assert f" {document.id} (chats.jsonl:{document.id + 1})" in caught.value.message
    assert f" {training.held_out[0].documents[0].id} (chats" not in caught.value.message
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert training.state.eval_loss is None
    assert all(math.isfinite(x) for _, x, _ in training.saved if x is not None)


def test_no_line_of_metrics_holds_what_is_no_number(tmp_path: Path) -> None:
    lines = metrics.Metrics(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write(step=1, loss=float("nan"))
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_a_gradient_norm_that_is_no_number_stops_too(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.engine.table.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(SparkError, match=r"the gradient norm of step 1 is (nan|inf), with documents"):
        training.run()
    assert (training.lines("loss"), training.saved) == ({}, [])


SAVING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP ends this process, as it does where nobody started it with `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("ahead", "done"), [(False, 4), (True, 5)])  # the fifth step was given, and is read first
@pytest.mark.parametrize(("number", "status"), SAVING)
def test_a_signal_saves_the_last_boundary_and_the_rest_follows_bit_for_bit(
    tmp_path: Path, hangup: None, number: int, status: int, ahead: bool, done: int
) -> None:
    straight = Training(tmp_path / "straight")
    straight.run()
    training = Training(tmp_path / "stopped", ahead=ahead)

    def before(pack: Pack) -> None:
        if training.state.step == 4 and training.engine.table.grad is not None:
            signal.raise_signal(number)  # in the middle of an accumulation

    training.engine.before = before
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"after step {done} of 6; saved") as caught, training.signals.caught():
        training.run()
    assert signal.getsignal(number) is handler
    assert (caught.value.exit_status, caught.value.hint) == (status, "sparkctl resume r1")
    assert list(training.lines("loss")) == list(range(1, done + 1))
    again = Training(tmp_path / "stopped", ahead=ahead)
    again.state = state.load(tmp_path / "stopped" / "checkpoints" / f"step-00000{done}", again.optimizer)
    again.run()
    assert again.lines("loss") == straight.lines("loss")
    assert again.lines("eval_loss") == straight.lines("eval_loss")
    assert torch.equal(again.engine.table, straight.engine.table)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def before(pack: Pack) -> None:
        if training.state.step == 4:
            with suppress(Exception):  # a library's
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)

    training.engine.before = before
    with pytest.raises(Interrupted, match="at once") as caught, training.signals.caught():
        training.run()
    assert caught.value.exit_status == 143
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_closed_terminal_is_told_of_twice_and_under_nohup_it_changes_nothing(tmp_path: Path, hangup: None) -> None:
    training = Training(tmp_path / "closed")

    def before(pack: Pack) -> None:
        if training.state.step == 4:
            signal.raise_signal(signal.SIGHUP)  # the kernel's
            signal.raise_signal(signal.SIGHUP)  # the shell's

    training.engine.before = before
    with pytest.raises(Interrupted, match="after step 4 of 6; saved"), training.signals.caught():
        training.run()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    training = Training(tmp_path / "nohup")
    training.engine.before = before
    with training.signals.caught():
        training.run()


def test_a_full_disk_takes_the_torn_line_back(small_disk: Path) -> None:
    written = metrics.Metrics(small_disk / "metrics.jsonl")
    written.write(step=1, loss=1.0)
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        written.write(step=2, loss="x" * (2 << 20))
    written.close()
    assert metrics.read(small_disk / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    assert (small_disk / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_the_disk_has_the_lines_that_lead_to_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut right after a checkpoint must not leave a hole behind it."""
    training, synced, held = Training(tmp_path), os.fsync, []

    def fsync(file: int) -> None:
        synced(file)
        if os.path.samestat(os.fstat(file), (tmp_path / "metrics.jsonl").stat()):
            held.append(max(line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")))

    monkeypatch.setattr(os, "fsync", fsync)
    training.on_saved = lambda name: held.append(name)
    training.run()
    assert held == [3, "step-000003", 6, "step-000006"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_metrics_that_do_not_reach_the_disk_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(file: int) -> None:
        raise OSError(number, os.strerror(number))

    lines = metrics.Metrics(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"metrics\.jsonl") as refused:
        lines.sync()
    assert refused_by_system(refused.value)
    lines.close()


def test_metrics_are_cut_at_a_step_and_a_torn_last_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 3.0}, *({"step": n, "loss": 1 / n} for n in range(1, 6))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"step": 6, "lo')
    assert metrics.read(path) == lines
    metrics.truncate(path, 5)
    assert path.read_text() == text
    metrics.truncate(path, 3)
    assert metrics.read(path) == lines[:4]
    metrics.truncate(path, 0)
    assert path.read_text() == ""
    metrics.truncate(tmp_path / "absent", 3)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        training = Training(Path(folder), plan=ready.plan(learning_rate=0.3), ranks=ranks)
        training.run()
    assert (rank == 0) == bool(training.saved)


def test_two_ranks_give_the_losses_of_one_process(tmp_path: Path) -> None:
    alone = Training(tmp_path / "alone", plan=ready.plan(learning_rate=0.3))
    ready.store(tmp_path / "two" / "tokens", ready.documents(40))
    alone.run()
    two_ranks(_rank, str(tmp_path / "two"))
    two = Training(tmp_path / "two")
    for key in ("loss", "eval_loss", "grad_norm"):
        assert two.lines(key) == pytest.approx(alone.lines(key), rel=1e-6)  # observed 2e-7
    assert two.lines("tokens") == alone.lines("tokens")
    end = state.load(tmp_path / "two" / "checkpoints" / "step-000006", two.optimizer)
    assert end.tokens == alone.state.tokens == sum(alone.lines("tokens").values())
    assert torch.allclose(two.engine.table, alone.engine.table, atol=1e-5)

"""The training loop: the only one. What differs between modes, engines, fresh and resumed runs is handed to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sparkctl.data.batches import Pack, share
from sparkctl.progress import Progress, Task, silent
from sparkctl.train import guard, metrics, state
from sparkctl.train.metrics import Metrics
from sparkctl.train.ranks import Ranks
from sparkctl.train.readout import Moment, Readout
from sparkctl.train.state import RECENT, State

if TYPE_CHECKING:
    from sparkctl.data.batches import Schedule
    from sparkctl.train.engines.base import Engine
    from sparkctl.train.guard import Numbers, Signals
    from sparkctl.train.optim import Optimizer

Saved = Callable[[Path, State, list[str]], None]  # the checkpoint, its state, and the ids that had to go for it


@dataclass(frozen=True)
class Given:
    """An optimiser step that the device was given, and whose numbers nobody has read yet.

    mine: this rank's share of the packs. numbers: each one's loss, then the gradient's norm before it was clipped.
    """

    packs: Sequence[Pack]
    mine: Sequence[Pack]
    labels: int
    rate: float
    numbers: Readout


@dataclass
class Loop:
    """A training, ready to run. `state` is where it stands; `run` takes it to the schedule's end.

    rate: learning rate of a step (from 0). saved: told of each checkpoint. held_out: packs that are never trained.
    ahead: the device is given a step before the numbers of the one before it are read, so that it need not wait for the
    host; nothing is evaluated or saved of a step whose numbers have not been looked at. Of several ranks it gains
    nothing: they agree before each step on whether to stop.
    """

    engine: Engine
    schedule: Schedule
    optimizer: Optimizer
    rate: Callable[[int], float]
    state: State
    folder: Path
    save_every: int
    keep: int
    held_out: Sequence[Pack]
    metrics: Metrics | None
    numbers: Numbers
    signals: Signals
    saved: Saved
    progress: Progress = silent
    ranks: Ranks = field(default_factory=Ranks)
    ahead: bool = False

    def run(self) -> State:
        """Train to the end. Raises Interrupted after saving; SparkError at a loss or norm that is no number."""
        self._began = self._counted = time.monotonic()
        self._ended = Moment(self.engine.device)
        self._first = self._saved_at = self.state.step
        total = self.schedule.steps
        unread: Given | None = None
        with self.progress.task("training", total, unit="steps") as task:
            task.advance(self.state.step)
            if self.state.step == 0:
                self._evaluate()
            for n in range(self.state.step, total):
                given = None if self._stop() else self._give(n)
                if unread:
                    self._read(unread, task)
                if given is None:
                    self._leave()
                due = (n + 1) % self.save_every == 0 or n + 1 == total
                unread = given if self.ahead and not due else None
                if unread is None:
                    self._read(given, task)
                if due:
                    self._evaluate()
                    self._save()
        return self.state

    def _give(self, n: int) -> Given | None:
        """Optimiser step `n`. None where it was to stop between two packs: the step is then as if never begun."""
        packs, labels = self.schedule.step(n), self.schedule.labels(n)
        mine = share(packs, self.ranks.rank, self.ranks.size)
        sums = []
        for pack in mine:
            if self.signals.asked and self.ranks.size == 1:
                self.optimizer.clear()
                return None
            sums.append(self.engine.micro_step(pack, 1 / labels))
        self.ranks.sum_gradients(self.optimizer.parameters.values())
        norm, rate = self.optimizer.clip(), self.rate(n)
        self.optimizer.step(rate)
        return Given(packs, mine, labels, rate, Readout([*sums, norm], self.engine.device))

    def _read(self, given: Given, task: Task) -> None:
        """Wait for the step's numbers, check them, and count it as done.

        Its time is the device's, from the end of the step before it, of an evaluation or a save.
        """
        *losses, norm = given.numbers.read()
        loss = self.ranks.sum([sum(losses)], self.engine.device)[0] / given.labels
        number = self.state.step + 1
        self.numbers.check(number, given.mine, losses)
        self.numbers.check_step(number, given.packs, loss, norm)
        self._count(given.packs, loss)
        ended = given.numbers.there
        self._report(task, given, loss, norm, ended.since(self._ended))
        self._ended = ended

    def _report(self, task: Task, given: Given, loss: float, norm: float, seconds: float) -> None:
        """The step's line in metrics.jsonl, and the live one."""
        now, tokens = self.state, sum(pack.tokens for pack in given.packs)
        if self.metrics:
            self.metrics.write(
                step=now.step, loss=loss, grad_norm=norm, learning_rate=given.rate, tokens=tokens, labels=given.labels,
                tokens_per_second=round(tokens / seconds, 1), seconds=round(seconds, 4), memory=now.peak_memory,
            )  # fmt: skip
        task.advance()
        each = (time.monotonic() - self._began) / (now.step - self._first)
        left = clock(each * (self.schedule.steps - now.step))
        task.note(f"loss {loss:.4f} · {tokens / seconds:,.0f} tok/s · {left} left")

    def _count(self, packs: Sequence[Pack], loss: float) -> None:
        """Move the state one step on."""
        now = self.state
        now.epoch = self.schedule.epoch(now.step)
        now.step += 1
        now.tokens += sum(pack.tokens for pack in packs)
        now.first_loss = loss if now.first_loss is None else now.first_loss
        now.recent_losses = [*now.recent_losses, loss][-RECENT:]
        now.eval_loss = None
        now.peak_memory = max(now.peak_memory or 0, metrics.peak_memory(self.engine.device))

    def _evaluate(self) -> None:
        """The held-out loss, mean over label tokens; nothing where nothing is held out."""
        if not self.held_out:
            return
        what = f"the held-out loss after step {self.state.step}"
        loss = held_out_loss(self.engine, self.held_out, self.ranks, self.numbers, what)
        self.state.eval_loss = loss
        if self.state.step == 0:
            self.state.first_eval_loss = loss
        if self.metrics:
            self.metrics.write(step=self.state.step, eval_loss=loss)
        self.progress.say(f"step {self.state.step}: held-out loss {loss:.4f}")
        self._ended = Moment(self.engine.device)

    def _save(self) -> None:
        """A checkpoint of this step; without a held-out loss the newest counts as the best."""
        now, id = self.state, state.checkpoint_id(self.state.step)
        measured = now.eval_loss if self.held_out else 0.0
        if measured is not None and (now.best_eval_loss is None or measured < now.best_eval_loss or not self.held_out):
            now.best_checkpoint, now.best_eval_loss = id, measured if self.held_out else None
        self._count_time()
        if self.metrics:
            self.metrics.sync()
        if self.ranks.writes:
            path = state.save(self.folder, now, self.optimizer)
            self.saved(path, now, state.prune(self.folder, self.keep, now.best_checkpoint))
        self._count_time()  # of the save, which it does not know itself
        self._saved_at = now.step
        self._ended = Moment(self.engine.device)

    def _count_time(self) -> None:
        """Add what has passed since it was added last."""
        now = time.monotonic()
        self.state.seconds += now - self._counted
        self._counted = now

    def _stop(self) -> bool:
        """Whether a signal or a lack of memory stops any rank: all stop at the same step."""
        return self.signals.agreed(self.ranks.sum(self.signals.flags(), self.engine.device))

    def _leave(self) -> NoReturn:
        """Save where we stand, unless that is saved, and end."""
        guard.release()
        if self.state.step > self._saved_at:
            self._save()
        at = f"after step {self.state.step} of {self.schedule.steps}"
        raise self.signals.stopped(f"interrupted {at}; " + ("saved" if self.state.step else "nothing to save yet"))


def held_out_loss(engine: Engine, packs: Sequence[Pack], ranks: Ranks, numbers: Numbers, what: str) -> float:
    """Mean loss over the label tokens of `packs`, each rank taking its share.

    Raises SparkError on every rank where it is no number, naming the documents; `what` is being measured.
    """
    mine = [pack for pack in share(packs, ranks.rank, ranks.size) if pack.documents]
    given = [engine.eval_sum(pack) for pack in mine]  # the device may run behind
    sums = [float(value) for value in given]
    total = ranks.sum([sum(sums)], engine.device)[0]
    numbers.check_held_out(what, mine, sums)
    if not math.isfinite(total):  # in another rank's share
        raise numbers.no_number(what, total, packs)
    return total / sum(pack.labels for pack in packs)


def clock(seconds: float) -> str:
    """2:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

"""A plan, a model and a token store put together into something that trains; `train`, `resume` and proofs open one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.data.batches import Pack, Schedule, eval_packs
from sparkctl.hardware.shape import CHUNK
from sparkctl.manifest.schema import Course, PlanTable
from sparkctl.model.audit import not_finite
from sparkctl.progress import Progress, silent
from sparkctl.train import guard, random, state
from sparkctl.train.engines import make_engine
from sparkctl.train.loop import Loop, Saved
from sparkctl.train.metrics import Metrics
from sparkctl.train.optim import Optimizer, learning_rate
from sparkctl.train.ranks import Ranks
from sparkctl.train.rehearsal import Advice, rehearse
from sparkctl.train.state import State

if TYPE_CHECKING:
    from sparkctl.data.tokens import TokenStore
    from sparkctl.train.engines.base import Engine


def advice(recommend: str, analyze: str, longest: int) -> Advice:
    """For the training of a model, by the commands that planned and analysed it. longest: document, in tokens."""
    shorter = max(1, 3 * longest // 4)
    forced = f"{recommend.removesuffix(' --force')} --force"  # where a loss is no number the plan was trained by
    return Advice(
        model=f"`{recommend} --mode lora`, or take a model that fits this machine",
        pack=f"`{recommend} --checkpointing`, or drop such examples: `{analyze} --max-seq-length {shorter}`",
        disk=f"`{recommend} --keep 1` keeps fewer; or free some space there",
        rate=f"{forced} --learning-rate",
    )


def _advice(name: str, store: TokenStore) -> Advice:
    """Where nobody knows more of a run than its name."""
    longest = int(store.lengths.max(initial=1))
    return advice(f"sparkctl recommend {name}", f"sparkctl analyze DATA --run {name}", longest)


@dataclass
class Session:
    """All that a training holds in memory."""

    plan: Course
    store: TokenStore
    engine: Engine
    schedule: Schedule
    optimizer: Optimizer
    held_out: Sequence[Pack]
    state: State
    ranks: Ranks
    advice: Advice
    folder: Path | None  # of the base, where that is what is trained on

    @classmethod
    def open(
        cls, plan: PlanTable, folder: Path, store: TokenStore, *,
        choices: dict[str, str] | None = None, ranks: Ranks | None = None, name: str = "RUN", allow_slow: bool = False,
        advice: Advice | None = None,
    ) -> Session:  # fmt: skip
        """Load the model of `folder` and stand before step 1. choices: the pinned ones of an earlier start.

        name: the run in hints. allow_slow: a GPU may compute in plain torch what lacks its fast kernel.
        """
        return cls.of(
            plan, store, lambda: make_engine(plan, folder, choices, name, allow_slow),
            State(mode=plan.mode, lora=plan.lora), advice or _advice(name, store), ranks, folder,
        )  # fmt: skip

    @classmethod
    def of(
        cls, plan: Course, store: TokenStore, engine: Callable[[], Engine], start: State, advice: Advice,
        ranks: Ranks | None = None, folder: Path | None = None,
    ) -> Session:  # fmt: skip
        """Load what `engine` makes and stand before step 1. folder: of the base, where that is what is trained on."""
        ranks = ranks or Ranks()
        schedule = Schedule(
            store, pack_length=plan.pack_length, gradient_accumulation=plan.gradient_accumulation, epochs=plan.epochs,
            seed=plan.seed, max_steps=plan.max_steps,
        )  # fmt: skip
        guard.limit_memory(plan.machine)
        with guard.memory("the model and its optimiser", advice.model):
            made = engine()
            optimizer = Optimizer(made.parameters(), plan)
        guard.release()  # the blocks of loading: torch would keep them, too small for what a pack wants
        random.seed_all(plan.seed)  # last: libraries draw from Python's generator when they are first imported
        held_out = eval_packs(store, plan.pack_length)
        return cls(plan, store, made, schedule, optimizer, held_out, start, ranks, advice, folder)

    def restore(self, checkpoint: Path, progress: Progress = silent) -> None:
        """Stand where `checkpoint` stands, and say so where the best one is another than it names."""
        at = state.load(checkpoint, self.optimizer)
        self.state, problems = state.with_whole_best(at, checkpoint.parent)
        if problems:
            progress.say(f"{'; '.join(problems)}; the best checkpoint is {self.state.best_checkpoint or 'none'} now")

    def start_from(self, checkpoint: Path) -> None:
        """Begin with the weights of another training's checkpoint, everything else fresh."""
        state.load_trainable(checkpoint, self.engine.parameters())

    def rehearse(self, folder: Path) -> None:
        """Try the heaviest packs, an evaluation and a checkpoint in `folder`; nothing is changed by it."""
        saves = -(-self.schedule.steps // self.plan.save_every)
        rehearse(
            self.engine, self.optimizer, self.schedule.heaviest(CHUNK), self.held_out, folder, self.state,
            checkpoints=min(saves, self.plan.keep + 2), advice=self.advice, writes=self.ranks.writes,
            accumulates=self.plan.gradient_accumulation > self.ranks.size,
        )  # fmt: skip

    def loop(
        self, folder: Path, metrics: Metrics | None, signals: guard.Signals, saved: Saved, progress: Progress = silent
    ) -> Loop:
        """The loop from here to the schedule's end."""
        numbers = guard.Numbers(
            self.store.place,
            f"look at these examples; a lower rate may help: `{self.advice.rate} {self.plan.learning_rate / 2:g}`",
            lambda: not_finite(self.folder) if self.folder else None,
        )
        steps = self.schedule.steps
        return Loop(
            engine=self.engine,
            schedule=self.schedule,
            optimizer=self.optimizer,
            rate=lambda step: learning_rate(self.plan, step, steps),
            state=self.state,
            folder=folder,
            save_every=self.plan.save_every,
            keep=self.plan.keep,
            held_out=self.held_out,
            metrics=metrics,
            numbers=numbers,
            signals=signals,
            saved=saved,
            progress=progress,
            ranks=self.ranks,
            ahead=self.engine.device.type == "cuda" and self.ranks.size == 1,  # several agree at every step on a stop
        )

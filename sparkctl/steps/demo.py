"""The main job on the embedded default: every step in a row, the training killed and resumed once on the way.

The steps are called as the commands call them; only the training that is to be killed runs in a process of its own.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparkctl.demo.chats import held_out_questions, training_chats, write_jsonl
from sparkctl.errors import UsageError
from sparkctl.manifest.evidence import Acceptance
from sparkctl.manifest.schema import Choices
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress, silent
from sparkctl.steps.killing import killed_training
from sparkctl.steps.mtp_eval import SHIPPED, TRAINED

MARK = ".sparkctl-demo"  # the folder is the demo's own: it may be emptied
KILL_AFTER = 5  # steps beyond the first checkpoint, so that killing loses work
QUESTIONS = 30  # at least so many are asked
EXACT_SHARE = 0.95
LOSS = 0.2
HELD_OUT = 0.05  # of the chats: enough prompts to measure drafts on
HEAD_RATE = 5e-4  # learning rate of a head so small


@dataclass(frozen=True)
class Answer:
    """A held-out question, the answer as taught, and what the model said before and after tuning."""

    question: str
    taught: str
    before: str
    after: str


@dataclass
class Demo:
    """What the demo did and found; `problems` names each promise that was not kept."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    examples: int = 0
    killed_at: int = 0
    resumed_from: int = 0
    steps: int = 0
    final_loss: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    drafts: list[Acceptance] = field(default_factory=list)
    serve: str = ""

    @property
    def before(self) -> int:
        """Questions that the base answers exactly as taught."""
        return sum(answer.before == answer.taught for answer in self.answers)

    @property
    def after(self) -> int:
        """Questions that the tuned model answers exactly as taught."""
        return sum(answer.after == answer.taught for answer in self.answers)

    @property
    def regained(self) -> bool:
        """Whether more drafts are accepted of the trained head than of the shipped one, on the tuned model."""
        accepted = {row.name: row.mean_accepted for row in self.drafts}
        return accepted.get(TRAINED, 0.0) > accepted.get(SHIPPED, 0.0)

    @property
    def problems(self) -> list[str]:
        """Promises that this run did not keep."""
        asked = len(self.answers)
        found = {
            f"{asked} questions were asked, fewer than {QUESTIONS}": asked < QUESTIONS,
            f"the base answers {self.before} of {asked} questions as taught, before any tuning": self.before > 0,
            f"the tuned model answers {self.after} of {asked} questions as taught": self.after < EXACT_SHARE * asked,
            f"the final loss is {self.final_loss:.3f}": not self.final_loss < LOSS,
            f"the training was killed at step {self.killed_at} and resumed from {self.resumed_from}": not (
                0 < self.resumed_from < self.killed_at < self.steps
            ),
            "training the MTP head regained no accepted draft": not self.regained,
        }
        return [text for text, broken in found.items() if broken]

    @contextmanager
    def phase(self, name: str, progress: Progress) -> Iterator[None]:
        """Time one phase, announced."""
        progress.say(f"demo: {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


def demo(folder: Path, *, progress: Progress = silent) -> Demo:
    """Play the whole main job in `folder`, emptied first where an earlier demo made it."""
    from sparkctl.demo.ask import answers
    from sparkctl.demo.model import write_model
    from sparkctl.steps.analyze import analyze
    from sparkctl.steps.injection import Request as InjectRequest
    from sparkctl.steps.inputs import Request
    from sparkctl.steps.merge import Request as MergeRequest
    from sparkctl.steps.merge import merge
    from sparkctl.steps.mtp_inject import inject
    from sparkctl.steps.mtp_train import mtp_train
    from sparkctl.steps.mtp_training import HeadWishes
    from sparkctl.steps.mtp_training import Request as HeadRequest
    from sparkctl.steps.recommend import Request as PlanRequest
    from sparkctl.steps.recommend import recommend
    from sparkctl.steps.resume import resume

    result = Demo(folder)
    claim(folder)
    model, run, questions = folder / "model", folder / "run", held_out_questions()
    with result.phase("make", progress):
        data = write_jsonl(folder / "chats.jsonl", training_chats())
        write_model(model)
    with result.phase("analyze", progress):
        request = Request((data,), run, model=str(model), recipe="demo", eval_fraction=HELD_OUT)
        analysed = analyze(request, progress=progress)
    with result.phase("recommend", progress):
        recommend(PlanRequest(run, Choices()), progress=progress)
    with result.phase("train, killed", progress):
        result.killed_at = killed_training(run, KILL_AFTER)
    with result.phase("resume", progress):
        trained = resume(run, progress=progress).train
    with result.phase("merge", progress):
        merged = merge(MergeRequest(run), progress=progress).folder
    with result.phase("mtp train", progress):
        head = mtp_train(HeadRequest(run, HeadWishes(learning_rate=HEAD_RATE)), progress=progress).mtp
    with result.phase("mtp inject", progress):
        result.serve = inject(InjectRequest(run, "trained"), progress=progress).serve or ""
    result.drafts = head.acceptance if head else []
    result.examples, result.parameters = analysed.analysis.examples, analysed.model.parameters
    result.resumed_from = Run.open(run).manifest.resumes[-1].step
    result.steps, result.final_loss = trained.steps, trained.final_loss or math.nan
    with result.phase("ask", progress):
        asked = [question for question, _ in questions]
        pairs = zip(questions, answers(model, asked), answers(merged, asked), strict=True)
        result.answers = [Answer(question, taught, before, after) for (question, taught), before, after in pairs]
    return result


def claim(folder: Path) -> None:
    """An empty folder that carries the demo's mark. Raises UsageError where somebody else's files are in it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{folder}` is a file", "sparkctl demo OTHER_FOLDER")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UsageError(f"`{folder}` holds files that no demo made", "sparkctl demo OTHER_FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()

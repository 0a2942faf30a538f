"""How much of its drafts a server accepts, counted as vLLM counts it.

A server drafts N tokens with the head, the model checks them all in one step, and the leading ones that are what the
model itself says are accepted, with one more token that the model adds. Answering greedily, the server says the
model's own text whatever the head guesses; so the text is made first, the head drafts at every place of it, and the
server's walk over the places is played afterwards, for each N up to the longest.

Followed is vLLM 0.32 (v1/core/sched/scheduler.py, v1/spec_decode/metrics.py, v1/sample/rejection_sampler.py):
- The prompt's step gives the answer's first token and is no draft. A draft is counted when the model has checked it:
  an answer of one token has none, and what the head drafts after the last step is never counted.
- Every draft has N tokens, also where fewer are left to say: a server cuts one off at its --max-model-len alone.
- A draft is counted before the answer is cut off at a stop token or at its longest: tokens behind the end count as
  accepted where they are what the model would have said there. Hence `Answer.beyond`.
- The rate of a position is its accepted tokens over all drafts (here `cumulative`), and "mean acceptance length" is
  1 + accepted tokens / drafts.
The head's own draft steps are in drafter.py.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparkctl.data.batches import Document, Pack
from sparkctl.data.pack import best_fit
from sparkctl.data.tokens import label_count
from sparkctl.manifest.evidence import Acceptance
from sparkctl.mtp.answers import Answer, greedy_answers
from sparkctl.progress import Progress, silent

if TYPE_CHECKING:
    from sparkctl.mtp.drafter import Drafter

# A tokens of an answer · N tokens of the longest draft · G = A - 1 places where one can begin

PACK = 8192  # tokens that the head drafts on at once, or the longest text
DIGITS = 6


@dataclass(frozen=True)
class Subject:
    """A model's folder and whose head drafts for it: a model's folder, or a safetensors file."""

    name: str
    model: Path
    head: Path
    made_from: str


@dataclass(frozen=True)
class Setting:
    """max_tokens: of an answer. draft_length: the longest. allow_slow, run: as in `Drafter.load`."""

    max_tokens: int = 128
    draft_length: int = 3
    device: str = "cpu"
    allow_slow: bool = False
    run: str = "RUN"


def measure(
    subjects: Sequence[Subject], prompts: Sequence[np.ndarray], setting: Setting, progress: Progress = silent
) -> list[Acceptance]:
    """Each subject's acceptance over the answers that its model gives to `prompts`; a model answers once."""
    found: dict[str, Acceptance] = {}
    for model in dict.fromkeys(subject.model for subject in subjects):
        theirs = [subject for subject in subjects if subject.model == model]
        answers = greedy_answers(
            model, prompts, max_tokens=setting.max_tokens, beyond=setting.draft_length - 1, device=setting.device,
            progress=progress,
        )  # fmt: skip
        gc.collect()  # one model in memory at a time
        heads = {subject.name: subject.head for subject in theirs}
        hits = draft(model, heads, answers, setting, progress)
        found |= {s.name: acceptance(s, answers, hits[s.name]) for s in theirs}
    return [found[subject.name] for subject in subjects]


def draft(
    model: Path, heads: Mapping[str, Path], answers: Sequence[Answer], setting: Setting, progress: Progress = silent
) -> dict[str, list[np.ndarray]]:
    """By head: for each answer bool [N, G], whether the k-th token of the draft at a place is the text's."""
    from sparkctl.mtp.drafter import Drafter, read_head

    drafter, found = None, {}
    for name, head in heads.items():
        if drafter is None:
            drafter = Drafter.load(model, head, setting.device, allow_slow=setting.allow_slow, name=setting.run)
        else:
            drafter.head.load(read_head(head), str(head))
        found[name] = hits(drafter, answers, setting.draft_length, progress, name)
    return found


def hits(
    drafter: Drafter, answers: Sequence[Answer], draft_length: int, progress: Progress = silent, name: str = "drafts"
) -> list[np.ndarray]:
    """For each answer bool [N, G]: whether the k-th token of the draft at a place is the text's."""
    import torch

    lengths = np.array([len(text(answer)) for answer in answers], dtype=np.int64)
    packs = best_fit(lengths, max(PACK, int(lengths.max(initial=0))), seed=0)
    found: dict[int, np.ndarray] = {}
    with progress.task(name, len(packs)) as task:
        for number in range(len(packs)):
            those = [int(i) for i in packs.pack(number)]
            starts = np.cumsum([0, *lengths[those][:-1]])
            rows = [start + draft_rows(answers[i]) for start, i in zip(starts, those, strict=True)]
            where = torch.from_numpy(np.concatenate(rows)).to(drafter.device)
            guessed = drafter.guesses(make_pack([answers[i] for i in those]), draft_length, where).cpu().numpy()
            parts = np.split(guessed, np.cumsum([len(row) for row in rows])[:-1], axis=1)
            found |= {i: compared(answers[i], part) for i, part in zip(those, parts, strict=True)}
            task.advance()
    return [found[i] for i in range(len(answers))]


def text(answer: Answer) -> np.ndarray:
    """Prompt, answer and what lies beyond it, int32 [L]."""
    return np.concatenate([answer.prompt, answer.ids, answer.beyond]).astype(np.int32, copy=False)


def draft_rows(answer: Answer) -> np.ndarray:
    """The rows of the text, int64 [G], at which a server may draft: the newest of g + 1 tokens said, seen from behind.

    A row has the model's state there and the token after it, so at the prompt's last row one token was said.
    """
    return len(answer.prompt) - 1 + np.arange(len(answer.ids) - 1, dtype=np.int64)


def compared(answer: Answer, guesses_NG: np.ndarray) -> np.ndarray:
    """bool [N, G]: whether the token guessed k places after the g + 1 first ones is the one that the model says."""
    said = np.concatenate([answer.ids, answer.beyond])
    steps, places = guesses_NG.shape
    hits: np.ndarray = guesses_NG == said[1 + np.arange(places)[None, :] + np.arange(steps)[:, None]]
    return hits


def make_pack(answers: Sequence[Answer]) -> Pack:
    """The texts as documents; trained is what the model says."""
    documents = []
    for number, answer in enumerate(answers):
        ids = text(answer)
        documents.append(Document(number, ids, np.arange(len(ids)) >= len(answer.prompt)))
    labels = sum(label_count(document.trained) for document in documents)
    return Pack(documents, sum(len(document.ids) for document in documents), labels)


def walk(hits_NG: np.ndarray, draft_length: int) -> tuple[int, np.ndarray]:
    """A server's way through one answer: how many drafts it makes, and how often it accepts each position, int64 [N].

    It drafts at the first place, and goes on by the tokens accepted and the one that the model adds.
    """
    accepted_G = np.cumprod(hits_NG[:draft_length], axis=0, dtype=np.int64).sum(axis=0)
    drafts, place, counts = 0, 0, np.zeros(draft_length, dtype=np.int64)
    while place < len(accepted_G):
        counts[: accepted_G[place]] += 1
        drafts += 1
        place += int(accepted_G[place]) + 1
    return drafts, counts


def rates(hits: Sequence[np.ndarray], draft_length: int) -> tuple[int, list[float]]:
    """Drafts over all answers, and the share of them accepted at each position."""
    walks = [walk(hits_NG, draft_length) for hits_NG in hits]
    drafts = sum(drafts for drafts, _ in walks)
    counts = sum((counts for _, counts in walks), np.zeros(draft_length, dtype=np.int64))
    return drafts, [round(int(count) / drafts, DIGITS) if drafts else 0.0 for count in counts]


def acceptance(subject: Subject, answers: Sequence[Answer], hits: Sequence[np.ndarray]) -> Acceptance:
    """The row of the manifest."""
    longest = len(hits[0])
    every = [rates(hits, length) for length in range(1, longest + 1)]
    drafts, cumulative = every[-1]
    before = [1.0, *cumulative[:-1]]
    return Acceptance(
        name=subject.name,
        prompts=len(answers),
        tokens=sum(len(answer.ids) for answer in answers),
        drafts=drafts,
        conditional=[
            round(rate / last, DIGITS) if last else 0.0 for rate, last in zip(cumulative, before, strict=True)
        ],
        cumulative=cumulative,
        mean_accepted=round(sum(cumulative), DIGITS),
        shorter=[shares for _, shares in every[:-1]],
        made_from=subject.made_from,
    )


def helps(shipped: Acceptance, trained: Acceptance, losses: tuple[float, float] | None = None) -> bool:
    """Whether a server accepts more of the trained head's drafts than of the shipped one's, over the same answers;
    where it accepts as many, whether the held-out loss fell. losses: the shipped head's, the trained one's.
    """
    if losses and trained.mean_accepted == shipped.mean_accepted:
        return losses[1] < losses[0]
    return trained.mean_accepted > shipped.mean_accepted

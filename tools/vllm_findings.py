"""What a served model is judged by, and how that is shown."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from vllm_serving import Said

from sparkctl import __version__

POINTS = 0.03  # between a rate foretold and one counted
NEXT_TO_NONE = 0.1  # tokens accepted a draft, at most, of a head that makes no sense
HEAD = ("served", "N", "texts equal", "answers equal", "drafts", "accepted, by position", "foretold", "apart")


@dataclass(frozen=True)
class Row:
    """A model as served. The rest is None where it does not apply.

    equal, tied: of its texts, those that are the reference's token for token, and those that part from it where two
    tokens have the very same logit. answers: those that are the reference's up to their stop token.
    foretold: the rate of each position of a draft that sparkctl expects.
    """

    name: str
    draft_length: int
    said: Said
    equal: int | None = None
    tied: int = 0
    answers: int | None = None
    foretold: list[float] | None = None

    @property
    def apart(self) -> float:
        """The largest difference between a rate foretold and one counted."""
        return max((abs(a - b) for a, b in zip(self.foretold or [], self.said.cumulative, strict=False)), default=0.0)


@dataclass
class Findings:
    """The rows so far, and a sentence for each promise that was not kept. reference: what the others are to say."""

    prompts: int
    tokens: int
    reference: Said
    rows: list[Row] = field(default_factory=list)
    drafting: list[Row] = field(default_factory=list)  # of them, those whose texts are to be the reference's
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def same_model(
        self, name: str, draft_length: int, said: Said, foretold: list[float] | None = None, *,
        as_said: Said | None = None,
    ) -> Row:  # fmt: skip
        """A row whose texts are to be the reference's: its model has the same weights, whatever drafts for it.

        as_said: what they are to be in the reference's place.
        """
        what, reference = f"{name}, N = {draft_length}", as_said or self.reference
        kinds = [self._compare(what, reference, i, text) for i, text in enumerate(said.texts)]
        same = [a == b for a, b in zip(reference.answers, said.answers, strict=True)]
        self.problems += [f"{what}: answer {i + 1} is another" for i, equal in enumerate(same) if not equal]
        row = Row(name, draft_length, said, kinds.count("equal"), kinds.count("tied"), sum(same), foretold)
        self.drafting += [row] * bool(draft_length and as_said is None)
        return self._add(row)

    def drafts_change_nothing(self, refused: Row) -> None:
        """What is said where drafts are accepted is what is said where none ever is, token for token, ties and all.

        vLLM's steps that check drafts may run other kernels than its steps without, so that texts part at a tie between
        the two; between these rows drafts are all that differs.
        """
        if sum(refused.said.accepted):
            self.problems.append(f"{refused.name}: {refused.said.accepted[0]} drafts were accepted, and none should be")
        differ: set[int] = set()
        for row in self.drafting:
            pairs = enumerate(zip(refused.said.texts, row.said.texts, strict=True))
            others = [number for number, (text, other) in pairs if text != other]
            differ.update(others)
            self.problems += [
                f"{row.name}, N = {row.draft_length}: text {number + 1} is another where no draft is accepted"
                for number in others
            ]
        same = f"{self.prompts - len(differ)} of {self.prompts} texts are the same to the last token"
        self.notes.append(f"{same} in all {len(self.drafting)} rows with drafts, whether drafts are accepted or not")

    def other_model(self, name: str, draft_length: int, said: Said, foretold: list[float] | None = None) -> Row:
        """A row of a model whose texts are its own."""
        return self._add(Row(name, draft_length, said, foretold=foretold))

    def same_answers(self, name: str, draft_length: int, said: Said, foretold: list[float] | None = None) -> Row:
        """A row whose answers are to be the reference's; the texts past them are its own, or were not asked for."""
        same = sum(a == b for a, b in zip(self.reference.answers, said.answers, strict=True))
        if same < len(said.answers):
            self.problems.append(f"{name}: {same} of {len(said.answers)} answers are those of the merged model")
        return self._add(Row(name, draft_length, said, answers=same, foretold=foretold))

    def same_rates(self, row: Row, other: Row) -> None:
        """Heads that compute the same have the same accepted."""
        pairs = zip(row.said.cumulative, other.said.cumulative, strict=True)
        if max(abs(a - b) for a, b in pairs) > POINTS:
            counted, wanted = percent(row.said.cumulative), percent(other.said.cumulative)
            self.problems.append(f"{row.name}, N = {row.draft_length}: {counted} accepted, {wanted} of {other.name}")

    def no_sense(self, row: Row) -> None:
        """A head that makes no sense drafts, and has next to nothing accepted."""
        if not row.said.drafts or sum(row.said.cumulative) > NEXT_TO_NONE:
            accepted = f"{sum(row.said.cumulative):.2f} tokens a draft were accepted"
            self.problems.append(f"{row.name}, N = {row.draft_length}: {accepted} of {row.said.drafts} drafts")

    def _add(self, row: Row) -> Row:
        if row.apart > POINTS:
            counted, foretold = percent(row.said.cumulative), percent(row.foretold or [])
            weight = f"{row.said.drafts} drafts, {100 / max(1, row.said.drafts):.1f} points each"
            problem = f"{row.name}, N = {row.draft_length}: {foretold} were foretold, {counted} accepted ({weight})"
            self.problems.append(problem)
        self.rows.append(row)
        return row

    def _compare(self, what: str, reference: Said, number: int, text: list[int]) -> Literal["equal", "tied", "other"]:
        """Whether a text is the reference's; a tie is noted, any other difference is a problem."""
        assert reference.rivals
        at = parting(reference.texts[number], text)
        if at is None:
            return "equal"
        told = f"{what}: text {number + 1} parts from the one without drafts at token {at + 1}"
        rivals = reference.rivals[number]
        rival, gap = rivals[at] if at < len(rivals) else (None, float("nan"))
        if gap == 0.0 and rival == text[at]:
            self.notes.append(f"{told}, where both tokens have the same logit")
            return "tied"
        self.problems.append(f"{told}, where the logit of the token taken led by {gap:.3f}")
        return "other"

    def as_json(self) -> dict[str, Any]:
        """Everything but the texts."""
        rows = [
            {
                "name": row.name, "draft_length": row.draft_length, "texts_equal": row.equal, "texts_tied": row.tied,
                "answers_equal": row.answers, "drafts": row.said.drafts, "accepted": row.said.accepted,
                "counted": row.said.cumulative, "foretold": row.foretold, "seconds": row.said.seconds,
            }
            for row in self.rows
        ]  # fmt: skip
        return {
            "ok": not self.problems, "date": date.today().isoformat(), "machine": machine(),
            "versions": self._versions(), "prompts": self.prompts, "tokens": self.tokens, "rows": rows,
            "notes": self.notes, "problems": self.problems,
        }  # fmt: skip

    def as_table(self) -> str:
        """In Markdown: a line a row, what the figures hold for, what is to be said besides."""
        lines = [HEAD, ["---"] * len(HEAD), *(cells(row, self.prompts) for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        versions = ", ".join(f"{name} {version}" for name, version in self._versions().items())
        about = f"{self.prompts} held-out prompts, {self.tokens} new tokens each, bf16, greedy; N: tokens of a draft."
        where = f"{versions}; {machine()}; {date.today()}."
        return "\n".join([table, "", about, where, *(f"- {note}" for note in self.notes)]) + "\n"

    def _versions(self) -> dict[str, str]:
        return {"sparkctl": __version__, **self.reference.versions}


def parting(text: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index at which two texts differ, one ending before the other being a difference; None where equal."""
    if list(text) == list(other):
        return None
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def cells(row: Row, prompts: int) -> list[str]:
    """A line of the table."""
    equal = "" if row.equal is None else f"{row.equal} of {prompts}"
    return [
        row.name,
        str(row.draft_length),
        f"{equal}, {row.tied} at a tie" if row.tied else equal,
        "" if row.answers is None else f"{row.answers} of {prompts}",
        str(row.said.drafts) if row.draft_length else "",
        percent(row.said.cumulative) if row.draft_length else "",
        percent(row.foretold or []),
        f"{100 * row.apart:.1f} points" if row.foretold else "",
    ]


def percent(rates: Sequence[float]) -> str:
    """ "86.1 / 70.0 %" """
    return " / ".join(f"{100 * rate:.1f}" for rate in rates) + (" %" if rates else "")


def machine() -> str:
    """What the figures were made on."""
    return f"{platform.machine().replace('_', '-')}, {os.cpu_count()} cores"

"""What a plan is made for and what was asked for; and how to say that it cannot be had.

A refusal names what is lacking, and as the command to type the nearest plan that fits.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.errors import SparkError
from sparkctl.manifest.schema import AnalysisTable, Asked, Choices, Machine, ModelTable, PlanTable
from sparkctl.plan import rules
from sparkctl.plan.estimates import Model
from sparkctl.plan.fit import RANKS, Memory, Variant, nearest
from sparkctl.words import size

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparkctl.data.tokens import TokenStore

NAMED = 5  # documents named in an error
ALL = {"mode", "lora_r", "pack_length", "checkpointing"}  # what memory depends on


@dataclass(frozen=True)
class Wishes:
    """What was asked for. auto: names that a flag leaves to the rules. recipe_name: as the manifest keeps it."""

    flags: Choices
    auto: frozenset[str] = frozenset()
    recipe: Choices | None = None
    recipe_name: str | None = None
    parent: PlanTable | None = None
    recipe_flag: str | None = None

    @property
    def asked(self) -> Asked:
        """The command line of it, as the manifest keeps it."""
        return Asked(
            flags=self.flags, auto=sorted(self.auto), recipe=self.recipe_name if self.recipe_flag is not None else None
        )

    def command(self, run: Path, **changes: Any) -> str:
        """The user's command with other values: what a hint says."""
        return command(run, self.asked, self.recipe_flag, **changes)


def command(run: Path, asked: Asked, recipe: str | None, **changes: Any) -> str:
    """`sparkctl recommend` as it was asked, with other values. run and recipe: as the user can type them."""
    words = ["sparkctl", "recommend", str(run), *(["--recipe", recipe] if recipe is not None else [])]
    for name in (name for name in asked.auto if name not in changes):
        words += [f"--{name}", "auto"]
    for name, value in (asked.flags.model_dump(exclude_none=True) | changes).items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", f"{value}"]
    return shlex.join(words)


@dataclass(frozen=True)
class Situation:
    """What a plan is made for. analyze: the command that analysed; disk: bytes free; store_bytes: the token store."""

    run: Path
    analyze: str
    analysis: AnalysisTable
    table: ModelTable
    model: Model
    store: TokenStore
    machine: Machine
    disk: int
    store_bytes: int
    fla: bool


def too_long(at: Situation, wishes: Wishes, length: int, longest: int) -> SparkError | None:
    """The error where documents to train on are longer than a pack."""
    longer = np.flatnonzero((at.store.lengths > length) & ~at.store.held_out)
    if not len(longer):
        return None
    return SparkError(
        f"{_count(longer)} longer than packs of {length:,} tokens: {_name(at.store, longer)}",
        wishes.command(at.run, pack_length=rules.round_up(longest)),
    )


def too_large(at: Situation, wishes: Wishes, memory: Memory, wanted: Variant, least: int) -> SparkError:
    """The error where memory does not suffice: the nearest plan that fits, else the documents that never will."""
    machine = at.machine
    needed, room = (size(count) for count in (memory.terms(wanted).total, machine.memory))
    message = f"the plan needs {needed} of memory, {machine.name} has {room}"
    other = nearest(memory, wanted, ALL, least)
    if other is not None:
        return SparkError(message, wishes.command(at.run, **wanted.differences(other)))
    smallest = Variant("lora", wanted.lora_r, least, True)
    longest = memory.longest_that_fits(smallest)
    if not longest:
        smallest = replace(smallest, lora_r=min(RANKS))
        terms = memory.terms(smallest)
        fixed = size(terms.total - terms.activations - terms.logits)
        return SparkError(
            f"{message}; weights, smallest adapters and libraries alone take {fixed}",
            "take a smaller model, or free memory",
        )
    longer = np.flatnonzero(at.store.lengths > longest)
    return SparkError(
        f"{_count(longer)} too long for the memory of {machine.name}, {room}, which takes up to "
        f"{longest:,} tokens: {_name(at.store, longer)}",
        f"{at.analyze} --max-seq-length {longest}",
    )


def no_room(
    at: Situation, wishes: Wishes, variant: Variant, keep: int, ahead: Callable[[int, int], int]
) -> SparkError | None:
    """The error where the disk does not suffice. ahead: bytes to write for (checkpoints kept, parameters trained)."""

    def writes(kept: int, r: int, mode: str) -> int:
        return ahead(kept, at.model.full if mode == "full" else at.model.trainable("lora", r))

    needed = writes(keep, variant.lora_r, variant.mode)
    if needed <= at.disk:
        return None
    message = f"the plan writes {size(needed)}, the disk of `{at.run}` has {size(at.disk)} free"
    ranks = (variant.lora_r, *(r for r in RANKS if r < variant.lora_r))
    others = [replace(variant), *(replace(variant, mode="lora", lora_r=r) for r in ranks)]
    for other in others:
        if writes(1, other.lora_r, other.mode) <= at.disk:
            return SparkError(message, wishes.command(at.run, **variant.differences(other), keep=1))
    lacking = writes(1, min(RANKS), "lora") - at.disk
    return SparkError(message, f"free {size(lacking)} there, or keep the run on another disk")


def _count(rows: np.ndarray) -> str:
    return "1 document is" if len(rows) == 1 else f"{len(rows):,} documents are"


def _name(store: TokenStore, rows: np.ndarray) -> str:
    """The longest of these documents, with their places."""
    longest = rows[np.argsort(-store.lengths[rows], kind="stable")][:NAMED].tolist()
    named = ", ".join(f"{store.place(row)} ({store.lengths[row]:,} tokens)" for row in longest)
    return named + (" and more" if len(rows) > NAMED else "")

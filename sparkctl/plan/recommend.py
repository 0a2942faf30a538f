"""The plan of a run: what was given, the rules for the rest, what it costs, and whether that fits.

Nothing that somebody chose is changed. Where it does not fit the plan is refused, with the nearest one that does as
the command to type; what the rules choose fits by itself, where anything does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from sparkctl.data.batches import Schedule
from sparkctl.errors import UsageError
from sparkctl.hardware.load import splitting
from sparkctl.hardware.machine import identity
from sparkctl.hardware.measurements import Kind, lookup
from sparkctl.hardware.throughput import Rate, expected
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import AnalysisTable, Estimates, Lora, Machine, ModelTable, PlanTable
from sparkctl.manifest.table import EngineName
from sparkctl.plan import estimates, heads, rules
from sparkctl.plan.doubts import doubts
from sparkctl.plan.estimates import Documents
from sparkctl.plan.fit import Memory, Variant, nearest
from sparkctl.plan.request import ALL, Situation, Wishes, no_room, too_large, too_long
from sparkctl.plan.resolve import Decisions, resolve
from sparkctl.plan.rules import Chosen
from sparkctl.words import size

FORMAT = 3  # of the rules and of what estimates mean: a change here makes every plan stale


def made_from(analysis: AnalysisTable, table: ModelTable, wishes: Wishes, machine: Machine) -> str:
    """The analysis's fingerprint, then that of everything else."""
    parent = wishes.parent.made_from if wishes.parent else None
    rest = fingerprint(
        FORMAT, table.config_sha256, wishes.flags, sorted(wishes.auto), wishes.recipe,
        PurePath(wishes.recipe_name or "").name, parent,
        identity(machine), list(rules.engines()),
    )  # fmt: skip
    return f"{analysis.made_from}.{rest}"


def is_made_from(plan: PlanTable, analysis: AnalysisTable) -> bool:
    """Whether the plan was made from this analysis."""
    return plan.made_from.partition(".")[0] == analysis.made_from


def recommend(at: Situation, wishes: Wishes) -> PlanTable:
    """The plan. Raises UsageError where a choice cannot be, SparkError where memory or disk does not suffice."""
    plan = _Planner(at, wishes).plan()
    plan.asked = wishes.asked
    if at.model.drafts:
        _add_head(plan, at)
    return plan


def _add_head(plan: PlanTable, at: Situation) -> None:
    """What comes after the training where the model has an MTP head. It refuses no plan: it can be had with less."""
    costs = plan.estimates
    costs.head_seconds = heads.seconds(
        plan, at.model.shape, Documents.of(at.store), heads.HeadWishes(), at.table.config_sha256
    )
    costs.disk += heads.disk_bytes(at.model.shape, at.model.bytes)
    lacking = costs.disk - at.store_bytes - at.disk
    if lacking > 0:
        plan.reasons["keep"] += (
            f"; warning: with the MTP head and served/ the disk lacks {size(lacking)}: `sparkctl mtp inject --link` "
            "copies no weights, its `--out FOLDER` writes elsewhere"
        )


class _Planner:
    """One plan in the making: each method decides a few choices, in the order that they depend on each other."""

    def __init__(self, at: Situation, wishes: Wishes) -> None:
        self._at, self._wishes = at, wishes
        self._made: Decisions = resolve(wishes.flags, wishes.recipe, wishes.recipe_name, wishes.parent, wishes.auto)
        self._documents = Documents.of(at.store)
        self._values = self._made.values

    def plan(self) -> PlanTable:
        """Decide everything, then write it down."""
        made, at = self._made, self._at
        made.decide("seed", rules.seed())
        made.decide("mode", Chosen("lora", "a rank was given") if made.asked("lora_r") else rules.mode(at.analysis))
        self._engine()
        made.decide("tokens_per_step", rules.tokens_per_step(at.analysis))
        self._memory = Memory(
            at.machine.memory, at.machine.device, at.fla, at.model, self._documents, self._values["seed"],
            self._values["engine"], splitting(at.machine.capability, at.model.shape.head_dim),
        )  # fmt: skip
        variant = self._variant()
        accumulation = rules.accumulation(self._values["tokens_per_step"], variant.pack_length)
        steps = self._steps(variant, accumulation)
        self._learning(steps)
        return self._table(variant, accumulation, steps)

    def _engine(self) -> None:
        """The engine, and the rates measured here with it by pack length."""
        at, values = self._at, self._values
        if self._made.given("engine") and values["engine"] in rules.EXTRA_ENGINES:
            self._require_extra(values["engine"])
        if self._made.given("engine") and values["engine"] == "native" and at.model.lacking:
            raise UsageError(
                f"the native engine has nothing for {at.model.lacking}",
                self._wishes.command(at.run, engine="reference"),
            )
        rank = values.get("lora_r", rules.RANK) if values["mode"] == "lora" else 0
        kind = Kind(at.table.config_sha256, values["mode"], rank, bool(values.get("checkpointing", False)))
        here = sorted(lookup(at.machine, kind), key=lambda m: m.tokens_per_second)
        rates = {m.engine: m.tokens_per_second for m in here}
        engine = self._made.decide("engine", rules.engine(rates, at.model.lacking))
        self._measured = {m.pack_length: m.tokens_per_second for m in here if m.engine == engine}

    def _require_extra(self, engine: EngineName) -> None:
        """Raise UsageError unless the package of that engine and a GPU are there."""
        other = self._wishes.command(self._at.run, engine=rules.AVAILABLE_ENGINES[0])
        if engine not in rules.engines():
            raise UsageError(f"the engine `{engine}` is not installed: `pip install 'dgx-sparkctl[{engine}]'`", other)
        if self._at.machine.device != "cuda":
            raise UsageError(f"the engine `{engine}` needs a GPU that torch can use", other)

    def _variant(self) -> Variant:
        """Mode, rank, pack length and checkpointing: as given, the rest as wanted where that fits, else as near."""
        made, values, longest = self._made, self._values, self._documents.longest
        if made.origin.get("pack_length") == "parent" and values["pack_length"] < longest:
            made.origin["pack_length"] = "rule"
        goal = made.decide("pack_length", rules.pack_length(longest, values["tokens_per_step"], self._measured))
        error = too_long(self._at, self._wishes, goal, longest)
        if error:
            raise error
        wanted = Variant(
            values["mode"], values.get("lora_r", rules.RANK), goal, bool(values.get("checkpointing", False))
        )
        free = {name for name in ALL - {"lora_r"} if not made.given(name)}
        least = min(goal, rules.round_up(longest))
        chosen = nearest(self._memory, wanted, free, least)
        if chosen is None:
            raise too_large(self._at, self._wishes, self._memory, wanted, least)
        if "pack_length" in free and chosen.pack_length != goal:
            even = rules.even(chosen.pack_length, least, values["tokens_per_step"])
            chosen = replace(chosen, pack_length=even)
        self._note(wanted, chosen)
        return chosen

    def _note(self, wanted: Variant, chosen: Variant) -> None:
        """Write down what was chosen, and what memory changed of what the rules wanted."""
        made, room = self._made, size(self._at.machine.memory)
        changes = wanted.differences(chosen)
        if "mode" in changes:
            reason = f"{made.reasons['mode']}; but full fine-tuning does not fit in {room}"
            made.put("mode", "lora", "rule", reason)
        if "pack_length" in changes:
            fits = f"as long as fits in {room}" + ("" if chosen.checkpointing else " without checkpointing")
            made.put("pack_length", chosen.pack_length, "rule", fits)
        needed = self._memory.terms(replace(chosen, checkpointing=False)).total
        needs = f"without it the plan needs {size(needed)}"
        without = Chosen(False, f"not needed: everything fits in {room}")
        made.decide("checkpointing", Chosen(True, f"{needs} of {room}") if chosen.checkpointing else without)
        if chosen.mode == "lora":
            made.decide("lora_r", rules.lora_r())
            made.decide("lora_alpha", rules.lora_alpha(chosen.lora_r))
        else:
            made.drop("lora_r", "lora_alpha")  # of the round before

    def _steps(self, variant: Variant, accumulation: int) -> int:
        """Optimiser steps of the run, counted over its real packs."""
        self._made.decide("epochs", rules.epochs(len(self._documents.lengths)))
        packing = dict(pack_length=variant.pack_length, gradient_accumulation=accumulation, seed=self._values["seed"])
        self._epoch_steps = Schedule(self._at.store, epochs=1, **packing).steps
        most = self._values.get("max_steps")
        return Schedule(self._at.store, epochs=self._values["epochs"], max_steps=most, **packing).steps

    def _learning(self, steps: int) -> None:
        made, mode, parent = self._made, self._values["mode"], self._wishes.parent
        if parent and parent.mode != mode and made.origin.get("learning_rate") == "parent":
            made.drop("learning_rate")  # that of LoRA is ten times that of full fine-tuning
        made.decide("learning_rate", rules.learning_rate(mode, self._at.table.parameters))
        made.decide("schedule", rules.schedule())
        made.decide("warmup_fraction", rules.warmup_fraction(steps))
        made.decide("min_lr_fraction", rules.min_lr_fraction())
        made.decide("weight_decay", rules.weight_decay())
        made.decide("max_grad_norm", rules.max_grad_norm())

    def _rate(self, variant: Variant) -> Rate:
        """Real tokens a second, and where the number is from."""
        at, documents, length = self._at, self._documents, variant.pack_length
        load = replace(self._memory.load(variant), labels=int(documents.label_share * length))
        engine = self._values["engine"]
        rate = expected(
            at.machine, at.model.shape, load, engine, model_key=at.table.config_sha256, parameters=at.table.parameters,
            pack_length=length,
        )  # fmt: skip
        if rate.measured or engine != "reference":
            return rate
        return replace(rate, tokens_per_second=rate.tokens_per_second / documents.padding(length, self._values["seed"]))

    def _table(self, variant: Variant, accumulation: int, steps: int) -> PlanTable:
        made, values, wishes, at = self._made, self._values, self._wishes, self._at
        costs = self._estimates(variant, steps)
        for name, doubt in doubts(made, self._documents, at.table.parameters, steps, self._epoch_steps):
            made.reasons[name] += f"; warning: {doubt}"
        lora = Lora(r=variant.lora_r, alpha=values["lora_alpha"]) if variant.mode == "lora" else None
        return PlanTable(
            lora=lora,
            gradient_accumulation=accumulation,
            steps=steps,
            warmup_steps=rules.warmup_steps(values["warmup_fraction"], steps),
            recipe=wishes.recipe_name,
            reasons=made.reasons,
            origin=made.origin,
            estimates=costs,
            machine=at.machine,
            made_from=made_from(at.analysis, at.table, wishes, at.machine),
            **{name: value for name, value in values.items() if name in PlanTable.model_fields},
        )

    def _estimates(self, variant: Variant, steps: int) -> Estimates:
        """Time, memory and disk; on the way the save cadence, which follows from the time."""
        made, at, documents = self._made, self._at, self._documents
        rate, trainable = self._rate(variant), at.model.trainable(variant.mode, variant.lora_r)
        step = documents.tokens / self._epoch_steps / rate.tokens_per_second
        evaluation = estimates.evaluation_seconds(documents, rate.tokens_per_second)
        save = estimates.save_seconds(trainable)
        every = made.decide("save_every", rules.save_every(steps, step, save + evaluation))
        loop = estimates.loop_seconds(steps=steps, step=step, save_every=every, evaluation=evaluation, save=save)
        start, memory = estimates.start_seconds(save, at.model.bytes), self._memory.terms(variant)
        return Estimates(
            steps=steps,
            seconds=start + loop,
            start_seconds=start,
            tokens_per_second=rate.tokens_per_second,
            throughput_from=rate.source,
            peak_memory=memory.total,
            memory=memory,
            disk=self._disk(variant, trainable, -(-steps // every)),
            trainable_parameters=trainable,
        )

    def _disk(self, variant: Variant, trainable: int, saves: int) -> int:
        """Bytes on disk at the end. Raises SparkError where there is no room; a rule's `keep` makes do with less."""
        made, at, values = self._made, self._at, self._values

        def bytes_of(keep: int, trained: int) -> tuple[int, int]:
            return estimates.disk_bytes(
                store=at.store_bytes, trainable=trained, merged=at.model.bytes, keep=keep, saves=saves
            )

        made.decide("keep", rules.keep())
        if not made.given("keep") and bytes_of(values["keep"], trainable)[1] > at.disk:
            made.put("keep", 1, "rule", f"beside the best: the disk has {size(at.disk)} free")
        error = no_room(at, self._wishes, variant, values["keep"], lambda keep, trained: bytes_of(keep, trained)[1])
        if error:
            raise error
        return bytes_of(values["keep"], trainable)[0]

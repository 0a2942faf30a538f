"""The plan as a whole: who decides, what fits, what is refused and with which hint."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from plans import CPU, GB, SPARK, Store, situation, wishes
from typer.testing import CliRunner

from sparkctl.data.batches import Schedule
from sparkctl.errors import SparkError, UsageError
from sparkctl.hardware import heads
from sparkctl.hardware.measurements import Kind, record
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import Asked, Choices, Estimates, PlanTable
from sparkctl.plan.estimates import START_SECONDS, Documents
from sparkctl.plan.heads import HeadWishes, seconds
from sparkctl.plan.recommend import FORMAT, is_made_from, made_from, recommend
from sparkctl.plan.request import Situation, Wishes


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's data folder of the test's own."""
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path))


@pytest.fixture
def chats() -> Store:
    """400 documents of 50 to 2,000 tokens, eight of them held out."""
    return Store(np.random.RandomState(0).randint(50, 2001, 400), held=8)


def refused(at: Situation, asked: Wishes) -> SparkError:
    """The error that the plan ends in."""
    with pytest.raises(SparkError) as raised:
        recommend(at, asked)
    return raised.value


def obey(at: Situation, error: SparkError) -> PlanTable:
    """The plan that the hint's command gives: it must be one that the command line takes, and fit."""
    import typer

    from sparkctl.cli import recommend as cli

    taken: dict[str, Any] = {}
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register(app)
    words = shlex.split(error.hint or "")
    assert words[:3] == ["sparkctl", "recommend", str(at.run)]
    original = cli.recommend
    cli.recommend = lambda run, choices, recipe, **_: taken.update(choices)  # type: ignore[assignment]
    try:
        assert CliRunner().invoke(app, words[1:]).exit_code == 0
    finally:
        cli.recommend = original
    return recommend(at, wishes(**taken))


def test_a_plan_keeps_what_it_was_asked_for(chats: Store) -> None:
    asked = Wishes(Choices(warmup_fraction=1e-5), frozenset({"mode"}), Choices(), "2b-lora", recipe_flag="2b-lora")
    plan = recommend(situation(chats), asked)
    assert plan.asked == Asked(flags=Choices(warmup_fraction=1e-5), auto=["mode"], recipe="2b-lora")
    by_analyze = Wishes(Choices(), recipe=Choices(), recipe_name="2b-lora")  # `recommend` takes it again by itself
    assert recommend(situation(chats), by_analyze).asked == Asked()


def test_every_choice_has_a_reason_and_an_origin(chats: Store) -> None:
    plan = recommend(situation(chats), wishes())
    assert set(plan.origin) == set(plan.reasons) == set(Choices.model_fields) - {"max_steps"}
    assert all(plan.reasons.values())
    assert set(plan.origin.values()) == {"rule"}
    assert plan.lora
    assert (plan.lora.r, plan.lora.alpha) == (128, 128)


def test_steps_are_those_of_the_schedule(chats: Store) -> None:
    plan = recommend(situation(chats), wishes())
    packing = dict(pack_length=plan.pack_length, gradient_accumulation=plan.gradient_accumulation, seed=plan.seed)
    assert plan.steps == plan.estimates.steps == Schedule(chats, epochs=plan.epochs, **packing).steps  # type: ignore[arg-type]
    short = recommend(situation(chats), wishes(max_steps=3))
    assert short.steps == 3
    assert short.estimates.seconds < plan.estimates.seconds
    assert short.warmup_steps < 3


def test_the_time_is_that_of_the_loop_and_of_what_comes_before(chats: Store) -> None:
    costs = recommend(situation(chats), wishes()).estimates
    longer = recommend(situation(chats), wishes(epochs=40)).estimates
    assert costs.start_seconds == longer.start_seconds >= START_SECONDS
    loops = [each.seconds - each.start_seconds for each in (costs, longer)]
    tokens = chats.lengths[~chats.held_out].sum()
    assert loops[0] > tokens / costs.tokens_per_second
    assert loops[0] < loops[1]


def test_who_decides(chats: Store) -> None:
    parent = recommend(situation(chats), wishes(epochs=4, learning_rate=1e-5, seed=9, pack_length=2432))
    recipe = Choices(epochs=6, weight_decay=0.1, learning_rate=3e-4)
    plan = recommend(situation(chats), wishes(recipe, parent, epochs=2))
    assert (plan.epochs, plan.origin["epochs"]) == (2, "flag")
    assert (plan.learning_rate, plan.origin["learning_rate"]) == (3e-4, "recipe")
    assert (plan.seed, plan.origin["seed"]) == (9, "parent")
    assert (plan.pack_length, plan.origin["pack_length"]) == (2432, "parent")
    assert (plan.keep, plan.origin["keep"]) == (2, "rule")
    assert plan.reasons["weight_decay"] == "recipe `mine`"


def test_a_round_learns_as_the_one_before_and_cuts_its_packs_anew(chats: Store) -> None:
    parent = recommend(situation(chats), wishes())
    longer = Store(np.append(chats.lengths, 6000), held=8)
    plan = recommend(situation(longer), wishes(parent=parent))
    assert plan.tokens_per_step == parent.tokens_per_step
    assert plan.origin["tokens_per_step"] == "parent"
    assert (plan.pack_length, plan.origin["pack_length"]) == (6016, "rule")
    chosen = recommend(situation(chats), wishes(pack_length=2432))
    plan = recommend(situation(longer), wishes(parent=chosen))
    assert (plan.pack_length, plan.origin["pack_length"]) == (6016, "rule")  # nothing is cut, no cron job stops


def test_auto_overrules_recipe_and_parent(chats: Store) -> None:
    plan = recommend(situation(chats), wishes(Choices(mode="full"), auto=("mode",)))
    assert (plan.mode, plan.origin["mode"]) == ("lora", "rule")
    assert recommend(situation(chats), wishes(Choices(mode="full"))).mode == "full"


def test_full_has_no_adapters(chats: Store) -> None:
    plan = recommend(situation(chats), wishes(Choices(lora_r=64), mode="full"))
    assert plan.lora is None
    assert "lora_r" not in plan.origin
    assert plan.learning_rate == pytest.approx(2e-5)
    with pytest.raises(UsageError, match="no adapters"):
        recommend(situation(chats), wishes(mode="full", lora_r=64))


def test_an_engine_that_is_not_there(chats: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    at = situation(chats)
    monkeypatch.setattr("sparkctl.plan.rules.find_spec", lambda name: None)
    error = refused(at, wishes(engine="unsloth", epochs=2))
    assert isinstance(error, UsageError)
    assert "`pip install 'dgx-sparkctl[unsloth]'`" in error.message
    assert obey(at, error).epochs == 2
    monkeypatch.setattr("sparkctl.plan.rules.find_spec", lambda name: name)
    cpu = replace(at, machine=at.machine.model_copy(update={"device": "cpu"}))
    error = refused(cpu, wishes(engine="unsloth", epochs=2))
    assert "needs a GPU" in error.message
    assert obey(cpu, error).engine == "native"
    gpu = replace(at, machine=at.machine.model_copy(update={"device": "cuda"}))
    assert recommend(gpu, wishes(engine="unsloth")).engine == "unsloth"
    assert recommend(gpu, wishes()).engine == "native"


def test_the_native_engine_where_it_serves_the_model(chats: Store) -> None:
    at = situation(chats)
    assert recommend(at, wishes()).engine == "native"
    other = replace(at, model=replace(at.model, lacking="the activation `gelu`"))
    plan = recommend(other, wishes())
    assert plan.engine == "reference"
    assert "gelu" in plan.reasons["engine"]
    error = refused(other, wishes(engine="native"))
    assert isinstance(error, UsageError)
    assert obey(other, error).engine == "reference"


BIG = dict(examples=100_000, tokens=200_000_000)


def test_full_where_it_fits_else_lora_saying_so(chats: Store) -> None:
    assert recommend(situation(chats, "2b", **BIG), wishes()).mode == "full"
    plan = recommend(situation(chats, "9b", **BIG), wishes())
    assert (plan.mode, plan.origin["mode"]) == ("lora", "rule")
    assert "does not fit" in plan.reasons["mode"]
    assert plan.learning_rate == pytest.approx(2e-4)


def test_what_was_chosen_is_refused_with_the_nearest_that_fits(chats: Store) -> None:
    at = situation(chats, "9b")
    error = refused(at, wishes(mode="full", epochs=2))
    assert "NVIDIA GB10 has 115.0 GB" in error.message
    plan = obey(at, error)
    assert (plan.mode, plan.epochs) == ("lora", 2)
    assert plan.estimates.peak_memory <= at.machine.memory


def test_packs_that_are_too_long_are_refused_with_the_longest_that_fits(chats: Store) -> None:
    at = situation(chats, "4b", replace_memory(SPARK, 40))
    error = refused(at, wishes(pack_length=65536, checkpointing=False))
    plan = obey(at, error)
    assert 2048 <= plan.pack_length < 65536
    assert not plan.checkpointing
    with pytest.raises(SparkError):
        recommend(at, wishes(pack_length=plan.pack_length + 128, checkpointing=False))


def replace_memory(machine: plans.Machine, gigabytes: float) -> plans.Machine:
    """The machine with other memory."""
    return machine.model_copy(update={"memory": int(gigabytes * GB)})


def test_checkpointing_only_where_memory_needs_it(chats: Store) -> None:
    roomy = recommend(situation(chats, "4b"), wishes())
    assert not roomy.checkpointing
    tight = recommend(situation(chats, "4b", replace_memory(SPARK, 20)), wishes())
    assert tight.checkpointing
    assert "without it" in tight.reasons["checkpointing"]
    assert tight.estimates.tokens_per_second < roomy.estimates.tokens_per_second
    error = refused(situation(chats, "4b", replace_memory(SPARK, 20)), wishes(checkpointing=False))
    assert obey(situation(chats, "4b", replace_memory(SPARK, 20)), error).checkpointing


def test_a_document_that_cannot_fit_is_counted_and_named(chats: Store) -> None:
    store = Store(np.append(chats.lengths, [300_000, 400_000]), held=8)
    error = refused(situation(store, "9b"), wishes())
    assert "2 documents are too long" in error.message
    assert error.message.index("chats.jsonl:402 (400,000 tokens)") < error.message.index(
        "chats.jsonl:401 (300,000 tokens)"
    )
    words = shlex.split(error.hint or "")
    assert words[:-1] == ["sparkctl", "analyze", "chats.jsonl", "--run", "runs/r1", "--max-seq-length"]
    kept = Store(np.append(chats.lengths, int(words[-1])), held=8)
    assert recommend(situation(kept, "9b"), wishes()).estimates.peak_memory <= SPARK.memory


def test_short_documents_cost_the_memory_of_their_chunks() -> None:
    """Each begins one of its own: a pack of 60-token documents has more than one of long ones, and the pack that holds
    most of the short documents counts, not the mean.
    """
    long, short = Store(np.full(400, 2048)), Store(np.full(14_000, 60))
    mixed = Store(np.concatenate([np.full(8_000, 16), np.full(100, 16_384)]))
    most = [Documents.of(store).most_chunks(16_384, 0) for store in (long, short, mixed)]
    assert most == [256, 256 + int(1.05 * 16), 256 + int(1.05 * (1024 - 256))]
    asked = wishes(mode="lora", pack_length=16_384)
    costs = [recommend(situation(store, "2b"), asked).estimates.peak_memory for store in (long, mixed)]
    state, layers, loss = 2 * 16 * 128 * 128, 18, 1.06  # of the 2B: bytes of a chunk in a layer, layers of the rule
    assert costs[1] - costs[0] == pytest.approx(loss * layers * state * (most[2] - most[0]), rel=0.02)


def test_a_document_longer_than_the_packs_asked_for(chats: Store) -> None:
    error = refused(situation(chats), wishes(pack_length=1000))
    assert "longer than packs of 1,000" in error.message
    assert "chats.jsonl:" in error.message
    assert obey(situation(chats), error).pack_length >= chats.lengths.max()


def test_a_model_that_is_too_large_for_the_machine(chats: Store) -> None:
    error = refused(situation(chats, "27b", replace_memory(CPU, 16)), wishes())
    assert "alone take" in error.message
    assert "smaller model" in (error.hint or "")


def test_disk(chats: Store) -> None:
    full = wishes(mode="full", save_every=20)
    at = situation(chats)
    plan = recommend(at, full)
    checkpoint = 12 * plan.estimates.trainable_parameters
    assert plan.estimates.disk == 4 * checkpoint + at.model.bytes + at.store_bytes
    tight = replace(at, disk=3 * checkpoint + at.model.bytes)
    saving = recommend(tight, full)
    assert (saving.keep, saving.origin["keep"]) == (1, "rule")
    assert "disk" in saving.reasons["keep"]
    error = refused(tight, wishes(mode="full", keep=3, save_every=20))
    assert obey(tight, error).keep == 1
    error = refused(replace(at, disk=at.model.bytes + 8 * GB), full)
    assert obey(replace(at, disk=at.model.bytes + 8 * GB), error).mode == "lora"
    assert "free 4.2 GB" not in (refused(replace(at, disk=GB), full).hint or "")
    assert "free " in (refused(replace(at, disk=GB), full).hint or "")


def test_the_head_s_checkpoints_and_the_served_folder_are_on_the_disk_too(chats: Store) -> None:
    """What the checks of `mtp train` and `mtp inject` ask room for; a disk without it refuses no training."""
    at = situation(chats)
    alone, plan = recommend(at, wishes()), recommend(drafting(at), wishes())
    head = 12 * heads.parameters(at.model.shape)
    extra = plan.estimates.disk - alone.estimates.disk
    assert extra == 3 * head + head // 3 + at.model.bytes
    assert "warning" not in plan.reasons["keep"]
    ahead = plan.estimates.disk - at.store_bytes
    assert "warning" not in recommend(drafting(replace(at, disk=ahead)), wishes()).reasons["keep"]
    tight = recommend(drafting(replace(at, disk=ahead - 5 * 10**8)), wishes())
    warning = "with the MTP head and served/ the disk lacks 500.0 MB: `sparkctl mtp inject --link`"
    assert warning in tight.reasons["keep"]


def drafting(at: Situation) -> Situation:
    """The same with an MTP head."""
    return replace(at, model=replace(at.model, drafts=True))


def test_a_small_disk_is_told_in_its_own_unit(chats: Store) -> None:
    error = refused(replace(situation(chats), disk=3 * 10**6), wishes())
    assert "has 3.0 MB free" in error.message


def test_a_measurement_here_changes_the_estimate(chats: Store) -> None:
    before = recommend(situation(chats), wishes()).estimates
    record(SPARK, Kind("config of 2b", "lora", 128, False), "native", 100.0, 4096, "2026-11-24T10:00:00Z")
    after = recommend(situation(chats), wishes()).estimates
    assert "published" in before.throughput_from
    assert "measured on this machine" in after.throughput_from
    assert after.tokens_per_second == pytest.approx(90)
    trained = chats.lengths[~chats.held_out].sum() * 5
    assert after.seconds > trained / 100


@pytest.mark.parametrize(("mode", "rank"), [("lora", 128), ("full", 0)])
def test_an_engine_is_as_fast_as_at_its_best_length_in_this_mode(chats: Store, mode: str, rank: int) -> None:
    kind = Kind("config of 2b", mode, rank, False)  # type: ignore[arg-type]
    for engine, rate, length in (("native", 900.0, 2048), ("native", 100.0, 4096), ("reference", 950.0, 2048)):
        record(SPARK, kind, engine, rate, length, "2026-11-24T10:00:00Z")  # type: ignore[arg-type]
    assert recommend(situation(chats), wishes(mode=mode)).engine == "reference"
    record(SPARK, kind, "native", 1000.0, 2048, "2026-11-24T10:00:00Z")
    assert recommend(situation(chats), wishes(mode=mode)).engine == "native"


def test_a_head_is_trained_as_fast_as_at_its_best_length(chats: Store) -> None:
    plan, kind = recommend(situation(chats), wishes()), Kind("config of 2b", "mtp", 3, False)
    found = []
    for rate, length in ((900.0, 8192), (100.0, 2048)):
        record(SPARK, kind, "native", rate, length, "2026-11-24T10:00:00Z")
        documents = Documents.of(chats)  # type: ignore[arg-type]
        found.append(seconds(plan, plans.model("2b").shape, documents, HeadWishes(), "config of 2b"))
    assert found[0] == found[1]


def test_what_fits_fits_to_the_byte(chats: Store) -> None:
    pinned = wishes(mode="lora", lora_r=128, pack_length=4096, checkpointing=False)
    needed = recommend(situation(chats), pinned).estimates.peak_memory
    exact, less = (SPARK.model_copy(update={"memory": memory}) for memory in (needed, needed - 1))
    assert recommend(situation(chats, machine=exact), pinned).estimates.peak_memory == needed
    assert "memory" in refused(situation(chats, machine=less), pinned).message


def test_terms_make_up_the_peak(chats: Store) -> None:
    costs = recommend(situation(chats), wishes()).estimates
    assert costs.memory.total == costs.peak_memory


def test_fingerprint(chats: Store) -> None:
    at, asked = situation(chats), wishes(epochs=2)
    plan = recommend(at, asked)
    assert plan.made_from == made_from(at.analysis, at.table, asked, at.machine)
    assert is_made_from(plan, at.analysis)
    assert not is_made_from(plan, at.analysis.model_copy(update={"made_from": "b" * 16}))
    less = replace_memory(at.machine, 90)
    assert made_from(at.analysis, at.table, asked, less) == plan.made_from  # other memory is free at any moment
    others = [
        made_from(at.analysis, at.table, wishes(epochs=3), at.machine),
        made_from(at.analysis, at.table, wishes(Choices(), epochs=2), at.machine),
        made_from(at.analysis, at.table, wishes(parent=plan, epochs=2), at.machine),
        made_from(at.analysis, at.table, wishes(epochs=2, auto=("mode",)), at.machine),
        made_from(at.analysis, at.table, asked, CPU),
    ]
    assert plan.made_from not in others
    assert len(set(others)) == len(others)


def test_what_estimates_tell_goes_with_the_format() -> None:
    """Another field, or another meaning of one, is another format: a plan of before is not up to date."""
    told = {name: field.description for name, field in Estimates.model_fields.items()}
    assert (FORMAT, fingerprint(told)) == (3, "3dc022e0943d470c")

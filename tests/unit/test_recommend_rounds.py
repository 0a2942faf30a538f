"""A round's own mode, rates of like trainings alone, and choices that a person may not have meant."""

from __future__ import annotations

import re

import numpy as np
import pytest
from plans import SPARK, Store, situation, wishes
from pydantic import ValidationError

from sparkctl.hardware.measurements import Kind, lookup, record
from sparkctl.manifest.schema import Choices
from sparkctl.plan.recommend import recommend

LARGE = dict(examples=150_000, tokens=300_000_000)  # of which rules.mode makes full fine-tuning


@pytest.fixture
def chats() -> Store:
    return Store(np.random.RandomState(0).randint(50, 900, 600), held=12)


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path_factory.mktemp("home")))


def test_auto_mode_is_not_held_to_the_rank_of_the_round_before(chats: Store) -> None:
    parent = recommend(situation(chats), wishes(lora_r=64))
    child = recommend(situation(chats, **LARGE), wishes(parent=parent, auto=("mode",)))
    assert (child.mode, child.origin["mode"], child.lora) == ("full", "rule", None)
    assert not {"lora_r", "lora_alpha"} & set(child.reasons)
    assert child.learning_rate == pytest.approx(2e-5)  # not LoRA's
    kept = recommend(situation(chats, **LARGE), wishes(parent=parent))
    assert (kept.mode, kept.origin["mode"]) == ("lora", "parent")
    assert kept.lora
    assert kept.lora.r == 64


def test_a_rank_that_is_asked_for_means_lora(chats: Store) -> None:
    at, parent = situation(chats, **LARGE), recommend(situation(chats), wishes())
    for asked in (wishes(parent=parent, auto=("mode",), lora_r=32), wishes(Choices(lora_r=32), parent, ("mode",))):
        plan = recommend(at, asked)
        assert (plan.mode, plan.reasons["mode"]) == ("lora", "a rank was given")


@pytest.mark.parametrize("other", [dict(rank=8), dict(checkpointing=True), dict(processes=2), dict(mode="full")])
def test_a_rate_of_another_training_is_no_measurement_of_this(chats: Store, other: dict[str, object]) -> None:
    kind = Kind("config of 2b", "lora", 128, False)
    before = recommend(situation(chats), wishes()).estimates
    assert record(SPARK, kind._replace(**other), "native", 5.0, 4096, "now")
    assert lookup(SPARK, kind) == []
    assert recommend(situation(chats), wishes()).estimates.throughput_from == before.throughput_from
    assert record(SPARK, kind, "native", 5.0, 4096, "now")
    assert "measured" in recommend(situation(chats), wishes()).estimates.throughput_from


@pytest.mark.parametrize(
    ("held", "flags", "name", "warning"),
    [
        (12, dict(learning_rate=5.0), "learning_rate", r"25,000 times the usual 0\.0002"),
        (12, dict(tokens_per_step=256), "tokens_per_step", r"the longest document has, \d+: no document is cut"),
        (12, dict(max_steps=10**6), "max_steps", r"the run ends after \d+ steps"),
        (0, {}, "keep", "nothing is held out"),
    ],
)
def test_what_may_not_be_meant_is_said_and_done(
    chats: Store, held: int, flags: dict[str, float], name: str, warning: str
) -> None:
    store = Store(chats.lengths, held=held)
    plan = recommend(situation(store), wishes(**flags))
    assert re.search(f"; warning: .*{warning}", plan.reasons[name])
    assert [key for key, reason in plan.reasons.items() if "warning:" in reason] == [name]
    usual = recommend(situation(chats), wishes(learning_rate=1e-3, tokens_per_step=2048, max_steps=3))
    assert not any("warning:" in reason for reason in usual.reasons.values())


def test_a_round_that_was_cut_for_a_try_says_that_it_still_is(chats: Store) -> None:
    parent = recommend(situation(chats), wishes(max_steps=3))
    plan = recommend(situation(chats), wishes(parent=parent))
    assert (plan.steps, plan.origin["max_steps"]) == (3, "parent")
    told = re.search(r"; warning: of an epoch's (\d+) steps, .*`--max-steps \1`", plan.reasons["max_steps"])
    assert told
    whole = recommend(situation(chats), wishes(parent=parent, max_steps=int(told[1])))
    assert whole.steps == recommend(situation(chats), wishes(epochs=1)).steps
    assert "warning" not in recommend(situation(chats), wishes(parent=whole)).reasons["max_steps"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm"])
def test_a_number_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValidationError):
        Choices(**{name: value})

"""`sparkctl bench mtp`: its rival computes what this project's engine does, and is counted by what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparkctl.bench import workload
from sparkctl.bench.head_rival import Rival
from sparkctl.bench.mtp import mtp_setting
from sparkctl.bench.workload import Workload
from sparkctl.data.batches import Document, Pack
from sparkctl.hardware import heads
from sparkctl.hardware.shape import Shape
from sparkctl.model import mtp
from sparkctl.mtp.drafter import Drafter
from sparkctl.mtp.engine import HeadEngine, step_weights

CPU, DECAY = torch.device("cpu"), 0.6
LIMIT = 0.04  # of a gradient's norm, both in bf16; observed 0.023


def work(steps: int = 1) -> Workload:
    return mtp_setting(shape="qwen3.5-2b", pack=96, documents=3, draft_steps=steps).work


@pytest.fixture(scope="module")
def engine() -> HeadEngine:
    """After a micro-step of one draft step, where both recipes are the same."""
    drafter = Drafter.of(workload.random_model(work(), CPU, torch.bfloat16), work().text)
    drafter.head.begin_anew(0)
    made = HeadEngine(drafter, steps=1, decay=DECAY, loss="kl")
    made.micro_step(work().pack(), 1 / work().pack().labels)
    return made


def rival(engine: HeadEngine, steps: int = 1, *, checkpointing: bool = False) -> Rival:
    tensors = {name: parameter.detach() for name, parameter in engine.parameters().items()}
    return Rival(work(steps), CPU, tensors, step_weights(steps, DECAY), checkpointing=checkpointing)


def apart(engine: HeadEngine, other: Rival) -> dict[str, float]:
    """Distances of the gradients, as shares of their norms."""
    theirs = {mtp.PREFIX + name: p.grad for name, p in other.head.named_parameters()}
    ours = {name: p.grad for name, p in engine.parameters().items()}
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}


def test_two_stacks_train_the_same_head(bench: Any) -> None:
    arguments = ("--pack", 64, "--documents", 2, "--steps", 1, "--calls", 2)
    status, said = bench("mtp", "--stacks", "transformers,native", *arguments)
    assert (status, said["draft_steps"]) == (0, 1)
    assert "tiny shape" in said["note"]
    other, native = said["stacks"]
    assert native["measured"]["loss"] == pytest.approx(other["measured"]["loss"], rel=2e-3)
    assert native["measured"]["trainable"] == other["measured"]["trainable"] > 0
    assert native["measured"]["head_rows"] == other["measured"]["head_rows"] == said["labels"]
    assert native["tokens_per_second"] == pytest.approx(64 / native["measured"]["p50"])
    assert other["ratio"] == 1
    assert 0 < native["share"] < 1
    shape = Shape.from_config(work().config, said["parameters"])
    each = heads.operations(shape, said["labels"] / 64, 1)
    assert native["operations"] == pytest.approx(64 * each)
    twice = 2 * 2 * shape.head_parameters * said["labels"]  # the teacher's logits and the student's
    later = heads.parameters(shape) - heads.projections(shape)  # what the native head leaves out of other tokens
    more = twice + 6 * later * (64 - said["labels"])
    assert other["operations"] - native["operations"] == pytest.approx(more)


def test_the_rivals_gradients_are_ours(engine: HeadEngine) -> None:
    other = rival(engine)
    other.step()
    assert len(apart(engine, other)) == 15
    assert max(apart(engine, other).values()) < LIMIT


def test_a_student_at_the_wrong_row_is_seen(engine: HeadEngine) -> None:
    other = rival(engine)
    other.students = [((rows + 1).clamp_max(95), present) for rows, present in other.students]
    other.step()
    assert min(apart(engine, other).values()) > LIMIT


def test_a_loss_computed_twice_is_the_same(engine: HeadEngine) -> None:
    once, twice = rival(engine, 3), rival(engine, 3, checkpointing=True)
    assert torch.equal(once.step(), twice.step())
    pairs = zip(once.head.parameters(), twice.head.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in pairs)


def test_the_rivals_documents_never_meet(engine: HeadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = work(3).lengths[0]
    before = rival(engine, 3)
    pack = work().pack()
    other = [Document(d.id, d.ids if not n else d.ids[::-1].copy(), d.trained) for n, d in enumerate(pack.documents)]
    monkeypatch.setattr(Workload, "pack", lambda self: Pack(other, pack.tokens, pack.labels))
    after = rival(engine, 3)
    assert not np.array_equal(before.ids.numpy(), after.ids.numpy())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for one, two in zip(before.states(before.hidden()), after.states(after.hidden()), strict=True):
            assert torch.equal(one[:first], two[:first])
            assert not torch.equal(one[first:], two[first:])


def test_a_mask_that_lets_documents_meet_is_seen(engine: HeadEngine) -> None:
    other = rival(engine)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = other.hidden()
        right = other.states(hidden)[0]
        other.positions = torch.arange(96)[None]
        assert not torch.equal(right, other.states(hidden)[0])


def test_wrong_usage(bench: Any, llama_folder: Path) -> None:
    status, said = bench("mtp", "--model", llama_folder, "--steps", 2)
    assert (status, said["error"]) == (2, f"`{llama_folder.name}` has no MTP head")
    assert said["hint"] == "sparkctl bench mtp --steps 2 --json --shape qwen3.5-2b"
    status, said = bench("mtp", "--stacks", "peft-fla")
    assert (status, said["hint"]) == (2, "sparkctl bench mtp --help")
    assert bench("mtp", "--pack", 16, "--documents", 9)[0] == 2


def test_work_for_another_process_keeps_its_draft_steps() -> None:
    assert Workload.loads(replace(work(), draft_steps=2).dumps()).draft_steps == 2

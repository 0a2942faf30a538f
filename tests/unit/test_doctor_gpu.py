"""On a GPU: the launched probes agree with what the chip has, and the fast path is right, repeatable and fast."""

from __future__ import annotations

import pytest
import torch

from sparkctl.doctor import chip, device, exercise, fastpath, launch, ptx, targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # a cold start compiles kernels
]


def test_every_feature_is_as_expected() -> None:
    gpu = device.look().gpu
    assert gpu
    target = targets.of_capability(gpu.capability)
    assert target
    rows = chip.rows(target, ptx.find(), launching=True)
    assert {row.name: row.why for row in rows if row.differs} == {}
    assert {row.name: row.why for row in rows if row.found is None} == {}
    assert {row.proof for row in rows if row.found} <= {"both", "launched"}


def test_a_kernel_that_traps_costs_one_answer() -> None:
    gpu = device.look().gpu
    target = targets.of_capability(gpu.capability) if gpu else None
    assert target
    source = chip.FEATURES[0].probe.source(target)
    for body, problem in (("trap;", "CUDA_ERROR_LAUNCH_FAILED"), ("again: bra again;", "did not end")):
        made = ptx.assemble(source.replace("done:", f"{body}\ndone:"), target, ptx.choose(target, ptx.find()))
        said = launch.launch(made.cubin, words=1, threads=32, cluster=1, shared=0)
        assert said.problem
        assert problem in said.problem
    assert launch.claims().problem is None


def test_the_fast_path() -> None:
    found = fastpath.look(fastpath.rates())
    assert found
    assert found.problems == {}
    assert [one for one in fastpath.judge(found) if one.mend != fastpath.OTHERS] == []  # other tests may compute beside
    assert found.proof
    assert found.proof.repeats == exercise.REPEATS

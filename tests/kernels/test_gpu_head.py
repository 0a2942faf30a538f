"""On a GPU: the training of an MTP head, as right as plain torch, the same bits, and never waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import ready
import torch
from gradient_cases import gradients, pack
from kernel_cases import Tensors, distances

from sparkctl.manifest.schema import HeadLoss
from sparkctl.mtp.drafter import Drafter
from sparkctl.mtp.engine import HeadEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),  # the first call of the library's kernels tunes them
]

SLACK = 1e-3  # of a gradient's norm


def engine(folder: Path, loss: HeadLoss, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> HeadEngine:
    drafter = Drafter.load(folder, None, device, dtype)
    drafter.head.begin_anew(1)
    return HeadEngine(drafter, steps=3, decay=0.6, loss=loss)


def results(made: HeadEngine) -> Tensors:
    """Loss and gradients."""
    loss, found = gradients(made, [pack(*ready.documents(6, longest=300))])
    return {"loss": torch.tensor(loss)} | found


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_no_further_from_fp32_than_twice_plain_torch(wide_qwen35: Path, loss: HeadLoss) -> None:
    truth = results(engine(wide_qwen35, loss, "cpu", torch.float32))
    plain = distances(results(engine(wide_qwen35, loss, "cpu")), truth)
    found = {name: tensor.cpu() for name, tensor in results(engine(wide_qwen35, loss)).items()}
    errors = distances(found, truth)
    assert len(errors) == 16
    assert all(errors[name] <= 2 * plain[name] + SLACK for name in errors), (errors, plain)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_same_bits_every_time(wide_qwen35: Path, loss: HeadLoss) -> None:
    made = engine(wide_qwen35, loss)
    first = results(made)
    for _ in range(5):
        again = results(made)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_micro_step_never_waits_for_the_gpu(wide_qwen35: Path, loss: HeadLoss) -> None:
    made, one = engine(wide_qwen35, loss), pack(*ready.documents(6, longest=300))
    made.micro_step(one, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.micro_step(one, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")

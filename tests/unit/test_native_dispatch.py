"""What the delta rule runs on where a GPU would be, by what is installed there, what the GPU is, and the dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ready
import torch
import triton
from sparkctl_kernels import gated_delta as rule
from sparkctl_kernels.attention import flash
from sparkctl_kernels.attention import op as attention
from sparkctl_kernels.dispatch import Choice, deterministic
from sparkctl_kernels.gated_delta import op
from torch._subclasses.fake_tensor import FakeTensorMode

from sparkctl.errors import SparkError
from sparkctl.train.engines.native import engine as native

GPU = torch.device("cuda")
HOPPER, SPARK = (9, 0), (12, 1)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    op._choice.cache_clear()
    yield
    op._choice.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GB10 with the library's kernels and a Triton that Hopper could not take for them."""
    monkeypatch.setattr(op, "_installed", lambda: op.LAUNCHED[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: SPARK)
    monkeypatch.setattr(triton, "__version__", "3.6.0+cu130")
    return monkeypatch


def test_the_library_s_kernels_or_its_function(gpu: pytest.MonkeyPatch) -> None:
    assert (op.choice(GPU, 128).kernel, op.choice(GPU, 128).slow) == ("fla kernels", False)
    gpu.setattr(op, "_installed", lambda: "0.6.1")
    assert (op.choice(GPU, 128).kernel, op.choice(GPU, 128).slow) == ("fla", False)
    assert not op.choice(torch.device("cpu"), 128).slow


def test_without_the_library_a_gpu_is_refused(gpu: pytest.MonkeyPatch, qwen35_folder: Path) -> None:
    from sparkctl.model.load import load_text_model

    base = load_text_model(qwen35_folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    gpu.setattr(flash, "serves", lambda *_: False)
    native.refuse_slow(native.kernels(base, GPU))
    gpu.setattr(op, "_installed", lambda: None)
    with pytest.raises(SparkError, match="gated_delta would run on its slow reference: flash-linear-attention is not"):
        native.refuse_slow(native.kernels(base, GPU))
    assert rule.choice(GPU, 128).mend == op.MEND


@pytest.mark.parametrize(
    ("capability", "version", "key_dim", "wrong"),
    [
        (HOPPER, "3.6.0", 64, True), (HOPPER, "3.4.0+git", 8, True), (HOPPER, "3.6.0", 128, False),
        (HOPPER, "3.7.1", 64, False), (HOPPER, "3.3.1", 64, False), (SPARK, "3.6.0", 64, False),
        (HOPPER, "3.7.0rc1", 64, True), (HOPPER, "3.8", 64, False),
    ],
)  # fmt: skip
def test_tiles_that_are_wrong_on_hopper_are_refused(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], version: str, key_dim: int, wrong: bool
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu.setattr(triton, "__version__", version)
    found = op.choice(GPU, key_dim)
    assert found.slow == wrong
    if wrong:
        with pytest.raises(SparkError, match=r"is wrong here for a key dim of \d+") as caught:
            native.refuse_slow([found])
        assert caught.value.hint == "`pip install 'triton>=3.7.1'`, or take the slow one with `--allow-slow`"


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, "fla kernels"), (torch.float32, "reference")])
def test_proofs_in_fp32_take_the_reference(gpu: pytest.MonkeyPatch, dtype: torch.dtype, kernel: str) -> None:
    with FakeTensorMode():
        queries = torch.empty(3, 1, 128, dtype=dtype, device=GPU)
        assert op.runs_on(queries) == kernel
        assert attention.computes(queries) == (kernel != "reference")
    assert op.runs_on(torch.empty(3, 1, 128, dtype=dtype)) == "reference"


def test_determinism_costs_no_second_writing_of_new_tensors() -> None:
    def settings() -> tuple[int, bool]:
        return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory

    before = settings()
    with deterministic():
        assert settings() == (2, False)
    assert settings() == before


def test_an_engine_refuses_a_slow_fallback_unless_it_is_allowed(
    qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Choice(
        "gated_delta", "reference", "flash-linear-attention is not installed", slow=True, mend="pip install x"
    )
    monkeypatch.setattr(native, "kernels", lambda *_: [slow])
    with pytest.raises(SparkError, match="would run on its slow reference"):
        native.load(ready.plan(), qwen35_folder, {})
    assert ("gated_delta", f"reference ({slow.reason})") in native.load(
        ready.plan(), qwen35_folder, {}, allow_slow=True
    ).describe()

"""The ways of the MTP head's matrix products: measured of its own step, pinned by its training, right in each."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_server import pack
from sparkctl_kernels import gemm, ways

from sparkctl.bench import products
from sparkctl.bench.mtp import mtp_setting
from sparkctl.hardware import measurements
from sparkctl.hardware.machine import this_machine
from sparkctl.hardware.measurements import Layers
from sparkctl.mtp import drafter
from sparkctl.mtp.drafter import Drafter
from sparkctl.mtp.engine import HeadEngine
from sparkctl.train.engines.native import engine as native

CPU = torch.device("cpu")
LIMIT = 1e-6  # relative, fp32; observed 0: a column is the same sum in half of a product


@pytest.fixture(autouse=True)
def _as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Products may be pinned and measured, by the ways that a CPU has too."""
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gemm, "fused", lambda _: True)
    monkeypatch.setattr(ways, "WAYS", {name: ways.WAYS[name] for name in ("torch", "halves")})
    yield
    ways.pin({})


def test_a_step_s_products_are_measured_and_kept_for_heads_alone() -> None:
    at = mtp_setting(shape="qwen3.5-2b", pack=64, documents=2)
    hidden, ffn, seconds = at.work.text["hidden_size"], at.work.text["intermediate_size"], cycle([1.0, 0.5])
    rows, layers = products.measure(products.one_of_each(at.work), CPU, lambda _: next(seconds))
    assert layers == Layers("qwen3_5", hidden, ffn, 0, head=True)
    found = {row.name: row.timed.best for row in rows}
    fc = {f"gemm nt 64x{hidden}x{2 * hidden}", f"gemm nn 64x{2 * hidden}x{hidden}", f"gemm tn {hidden}x{2 * hidden}x64"}
    assert found.keys() >= fc | {f"gemm nt 64x{2 * ffn}x{hidden}"}  # the frozen model's feed-forward
    assert any(name.startswith(f"gemm tn {2 * ffn}x{hidden}x") for name in found)  # the head's, of the rows that draft
    assert set(found.values()) == {"halves"}
    measurements.keep_ways(this_machine(), layers, found, "now")
    native.pin_start({}, layers._replace(head=False))
    assert ways.pinned() == {}
    native.pin_start({}, layers)
    assert ways.pinned() == found
    native.pin_start({"device": "a GPU", "gemm nn 1x2x3": "halves"}, layers)  # what a resumed one began with
    assert ways.pinned() == {"gemm nn 1x2x3": "halves"}


def engine(folder: Path, **given: Any) -> HeadEngine:
    return HeadEngine(Drafter.load(folder, folder, dtype=torch.float32, **given), steps=3, decay=0.6, loss="kl")


def test_a_head_in_other_ways_has_the_same_gradients(qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
        ways.by_torch(a, b, c, 1.01 * scale, add)

    monkeypatch.setitem(ways.WAYS, "wrong", wrong)
    with ways.measuring(lambda _: 1.0) as found:
        usual = engine(qwen35_folder)
        loss = float(usual.micro_step(pack(), 0.5))
    assert len(usual.parameters()) == 15
    for way in ("halves", "wrong"):
        ways.pin({str(key): way for key in found})
        other = engine(qwen35_folder)
        apart = {"loss": abs(float(other.micro_step(pack(), 0.5)) / loss - 1)}
        for name, parameter in usual.parameters().items():
            given = other.parameters()[name].grad
            assert parameter.grad is not None
            assert given is not None
            apart[name] = float((given - parameter.grad).norm() / parameter.grad.norm())
        assert (max(apart.values()) < LIMIT) == (way == "halves"), apart
        assert (min(apart.values()) > LIMIT) == (way == "wrong"), apart
        assert ("products", f"{len(found)} shapes not by torch, as measured here") in other.describe()


def test_a_training_of_the_head_takes_and_keeps_its_own(qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled, real = list[tuple[Layers, dict[str, str]]](), drafter.settle

    def settle(base: Any, layers: Layers, choices: dict[str, str], allow_slow: bool) -> Any:
        settled.append((layers, choices))
        return real(base, layers, choices, allow_slow)

    monkeypatch.setattr(drafter, "settle", settle)
    engine(qwen35_folder)
    engine(qwen35_folder, choices={"threads": "1", "gemm nn 1x2x3": "halves"})
    layers = Layers("qwen3_5", 32, 64, 0, head=True)
    assert settled == [(layers, {}), (layers, {"threads": "1", "gemm nn 1x2x3": "halves"})]

"""Every kernel of ours at every configuration that can be picked, compiled for a GB10 and for Hopper without a GPU.

Each target in a process of its own, since a driver without a device stands in Triton's place there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sparkctl_kernels import compiled
from sparkctl_kernels.gated_delta import fla_rule
from sparkctl_kernels.instructions import counted, on_tensor_cores
from sparkctl_kernels.shapes import QWEN35

TARGETS = ("sm_121a", "sm_90a")

pytestmark = pytest.mark.timeout(900)  # with a cold cache 80 s of a processor a target, beside other tests


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """What `python -m sparkctl_kernels.compiled TARGET --json` says, both targets at once."""
    started = {target: start("-m", "sparkctl_kernels.compiled", target, "--json") for target in TARGETS}
    said = {target: process.communicate() for target, process in started.items()}
    for target, process in started.items():
        assert said[target][0], said[target][1]
        assert process.returncode == bool(json.loads(said[target][0])["faults"])
    return {target: json.loads(out) for target, (out, _) in said.items()}


def test_all_of_them_fit_a_gb10(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["sm_121a"]["faults"] == []
    kernels = reports["sm_121a"]["kernels"]
    assert max(kernel["shared"] for kernel in kernels) <= 101_376
    assert all(kernel["warps"] <= 4 for kernel in kernels if kernel["dot"])


def test_the_docs_say_how_many_they_are_and_what_they_take(reports: dict[str, dict[str, Any]]) -> None:
    kernels = reports["sm_121a"]["kernels"]
    names, shared = {kernel["kernel"] for kernel in kernels}, max(kernel["shared"] for kernel in kernels)
    said = f"sm_121a: {len(names)} kernels, {len(kernels)} configurations, at most {shared:,} of 101,376 bytes"
    assert said in (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", TARGETS)
def test_every_operator_is_among_them(reports: dict[str, dict[str, Any]], target: str) -> None:
    found = {kernel["kernel"].partition(".")[0] for kernel in reports[target]["kernels"]}
    assert found == {
        "attention", "causal_conv", "distillation", "fla", "gated_delta", "gated_norm", "linear_cross_entropy",
        "lora_linear", "matmul", "qk_norm_rope", "rms_norm", "sigmoid_gate", "silu_mul",
    }  # fmt: skip
    shapes = {(k["kernel"], k["constants"]) for k in reports[target]["kernels"]}
    for head_dim, window in product((64, 128, 256), (False, True)):
        wanted = {f"H={head_dim}", f"WINDOW={window}"}
        assert any(wanted <= set(constants.split()) for name, constants in shapes if name == "attention.forward")
    for whole, eights in product((False, True), repeat=2):  # ranks of 8 and of 16 on three projections, and of 128
        wanted = {f"WHOLE={whole}", f"EIGHTS={eights}"}
        assert any(wanted <= set(constants.split()) for name, constants in shapes if name == "matmul.matmul")


@pytest.mark.parametrize("target", TARGETS)
def test_the_library_s_kernels_are_among_them_in_the_tiles_they_are_launched_in(
    reports: dict[str, dict[str, Any]], target: str
) -> None:
    tiles = {"sm_121a": fla_rule.KNOWN[12, 1], "sm_90a": fla_rule.KNOWN[9, 0]}[target]
    assert set(tiles) == {kernel.name for kernel in fla_rule.KERNELS}
    for (name, tile), shape in product(tiles.items(), QWEN35):
        heads = {"H=16", f"HV={shape.value_heads}", *(f"{key}={tile[key]}" for key in ("BK", "BV") if key in tile)}
        found = [
            kernel
            for kernel in reports[target]["kernels"]
            if kernel["kernel"] == f"fla.{name}" and heads <= set(kernel["constants"].split())
        ]
        assert found, (name, shape.name)
        assert {(kernel["warps"], kernel["stages"]) for kernel in found} == {(tile["num_warps"], tile["num_stages"])}


def test_hopper_has_room_for_all(reports: dict[str, dict[str, Any]]) -> None:
    assert max(kernel["shared"] for kernel in reports["sm_90a"]["kernels"]) <= compiled.SHARED["sm_90a"]


def test_a_kernel_that_needs_more_is_found() -> None:
    out, err = start(str(Path(__file__).parents[1] / "greedy_kernels.py"), "sm_121a").communicate()
    assert out, err
    faults = json.loads(out)
    assert any("bytes of shared memory, 101,376 are there" in fault for fault in faults)
    assert any("tl.dot on 8 warps, 4 at most" in fault for fault in faults)
    assert any("spilled" in fault for fault in faults)
    assert any(".scalar" in fault and "tl.dot without tensor cores" in fault for fault in faults)


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_tensor_cores_and_load_ahead(reports: dict[str, dict[str, Any]], target: str) -> None:
    products = [kernel for kernel in reports[target]["kernels"] if kernel["dot"]]
    assert products
    assert all(kernel["instructions"].get("mma.sync") or kernel["instructions"].get("wgmma") for kernel in products)
    forward = [kernel for kernel in products if kernel["kernel"] == "attention.forward"]
    assert all(kernel["instructions"]["cp.async"] >= 8 for kernel in forward)


def test_instructions_are_counted_where_they_stand() -> None:
    ptx = "\n".join(
        [
            "\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };",
            "\t@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };",
            "\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0}, %rd1, %rd2, 1, 1, 1, 0, 0;",
            "\t@%p2 cp.async.cg.shared.global [ %r7 + 0 ], [ %rd3 + 0 ], 0x10, %r8;",
            "\tcp.async.commit_group;",
            "\tcp.async.bulk.wait_group 0;",
            "\tcp.async.bulk.tensor.2d.shared::cta.global.tile [%r1], [%rd4, {%r2, %r3}], [%r4];",
            "\tfma.rn.f32 %r1, %r2, %r3, %r4;",
            "\t@%p3 atom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 + 0 ], %r2;",
            "// mma.sync. in a comment",
        ]
    )
    assert counted(ptx) == {"mma.sync": 2, "wgmma": 1, "cp.async": 1, "cp.async.bulk": 1, "fma": 1, "atomic": 1}
    assert on_tensor_cores({"wgmma": 1})
    assert not on_tensor_cores({"fma": 512, "cp.async": 8})


def test_spills_outside_of_loops_are_told_from_those_inside() -> None:
    sass = "\n".join(
        [
            "  STL [R1], R0 ;",
            ".L_x_0:",
            "  LDL R2, [R1] ;",
            "  STL [R1], R2 ;",
            "  @P0 BRA `(.L_x_0) ;",
            "  LDL R2, [R1] ;",
        ]
    )
    assert compiled.spills_in_loops(sass) == 2
    assert compiled.spills_in_loops(sass.replace("BRA `(.L_x_0)", "BRA `(.L_x_9)")) == 0

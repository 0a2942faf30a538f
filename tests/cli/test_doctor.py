"""`doctor` as a command, on machines that are not here: what it prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_machine
import pytest
from fake_machine import drivers, no_drivers, quick, spark, sparkctl  # noqa: F401  # fixtures

from sparkctl.cli import app
from sparkctl.doctor import device, fastpath, kernels, ptx, software
from sparkctl.doctor.fastpath import FastPath, Operator, Proof, Speed
from sparkctl.doctor.ptx import Assembler
from sparkctl.doctor.software import LIBRARIES, Installed

ROW = {"name", "expected", "found", "proof"}
FEATURES = 15


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = app.run(["doctor", *arguments])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


def test_a_target_without_its_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--target", "sm_121a")
    lines = [line.split("  ") for line in out.splitlines()]
    found = {words[0]: [word.strip() for word in words[1:] if word.strip()] for words in lines}
    assert status == 0, err
    assert out.startswith("sm_121a: has what training needs, by assembling alone")
    assert found["tcgen05.alloc"] == ["no", "no", "no", "yes", "no"]  # the last table with that row: five targets
    assert found["wgmma.mma_async"] == ["no", "no", "no", "no", "yes"]
    assert found["ld.shared::cluster"][-1] == "only a launch tells"
    assert max(map(len, out.splitlines())) <= 100


def test_the_report_in_the_docs_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--target", "sm_121a")
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    shown = text.partition("$ sparkctl doctor --target sm_121a\n")[2].partition("\n\nsm_121 without")[0].splitlines()
    printed = set(out.splitlines())
    lines = [line[4:] for line in shown if line.strip() not in ("", "…")]
    assert len(lines) > 2 * FEATURES
    assert [line for line in lines if line not in printed] == []


def test_a_target_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--target", "sm_121a", "--quick", "--json")
    said = json.loads(out)
    assert (status, said["ok"], said["target"], said["device"]) == (0, True, "sm_121a", None)
    assert len(said["features"]) == FEATURES
    assert all(row.keys() >= ROW for row in said["features"])
    values = {row["name"]: (row["expected"], row["found"], row["proof"]) for row in said["features"]}
    assert values["tcgen05.alloc"] == (False, False, "assembled")
    assert values["mma bf16"] == (True, True, "assembled")
    assert values[".multicast::cluster"] == (False, None, None)
    assert {row["name"] for row in said["software"]} >= {"torch", "triton", "unsloth"}
    assert all(row["right"] is None for row in said["software"] if row["version"] is None)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "sm_999"),
        ("--target", ""),
        ("--kernels", "--quick"),
        ("--kernels", "--target", "sm_80"),
        ("--kernels", "--target", ""),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 2
    assert json.loads(out)["ok"] is False
    assert "hint:" in err


def test_what_assembling_could_not_tell_is_not_proved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ptx, "assemble", lambda *given: ptx.Assembled(None, why="ptxas: PTX .version 8.7 is not for it")
    )
    status, out, err = run(capsys, "--target", "sm_120f", "--quick")
    assert status == 1
    assert out.startswith("sm_120f: not proved, 2 features that training needs")
    assert "error: mma bf16, which training needs, is not proved of sm_120f: ptxas: PTX .version 8.7" in err


def test_no_assembler_that_knows_the_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Assembler("ptxas", Path("/usr/bin/ptxas"), "12.4", frozenset({"sm_90a"}))
    monkeypatch.setattr(ptx, "find", lambda *_: [old])
    status, _, err = run(capsys, "--target", "sm_121a")
    assert status == 1
    assert "error: no ptxas here knows sm_121a: ptxas 12.4 stops at sm_90a" in err
    assert "hint: ptxas of CUDA 12.9 or newer does" in err


@pytest.mark.skipif(device.look().fitted, reason="a GPU is fitted here")
def test_a_machine_without_a_gpu_is_told_so_and_trains(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, said, err = sparkctl("doctor", "--quick", drivers=no_drivers(tmp_path))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (status, said["ok"], said["features"], said["fast_path"]) == (0, True, [], None)
    assert "libnvidia-ml.so.1: file too short" in said["device"]["problem"]
    assert "note: no GPU" in err
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # CPU seconds: 0.6 seen


def test_a_good_spark(drivers: Path, spark: Path) -> None:  # noqa: F811
    status, said, err = quick(drivers, spark)
    assert (status, said["ok"], said["target"]) == (0, True, "sm_121a"), err
    assert (said["device"]["gpu"]["name"], said["device"]["unified"]) == ("NVIDIA GB10", True)
    assert (said["device"]["claims"]["free"], said["device"]["gpu"]["memory"]) == (3 << 30, None)
    assert len(said["features"]) == FEATURES
    assert {row["proof"] for row in said["features"]} == {"assembled", None}


def test_what_is_wrong_is_told_by_weight(drivers: Path, spark: Path) -> None:  # noqa: F811
    fake_machine.package(spark, "flash-linear-attention", "0.5.2")
    status, said, err = quick(drivers, spark, FAKE_THROTTLE="128")
    assert (status, said["ok"]) == (1, False)
    weights = [finding["weight"] for finding in said["findings"]]
    assert weights[:2] == ["needed", "slow"]
    assert said["hints"][0] == "pip install 'flash-linear-attention>=0.6'"
    assert err.index("error: tl.dot races") < err.index("warning: clocks are held down: power brake")
    assert "https://github.com/triton-lang/triton/issues/10590" in err
    rows = {row["name"]: row for row in said["software"]}
    assert (rows["flash-linear-attention"]["right"], rows["transformers"]["right"]) == (False, True)


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"FAKE_CUDA": "full", "FAKE_HELD": str(1 << 28)}, "error: no memory is left on the GPU"),
        ({"FAKE_CUDA": "no-device"}, "error: CUDA does not start: CUDA_ERROR_NO_DEVICE"),
        ({"FAKE_MAJOR": "7", "FAKE_MINOR": "5"}, "error: NVIDIA GB10 has compute capability 7.5"),
    ],
)
def test_a_gpu_that_cannot_train(drivers: Path, spark: Path, variables: dict[str, str], what: str) -> None:  # noqa: F811
    status, said, err = quick(drivers, spark, **variables)
    assert (status, said["ok"]) == (1, False)
    assert what in err


def test_a_driver_that_takes_too_long_for_a_quick_look(drivers: Path, spark: Path) -> None:  # noqa: F811
    status, said, _ = quick(drivers, spark, FAKE_CUDA="slow-context")
    assert (status, said["device"]["claims"], said["device"]["unified"]) == (0, None, True)


def test_a_driver_without_permission(drivers: Path, spark: Path) -> None:  # noqa: F811
    _, said, _ = quick(drivers, spark, FAKE_NVML="4")
    assert said["device"]["problem"] == "NVML: insufficient permissions"
    assert said["features"] == []


def test_without_torch_or_triton(tmp_path: Path) -> None:
    """The whole command: nothing is launched, no fast path is tried, and it says what to install."""
    fake_machine.hide(tmp_path, "torch", "triton", "fla", "flash-linear-attention", "transformers", "peft", "datasets")
    status, said, err = sparkctl("doctor", drivers=no_drivers(tmp_path), packages=tmp_path)
    assert (status, said["ok"], said["fast_path"]) == (1, False, None)
    assert "error: torch is not installed" in err
    assert "hint: pip install dgx-sparkctl" in err
    assert "Triton" not in err


def test_a_signal_ends_it_and_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    body = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)"
    fake_machine.package(tmp_path, "torch", "2.11.0", body)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
        "LD_LIBRARY_PATH": str(no_drivers(tmp_path)),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "sparkctl", "doctor"], env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        while not mark.exists() or not mark.read_text():
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=20)
    assert running.returncode == 143
    assert "error: interrupted" in err
    assert not Path("/proc", mark.read_text()).exists()


def test_launches_that_all_fail_cost_rows_not_the_command(drivers: Path) -> None:  # noqa: F811
    status, said, err = sparkctl("doctor", "--target", "sm_121a", drivers=drivers)  # that driver takes no real code
    rows = {row["name"]: row for row in said["features"]}
    assert status == 1
    assert (rows["mma bf16"]["found"], rows["mma bf16"]["proof"], rows["mma bf16"]["why"]) == (
        False,
        "both",
        "error 200",
    )
    assert (rows["tcgen05.alloc"]["found"], rows["tcgen05.alloc"]["proof"]) == (False, "assembled")
    assert "error: sm_121a has no mma bf16, which training needs" in err


def row(**changes: object) -> dict[str, object]:
    kernel = dict(
        kernel="rms_norm.forward", shape="qwen3.5-2b", constants="OFFSET=True ADD=False BLOCK=2048", warps=4, stages=3,
        shared=16, registers=38, stack=0, in_loops=0, dot=False, instructions={"fma": 8},
    )  # fmt: skip
    return kernel | changes


def compiled(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """The compiler is a module that prints `text`."""
    (folder / "fake_compiler.py").write_text(f"import sys\nprint({text!r})\nsys.exit('fault' in {text!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(kernels, "MODULE", "fake_compiler")


def test_kernels_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dot = row(kernel="attention.forward", dot=True, shared=51_200, instructions={"mma.sync": 96, "cp.async": 16})
    compiled(monkeypatch, tmp_path, json.dumps({"kernels": [row(), row(), dot], "faults": []}))
    status, out, _ = run(capsys, "--kernels", "--target", "SM_121A")
    assert status == 0
    assert [line.split() for line in out.splitlines()[:5]] == [
        ["kernel,", "configuration", "mma.sync", "cp.async", "fma", "warps", "regs", "stack", "shared"],
        ["attention.forward"],
        ["qwen3.5-2b", "OFFSET", "BLOCK=2048", "96", "16", "4", "38", "0", "51,200"],
        ["rms_norm.forward"],
        ["qwen3.5-2b", "OFFSET", "BLOCK=2048", "8", "4", "38", "0", "16"],
    ]
    assert out.splitlines()[-1] == (
        "sm_121a: 2 kernels, 3 configurations, at most 51,200 of 101,376 bytes of shared memory, 0 faults"
    )


def test_a_kernel_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled(monkeypatch, tmp_path, json.dumps({"kernels": [row()], "faults": ["too much: a fault"]}))
    status, out, err = run(capsys, "--kernels", "--json")
    assert (status, json.loads(out)["ok"], json.loads(out)["faults"]) == (1, False, ["too much: a fault"])
    assert "error: too much: a fault" in err


def test_a_ptxas_that_does_not_know_the_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\n\nRepro command: ptxas -v x.ptx\n"
    (tmp_path / "fake_compiler.py").write_text(f"import sys\nsys.exit({said!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(kernels, "MODULE", "fake_compiler")
    status, _, err = run(capsys, "--kernels")
    assert status == 1
    assert "for sm_121a: ptxas: Value 'sm_121a' is not defined for option 'gpu-name'\n" in err
    assert "hint: sparkctl doctor --target sm_121a\n" in err


def test_kernels_that_cannot_be_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_machine.hide(tmp_path, "triton")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    status, _, err = run(capsys, "--kernels")
    assert status == 1
    assert "error: the kernels could not be compiled for sm_121a: " in err
    assert "No module named 'triton'" in err
    assert "hint: pip install 'dgx-sparkctl[cuda]'" in err
    fake_machine.hide(tmp_path, "torch")
    assert "hint: pip install dgx-sparkctl\n" in run(capsys, "--kernels")[2]


def test_the_help_names_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparkctl", "doctor", "--help"], capture_output=True, text=True, check=True
    )
    assert all(option in done.stdout for option in ("--target", "--quick", "--kernels", "--json"))


def test_the_whole_command_says_what_the_fast_path_came_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose gradients are no numbers: the slow parts are faked, the rest is this machine."""
    operators = [Operator("attention", "triton", "fused kernel of this project, head dim 256")]
    proof = Proof(float("inf"), "layers.0.q_proj", 0.9, 30, [2], 3.0)
    speed = Speed("NVIDIA GB10", 45e12, 240e9, 850.0, 3003.0, 20.0, ["power brake"])
    torch = {"cuda": None, "architectures": [], "available": False}
    monkeypatch.setattr(fastpath, "rates", lambda progress: fastpath.Answer({"torch": torch}, None))
    monkeypatch.setattr(fastpath, "look", lambda rates, progress: FastPath(operators, proof, speed))
    monkeypatch.setattr(software, "look", lambda: [Installed(LIBRARIES[0], "2.13.0")])
    monkeypatch.setattr(software, "imported", lambda found, progress: found)
    status, out, err = run(capsys)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert status == 1
    assert "attention triton: fused kernel of this project, head dim 256" in lines
    assert "repeats 30 of a forward and backward: 1 differ" in lines
    assert "bf16 products 45 TFLOP/s, 50% of what the device should reach" in lines
    assert "meanwhile 850 of 3,003 MHz, 20 W, held down: power brake" in lines
    assert "error: 1 of 30 repeats of a forward and backward differ in their bits: a race" in err
    status, out, _ = run(capsys, "--json")
    assert json.loads(out, parse_constant=pytest.fail)["fast_path"]["proof"]["ratio"] is None

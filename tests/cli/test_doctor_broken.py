"""`doctor` where something is broken that it stands on itself: it survives, and says so."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fake_machine
import pytest
from fake_machine import drivers, no_drivers, quick, spark, sparkctl  # noqa: F401  # fixtures

from sparkctl.doctor import software


@pytest.mark.parametrize(("status", "problem"), [(-1, "NVML did not end within 2 s"), (-2, "NVML died of SIGABRT")])
def test_a_management_library_that_hangs_or_aborts(drivers: Path, spark: Path, status: int, problem: str) -> None:  # noqa: F811
    began = time.monotonic()
    _, said, _ = quick(drivers, spark, FAKE_NVML=str(status))
    assert (said["device"]["gpu"], said["device"]["problem"]) == (None, problem)
    assert time.monotonic() - began < 6  # 2.5 s seen on an idle machine


NUMPY = {
    "raises": "raise ImportError('numpy was built for another Python')",
    "hangs": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("how", ["hidden", *NUMPY])
@pytest.mark.parametrize("arguments", [("--quick",), ("--quick", "--target", "sm_121a")])
def test_a_numpy_that_is_missing_or_broken(tmp_path: Path, how: str, arguments: tuple[str, ...]) -> None:
    packages, libraries = tmp_path / "packages", tmp_path / "drivers"
    libraries.mkdir()
    if how == "hidden":
        fake_machine.hide(packages, "numpy")
    else:
        fake_machine.package(packages, "numpy", "2.2.6", NUMPY[how])
    _, said, _ = sparkctl("doctor", *arguments, drivers=no_drivers(libraries), packages=packages, timeout=20)
    row = next(row for row in said["software"] if row["name"] == "numpy")
    assert row["version"] == (None if how == "hidden" else "2.2.6")
    missing = [finding["mend"] for finding in said["findings"] if finding["subject"] == "numpy"]
    assert missing == (["pip install dgx-sparkctl"] if how == "hidden" and len(arguments) == 1 else [])


def test_a_numpy_that_cannot_be_imported_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine.package(tmp_path, "numpy", "2.2.6", NUMPY["raises"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (found,) = software.imported([one for one in software.look() if one.library.name == "numpy"])
    assert (found.imports, found.problem) == (False, "ImportError: numpy was built for another Python")

"""Libraries that import well, badly, never, or are not there: each costs its own row."""

from __future__ import annotations

import os
from pathlib import Path

import fake_machine
import pytest

from sparkctl.doctor import software
from sparkctl.doctor.software import Installed, Torch

BODIES = {
    "torch": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "triton": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "peft": "import time; time.sleep(60)",
    "datasets": "print('a word of welcome')",
    "safetensors": "import sys; sys.exit(0)",
    "unsloth": "import os; os._exit(3)",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Installed]:
    """Every library, with those of BODIES in the place of the real ones."""
    folder = tmp_path_factory.mktemp("packages")
    for name, body in BODIES.items():
        fake_machine.package(folder, name, "9.8.7", body)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setattr(software, "SECONDS", 12.0)
        patch.setattr(software, "LIBRARIES", [one for one in software.LIBRARIES if one.name in BODIES])
        return {one.library.name: one for one in software.imported(software.look())}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("torch", "ImportError: libcudart.so.13: cannot open shared object file"),
        ("triton", "died of SIGSEGV"),
        ("peft", "did not end within 12 s"),
        ("safetensors", "ended without an answer"),
        ("unsloth", "exit status 3"),
    ],
)
def test_an_import_that_fails(seen: dict[str, Installed], name: str, problem: str) -> None:
    assert (seen[name].version, seen[name].imports, seen[name].problem) == ("9.8.7", False, problem)


def test_an_import_that_talks_is_heard_all_the_same(seen: dict[str, Installed]) -> None:
    assert (seen["datasets"].imports, seen["datasets"].problem) == (True, None)


def test_a_torch_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """\
    class version:
        cuda = "13.0"

    class cuda:
        is_available = staticmethod(lambda: True)

    class _C:
        _cuda_getArchFlags = staticmethod(lambda: "sm_80 sm_120 compute_120")
    """
    fake_machine.package(tmp_path, "torch", "2.11.0", body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(software, "LIBRARIES", software.LIBRARIES[:1])
    (found,) = software.imported(software.look())
    assert found.torch == Torch("13.0", ("sm_80", "sm_120", "compute_120"), True)


def test_without_importing_versions_are_from_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine.package(tmp_path, "unsloth", "2026.10.9", "raise SystemExit(7)", requires=("datasets<5",))
    fake_machine.package(tmp_path, "unsloth-zoo", "2026.10.5", requires=("trl<=1.0",))
    monkeypatch.syspath_prepend(tmp_path)
    here = software.look()
    found = {one.library.name: one for one in here}
    assert (found["unsloth"].version, found["unsloth"].imports) == ("2026.10.9", None)
    assert software.versions(here)["unsloth"] == "2026.10.9"
    assert software.requirements()["unsloth"] == ["datasets<5"]
    assert software.requirements()["unsloth-zoo"] == ["trl<=1.0"]  # that has no row
    assert software.versions(here)["unsloth-zoo"] == "2026.10.5"
    assert "bitsandbytes" not in software.versions(here)

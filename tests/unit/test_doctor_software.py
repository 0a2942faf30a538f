"""Libraries that import well, badly, never, or are not there: each costs its own row."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import fake_machine
import pytest

from sparkctl import child
from sparkctl.doctor import rules, software
from sparkctl.doctor.findings import Weight
from sparkctl.doctor.software import Installed, Torch
from sparkctl.hardware.software import UNREADABLE

BODIES = {
    "transformers": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "triton": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "peft": "import time; time.sleep(60)",
    "datasets": "print('a word of welcome')",
    "numpy": "import atexit, os; os.write(1, b'no end of line'); atexit.register(print, 'farewell')",
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
        ("transformers", "ImportError: libcudart.so.13: cannot open shared object file"),
        ("triton", "died of SIGSEGV"),
        ("peft", "did not end within 12 s"),
        ("safetensors", "ended without an answer"),
        ("unsloth", "exit status 3"),
    ],
)
def test_an_import_that_fails(seen: dict[str, Installed], name: str, problem: str) -> None:
    assert (seen[name].version, seen[name].imports, seen[name].problem) == ("9.8.7", False, problem)


@pytest.mark.parametrize("damage", [b"Name: peft\nVersion: \xff\n", b"", None])
def test_metadata_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None) -> None:
    """Not UTF-8, empty, or gone: the library is there, and nothing is known of it."""
    fake_machine.package(tmp_path, "peft", "9.8.7", requires=("numpy<1",))
    file = tmp_path / "peft-9.8.7.dist-info" / "METADATA"
    file.unlink() if damage is None else file.write_bytes(damage)
    monkeypatch.syspath_prepend(tmp_path)
    found = [one for one in software.look() if one.library.name == "peft"]
    assert [one.version for one in found] == [UNREADABLE]
    assert "peft" not in software.versions(found)
    assert software.requirements()["peft"] == []
    (finding,) = rules.missing(found, gpu=False)
    assert (finding.weight, finding.what) == (Weight.NEEDED, "the metadata of peft cannot be read")
    assert finding.mend == "pip install --force-reinstall --no-deps 'peft'"


@pytest.mark.parametrize("name", ["datasets", "numpy"])
def test_an_import_that_talks_is_heard_all_the_same(seen: dict[str, Installed], name: str) -> None:
    """By Python, by a descriptor as compiled code does, or at the end of the process."""
    assert (seen[name].imports, seen[name].problem) == (True, None)


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


UNTRIED = "not tried: torch cannot be imported"


@pytest.mark.parametrize(
    ("body", "problem"),
    [("import time; time.sleep(60)", "did not end within 4 s"), ("raise ImportError('libcudart')", "libcudart")],
)
def test_what_stands_on_a_torch_that_cannot_be_imported_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, problem: str
) -> None:
    """Neither is it wrong: the one finding is torch's."""
    fake_machine.package(tmp_path, "torch", "2.11.0", body)
    fake_machine.package(tmp_path, "peft", "0.21.2", "import torch")
    fake_machine.package(tmp_path, "bitsandbytes", "0.50.2", "import torch")
    fake_machine.package(tmp_path, "safetensors", "0.8.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(software, "SECONDS", 4.0)
    here = ("torch", "peft", "bitsandbytes", "safetensors")
    found = software.imported([one for one in software.look() if one.library.name in here])
    said = {one.library.name: (one.imports, one.problem) for one in found}
    assert (said["peft"], said["bitsandbytes"]) == ((None, UNTRIED), (None, UNTRIED))
    assert said["safetensors"] == (True, None)
    assert said["torch"][0] is False
    assert problem in (said["torch"][1] or "")
    (finding,) = rules.missing(found, gpu=True)
    assert finding.subject == "torch"
    again = "`python -X importtime -c 'import torch'`"
    assert finding.mend == (
        again if "did not end" in problem else "pip install --force-reinstall --no-deps 'torch==2.11.0'"
    )


def test_without_torch_what_stands_on_it_is_not_tried() -> None:
    peft, torch = (one for name in ("peft", "torch") for one in software.look() if one.library.name == name)
    found = software.imported([replace(torch, version=None), peft])
    assert (found[1].imports, found[1].problem) == (None, "not tried: torch is not installed")
    assert [finding.subject for finding in rules.missing(found, gpu=False)] == ["torch"]


def test_what_stands_on_a_numpy_that_cannot_be_imported_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(name: str, module: str, seconds: float) -> tuple[dict[str, object], str | None]:
        asked.append(module)
        return {}, "did not end within 90 s" if module == "numpy" else None

    monkeypatch.setattr(child, "answer", answer)
    every = software.rooted([Installed(library, "1.0") for library in software.LIBRARIES])
    assert (asked, software.ready(every, "torch")) == (["numpy"], False)
    found = {one.library.name: one.problem for one in software.imported(every)}
    assert sorted(asked) == ["numpy", "safetensors", "triton"]
    assert {name for name, problem in found.items() if problem == "not tried: numpy cannot be imported"} == (
        set(found) - {"numpy", "safetensors", "triton"}
    )
    (finding,) = rules.missing(software.imported(every), gpu=True)
    assert (finding.subject, finding.mend) == ("numpy", "`python -X importtime -c 'import numpy'`")


def test_torch_that_was_imported_before_is_not_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    torch, triton = (one for name in ("torch", "triton") for one in software.look() if one.library.name == name)
    facts = {"cuda": "13.0", "architectures": ["sm_120"], "available": True}
    before = software.answered([torch, triton], facts, "rates died")
    monkeypatch.setattr(child, "answer", lambda name, module, seconds: ({}, asked.append(module)))
    found = software.imported(before)
    assert (found[0].imports, found[0].torch, asked) == (True, Torch("13.0", ("sm_120",), True), ["triton"])


def test_the_slowest_import_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(software, "LEAST", 1)
    monkeypatch.setattr(software, "MOST", 1)
    monkeypatch.setattr(child, "answer", lambda name, module, seconds: ({}, asked.append(module)))
    every = [Installed(library, "1.0", library.name in software.ROOTS or None) for library in software.LIBRARIES]
    found = software.imported(every)
    assert asked[0] == "unsloth"
    assert [one.library for one in found] == list(software.LIBRARIES)


@pytest.mark.parametrize(("cores", "imports"), [(1, 2), (2, 2), (12, 3), (20, 4)])
def test_imports_at_once(monkeypatch: pytest.MonkeyPatch, cores: int, imports: int) -> None:
    monkeypatch.setattr(software, "available_cores", lambda: cores)
    assert software.at_once() == imports

"""The table of a chip's features: what ptxas makes of each probe, and what a launch adds to it."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sparkctl.doctor import chip, features, launch, probes, ptx, targets
from sparkctl.doctor.chip import Row
from sparkctl.doctor.findings import Weight
from sparkctl.doctor.launch import Launched
from sparkctl.doctor.ptx import Assembled, Assembler
from sparkctl.doctor.targets import GB10, HOPPER, Target
from sparkctl.errors import SparkError, UsageError

# one PTX line each by ptxas 13.0, as it was found by hand: sm_121a, sm_121, sm_120a, sm_100a, sm_90a
BY_HAND = {
    "tcgen05.alloc": "no no no yes no",
    "wgmma.mma_async": "no no no no yes",
    "cp.async.bulk.tensor, one CTA": "yes yes yes yes yes",
    ".multicast::cluster": "yes yes yes yes yes",
    "ld.shared::cluster": "yes yes yes yes yes",
    "mma kind::f8f6f4": "yes no yes yes no",
    "mma mxf4nvf4 block_scale": "yes no yes no no",
}


@pytest.fixture(scope="module")
def here() -> list[Assembler]:
    """The assemblers of this machine: Triton brings two."""
    return ptx.find()


@pytest.fixture(scope="module")
def table(here: list[Assembler]) -> dict[str, Row]:
    """A GB10's features without a GPU, the others beside them."""
    return {row.name: row for row in chip.rows(GB10, here, launching=False, beside=targets.BESIDE)}


def test_the_table_is_the_one_that_was_made_by_hand(table: dict[str, Row]) -> None:
    found = {name: " ".join(chip.yes(value) for value in table[name].assembled.values()) for name in BY_HAND}
    assert found == BY_HAND
    assert list(table["mma bf16"].assembled) == ["sm_121a", "sm_121", "sm_120a", "sm_100a", "sm_90a"]


def test_what_assembles_everywhere_proves_nothing(table: dict[str, Row]) -> None:
    open_ones = {name for name, row in table.items() if row.found is None}
    assert open_ones == {
        "shared memory, 101,376 bytes", ".multicast::cluster", "ld.shared::cluster", "clusters above 1x1x1",
    }  # fmt: skip
    assert {table[name].proof for name in open_ones} == {None}
    assert all(row.proof == "assembled" and not row.differs for row in table.values() if row.name not in open_ones)


FAMILIES = ["sm_100f", "sm_103f", "sm_110f", "sm_120f", "sm_121f"]


@pytest.mark.parametrize("name", ["sm_121a", "sm_121", "sm_120a", "sm_100a", "sm_90a", "sm_89", "sm_80", *FAMILIES])
def test_every_probe_is_judged_for_its_feature_alone(here: list[Assembler], name: str) -> None:
    """A mistake in the PTX would be no `no`: it would leave the row open."""
    rows = chip.rows(targets.parse(name), here, launching=False)
    assert {row.name: row.why for row in rows if row.assembled[name] is None} == {}
    assert [row.name for row in rows if row.differs] == []
    assert all(row.why for row in rows if row.found is False)


def test_a_probe_with_a_mistake_leaves_its_row_open(here: list[Assembler]) -> None:
    source = probes.CP_ASYNC.source(GB10).replace("cp.async.wait_all", "cp.async.wait_none")
    found = ptx.assemble(source, GB10, here[0])
    assert found.accepted is None
    assert found.why
    assert "Unknown modifier" in found.why


def test_an_assembler_that_is_too_old_for_an_instruction_says_so(here: list[Assembler]) -> None:
    found = ptx.assemble(probes.CP_ASYNC.source(HOPPER).replace(".version 8.0", ".version 99.0"), HOPPER, here[0])
    assert found.accepted is None
    assert found.why
    assert "too old" in found.why


def test_the_registers_are_really_held(here: list[Assembler], tmp_path: Path) -> None:
    (tmp_path / "a.ptx").write_text(probes.REGISTERS.source(GB10))
    by = ptx.choose(GB10, here)
    said = subprocess.run(
        [by.path, "-v", f"-arch={GB10}", tmp_path / "a.ptx", "-o", tmp_path / "a.cubin"], capture_output=True, text=True
    )
    used = re.search(r"Used (\d+) registers", said.stderr + said.stdout)
    assert used
    assert probes.HELD <= int(used[1]) <= 255
    assert 256 * 256 <= 65_536


def assembler(release: str, *names: str) -> Assembler:
    return Assembler("ptxas", Path("ptxas"), release, frozenset(names))


def test_a_ptxas_that_is_too_old_names_one_that_would_do() -> None:
    old = [assembler("12.8", "sm_90a", "sm_120", "sm_120a"), assembler("12.4", "sm_90a")]
    with pytest.raises(SparkError) as error:
        ptx.choose(GB10, old)
    assert error.value.message == (
        "no ptxas here knows sm_121a: ptxas 12.8 stops at sm_120a, ptxas 12.4 stops at sm_90a"
    )
    assert error.value.hint
    assert "CUDA 12.9 or newer" in error.value.hint


def test_the_newest_that_knows_the_target_is_chosen(here: list[Assembler]) -> None:
    assert ptx.choose(GB10, here) is here[0]
    both = [assembler("13.1", "sm_121a"), assembler("12.8", "sm_90a")]
    assert ptx.choose(HOPPER, both).release == "12.8"
    assert [one.release for one in here] == sorted((one.release for one in here), key=lambda r: -float(r))


def test_no_assembler_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ptx, "_places", lambda: [("ptxas", tmp_path / "ptxas")])
    assert ptx.find() == []
    (tmp_path / "ptxas").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "ptxas").chmod(0o755)
    assert ptx.find() == []
    with pytest.raises(SparkError, match="no ptxas here knows sm_90a"):
        ptx.choose(HOPPER, [])


def test_an_assembler_that_writes_nothing_leaves_its_row_open(tmp_path: Path) -> None:
    (tmp_path / "ptxas").write_text("#!/bin/sh\n")
    (tmp_path / "ptxas").chmod(0o755)
    by = Assembler("ptxas", tmp_path / "ptxas", "13.0", frozenset(["sm_121a"]))
    assert ptx.assemble("", GB10, by) == Assembled(None, why="ptxas 13.0 ended well and wrote no code")


def test_without_a_place_for_a_temporary_file_a_row_stays_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: list[Assembler]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    found = ptx.assemble(probes.CP_ASYNC.source(GB10), GB10, here[0])
    assert found == Assembled(None, why="no temporary file can be written: no such file or directory")


def test_an_assembler_that_may_not_be_looked_at_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.path answers no where pathlib raises PermissionError."""
    monkeypatch.setattr(Path, "is_file", raising(PermissionError(13, "permission denied")))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/closed/ptxas")
    monkeypatch.setenv("CUDA_HOME", "/closed")
    assert all("closed" not in str(one.path) for one in ptx.find())


def raising(error: OSError) -> Callable[[Path], bool]:
    def is_file(path: Path) -> bool:
        raise error

    return is_file


def test_an_assembler_that_hangs_costs_no_more_than_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ptxas").write_text("#!/bin/sh\nsleep 30\n")
    (tmp_path / "ptxas").chmod(0o755)
    monkeypatch.setattr(ptx, "_places", lambda: [("ptxas", tmp_path / "ptxas")])
    began = time.monotonic()
    assert ptx.find(0.3) == []
    assert time.monotonic() - began < 10


def test_triton_s_own_assemblers_can_be_replaced_by_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, other = dict(ptx.of_triton())["triton's ptxas-blackwell"], tmp_path / "ptxas"
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(other))
    assert dict(ptx.of_triton())["triton's ptxas-blackwell"] == own  # as Triton does where nothing is there
    other.touch()
    assert dict(ptx.of_triton())["triton's ptxas-blackwell"] == other


@pytest.mark.parametrize("name", ["sm_999", "sm_121x", "121a", "", "sm_89a", "sm_90f"])
def test_an_unknown_target(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        targets.parse(name)


def test_a_family_is_known_later_than_its_chips() -> None:
    assert {(targets.parse(name).ptx, targets.parse(name).release) for name in FAMILIES if "110" not in name} == {
        ("8.8", "12.9")
    }
    assert (targets.parse("sm_110f").ptx, targets.parse("sm_110f").release) == ("9.0", "13.0")
    assert (targets.parse("sm_120a").ptx, targets.parse("sm_100a").release) == ("8.7", "12.8")


def test_what_training_needs_and_nothing_proves_is_wrong() -> None:
    open_one = Row("mma bf16", True, None, None, "products", needed=True, why=f"ptxas 12.8 {ptx.OUTDATED}")
    (found,) = chip.judge([open_one], GB10)
    assert (found.weight, found.mend) == (Weight.NEEDED, "pip install --upgrade triton")
    assert "mma bf16, which training needs, is not proved of sm_121a: ptxas 12.8 is too old" in found.what
    other = [replace(open_one, needed=False), replace(open_one, launch_only=True)]
    assert chip.judge(other, GB10) == []
    assert chip.judge([replace(open_one, why="ptxas: a mistake")], GB10)[0].mend is None


def test_targets_by_capability() -> None:
    assert [str(targets.of_capability(c)) for c in ("12.1", "9.0", "8.9", "7.5")] == [
        "sm_121a",
        "sm_90a",
        "sm_89",
        "None",
    ]


def launched(
    monkeypatch: pytest.MonkeyPatch, here: list[Assembler], target: Target, answer: Launched | None
) -> dict[str, Row]:
    """The table where every launch gives `answer`, or what a probe should write."""
    expected = {feature.probe.source(target): feature.probe for feature in features.FEATURES}
    sources: dict[bytes, str] = {}
    assemble = ptx.assemble

    def remembered(source: str, target: Target, by: Assembler) -> ptx.Assembled:
        made = assemble(source, target, by)
        cubin = made.cubin + source.encode()
        sources[cubin] = source
        return ptx.Assembled(made.accepted, cubin, made.why)

    def launch_(cubin: bytes, *, words: int, threads: int, cluster: int, shared: int) -> Launched:
        probe = expected[sources[cubin]]
        assert (words, threads, cluster) == (len(probe.expected), probe.threads, probe.cluster)
        assert shared == (target.shared if probe.shared else 0)
        return answer or Launched(probe.expected)

    monkeypatch.setattr(ptx, "assemble", remembered)
    monkeypatch.setattr(launch, "launch", launch_)
    return {row.name: row for row in chip.rows(target, here, launching=True)}


def test_launches_that_write_what_they_should(monkeypatch: pytest.MonkeyPatch, here: list[Assembler]) -> None:
    rows = launched(monkeypatch, here, HOPPER, None)
    assert all(not row.differs for row in rows.values())
    assert rows["wgmma.mma_async"].proof == "both"
    assert rows[".multicast::cluster"].proof == "launched"
    assert (rows["tcgen05.alloc"].found, rows["tcgen05.alloc"].proof) == (False, "assembled")
    assert chip.judge(list(rows.values()), HOPPER) == []


def test_a_gb10_that_had_clusters_would_be_told(monkeypatch: pytest.MonkeyPatch, here: list[Assembler]) -> None:
    rows = launched(monkeypatch, here, GB10, None)
    found = chip.judge(list(rows.values()), GB10)
    assert [(f.subject, f.weight) for f in found] == [
        (name, Weight.NOTE) for name in (".multicast::cluster", "ld.shared::cluster", "clusters above 1x1x1")
    ]
    assert "expected no on sm_121a, found yes" in found[0].what


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Launched((1, 1)), "it wrote [1, 1], not [7, 7]"),
        (Launched(problem="CUDA_ERROR_LAUNCH_FAILED"), "CUDA_ERROR_LAUNCH_FAILED"),
        (Launched(problem="did not end within 15 s"), "did not end within 15 s"),
    ],
)
def test_a_launch_that_fails_costs_its_row(
    monkeypatch: pytest.MonkeyPatch, here: list[Assembler], answer: Launched, why: str
) -> None:
    rows = launched(monkeypatch, here, HOPPER, answer)
    assert rows[".multicast::cluster"].found is False
    assert rows[".multicast::cluster"].why == why
    needed = [finding.subject for finding in chip.judge(list(rows.values()), HOPPER) if finding.weight == Weight.NEEDED]
    assert needed == ["mma bf16", "cp.async", "shared memory, 232,448 bytes"]


def test_a_launch_that_was_never_made_says_nothing(monkeypatch: pytest.MonkeyPatch, here: list[Assembler]) -> None:
    rows = launched(monkeypatch, here, HOPPER, Launched(problem="CUDA_ERROR_OUT_OF_MEMORY", never=True))
    assert (rows["mma bf16"].found, rows["mma bf16"].proof) == (True, "assembled")
    assert (rows["ld.shared::cluster"].found, rows["ld.shared::cluster"].proof) == (None, None)
    assert chip.judge(list(rows.values()), HOPPER) == []

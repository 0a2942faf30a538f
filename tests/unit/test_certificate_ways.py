"""A certificate is of the ways in which matrix products were computed: with others it is not the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ready

from sparkctl.hardware.machine import this_machine
from sparkctl.hardware.measurements import Layers, keep_ways
from sparkctl.manifest.evidence import Lossless
from sparkctl.manifest.store import Run
from sparkctl.progress import silent
from sparkctl.steps import certificate, verify_lossless
from sparkctl.steps.train import train
from sparkctl.steps.training import Job, planned
from sparkctl.train.ranks import Ranks
from sparkctl.verify import lossless
from sparkctl.verify.certificate import Certificate

PRODUCT, OTHER = "gemm nt 96x64x32", "gemm nn 96x32x64"
LAYERS = Layers("llama", 32, 64, 4)  # of tests/tiny.py's, with the rank of ready.plan


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))


def job(root: Path, model: Path, **changes: Any) -> Job:
    """A long training on the native engine, planned for a GPU."""
    plan = ready.plan(engine="native")
    plan.machine.device, plan.estimates.seconds = "cuda", 2 * verify_lossless.LONG
    values = dict(engine="native", machine=plan.machine, estimates=plan.estimates)
    return planned(ready.run(root, model, **(values | changes)))


def measured(**ways: str) -> None:
    """What `bench products` found here."""
    keep_ways(this_machine(), LAYERS, {PRODUCT: ways.get("product", "torch"), OTHER: "torch"}, "now")


def made_from(at: Job, model: Path, choices: dict[str, str] | None = None) -> str:
    return certificate.made_from(at, model, choices or {})


def test_other_ways_are_another_certificate(tmp_path: Path, llama_folder: Path) -> None:
    at = job(tmp_path / "run", llama_folder)
    torchs = made_from(at, llama_folder)
    measured()
    assert made_from(at, llama_folder) == torchs  # torch's own way is no other way
    measured(product="halves")
    halves = made_from(at, llama_folder)
    assert halves != torchs
    measured(product="matmul")
    assert made_from(at, llama_folder) not in (torchs, halves)
    # a run that has begun: its own, whatever was measured since
    assert made_from(at, llama_folder, {"device": "an H100", "attention": "triton"}) == torchs
    assert made_from(at, llama_folder, {"device": "an H100", PRODUCT: "halves"}) == halves


def test_products_have_one_way_on_a_cpu_and_in_other_engines(tmp_path: Path, llama_folder: Path) -> None:
    native = ready.plan(engine="native")
    others = [job(tmp_path / "cpu", llama_folder, machine=native.machine)]
    others.append(job(tmp_path / "unsloth", llama_folder, engine="unsloth"))
    before = [made_from(at, llama_folder) for at in others]
    measured(product="halves")
    assert [made_from(at, llama_folder) for at in others] == before


def test_a_long_training_asks_for_the_certificate_of_its_ways(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[str]()

    def certified(at: Job, *_: object) -> tuple[Lossless, None]:
        made.append(made_from(at, llama_folder))
        return Lossless.model_construct(passed=True, problems=[], engine="native", made_from=made[-1]), None

    monkeypatch.setattr(verify_lossless, "certified", certified)
    monkeypatch.setattr(verify_lossless, "_keep", lambda run, table, ranks: setattr(run.manifest, "lossless", table))
    at = job(tmp_path / "run", llama_folder)
    for _ in range(2):
        verify_lossless.require(at, Ranks(), silent)
    assert len(made) == 1
    measured(product="halves")
    for _ in range(2):
        verify_lossless.require(at, Ranks(), silent)
    assert len(made) == 2


def test_a_run_that_has_begun_is_judged_as_it_is_pinned(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = list[dict[str, str]](), certificate.certify

    def certify(setting: lossless.Setting, *others: Any) -> Certificate:
        seen.append(setting.choices)
        return real(setting, *others)

    monkeypatch.setattr(certificate, "certify", certify)
    monkeypatch.setattr(lossless, "PACKS", 1)
    run = ready.run(tmp_path / "run", llama_folder, count=24, engine="native")
    verify_lossless.verify_lossless(run.root, steps=1)
    pinned = train(run.root).train
    assert pinned
    verify_lossless.verify_lossless(run.root, steps=1)
    verify_lossless.verify_lossless(run.root, engine="reference", steps=1)
    with Run.open(run.root).edit() as manifest:
        assert manifest.plan
        manifest.plan.learning_rate /= 2
    verify_lossless.verify_lossless(run.root, steps=1)
    assert pinned.choices
    assert seen == [{}, pinned.choices, {}, {}]

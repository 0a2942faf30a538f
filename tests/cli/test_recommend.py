"""`sparkctl recommend` through the command line: the plan it writes, what it refuses, what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plans
import pytest
import ready

from sparkctl.cli import app
from sparkctl.manifest.schema import Choices, Machine, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.steps import recommend as step

Recommend = Callable[..., "Answer"]


class Answer:
    """Exit status and both streams."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def plan(self) -> dict[str, Any]:
        """[plan] of the JSON on stdout."""
        return json.loads(self.out)["plan"]


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """A run that has been analysed: 40 documents of 6 to 40 tokens."""
    made = ready.run(tmp_path / "r1", llama_folder)
    with made.edit() as manifest:
        manifest.plan = None
    return made


@pytest.fixture
def recommend(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Recommend:
    """The command on that run, with --json, on a machine of 24 GB; a 0.8B stands for the model."""
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(step, "this_machine", lambda: plans.CPU)
    monkeypatch.setattr(step, "_model", lambda *_: plans.model("0.8b"))
    monkeypatch.setattr(step, "disk_free", lambda _: 10**12)

    def command(*arguments: object, json: bool = True, root: Path = run.root) -> Answer:
        status = app.run(["recommend", str(root), *map(str, arguments), *["--json"] * json])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Answer(status, captured.out, captured.err)

    return command


def test_a_plan_is_written(recommend: Recommend, run: Run) -> None:
    answer = recommend("--epochs", 2, "--no-checkpointing", "--learning-rate", "1e-3")
    assert answer.status == 0, answer.err
    plan = Run.open(run.root).manifest.plan
    assert plan
    assert answer.plan == plan.model_dump(mode="json", exclude_none=True)
    assert (plan.epochs, plan.learning_rate, plan.checkpointing) == (2, 1e-3, False)
    flags = {name for name, origin in plan.origin.items() if origin == "flag"}
    assert flags == {"learning_rate", "epochs", "checkpointing"}
    assert plan.machine == plans.CPU


def test_a_person_reads_value_origin_and_reason(recommend: Recommend) -> None:
    answer = recommend("--epochs", 2, json=False)
    words = " ".join(answer.out.split())
    for said in (
        "tokens per step 2,048 rule 16 × 128",
        "epochs 2 flag `--epochs`",
        "activations",
        "GFLOP/s",
        "sparkctl train",
    ):
        assert said in words


def test_every_choice_is_a_flag_with_the_schemas_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    app.run(["recommend", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Choices.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description
        assert field.description in text
    assert "--no-checkpointing" in text
    assert "auto|lora|full" in text


def test_up_to_date(recommend: Recommend, run: Run) -> None:
    recommend("--epochs", 2)
    before = (run.root / "run.toml").read_bytes()
    again = recommend("--epochs", 2)
    assert again.status == 0
    assert "up to date" in again.err
    assert json.loads(again.out)["up_to_date"]
    said = recommend("--epochs", 2, json=False).out
    assert said.startswith("plan of r1 (up to date: nothing was done, this is the result of 20")
    assert (run.root / "run.toml").read_bytes() == before
    assert recommend("--epochs", 3).plan["epochs"] == 3
    assert "up to date" not in recommend("--epochs", 3, "--force").err


def test_other_memory_makes_a_plan_stale_only_where_it_no_longer_fits(
    recommend: Recommend, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = recommend().plan["estimates"]["peak_memory"]
    for memory, fits in ((peak + 1, True), (peak - 1, False)):
        monkeypatch.setattr(step, "this_machine", lambda m=memory: plans.CPU.model_copy(update={"memory": m}))
        assert ("up to date" in recommend().err) == fits


def test_dry_run_writes_nothing(recommend: Recommend, run: Run) -> None:
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    assert recommend("--dry-run").plan["steps"] > 0
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", 0), "epochs"),
        (("--epochs", 100_000_000), "epochs"),  # each is packed to count its steps
        (("--learning-rate", -1), "learning_rate"),
        (("--warmup-fraction", 1), "warmup_fraction"),
        (("--epochs", "many"), "'--epochs'"),
        (("--mode", "half"), "half"),
        (("--engine", "unsloth"), "`unsloth`"),
        (("--mode", "full", "--lora-r", 4), "no adapters"),
        (("--recipe", "nonesuch"), "`nonesuch`"),
        (("--pack-length", 16), "longer than packs of 16"),
    ],
)
def test_wrong_flags(recommend: Recommend, run: Run, flags: tuple[object, ...], message: str) -> None:
    before = (run.root / "run.toml").read_bytes()
    answer = recommend(*flags)
    assert answer.status in (1, 2)
    assert "error:" in answer.err
    assert message in answer.err
    assert "hint:" in answer.err
    assert not json.loads(answer.out)["ok"]
    assert (run.root / "run.toml").read_bytes() == before


def test_recipes(recommend: Recommend, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 9\nlearning_rate = 5e-4\n")
    plan = recommend("--recipe", recipe, "--epochs", 4).plan
    assert (plan["epochs"], plan["learning_rate"], plan["origin"]["learning_rate"]) == (4, 5e-4, "recipe")
    assert plan["recipe"] == "../mine.toml"
    with run.edit() as manifest:
        assert manifest.data
        manifest.data.recipe = "../mine.toml"
    assert recommend().plan["epochs"] == 9  # what analyze was given counts, from any folder
    assert recommend("--recipe", "qwen3.5-0.8b-lora").plan["recipe"] == "qwen3.5-0.8b-lora"
    recipe.write_text("epoch = 9\n")
    wrong = recommend()
    assert wrong.status == 2
    assert "`epoch`" in wrong.err
    assert "did you mean `epochs`?" in wrong.err


def test_a_plan_that_does_not_fit_and_its_hint(recommend: Recommend, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Machine(name="small", device="cpu", memory=6 * plans.GB, cores=2)
    monkeypatch.setattr(step, "this_machine", lambda: small)
    answer = recommend("--mode", "full", "--epochs", 2)
    assert answer.status == 1
    assert "has 6.0 GB" in answer.err
    assert Run.open(run.root).manifest.plan is None
    hint = json.loads(answer.out)["hint"].split()
    assert hint[:3] == ["sparkctl", "recommend", str(run.root)]
    obeyed = recommend(*hint[3:])
    assert obeyed.status == 0, obeyed.err
    assert obeyed.plan["mode"] == "lora"
    assert obeyed.plan["epochs"] == 2


def test_before_analyze(recommend: Recommend, run: Run, tmp_path: Path) -> None:
    with run.edit() as manifest:
        manifest.analysis = None
    answer = recommend()
    assert answer.status == 2
    assert "no [analysis]" in answer.err
    assert "sparkctl analyze" in answer.err
    assert recommend(root=tmp_path / "nothing").status == 2


def test_while_another_step_works(recommend: Recommend, run: Run) -> None:
    with run.step("train"):
        answer = recommend("--epochs", 2)
    assert answer.status == 1
    assert "`train` is running" in answer.err


def trained(run: Run, status: str, at: int) -> None:
    """As if a training had come so far."""
    with run.edit() as manifest:
        manifest.train = TrainTable(
            status=status, started="now", engine="reference", versions={}, made_from="x", step=at, steps=15,
            trainable_parameters=1, estimated_seconds=1, estimated_peak_memory=1,
        )  # fmt: skip


def test_a_plan_that_was_trained_by_stays(recommend: Recommend, run: Run) -> None:
    recommend("--epochs", 2)
    trained(run, "done", 15)
    assert "up to date" in recommend("--epochs", 2).err
    answer = recommend("--epochs", 3)
    assert answer.status == 2
    assert "has been trained" in answer.err
    assert f"--parent {run.root}" in answer.err
    assert recommend("--epochs", 3, "--force").status == 0


def test_a_dry_run_on_a_trained_run_answers(recommend: Recommend, run: Run) -> None:
    recommend("--epochs", 2)
    trained(run, "done", 15)
    before = (run.root / "run.toml").read_bytes()
    answer = recommend("--epochs", 3, "--dry-run")
    assert (answer.status, answer.plan["epochs"]) == (0, 3)
    assert "without `--dry-run` this is refused" in answer.err
    assert (run.root / "run.toml").read_bytes() == before
    assert "sparkctl train" not in recommend("--epochs", 3, "--dry-run", json=False).out
    assert "refused" not in recommend("--epochs", 3, "--dry-run", "--force").err


def test_an_interrupted_training_may_be_carried_out_otherwise_but_not_learn_otherwise(
    recommend: Recommend, run: Run
) -> None:
    recommend("--epochs", 2)
    trained(run, "interrupted", 5)
    assert recommend("--epochs", 3).status == 2
    assert recommend("--epochs", 2, "--checkpointing").plan["checkpointing"]
    trained(run, "failed", 0)
    assert recommend("--epochs", 3).status == 0  # nothing was learnt yet


def test_a_round_takes_the_parents_plan(recommend: Recommend, run: Run, tmp_path: Path, llama_folder: Path) -> None:
    recommend("--learning-rate", "7e-4", "--epochs", 3)
    ready.run(tmp_path / "r2", llama_folder, parent=Run.open(run.root), seed=1)
    plan = recommend("--epochs", 2, root=tmp_path / "r2").plan
    assert (plan["learning_rate"], plan["origin"]["learning_rate"]) == (7e-4, "parent")
    assert (plan["epochs"], plan["origin"]["epochs"]) == (2, "flag")


def test_the_whole_command_on_a_real_model(
    tmp_path: Path, qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything as installed, in a process of its own: quick, and without torch once the machine is known."""
    monkeypatch.setenv("SPARKCTL_HOME", str(tmp_path / "home"))
    made = ready.run(tmp_path / "r1", qwen35_folder)
    with made.edit() as manifest:
        manifest.plan = None
    script = (
        "import sys; from sparkctl.cli import app; status = app.run(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    for torch_needed in ("True", "False"):
        start = time.monotonic()
        command = [sys.executable, "-c", script, "recommend", str(made.root), "--json", "--force"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == torch_needed
        assert time.monotonic() - start < 20
    costs = json.loads(done.stdout)["plan"]["estimates"]
    assert costs["steps"] > 0
    assert costs["seconds"] > 0
    assert costs["peak_memory"] == sum(costs["memory"].values())

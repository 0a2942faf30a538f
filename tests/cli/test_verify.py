"""`verify` as a command: what it prints, what it writes, and with which status it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ready
from faults import in_another_process as fault
from vllm_heads import without

from sparkctl.cli import app
from sparkctl.manifest.store import Run
from sparkctl.steps import certificate as certificate_step
from sparkctl.steps import verify_lossless
from sparkctl.steps.verify_leaks import Looked
from sparkctl.verify import lossless
from sparkctl.verify.leaks import Finding

Said = tuple[int, str, str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command line: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        status = app.run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    return run


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of a few steps on the native engine; proofs look at few packs."""
    monkeypatch.setattr(lossless, "PACKS", 4)
    monkeypatch.setattr(verify_lossless, "STEPS", 2)
    monkeypatch.setattr(verify_lossless, "FEWEST", 2)
    return ready.run(tmp_path / "run", llama_folder, count=24, engine="native")


def long(run: Run, seconds: float = 3601.0) -> Run:
    """The same run with another estimate."""
    with run.edit() as manifest:
        assert manifest.plan
        manifest.plan.estimates.seconds = seconds
    return run


def certificate(run: Run) -> Any:
    return Run.open(run.root).manifest.lossless


def test_the_certificate_is_shown_and_written(run: Run, say: Callable[..., Said]) -> None:
    status, out, err = say("verify", "lossless", run.root, "--steps", 2)
    assert status == 0, err
    assert out.startswith("lossless: native, lora, on ")
    assert "gradient of" in out
    assert any("_proj.lora_" in line and line.startswith("layers.*.") for line in out.splitlines())
    table = certificate(run)
    assert table.passed
    assert (table.engine, table.mode, table.steps, table.tensors) == ("native", "lora", 2, 14)
    assert table.worst_gradient_ratio < 2
    assert table.worst_fp32_distance < 1e-5
    assert "torch" in table.versions
    assert say("show", run.root, "--get", "lossless.passed")[1].strip() == "true"


@pytest.mark.parametrize(
    "wrong", ["'silu_mul', 'forward', into='y_TF'", "'lora_linear', 'add_weight_gradients', master='lora_a'"]
)
def test_one_per_cent_in_an_operator_or_a_gradient_fails_the_certificate(
    wrong: str, run: Run, say: Callable[..., Said], in_the_child: Callable[[str], None]
) -> None:
    in_the_child(fault(wrong))
    status, out, err = say("verify", "lossless", run.root, "--steps", 1, "--json")
    assert status == 1
    said = json.loads(out)
    assert said["ok"] is False
    assert "a formula differs" in said["problems"][0]
    assert said["lossless"]["passed"] is False
    assert {"truth", "reference", "engine"} == set(said["course"][0])
    assert len(said["tensors"]) == said["lossless"]["tensors"]
    assert "error: a formula differs" in err
    assert (
        f"hint: `sparkctl recommend {run.root} --engine reference`, or `sparkctl train {run.root} --no-certificate`"
        in err
    )
    assert not certificate(run).passed


def test_another_engine_can_be_looked_at(run: Run, say: Callable[..., Said]) -> None:
    status, out, _ = say("verify", "lossless", run.root, "--engine", "reference", "--steps", 1, "--json")
    assert status == 0
    assert json.loads(out)["lossless"]["worst_gradient_ratio"] == 1.0
    status, _, err = say("verify", "lossless", run.root, "--engine", "unsloth")
    assert status == 2
    assert "hint:" in err


def test_a_long_training_begins_with_its_certificate(run: Run, say: Callable[..., Said]) -> None:
    status, _, err = say("train", long(run).root)
    assert status == 0, err
    assert "first the certificate" in err
    first = certificate(run)
    assert first.passed
    status, _, err = say("train", run.root, "--force")
    assert status == 0
    assert "first the certificate" not in err  # it is there and true
    assert certificate(run).created == first.created
    with run.edit() as manifest:
        manifest.plan.learning_rate /= 2
    assert "first the certificate" in say("train", run.root, "--force")[2]


@pytest.mark.parametrize(("seconds", "engine"), [(3599.0, "native"), (7200.0, "reference")])
def test_short_trainings_and_the_judge_s_own_need_none(
    run: Run, say: Callable[..., Said], seconds: float, engine: Any
) -> None:
    with long(run, seconds).edit() as manifest:
        manifest.plan.engine = engine
    assert say("train", run.root)[0] == 0
    assert certificate(run) is None


def test_the_course_is_cheap_beside_the_training() -> None:
    def steps(rate: float, hours: float = 1.0) -> int:
        plan = ready.plan(pack_length=4096)
        plan.estimates.tokens_per_second, plan.estimates.seconds = rate, 3600 * hours
        return verify_lossless.affordable(plan)

    assert steps(30_000) == 30  # a GPU
    assert steps(100) == 5  # a CPU: no fewer than that
    assert 5 < steps(120, hours=4) < 30


@pytest.mark.parametrize("command", [("train",), ("verify", "lossless")])
def test_no_certificate_is_made_for_a_base_that_training_refuses(
    command: tuple[str, ...], run: Run, tmp_path: Path, qwen35_folder: Path, say: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It takes minutes, and the head that is lacking is no matter of the engine's: so it is said first."""
    monkeypatch.setattr(certificate_step, "certify", lambda *_: pytest.fail("a certificate is being made"))
    base = without(qwen35_folder, tmp_path / "base", "mtp.norm.weight")
    run = long(ready.run(tmp_path / "other", base, count=24, engine="native"))
    status, _, err = say(*command, run.root)
    assert status == 1
    assert "is not whole, so what is trained on it could not be merged" in err
    assert "promises `mtp.norm.weight`, and it is missing" in err
    assert certificate(run) is None


def test_a_dry_run_makes_none(run: Run, say: Callable[..., Said]) -> None:
    assert say("train", long(run).root, "--dry-run")[0] == 0
    assert certificate(run) is None


def test_leaks_of_a_run_s_architecture(run: Run, say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = say("verify", "leaks", run.root)
    assert status == 0, err
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert any(row.startswith("native engine attention none, to the bit seen (") for row in rows)
    assert any(row.startswith("reference engine attention none, to the bit seen (") for row in rows)
    assert any(row.startswith("transformers") for row in rows)
    assert rows[-2].startswith("sparkctl holds: in its operators and in its native engine and reference engine no ")
    assert rows[-1].startswith("transformers ")
    assert ("LEAKS between packed documents" in rows[-1]) == any(row.split()[-2] == "leaks" for row in rows[:-3])
    from sparkctl_kernels.attention import reference

    real = reference.attention
    monkeypatch.setattr(reference, "attention", lambda q, k, v, lengths, window: real(q, k, v, [len(q)], window))
    status, out, err = say("verify", "leaks", run.root, "--engine", "native", "--json")
    assert status == 1
    said = json.loads(out)
    assert said["problems"] == ["operator, attention: leaks", "native engine, attention: leaks"]
    assert {one["subject"].split(",")[0].split(" ")[0] for one in said["findings"]} == {
        "operator",
        "native",
        "transformers",
    }
    leaks = [one["leaks"] for one in said["findings"] if one["subject"].startswith("transformers")]
    assert said["transformers_leaks"] is any(leaks)
    assert "error: operator, attention: leaks" in err
    assert f"hint: sparkctl recommend {run.root} --engine reference\n" in err


def test_the_verdict_on_leaks_is_the_last_that_is_said(
    say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Finding("native engine", "attention", planted=1.0)
    wrong = Finding("transformers 5.17.0, position ids alone", "attention", leak=0.1, judged=False)
    right = Finding("transformers 5.17.0, everything right", "attention", judged=False)
    refused = Finding("transformers 5.17.0, cu_seq_lens alone", "attention", judged=False, refused="no such argument")

    def verdict(*found: Finding) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr("sparkctl.steps.verify_leaks.verify_leaks", lambda *_, **__: Looked(list(found), "no"))
        status, out, _ = say("verify", "leaks")
        lines = out.partition("verdict\n")[2].splitlines()
        return status, {name: said.strip() for name, _, said in (line.partition(" ") for line in lines)}

    operator = replace(ours, subject="operator")
    status, said = verdict(operator, ours, wrong, right)
    assert status == 0
    assert said["sparkctl"] == "holds: in its operators and in its native engine no document of a pack sees another"
    untried = replace(operator, refused="there is nothing for it")
    assert verdict(untried, ours)[1]["sparkctl"] == "holds: in its native engine no document of a pack sees another"
    assert said["transformers"].startswith(
        "5.17.0 LEAKS between packed documents on this machine, called with position ids alone. "
    )
    assert said["transformers"].endswith("In a script of your own that packs, call it with everything right")
    assert "whichever way it is called" in verdict(ours, wrong, refused)[1]["transformers"]
    assert verdict(ours, right)[1]["transformers"] == "holds, called in any of these ways"
    assert set(verdict(ours, refused)[1]) == {"sparkctl"}
    status, said = verdict(replace(ours, leak=0.1), right)
    assert (status, said["sparkctl"]) == (1, "FAILS: native engine; do not train on it here")


def test_resume_is_proved_in_processes_of_their_own(run: Run, say: Callable[..., Said]) -> None:
    status, out, err = say("verify", "resume", run.root, "--json")
    assert status == 0, err
    said = json.loads(out)
    assert (said["steps"], said["killed_at"], said["resumed_from"], said["differences"]) == (4, 3, 2, [])
    assert Run.open(run.root).manifest.train is None


def test_what_differs_after_a_resume_is_listed(
    run: Run, say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparkctl.steps import verify_resume

    made = verify_resume.Result(run.root, 4, 3, 2, ["metrics.jsonl: step 3: loss 1.0 straight, 1.1 resumed"])
    monkeypatch.setattr(verify_resume, "verify_resume", lambda *_, **__: made)
    status, out, err = say("verify", "resume", run.root)
    assert status == 1
    assert "1 difference\n" in out
    assert "error: metrics.jsonl: step 3: loss 1.0 straight, 1.1 resumed" in err
    assert f"hint: `sparkctl verify resume {run.root}`, once more; " in err


def test_a_whole_model_and_one_that_lacks_a_tensor(
    tmp_path: Path, llama_folder: Path, say: Callable[..., Said]
) -> None:
    from safetensors.torch import load_file, save_file

    assert say("verify", "model", llama_folder)[0] == 0
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, out, err = say("verify", "model", folder, "--json")
    assert status == 1
    assert json.loads(out)["problems"] == [f"config.json promises `{gone}`, and it is missing"]
    assert f"error: config.json promises `{gone}`" in err
    assert f"hint: hf download ORG/NAME --local-dir {folder}, or " in err
    status, _, err = say("verify", "model", tmp_path / "nothing")
    assert status == 2
    assert "hint: name a folder with config.json and safetensors weights\n" in err


def test_usage(run: Run, say: Callable[..., Said], tmp_path: Path) -> None:
    status, out, _ = say("verify", "--help")
    assert status == 0
    assert all(name in out for name in ("lossless", "leaks", "resume", "model"))
    for name in ("lossless", "resume", "leaks"):
        status, out, err = say("verify", name, tmp_path / "no-run", "--json")
        assert status == 2
        assert json.loads(out)["ok"] is False
        assert "hint:" in err
    assert say("verify", "--json")[0] == 2

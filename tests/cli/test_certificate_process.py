"""The certificate that a long `train` begins with: made in a process of its own, which leaves nothing in this one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ready
from faults import in_another_process as fault

from sparkctl.cli import app
from sparkctl.errors import AGAIN
from sparkctl.manifest.store import Run
from sparkctl.steps import verify_lossless


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    """A training of a few steps on the native engine that is thought to be long."""
    made = ready.run(tmp_path / "run", llama_folder, count=24, engine="native")
    with made.edit() as manifest:
        assert manifest.plan
        manifest.plan.estimates.seconds = 2 * verify_lossless.LONG
    return made


def certificate(run: Run) -> dict[str, object]:
    """[lossless], without its times."""
    table = Run.open(run.root).manifest.lossless
    return table.model_dump(exclude={"seconds", "created"}) if table else {}


def test_it_is_the_one_that_verify_lossless_makes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train", str(run.root)]) == 0, capsys.readouterr().err
    made = certificate(run)
    assert made["passed"]
    assert app.run(["verify", "lossless", str(run.root), "--steps", str(made["steps"])]) == 0
    assert certificate(run) == made


BEFORE_AND_AFTER = """
import json, sys
from pathlib import Path
from sparkctl.manifest.store import Run
from sparkctl.progress import silent
from sparkctl.steps import training, verify_lossless
from sparkctl.train.ranks import Ranks
run = Run.open(Path(sys.argv[1]))
verify_lossless.require(training.planned(run), Ranks(), silent)
print(json.dumps([run.manifest.lossless.passed, sorted({"transformers", "peft"} & set(sys.modules))]))
"""


def test_the_training_s_process_has_not_imported_transformers_yet(run: Run) -> None:
    """Unsloth, for one, wants to be imported before it."""
    done = subprocess.run([sys.executable, "-c", BEFORE_AND_AFTER, str(run.root)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [True, []], done.stderr


PATCHING = """
import json, sys
from pathlib import Path

Path({mark!r}).write_text(json.dumps(sorted({{"transformers", "peft"}} & set(sys.modules))))

def language_model():
    pass

def load(plan, folder, choices, **_):
    from sparkctl.train.engines import reference
    return reference.load(plan, folder, choices)
"""


def test_an_engine_is_judged_in_a_process_that_has_imported_nothing_before_it(
    run: Run, in_the_child: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Unsloth's place an engine that notes what was there as it was imported."""
    mark = tmp_path / "mark"
    (tmp_path / "patching.py").write_text(PATCHING.format(mark=str(mark)))
    in_the_child(
        f"sys.path.insert(0, {str(tmp_path)!r})\nfrom sparkctl.train.engines import ENGINES\n"
        "ENGINES['unsloth'] = 'patching'\n"
    )
    status = app.run(["verify", "lossless", str(run.root), "--engine", "unsloth", "--steps", "1", "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert json.loads(mark.read_text()) == []
    assert json.loads(said.out)["lossless"]["engine"] == "unsloth"
    assert left_behind(run) == []


def left_behind(run: Run) -> list[Path]:
    """Gradients that passed through the run's folder."""
    return list(run.root.glob(".certificate*"))


def test_a_wrong_engine_is_refused(
    run: Run, in_the_child: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_child(fault("'silu_mul', 'forward', into='y_TF'"))
    assert app.run(["train", str(run.root)]) == 1
    err = capsys.readouterr().err
    assert "error: the native engine is not lossless with this model on this machine: a formula differs" in err
    assert f"sparkctl train {run.root} --no-certificate" in err
    assert Run.open(run.root).manifest.train is None
    assert not certificate(run)["passed"]
    assert app.run(["train", str(run.root)]) == 1
    assert "first the certificate" not in capsys.readouterr().err  # the certificate that failed still stands
    assert app.run(["train", str(run.root), "--no-certificate"]) == 0


@pytest.mark.parametrize(
    ("lines", "said", "hint"),
    [
        (
            "os.kill(os.getpid(), 9)",
            "making the certificate failed: died of SIGKILL",
            "where memory ended, `ps -eo rss",
        ),
        (
            "import torch\n"
            "from sparkctl.train.engines import reference\n"
            "def load(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory')\n"
            "reference.load = load",
            "not enough memory for the truth in fp32",
            "free memory, or go without a certificate: `sparkctl train",
        ),
    ],
    ids=["killed", "memory"],
)
def test_what_fails_there_is_said_with_the_way_on(
    lines: str, said: str, hint: str, run: Run, in_the_child: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_child(lines)
    assert app.run(["train", str(run.root), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == said
    assert hint in answer["hint"]
    assert f"{run.root} --no-certificate" in answer["hint"]
    manifest = Run.open(run.root).manifest
    assert (manifest.lossless, manifest.train) == (None, None)


RAISING = """
from sparkctl.train.engines import reference
def load(*_, **__): raise {error}
reference.load = load
"""


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        ("PermissionError(13, 'Permission denied', '/m/x')", "permission denied at `/m/x`", "check the permissions"),
        ("FileNotFoundError(2, 'No such file or directory', '/m/x')", "no such file or directory at `/m/x`", "path"),
        ("OSError(28, 'No space left on device')", "no space left on device", "free some space there"),
    ],
)
def test_what_the_system_refuses_there_is_said_as_here(
    error: str, said: str, hint: str, run: Run, in_the_child: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_child(RAISING.format(error=error))
    assert app.run(["train", str(run.root), "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["error"] == said
    assert hint in answer["hint"]
    assert "--no-certificate" not in answer["hint"]
    assert "Traceback" not in captured.err


def test_a_bug_there_is_a_bug_here(
    run: Run, in_the_child: Callable[[str], None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_child(RAISING.format(error="ValueError('odd')"))
    monkeypatch.setattr(sys, "argv", ["sparkctl", "train", str(run.root)])
    monkeypatch.setattr(app, "_on_signals", lambda: None)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == app.BUG
    err = capfd.readouterr().err
    assert "ValueError: odd" in err
    assert "sitecustomize.py" in err  # where it was
    assert "--no-certificate" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_processes(
    number: signal.Signals, run: Run, in_the_child: Callable[[str], None], tmp_path: Path
) -> None:
    mark = tmp_path / "pid"
    in_the_child(f"open({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)")
    command = [sys.executable, "-m", "sparkctl", "train", str(run.root)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as training:
        end = time.monotonic() + 120
        while not mark.exists() or not mark.read_text():
            assert training.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        training.send_signal(number)
        _, err = training.communicate(timeout=30)
    assert training.returncode == 128 + number
    assert err.endswith(f"error: interrupted\nhint: {AGAIN}\n")
    assert not Path("/proc", mark.read_text()).exists()
    with Run.open(run.root).step("train"):  # nobody holds it
        assert certificate(run) == {}
    assert left_behind(run) == []

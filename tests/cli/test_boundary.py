"""The one error boundary: `error:` and `hint:`, exit statuses, JSON for failures, tracebacks for bugs alone."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from sparkctl import __version__
from sparkctl.cli import app
from sparkctl.errors import Interrupted, SparkError, Terminated, refused_by_system
from sparkctl.files import staged_folder
from sparkctl.steps import show

OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.19 GiB is "
    "free. Process 4711 has 130.00 GiB memory in use. Of the allocated memory 100.00 MiB is allocated by PyTorch"
)


def test_help_lists_the_commands_in_the_order_of_the_job() -> None:
    result = CliRunner().invoke(app.register(), ["--help"])
    assert result.exit_code == 0
    places = [result.stdout.index(f" {name} ") for name in app.COMMANDS]
    assert places == sorted(places)


def leaves() -> list[list[str]]:
    """Every command that does something, as words."""
    commands = typer.main.get_command(app.register()).commands  # type: ignore[attr-defined]  # a group
    return [
        [name, *leaf]
        for name, command in commands.items()
        for leaf in ([[inner] for inner in command.commands] if hasattr(command, "commands") else [[]])
    ]


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_every_command_has_help_and_its_options_on_itself(words: list[str]) -> None:
    result = CliRunner().invoke(app.register(), [*words, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.stdout


@pytest.mark.parametrize("words", [[], ["mtp"], ["train"], ["recommend"], ["mtp", "train"]], ids=" ".join)
def test_help_names_no_type_beside_a_flag(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--help" in shown
    assert "bool" not in shown
    assert ("<int" in shown) == (words not in ([], ["mtp"], ["train"]))  # what takes a value says of which type


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "r1", "--mode", "qlora"], "invalid value for '--mode': 'qlora' is not one of"),
        (["trane"], "trane"),
        (["show"], "missing argument"),
        (["show", "r", "--speed"], "--speed"),
        (["analyze", "d.jsonl", "--run", "r", "--max-seq-length", "0"], "--max-seq-length"),
        (["recommend", "r", "--mode", "half"], "half"),
        (["recommend", "r", "--epochs", "0"], "epochs"),
        (["show", "nowhere"], "is not a run"),
        (["show", "b[/z]"], "b[/z]` is not a run"),
        (["show", __file__], "is a file; a run is a folder"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "\nhint: " in said.err
    assert message in said.err
    assert "\nhint: " in said.err
    assert app.run([*arguments, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["exit_status"]) == (False, 2)
    assert message in report["error"]
    assert report["hint"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SparkError("it broke [here]", "mend it"), 1, "error: it broke [here]\nhint: mend it"),
        (Interrupted("stopped", "go on", signal.SIGINT), 130, "error: stopped"),
        (Interrupted("stopped", "go on", signal.SIGTERM), 143, "error: stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "error: no space left on device at `/x`"),
        (OSError(errno.EACCES, "Permission denied", "/x"), 1, "hint: check the permissions"),
        (OSError(errno.EISDIR, "Is a directory", "/x"), 1, "hint: that is a folder"),
        (OSError(errno.ENOTDIR, "Not a directory", "/x"), 1, "hint: a part of that path is a file"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "hint: mend what the system says there"),
        (OSError(errno.EIO, "Input/output error"), 1, "error: input/output error\nhint: mend what the system says"),
        (OSError(errno.EFBIG, "File too large"), 1, "error: file too large\nhint: that file system, or `ulimit -f`"),
        (KeyboardInterrupt(), 130, "error: interrupted\nhint: run the same command again"),
        (Terminated(), 143, "error: interrupted\nhint: run the same command again"),
        (OUT_OF_MEMORY, 1, "error: not enough GPU memory: 2.00 GiB were asked for, 1.19 GiB of 139.81 GiB are free\n"),
        (OUT_OF_MEMORY, 1, "hint: `nvidia-smi` shows who holds it; end that, or ask for less, then run the same"),
        (torch.OutOfMemoryError("of another device"), 1, "error: not enough memory\nhint: `ps "),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 1, "error: not enough GPU memory\n"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 1, "error: not enough GPU memory\n"),
        (MemoryError(), 1, "error: not enough memory\nhint: `ps -eo rss,args --sort=-rss | head` shows who holds it"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: not enough memory\n"),
        (RuntimeError("std::bad_alloc"), 1, "error: not enough memory\n"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 1, "error: not enough memory\n"),
        (OSError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_what_is_raised_becomes_a_message_and_a_status(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr(show, "show", fail)
    assert app.run(["show", "r"]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "deep/file/out"])
def test_a_place_under_a_file_is_no_target_that_exists(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `--force`, which cannot help there, is not advised."""
    (tmp_path / "deep").mkdir()
    for file in (tmp_path / "file", tmp_path / "deep" / "file"):
        file.touch()

    def write(*_: object, **__: object) -> None:
        with staged_folder(tmp_path / place):
            pass

    monkeypatch.setattr(show, "show", write)
    assert app.run(["show", "r1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not a directory at `")
    assert "hint: a part of that path is a file, not a folder: choose another path" in " ".join(said.split())
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "deep"):
        pass


def test_memory_that_ended_at_a_file_is_no_refusal() -> None:
    assert refused_by_system(OSError(errno.EIO, "Input/output error"))
    assert not refused_by_system(OSError(errno.ENOMEM, "Cannot allocate memory", "x.safetensors"))


def test_bare_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([]) == 0
    said = capsys.readouterr()
    assert "Usage: sparkctl" in said.out
    assert said.err == ""


def test_a_group_without_a_command_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["verify"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    names = "lossless, leaks, resume, model"
    assert said.err == f"error: missing command: {names}\nhint: sparkctl verify --help\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"sparkctl {__version__}\n"


def test_help_names_the_parts_of_bench_that_there_are() -> None:
    group = typer.main.get_command(app.register()).commands["bench"]  # type: ignore[attr-defined]  # a group
    assert set(re.findall(r"`(\w+)`", group.help)) == set(group.commands)


@pytest.mark.parametrize("bug", [ValueError("a bug of ours"), RuntimeError("The size of tensor a must match")])
def test_a_bug_is_a_traceback_and_70(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise bug

    monkeypatch.setattr(show, "show", fail)
    monkeypatch.setattr(sys, "argv", ["sparkctl", "show", "r"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 70
    assert "Traceback" in capsys.readouterr().err


INTERRUPTED_IN_TEXT = """
import sys
from sparkctl.cli import app
from sparkctl.steps import show

show.show = lambda folder: exec("import signal; signal.raise_signal(signal.SIGINT)")
sys.argv = ["sparkctl", "show", "r1"]
app.main()
"""


def test_ctrl_c_is_130_wherever_it_comes(tmp_path: Path) -> None:
    """`python -m` ends by SIGINT where KeyboardInterrupt has left an `exec` of text, though it was caught."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_IN_TEXT)
    done = subprocess.run([sys.executable, "-m", "interrupted"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (130, "error: interrupted")


WHILE_IMPORTING = """
import signal, sys

class Knock:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "typer":
            signal.raise_signal({number})

sys.meta_path.insert(0, Knock)
from sparkctl.__main__ import main
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_python_imports_is_answered(number: int, status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WHILE_IMPORTING.format(number=int(number)), "show", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert (done.returncode, said["error"], said["exit_status"]) == (status, "interrupted", status), done.stderr
    assert "Traceback" not in done.stderr


LAST_WORDS = """
import signal
from sparkctl.cli import app, console
said = console.failure

def failure(*arguments, **options):
    said(*arguments, **options)
    signal.raise_signal({number})

console.failure = failure
app.main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_amid_the_last_words_is_no_traceback(number: int, status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAST_WORDS.format(number=int(number)), "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_answer_changes_nothing(number: int) -> None:
    """Python ends then, and torch with it: what raised there would be a traceback."""
    ending = f"import atexit, signal; atexit.register(signal.raise_signal, {int(number)})"
    command = [sys.executable, "-c", f"{ending}; from sparkctl.__main__ import main; main()", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sparkctl {__version__}\n", "")


def test_the_installed_command_speaks_without_colour(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("sparkctl")
    done = subprocess.run([command, "show", tmp_path], capture_output=True, text=True, env={"NO_COLOR": "1"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert done.stderr.splitlines()[0].startswith("error: ")

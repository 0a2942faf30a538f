"""What is printed: values as they are, any encoding, nothing broken in a pipe, messages above a live bar."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sparkctl import errors
from sparkctl.cli import analysis, console, timings
from sparkctl.errors import SparkError
from sparkctl.manifest.schema import Histogram

LONG = " ".join(f"word{number}" for number in range(60))


class Terminal:
    """A pseudo-terminal of 60 columns in stderr's or stdout's place; `text` is what it was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        self._read, write = pty.openpty()
        self._file = open(write, "w", encoding="utf-8")  # noqa: SIM115  # closed in `text`
        self._sent = b""
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()
        monkeypatch.setattr(sys, stream, self._file)

    def text(self) -> str:
        self._file.close()
        self._thread.join(10)
        os.close(self._read)
        return self._sent.decode()

    def _drain(self) -> None:
        while True:
            try:
                chunk = os.read(self._read, 65536)
            except OSError:  # the other end is closed
                return
            self._sent += chunk


def words(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split()


@pytest.mark.parametrize("value", ["b[/z]", "[bold]x[/bold]", "back\\", ":smile:", "\\[a]", "[/]"])
def test_a_value_is_printed_as_it_is(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.answer({}, console.rows(value, (value, value)), json=False)
    console.failure(SparkError(value, value), json=False)
    said = capsys.readouterr()
    assert said.out.splitlines() == [value, f"{value}  {value}"]
    assert said.err.splitlines() == [f"error: {value}", f"hint: {value}"]


def test_a_pipe_gets_whole_lines_without_blanks_at_their_ends(capsys: pytest.CaptureFixture[str]) -> None:
    chat = Text("a  " + "x" * 300 + "  \nb")
    console.answer({}, Group(chat, console.rows(LONG, ("long", LONG), ("short", 1))), json=False)
    assert capsys.readouterr().out == f"{chat.plain}\n{LONG}\nlong   {LONG}\nshort  1\n"


def test_a_message_without_a_label_keeps_its_indent(capsys: pytest.CaptureFixture[str]) -> None:
    console.progress().say("  `sparkctl show r1` tells more")
    assert capsys.readouterr().err == "  `sparkctl show r1` tells more\n"


def test_a_terminal_gets_titles_unfolded_and_chats_unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, "stdout")
    table = Table()
    table.add_column("x")
    console.answer({}, Group(Text("y" * 200), console.titled("a title wider than its table", table)), json=False)
    said = terminal.text()
    assert "y" * 200 in said
    assert "a title wider than its table" in said


def test_a_terminal_gets_messages_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, "stderr")
    path = "/" + "p" * 100
    console.failure(SparkError(f"{LONG} {path}", LONG), json=False)
    said = terminal.text()
    assert words(said) == ["error:", *LONG.split(), path, "hint:", *LONG.split()]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()
    assert [line for line in lines if len(line) > 60] == [path]


def test_a_terminal_gets_commands_unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied from it is one line, whatever the terminal is wide."""
    terminal = Terminal(monkeypatch, "stderr")
    command = "sparkctl recommend runs/r1 --tokens-per-step 2048 --pack-length 2688 --max-steps 30"
    console.failure(SparkError(f"{LONG} `{command}` {LONG}", command), json=False)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text()).replace("\r", "").splitlines()
    assert f"`{command}`" in lines
    assert any(line.endswith(command) for line in lines[-2:])
    assert [line for line in lines if len(line) > 60 and command not in line] == []


def test_a_message_stands_above_the_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, "stderr")
    progress = console.progress()
    with progress.task("training", 4, unit="steps") as task:
        task.advance()
        task.note("loss 1.0 · 0:00:09 left")
        time.sleep(0.3)  # a refresh, so that the bar is there
        progress.say("step 6: held-out loss 2.5")
        with progress.task("within", 1):  # a second bar joins the first
            time.sleep(0.3)
    said = terminal.text()
    assert "within" in said
    before = said[: said.index("step 6:")]
    assert before.count("training") >= 1
    # the bar's line is erased, and nothing is printed between that and the message
    assert re.search(r"\x1b\[2K(\x1b\[[0-9;]*m)*$", before)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", re.split(r"[\r\n]", before[: before.rindex("left") + 4])[-1])
    assert "0:00:09 left" in last
    assert len(re.findall(r"\d:\d\d:\d\d", last)) == 1
    assert "-:--:--" not in last


def installed(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [Path(sys.executable).with_name("sparkctl"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


def test_an_encoding_that_lacks_characters(tmp_path: Path, qwen35_folder: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "größer?"}, {"role": "assistant", "content": "日本"}]
    data.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(3)))
    line = ("analyze", data, "--run", tmp_path / "größe", "--model", qwen35_folder, "--dry-run", "--show", 1)
    table = installed(*line, PYTHONIOENCODING="ascii")
    assert (table.returncode, b"Traceback" in table.stderr) == (0, False)
    assert b"analysis of gr??e" in table.stdout or b"analysis of gr?" in table.stdout
    plain = installed(*line, "--json", PYTHONIOENCODING="ascii")
    assert plain.returncode == 0
    assert json.loads(plain.stdout.decode("ascii"))["run"].endswith("größe")


def test_json_is_readable_where_the_encoding_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, text in (("utf-8", '{"a": "ß"}\n'), ("latin-1", '{"a": "\\u00df"}\n')):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        console.answer({"a": "ß"}, "", json=True)
        assert stream.buffer.getvalue().decode(encoding) == text  # type: ignore[attr-defined]  # a BytesIO


def test_sigterm_leaves_through_the_boundary(tmp_path: Path, qwen35_folder: Path) -> None:
    data, run = tiny.chats(tmp_path / "chats.jsonl", 40_000), tmp_path / "r1"
    command = [Path(sys.executable).with_name("sparkctl"), "analyze", data, "--run", run, "--model", qwen35_folder]
    process = subprocess.Popen([*map(str, command), "--json"], stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 60
    while not list(run.glob(".tokens.*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith(f"error: interrupted\nhint: {errors.AGAIN}\n")
    assert json.loads(out)["exit_status"] == 143
    assert list(run.glob(".tokens.*")) == []


def test_the_histogram_is_aligned(tmp_path: Path) -> None:
    class Analysis:
        histogram = Histogram(edges=[0, 128, 256, 384], counts=[40, 0, 1])

    lines = analysis._histogram(Analysis()).plain.splitlines()[-3:]  # type: ignore[arg-type]  # all it looks at
    assert lines == ["  0 to 127 " + "█" * 40 + " 40", "128 to 255 0", "256 to 383 █ 1"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_figures_fold_between_words_and_are_never_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(console, "out", lambda: Console(file=terminal, width=width))
    lines = [["linear_cross_entropy", "flash 2 of torch", "12.305", "", "12.302 to 12.321", "44%*"], ["x", "", "wrong"]]
    names = ["operator", "kernel", "ms", "busy ms", "p20 to p80", "of ceiling"]
    console.answer({}, console.figures(names, lines, left=2), json=False)
    shown = terminal.getvalue()
    found = set(shown.split())
    assert found == {word for line in [names[:3], names[4:], *lines] for cell in line for word in cell.split()}
    longest = max(len(line.rstrip()) for line in shown.splitlines())
    assert longest <= max(width, 65)  # 65: of the longest words side by side
    assert len(shown.splitlines()) == {60: 5, 80: 4, 200: 4}[width]  # two of the names, one longer than its figures


def test_columns_that_nobody_fills_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from sparkctl.bench.setting import setting
    from sparkctl.bench.step import Row
    from sparkctl.bench.worker import Measured

    at = setting(shape="qwen3.5-2b", mode="lora", pack=32, documents=1)
    measured = Measured.__new__(Measured)
    for name in Measured.__dataclass_fields__:
        object.__setattr__(measured, name, None)
    for name in ("p20", "p50", "p80"):
        object.__setattr__(measured, name, 2.0)
    rows = [Row("native", 32, measured), Row("stock", 32, None, failed="it broke [/here]")]
    console.answer({}, timings.step_table(at, rows), json=False)
    title, header, native, stock, failed, note = capsys.readouterr().out.splitlines()
    assert "in 1 document on" in title
    assert header.split() == ["stack", "tok/s", "p20", "to", "p80", "ratio"]
    assert native.split() == ["native", "16", "16", "to", "16", "1.00"]
    assert stock.split() == ["stock", "failed"]
    assert failed == "it broke [/here]"
    assert note == at.note

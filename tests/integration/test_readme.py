"""The README says what is true: its commands parse, its script is the tested one, its folders exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from sparkctl.cli.app import register

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]


def commands() -> list[str]:
    """Every `sparkctl …` line of a shell block, and every one in running text."""
    lines = [
        line
        for page in PAGES
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    inline = [text for page in PAGES for text in re.findall(r"`(sparkctl [a-z]+ [^`]+)`", page)]
    whole = [re.sub(r"^torchrun --nproc-per-node \d+ -m ", "", line.strip()) for line in [*lines, *inline]]
    return sorted({line for line in whole if line.startswith("sparkctl ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line: str) -> None:
    parse(shlex.split(line.replace('"$@"', "data.jsonl"), comments=True)[1:])


def parse(words: list[str]) -> None:
    """Read a command line as `sparkctl` does, down to the leaf command, and run nothing. Raises TyperException.

    A leaf that stands alone, without any argument, is spoken of and not called.
    """
    command, name, parent = typer.main.get_command(register()), "sparkctl", None
    while hasattr(command, "commands"):
        parent = command.make_context(name, words, parent=parent)
        _, command, words = command.resolve_command(parent, [*parent._protected_args, *parent.args])
        name = command.name
    if words:
        command.make_context(name, words, parent=parent)


@pytest.mark.parametrize("line", ["show run --no-such-option", "bench nosuchcommand", "bench step --no-such-option",
                                  "mtp train run --nonsense 3", "verify lossless run --bogus"])  # fmt: skip
def test_a_command_that_does_not_exist_would_be_caught(line: str) -> None:
    with pytest.raises(typer.TyperException):
        parse(line.split())


def test_the_retrain_round_is_the_tested_script() -> None:
    script = (ROOT / "docs" / "retrain.sh").read_text(encoding="utf-8")
    assert script in BLOCKS


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        target
        for page in PAGES
        for target in re.findall(r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", page, re.MULTILINE)
        for target in target
        if target
    }
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_every_folder_of_the_tree_exists() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    named = [line.split()[0] for line in tree.group(1).splitlines() if line.strip()]
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []

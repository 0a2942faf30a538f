"""Which of a run's open steps comes next."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkctl.steps import show
from sparkctl.steps.show import Step, next_command

ADAPTER = Step("adapter", "stale", mend="merge it")
TEXT = Step("adapter, text", "stale", mend="merge its text")
HEAD, SERVED = Step("mtp train", "not run", mend="train it"), Step("mtp inject", "not run", mend="inject it")


@pytest.mark.parametrize(
    ("steps", "then"),
    [
        ([ADAPTER, TEXT, HEAD, SERVED], "train it"),
        ([ADAPTER, TEXT, Step("mtp train", "done"), SERVED], "inject it"),
        ([ADAPTER, TEXT, Step("mtp train", "done")], "merge it"),
        ([Step("merge", "done")], None),
    ],
)
def test_no_step_waits_for_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Step], then: str | None
) -> None:
    monkeypatch.setattr(show.Run, "open", lambda folder: None)
    monkeypatch.setattr(show, "_steps", lambda run, shown: steps)
    assert next_command(tmp_path) == then

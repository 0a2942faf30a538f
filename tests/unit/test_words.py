"""Words of messages."""

from __future__ import annotations

from sparkctl.cli.analysis import _dropped
from sparkctl.manifest.schema import Dropped
from sparkctl.words import heading


def test_a_heading_says_what_became_of_the_work() -> None:
    made = "2026-11-26T21:34:31Z"
    assert heading("merge", dry_run=False, up_to_date=False, made=made) == "merge"
    assert heading("merge", dry_run=True, up_to_date=False, made=None) == "merge (dry run: nothing written)"
    told = "merge (up to date: nothing was done, this is the result of 2026-11-26 21:34 UTC)"
    assert heading("merge", dry_run=True, up_to_date=True, made=made) == told
    assert "this is an earlier result" in heading("merge", dry_run=False, up_to_date=True, made=None)


def test_one_dropped_line_is_told_in_the_singular() -> None:
    assert _dropped(Dropped()) == "none"
    assert _dropped(Dropped(bad_lines=1)) == "1 bad line"
    assert _dropped(Dropped(too_long=1, bad_lines=1200)) == "1 too long, 1,200 bad lines"

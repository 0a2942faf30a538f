"""What `sparkctl mtp inject` says where it does not do what was asked: why, and the command that helps."""

from __future__ import annotations

from pathlib import Path

import heads
import pytest
from injecting import DEFAULT, Said, answer, captured, inject, merged  # noqa: F401  # fixtures too

from sparkctl.manifest.store import Run


def test_links_that_are_not_made_say_why(run: Run, said: Said, tmp_path: Path) -> None:
    """And the command that is named makes them."""
    heads.rebuilt(Path("base"), tmp_path / "single", 1)
    line = (*DEFAULT, "--into", "single", "--out", "made", "--link")
    for more in (("--dry-run",), (), ()):  # the last is up to date
        result = answer(said, *line, *more)
        assert result["linked"] == 0
        assert result["unlinked"] == (
            "`model.safetensors` holds an MTP head among other tensors, and is written anew without it; with the head "
            "in a file of its own, as in `made`, a model is linked: "
            "`sparkctl mtp inject r1 --mode default --into made --link --out FOLDER`"
        )
    inject(*line)
    assert "MTP head among other tensors" in " ".join(said.readouterr().out.split())
    again = result["unlinked"].split("`")[-2].replace("FOLDER", "linked").split()
    result = answer(said, *again[3:])
    assert (result["linked"], result["unlinked"]) == (1, "")
    assert heads.equal(heads.own(Path("linked")), heads.own(Path("base")))
    inject(*DEFAULT, "--out", "copied")
    assert answer(said, *DEFAULT, "--out", "copied")["unlinked"] == ""  # who did not ask for links is told nothing
    result = answer(said, *DEFAULT, "--out", "copied", "--link")
    force = "sparkctl mtp inject r1 --mode default --out copied --link --force"
    assert result["unlinked"] == f"the folder was written without links; `{force}` makes them"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparkctl.mtp.inject._linked", lambda *_: False)
        result = answer(said, *force.split()[3:])
    assert result["unlinked"].startswith("the file system of `copied` takes no hard link to `r1/merged`; `sparkctl mtp")
    assert answer(said, *force.split()[3:])["unlinked"] == ""

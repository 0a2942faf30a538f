"""`sparkctl mtp inject --mode trained` with a head of another merged model than [merge] speaks of."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import heads
import merging_run
import pytest
from injecting import TRAINED, Said, captured, inject, merged, refused  # noqa: F401  # fixtures too
from safetensors.torch import load_file

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest.store import Run
from sparkctl.merge.seal import read_seal
from sparkctl.train import state

BEST, NAMED = "step-000003", "step-000006"


def train_for_what_is_merged(run: Run) -> None:
    """A trained head that the manifest says was made for the merged model as it is now."""
    heads.trained_head(run)
    with run.edit() as manifest:
        assert manifest.mtp
        assert manifest.merge
        seal = read_seal(run.root / manifest.merge.folder)
        assert seal
        manifest.mtp.merged = seal.digest


def test_a_head_of_another_merged_model(run: Run, said: Said) -> None:
    train_for_what_is_merged(run)
    inject(*TRAINED)
    assert sparkctl(["merge", "r1", "--checkpoint", "last", "--force"]) == 0
    text = refused(said, 2, *TRAINED)
    assert "was trained for another merged model" in text
    assert "hint: sparkctl mtp train r1 --force" in text
    inject(*TRAINED, "--into", "r1/merged", "--out", "mine")  # who names the folder means it


def test_a_head_of_a_merged_model_in_another_folder(run: Run, said: Said) -> None:
    """Which the user need not train anew: to merge into that folder once more is all."""
    train_for_what_is_merged(run)
    assert sparkctl(["merge", "r1", "--checkpoint", "last", "--out", "last one"]) == 0
    text = refused(said, 2, *TRAINED)
    assert "hint: `sparkctl merge r1` takes that one again; `sparkctl mtp train r1 --force` trains a head for" in text
    assert sparkctl(["merge", "r1"]) == 0
    inject(*TRAINED)


def trained_anew(run: Run) -> None:
    """The checkpoint has the same name, and other bytes."""
    path = run.root / "checkpoints" / BEST
    weights, at = load_file(path / state.TRAINABLE), state.read_state(path)
    shutil.rmtree(path)
    entry = merging_run.save(run, {name: tensor + 1 for name, tensor in weights.items()}, at)
    with run.edit() as manifest:
        assert manifest.train
        manifest.train.started = "2100-01-01T00:00:00Z"
        manifest.checkpoints = [entry if c.id == BEST else c for c in manifest.checkpoints]


def checkpoint_gone(run: Run) -> None:
    shutil.rmtree(run.root / "checkpoints" / BEST)


def checkpoint_forgotten(run: Run) -> None:
    """One that was named, and gives way to the best."""
    with run.edit() as manifest:
        manifest.checkpoints = [c for c in manifest.checkpoints if c.id != NAMED]


@pytest.mark.parametrize(
    ("named", "then"),
    [((), trained_anew), ((), checkpoint_gone), (("--checkpoint", NAMED), checkpoint_forgotten)],
)
def test_a_merged_model_that_no_command_gives_again(
    named: tuple[str, ...], then: Callable[[Run], None], run: Run, said: Said
) -> None:
    assert sparkctl(["merge", "r1", *named, "--out", "of the head"]) == 0
    train_for_what_is_merged(run)
    assert sparkctl(["merge", "r1", "--checkpoint", BEST if named else "last", "--force"]) == 0
    again = "`sparkctl merge r1 " + " ".join((*named, "--out 'of the head'")) + "` takes that one again; "
    assert again in refused(said, 2, *TRAINED)
    then(run)
    assert "\nhint: sparkctl mtp train r1 --force\n" in refused(said, 2, *TRAINED)

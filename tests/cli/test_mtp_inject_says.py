"""What `sparkctl mtp inject` says where it does not do what was asked: why, and the command that helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import heads
import pytest
import torch
from hub_server import HubServer
from injecting import DEFAULT, TRAINED, Said, answer, captured, inject, merged, refused  # noqa: F401  # fixtures too
from safetensors.torch import load_file, save_file

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


LINE = "sparkctl mtp inject r1 --mode default"


def less(path: Path, name: str = "mtp.fc.weight") -> Path:
    """The safetensors file without one of its tensors."""
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)
    return path


def refused_as_recorded(run: Run, said: Said, path: Path) -> str:
    """What inject says to a trained head that is as the manifest records it."""
    with run.edit() as manifest:
        assert manifest.mtp
        manifest.mtp.digest = heads.sha256_file(path)
    text = refused(said, 1, *TRAINED)
    assert "hint: sparkctl mtp train r1 --force\n" in text
    return text


def test_a_trained_head_that_is_not_whole_is_trained_anew(run: Run, said: Said) -> None:
    """There is nothing to fetch."""
    path = less(heads.trained_head(run))
    assert "is not whole: it lacks `mtp.fc.weight`" in refused_as_recorded(run, said, path)
    tensors = load_file(heads.trained_head(run))
    tensors["mtp.norm.weight"][0] = torch.nan
    save_file(tensors, path)
    assert "is not finite" in refused_as_recorded(run, said, path)


def test_a_published_head_that_does_not_do_is_taken_elsewhere(
    hub: HubServer, run: Run, said: Said, tmp_path: Path
) -> None:
    """The folder anew where that is what is broken, another head where it is not; with the user's own arguments."""
    single = heads.rebuilt(Path("base"), tmp_path / "single", 1)
    less(single / "model.safetensors")
    for source, hint in (
        ("single", "hf download ORG/NAME --local-dir single, or save the model there again"),
        ("org/single", f"{LINE} --from HUB_ID --out new"),
    ):
        hub.publish("org/single", single)
        text = refused(said, 1, *DEFAULT, "--from", source, "--out", "new")
        assert "is not whole: it lacks `mtp.fc.weight`" in text
        assert f"hint: {hint}\n" in text
    heads.head_file(Path("single/model.safetensors"), ffn=96)
    infinite = heads.rebuilt(Path("base"), tmp_path / "infinite", 1)
    tensors = load_file(infinite / "model.safetensors")
    tensors["mtp.norm.weight"][0] = torch.inf
    save_file(tensors, infinite / "model.safetensors")
    two = heads.configured(heads.rebuilt(Path("base"), tmp_path / "two", 1), mtp_num_hidden_layers=2)
    lost = heads.configured(heads.rebuilt(Path("base"), tmp_path / "lost", 1), mtp_num_hidden_layers=0)
    for folder, what in (
        (single, "has other dimensions"), (infinite, "is not finite"), (two, "has 2 layers"), (lost, "promises none"),
    ):  # fmt: skip
        text = refused(said, 1, *DEFAULT, "--from", folder.name)
        assert what in text
        assert f"hint: {LINE} --from HUB_ID\n" in text


def test_a_head_that_is_damaged_where_it_is_published(hub: HubServer, run: Run, said: Said, tmp_path: Path) -> None:
    broken = heads.rebuilt(Path("base"), tmp_path / "broken", 1)
    (broken / "model.safetensors").write_bytes(b"not a model" * 1000)
    hub.publish("org/broken", broken)
    text = refused(said, 1, *DEFAULT, "--from", "org/broken", "--link")
    assert "`org/broken/model.safetensors` is no safetensors file" in text
    assert f"hint: {LINE} --from HUB_ID --link\n" in text


def test_a_model_that_is_not_whole_is_had_anew(run: Run, said: Said, tmp_path: Path) -> None:
    """By its own folder, and nothing was written."""
    less(heads.rebuilt(Path("base"), tmp_path / "cut", 1) / "model.safetensors", "model.language_model.norm.weight")
    text = refused(said, 1, *DEFAULT, "--into", "cut")
    assert "hint: `cut` is not whole either: hf download ORG/NAME --local-dir cut, " in text
    assert "; nothing was written to `" in text


def test_a_folder_that_takes_no_head_says_so(run: Run, said: Said, tmp_path: Path, llama_folder: Path) -> None:
    """Nothing is trained there."""
    path = heads.rebuilt(Path("base"), tmp_path / "fp8", 1) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    Path("file").touch()
    for into, what in (
        ("fp8", "`fp8` is quantised (fp8); an MTP head goes beside weights that are not"),
        (str(llama_folder), "is of type `llama`, which takes no MTP head"),
        ("file", "`file` is a file, and `--into` names the folder of a model"),
        ("none", "no folder `none`, and `--into` names the folder of a model"),
    ):
        text = refused(said, 2, *DEFAULT, "--into", into)
        assert what in text
        assert "training" not in text
        assert f"hint: {LINE} --into FOLDER\n" in text


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--force",)])
def test_a_target_under_a_file(more: tuple[str, ...], run: Run, said: Said) -> None:
    """Which no `--force` replaces."""
    Path("file").touch()
    for out in ("file/out", "file/deep/out"):
        text = refused(said, 2, *DEFAULT, "--out", out, *more)
        assert f"`file` is a file: `{out}` cannot be in it" in text
        assert f"hint: {LINE} --out FOLDER\n" in text


def test_a_full_disk_names_the_command_for_another(run: Run, said: Said, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 100_000))
    text = refused(said, 1, *DEFAULT, "--out", str(small_disk / "out"))
    assert f"hint: `{LINE} --out FOLDER` writes elsewhere; or free some space there\n" in text

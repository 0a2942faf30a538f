"""`sparkctl mtp inject` from the command line: what it writes, says and records, and what it refuses."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import heads
import merging
import merging_run
import pytest
import tiny
from hub_server import HubServer
from injecting import DEFAULT, TRAINED, Said, answer, captured, inject, merged, refused  # noqa: F401  # fixtures too
from safetensors.torch import load_file

from sparkctl.cli.app import run as sparkctl
from sparkctl.manifest import schema
from sparkctl.manifest.store import Run
from sparkctl.steps.mtp_eval import SHIPPED


def test_the_trained_head_is_injected_recorded_and_served(run: Run, said: Said) -> None:
    head = heads.trained_head(run)
    result = answer(said, *TRAINED)
    assert heads.equal(heads.own(run.root / "served"), load_file(head))
    body = {n: t for n, t in merging.tensors(run.root / "served").items() if not n.startswith("mtp.")}
    assert heads.equal(
        body, {n: t for n, t in merging.tensors(run.root / "merged").items() if not n.startswith("mtp.")}
    )
    manifest = Run.open(run.root).manifest
    table, entry = manifest.served, manifest.checkpoint("served-000003")
    assert table
    assert entry
    assert (table.mode, table.shipped, table.source, table.model, table.folder) == (
        "trained", False, "mtp/head.safetensors", "merged", "served",
    )  # fmt: skip
    assert (table.tensors, table.bytes, table.head_digest) == (
        result["tensors"], result["bytes"], result["head_digest"],
    )  # fmt: skip
    assert result["tensors"] == len(merging.tensors(run.root / "served"))
    assert (entry.kind, entry.parent, entry.path, entry.eval_loss) == ("served", "merged-000003", "served", 0.3)
    spoken = f'\'{{"method":"mtp","num_speculative_tokens":{result["draft_length"]}}}\''
    assert result["draft_length"] > 0
    assert result["serve"] == (
        f"vllm serve r1/served --served-model-name r1 --max-model-len 4096 --speculative-config {spoken}"
    )
    card = (run.root / "served" / "README.md").read_text()
    assert result["serve"].replace("r1/served", ".") in card
    assert card.count("vllm serve") == 1
    assert "## MTP head" in card
    assert str(run.root.parent) not in card


def test_the_default_head_is_the_bases(run: Run, said: Said) -> None:
    result = answer(said, *DEFAULT)
    assert result["source"] == "base"
    assert heads.equal(heads.own(Path("r1/served")), heads.own(Path("base")))
    said.readouterr()
    inject(*DEFAULT, "--force")
    shown = said.readouterr().out
    assert "acceptance is assumed (.93/.89/.84" in shown
    assert "`sparkctl mtp eval r1` measures it" in shown
    assert shown.rstrip().splitlines()[-1].startswith("vllm serve r1/served ")


def test_measured_acceptance_gives_the_length(run: Run, said: Said) -> None:
    """A head whose second guess is never right is worth one draft."""
    for rates, length in (((0.9, 0.0, 0.0), 1), ((0.9, 0.85, 0.8), 3), ((0.01, 0.0, 0.0), 0)):
        heads.trained_head(run, rates=rates)
        result = answer(said, *TRAINED, "--dry-run")
        assert result["draft_length"] == length
        assert "as measured" in result["reason"]
        assert ("speculative" in result["serve"]) == (length > 0)
    heads.trained_head(run, rates=(0.9, 0.0, 0.0), name=SHIPPED)
    assert answer(said, *DEFAULT, "--dry-run")["draft_length"] == 1
    assert "assumed" in answer(said, *TRAINED, "--dry-run")["reason"]


def test_a_second_run_is_up_to_date_until_something_changes(run: Run, said: Said) -> None:
    heads.trained_head(run)
    inject(*TRAINED)
    written = Path("r1/served/config.json").stat().st_mtime_ns, Path("r1/run.toml").read_bytes()
    assert answer(said, *TRAINED)["up_to_date"] is True
    inject(*TRAINED)
    assert "mtp inject (up to date: nothing was done, this is the result of 20" in said.readouterr().out
    assert (Path("r1/served/config.json").stat().st_mtime_ns, Path("r1/run.toml").read_bytes()) == written
    assert "another model or another head" in refused(said, 2, *DEFAULT)
    heads.trained_head(run, seed=6)
    assert "another model or another head" in refused(said, 2, *TRAINED)
    assert answer(said, *TRAINED, "--force")["up_to_date"] is False
    assert sparkctl(["merge", "r1", "--checkpoint", "last", "--force"]) == 0
    refused(said, 2, *TRAINED)
    answer(said, *TRAINED, "--force")
    assert [c.id for c in Run.open(run.root).manifest.checkpoints if c.kind == "served"] == ["served-000006"]
    (run.root / "served" / "model-mtp.safetensors").unlink()
    refused(said, 2, *TRAINED)
    assert answer(said, *TRAINED, "--force")["up_to_date"] is False


def test_up_to_date_is_said_without_torch(run: Run) -> None:
    inject(*DEFAULT)
    program = (
        "import sys; from sparkctl.cli.app import run; status = run(['mtp', 'inject', 'r1', '--mode', 'default']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stderr


def test_only_the_process_beside_it_imports_torch(run: Run) -> None:
    """Which builds the model's class while the bytes are copied."""
    program = (
        "import sys; from sparkctl.cli.app import run; status = run(['mtp', 'inject', 'r1', '--mode', 'default']); "
        "sys.exit(status or bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sparkctl(["verify", "model", "r1/served"]) == 0


def test_a_dry_run_writes_nothing_and_counts_the_same(run: Run, said: Said) -> None:
    before = Path("r1/run.toml").read_bytes(), sorted(run.root.iterdir())
    planned = answer(said, *DEFAULT, "--dry-run")
    assert (Path("r1/run.toml").read_bytes(), sorted(run.root.iterdir())) == before
    done = answer(said, *DEFAULT)
    assert all(planned[key] == done[key] for key in ("tensors", "bytes", "head_digest", "serve", "draft_length"))


def test_links_in_place_of_copies(run: Run, said: Said) -> None:
    result = answer(said, *DEFAULT, "--link")
    shards = sorted(path.name for path in Path("r1/merged").glob("*-of-*.safetensors"))
    assert result["linked"] == len(shards) > 1
    assert all(Path("r1/served", name).samefile(Path("r1/merged", name)) for name in shards)
    assert answer(said, *DEFAULT)["linked"] == len(shards)  # up to date: as it is
    assert answer(said, *DEFAULT, "--force")["linked"] == 0
    assert answer(said, *DEFAULT, "--link", "--force", "--dry-run")["linked"] == 0
    inject(*DEFAULT, "--link", "--force")
    assert sparkctl(["merge", "r1", "--checkpoint", "last", "--force"]) == 0  # whose new files are files of their own
    assert not any(Path("r1/served", name).samefile(Path("r1/merged", name)) for name in shards)
    assert answer(said, "r1", "--mode", "default", "--out", "other", "--link")["linked"] == len(shards)


def test_a_folder_of_another_tool(run: Run, said: Said, tmp_path: Path) -> None:
    """Text alone, in one file, without a head: what transformers saves."""
    other = tiny.hybrid(tmp_path / "other", seed=4)
    heads.configured(other, mtp_num_hidden_layers=0)
    for mode in ("default", "trained"):
        heads.trained_head(run)
        result = answer(said, "r1", "--mode", mode, "--into", "other", "--out", mode)
        wanted = heads.own(Path("base")) if mode == "default" else load_file("r1/mtp/head.safetensors")
        assert heads.equal(heads.own(Path(mode)), wanted)
        assert result["model"] == "other"
        served = Run.open(run.root).manifest.served
        assert served
        assert (served.model, served.folder) == ("../other", f"../{mode}")
    assert answer(said, "r1", "--mode", "default", "--into", "other", "--out", "default")["up_to_date"]
    os.utime(other / "model.safetensors")
    assert "another model" in refused(said, 2, "r1", "--mode", "default", "--into", "other", "--out", "default")


def test_the_head_of_a_hub_model(hub: HubServer, run: Run, said: Said, tmp_path: Path) -> None:
    upstream = heads.rebuilt(tiny.qwen35(tmp_path / "made", seed=9), tmp_path / "upstream", 1)
    commit = hub.publish("org/up", upstream)
    planned = answer(said, *DEFAULT, "--from", "org/up", "--dry-run")
    assert not list((tmp_path / "cache").rglob("head.*"))
    result = answer(said, *DEFAULT, "--from", "org/up")
    assert all(planned[key] == result[key] for key in ("tensors", "bytes", "source", "serve"))
    assert result["source"] == "org/up"
    assert heads.equal(heads.own(Path("r1/served")), heads.own(upstream))
    served = Run.open(run.root).manifest.served
    assert served
    assert served.source == f"org/up@{commit}"
    hub.requests.clear()
    assert answer(said, *DEFAULT, "--from", "org/up")["up_to_date"]
    assert len(hub.requests) == 1
    shutil.rmtree(tmp_path / "cache")
    again = answer(said, *DEFAULT, "--from", "org/up", "--dry-run")
    assert (again["up_to_date"], again["head_digest"]) == (True, result["head_digest"])
    hub.fail("GET /api/", status=404, code="RepoNotFound")
    assert "no model `org/none`" in refused(said, 2, *DEFAULT, "--from", "org/none")


def test_the_record_follows_a_run_that_moves(run: Run, tmp_path: Path) -> None:
    tiny.hybrid(tmp_path / "other", seed=4)
    inject("r1", "--mode", "default", "--into", "other", "--out", "out")
    (tmp_path / "deep").mkdir()
    moved = Run.open(Path(shutil.move("r1", "deep/r1"))).manifest.served
    assert moved
    assert (moved.model, moved.folder, moved.source) == ("../../other", "../../out", "../../base")


def test_a_base_of_another_family_is_skipped(
    llama_folder: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = merging_run.trained_run(tmp_path / "r1", llama_folder)
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.model_type = "llama"
    monkeypatch.chdir(tmp_path)
    assert sparkctl(["merge", "r1"]) == 0
    for arguments in (TRAINED, DEFAULT):
        result = answer(said, *arguments)
        assert "only Qwen3.5 has an MTP head" in result["skipped"]
        assert result["ok"] is True
        assert result["serve"].startswith("vllm serve r1/merged ")
        assert "speculative" not in result["serve"]
    table = Run.open(run.root).manifest.mtp
    assert table
    assert (table.mode, table.skipped) == ("skipped", result["skipped"])
    assert not Path("r1/served").exists()
    inject(*DEFAULT)
    shown = said.readouterr()
    assert "skipped" in shown.out + shown.err


def test_a_base_without_a_head_is_skipped_until_one_is_named(
    qwen35_folder: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = merging_run.trained_run(tmp_path / "r1", tiny.hybrid(tmp_path / "base"))
    heads.configured(tmp_path / "base", mtp_num_hidden_layers=0)
    monkeypatch.chdir(tmp_path)
    with run.edit() as manifest:
        assert manifest.model
        manifest.model.config_sha256 = heads.sha256_file(tmp_path / "base" / "config.json")
        manifest.model.model_type = "qwen3_5_text"
    assert sparkctl(["merge", "r1"]) == 0
    assert "has no MTP head" in answer(said, *DEFAULT)["skipped"]
    inject(*DEFAULT)
    assert "hint: sparkctl mtp inject r1 --mode default --from HUB_ID\n" in said.readouterr().err
    assert "has no MTP head" in answer(said, *TRAINED)["skipped"]
    mtp = Run.open(run.root).manifest.mtp
    assert mtp
    assert mtp.mode == "skipped"
    assert answer(said, *DEFAULT, "--from", str(qwen35_folder))["skipped"] is None
    assert heads.equal(heads.own(Path("r1/served")), heads.own(qwen35_folder))
    assert "has no MTP head" in refused(said, 1, *DEFAULT, "--from", "base", "--out", "new")


def test_a_shipped_head_that_was_kept(run: Run, said: Said) -> None:
    head = heads.trained_head(run, rates=(0.9, 0.0, 0.0), name=SHIPPED)
    with run.edit() as manifest:
        assert manifest.mtp
        manifest.mtp.mode = "shipped"
    said.readouterr()
    inject(*TRAINED)
    text = said.readouterr()
    assert "training the MTP head did not help: `mtp train` kept the base's own" in text.err
    assert "the base's, since training did not help, from r1/mtp/head.safetensors" in " ".join(text.out.split())
    assert heads.equal(heads.own(Path("r1/served")), load_file(head))
    assert Run.open(run.root).manifest.served.draft_length == 1  # measured as the shipped head's
    card = (run.root / "served" / "README.md").read_text()
    assert "as the base was published with it" in card
    assert " 1 token to draft." in card
    assert sparkctl(["show", "r1"]) == 0
    shown = " ".join(said.readouterr().out.split())
    assert "the base's head, since training did not help, 1 token to draft → r1/served" in shown
    assert "trained head" not in shown


def test_a_head_whose_training_has_not_ended(run: Run, said: Said) -> None:
    with run.edit() as manifest:
        manifest.mtp = schema.MtpTable(mode="training", made_from="test")
    assert "has no trained MTP head yet" in refused(said, 2, *TRAINED)


def test_what_is_missing_is_named(run: Run, said: Said) -> None:
    text = refused(said, 2, *TRAINED)
    assert "`r1` has no trained MTP head yet" in text
    assert "`sparkctl mtp train r1` trains one; `--mode default`" in text
    refused(said, 2, *TRAINED, "--from", "base")
    assert "no folder `nowhere`" in refused(said, 2, *DEFAULT, "--into", "nowhere")
    assert "no folder `nowhere`" in refused(said, 2, *DEFAULT, "--from", "nowhere")
    head = heads.trained_head(run)
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    assert "hint: sparkctl mtp train r1 --force" in refused(said, 1, *TRAINED)
    head.unlink()
    assert "is not what `mtp train` wrote" in refused(said, 1, *TRAINED)
    refused(said, 2, "r1")
    refused(said, 2, "r1", "--mode", "best")
    shard = next(Path("r1/merged").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x")
    assert "hint: sparkctl merge r1 --force" in refused(said, 2, *DEFAULT)
    with run.edit() as manifest:
        manifest.merge = None
    assert "hint: sparkctl merge r1" in refused(said, 2, *DEFAULT)


def test_a_head_of_other_dimensions(run: Run, said: Said, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "text_settings", lambda: _settings(intermediate_size=96))
        patch.setattr(tiny, "mtp_tensors", lambda **sizes: _tensors(**(sizes | {"ffn": 96})))
        tiny.qwen35(tmp_path / "wider")
    text = refused(said, 1, *DEFAULT, "--from", "wider")
    assert "has other dimensions than the model: `mtp.layers.0.mlp.gate_proj.weight` [96, 32] for [64, 32]" in text


_settings, _tensors = tiny.text_settings, tiny.mtp_tensors


def test_a_target_that_exists_is_left_alone(run: Run, said: Said) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    for options in ((), ("--force",)):
        text = refused(said, 2, *DEFAULT, "--out", "mine", *options)
        assert "no `mtp inject` wrote it" in text
        assert "hint: sparkctl mtp inject r1 --mode default --out FOLDER" in text
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    Path("file").write_text("mine")
    refused(said, 2, *DEFAULT, "--out", "file", "--force")
    for taken in ("r1", "r1/merged", "base"):
        refused(said, 2, *DEFAULT, "--out", taken, "--force")
    inject(*DEFAULT, "--out", "m")
    inject(*DEFAULT, "--into", "m", "--out", "n")
    assert "holds what is to be read" in refused(said, 2, *DEFAULT, "--into", "m", "--out", "m", "--force")


def test_what_a_killed_injection_left_beside_its_target_is_swept(run: Run) -> None:
    for name in (".m.abc.tmp", ".mine.abc.tmp"):
        Path(name).mkdir()
    inject(*DEFAULT, "--out", "m")
    assert not Path(".m.abc.tmp").exists()
    assert Path(".mine.abc.tmp").exists()


@pytest.mark.parametrize("seen", [True, False])
def test_a_full_disk_leaves_nothing(seen: bool, run: Run, small_disk: Path, said: Said) -> None:
    """A disk that is too small is seen before the work; one that fills up meanwhile, when it is full."""
    size = sum(path.stat().st_size for path in Path("r1/merged").glob("*.safetensors"))
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - size // 2))
    with pytest.MonkeyPatch.context() as patch:
        if not seen:
            patch.setattr("sparkctl.mtp.inject.require_space", lambda *_: None)
        text = refused(said, 1, *DEFAULT, "--out", str(small_disk / "out"))
    assert ("MB free" in text) == seen
    assert (os.strerror(errno.ENOSPC).lower() in text) != seen
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert Run.open(run.root).manifest.served is None

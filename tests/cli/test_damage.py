"""What changed behind a finished training's back is named: its checkpoints, the base it began with, its analysis."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import heads
import pytest
import ready
import tiny
import torch
from analyzing import chat, lines
from damaging import Said, flip, said
from safetensors.torch import load_file, save_file

from sparkctl.data import tokens
from sparkctl.files import sha256_file
from sparkctl.manifest.store import Run
from sparkctl.steps.train import train
from sparkctl.train import state
from sparkctl.words import here


@pytest.fixture(scope="module", autouse=True)
def _best_in_the_middle() -> Iterator[None]:
    """The held-out loss is least at step 3 of 4, so that best and last are two."""

    def loss(*arguments: object) -> float:
        return {0: 3.0, 3: 1.0, 4: 2.0}[int(str(arguments[-1]).split()[-1])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparkctl.train.loop.held_out_loss", loss)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A folder with a base model and a run trained on it. Read only: copy it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(llama_folder, folder / "base")
    run = ready.run(folder / "run", folder / "base", count=24)
    (run.root / "chat_template.jinja").write_text("template")
    with run.edit() as manifest:
        manifest.model.chat_template.sha256 = sha256_file(run.root / "chat_template.jinja")
    train(run.root)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy, times and all."""
    return Path(shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copy2))


def placed(index: Path) -> dict[str, str]:
    """Tensor → file of an index."""
    return dict(json.loads(index.read_text())["weight_map"])


def trained_weights(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted((folder / "run" / "checkpoints").glob("*/*.safetensors"))
    }


@pytest.mark.parametrize("which", ["best_checkpoint", "last_checkpoint"])
@pytest.mark.parametrize("file", [state.TRAINABLE, state.OPTIMIZER, state.STATE])
def test_a_flipped_bit_in_a_finished_run(folder: Path, finished: Path, capsys: Said, which: str, file: str) -> None:
    """The last one is trained again, bit for bit; in place of the best, which nothing follows from, the last serves."""
    assert said(capsys, "train", folder / "run")[0] == 0
    id = getattr(Run.open(folder / "run").manifest.train, which)
    flip(folder / "run" / "checkpoints" / id / file)
    status, text = said(capsys, "train", folder / "run")
    assert status == 2
    assert "damaged" in text
    assert "sparkctl resume" in text
    status, text = said(capsys, "show", folder / "run", "--json")
    step = json.loads(text)["steps"]["train"]
    assert step["status"] == "stopped"
    assert "sparkctl resume" in step["hint"]
    status, text = said(capsys, "resume", folder / "run")
    assert status == 0, text
    assert (trained_weights(folder) == trained_weights(finished)) == (which == "last_checkpoint" or file == state.STATE)
    best = "step-000003" if which == "last_checkpoint" else "step-000004"
    assert Run.open(folder / "run").manifest.train.best_checkpoint == best
    assert said(capsys, "train", folder / "run")[0] == 0


def test_a_flipped_bit_among_the_tokens(
    llama_folder: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained on it, no round follows it, and analysing again takes no row from it."""
    data, run = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "run"
    assert said(capsys, "analyze", data, "--run", run, "--model", llama_folder)[0] == 0
    assert said(capsys, "recommend", run)[0] == 0
    arrow = run / "tokens" / tokens.ARROW
    whole = arrow.read_bytes()
    flip(arrow)
    status, text = said(capsys, "train", run, "--no-certificate")
    assert status == 1
    assert "not those that `analyze` wrote" in text
    assert not (run / "metrics.jsonl").exists()
    status, text = said(capsys, "analyze", data, "--run", tmp_path / "child", "--parent", run)
    assert (status, f"--run {run} --force" in text) == (1, True)
    status, text = said(capsys, "analyze", data, "--run", run, "--force", "--json")
    assert (status, json.loads(text)["analysis"]["reused"]) == (0, 0)
    assert arrow.read_bytes() == whole


def test_a_base_that_was_moved_is_named_anew(llama_folder: Path, tmp_path: Path, capsys: Said) -> None:
    """By the very command that the hint says; the plan holds on."""
    data, run, base = tiny.chats(tmp_path / "chats.jsonl"), tmp_path / "run", tmp_path / "base"
    shutil.copytree(llama_folder, base)
    assert said(capsys, "analyze", data, "--run", run, "--model", base)[0] == 0
    assert said(capsys, "recommend", run)[0] == 0
    base.rename(tmp_path / "elsewhere")
    for command in (("train", run), ("recommend", run, "--force")):
        status, text = said(capsys, *command)
        assert (status, f"no folder `{base}`" in text) == (2, True)
        hint = text.partition("hint: put it back, or `sparkctl ")[2].partition("`")[0]
        assert hint.endswith("--model FOLDER --force"), text
    status, text = said(capsys, "analyze", data, "--run", run, "--force")
    assert (status, "--model FOLDER" in text) == (2, True)
    status, text = said(capsys, *hint.replace("FOLDER", str(tmp_path / "elsewhere")).split())
    assert status == 0, text
    status, text = said(capsys, "train", run, "--dry-run")
    assert status == 0, text


@pytest.mark.parametrize("amiss", ["flipped", "gone", "without digests"])
def test_a_best_checkpoint_that_is_not_whole_gives_way_to_the_last(folder: Path, capsys: Said, amiss: str) -> None:
    """It is named and not merged; the last one, which is whole, stays as it is."""
    run, best = folder / "run", folder / "run" / "checkpoints" / "step-000003"
    last = {path.name: path.read_bytes() for path in (run / "checkpoints" / "step-000004").iterdir()}
    if amiss == "flipped":
        flip(best / state.TRAINABLE)
    elif amiss == "gone":
        shutil.rmtree(best)
    else:
        (best / state.DIGESTS).unlink()
    status, text = said(capsys, "merge", run)
    assert status != 0
    assert not (run / "merged").exists()
    hint = "merge {} --checkpoint step-000004" if amiss == "gone" else "resume {} --from step-000004"
    if amiss != "without digests":
        assert f"hint: sparkctl {hint.format(run)}" in text
    status, text = said(capsys, "resume", run)
    assert status == 0, text
    assert "resuming from step-000004" in text
    assert f"`{best}" in text
    assert "the best checkpoint is step-000004 now" in text
    trained = Run.open(run).manifest.train
    assert (trained.status, trained.best_checkpoint, trained.best_eval_loss) == ("done", "step-000004", 2.0)
    assert {path.name: path.read_bytes() for path in (run / "checkpoints" / "step-000004").iterdir()} == last
    assert said(capsys, "train", run)[0] == 0
    status, text = said(capsys, "merge", run, "--json")
    assert (status, json.loads(text)["checkpoint"]) == (0, "step-000004")


@pytest.mark.parametrize("command", ["merge", "resume --from step-000003"])
def test_a_base_changed_in_place(folder: Path, capsys: Said, command: str) -> None:
    name, *options = command.split()
    flip(folder / "base" / "model.safetensors")
    status, text = said(capsys, name, folder / "run", *options)
    assert status == 2
    assert "model.safetensors changed" in text
    assert f"sparkctl train {folder / 'run'} --force" in " ".join(text.split())


@pytest.mark.parametrize("amiss", ["an absent tensor", "an index that counts wrongly"])
def test_a_base_that_is_not_whole_is_named_before_training(
    tmp_path: Path, qwen35_folder: Path, capsys: Said, amiss: str
) -> None:
    """Not after hours, by the audit of a merge; a total that a merge counts anew is no obstacle."""
    base = Path(shutil.copytree(qwen35_folder, tmp_path / "base"))
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if amiss == "an absent tensor":
        (base / "model-mtp.safetensors").unlink()
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith("mtp.")}
    path.write_text(json.dumps(index | {"metadata": {"total_size": 1}}))
    run = ready.run(tmp_path / "run", base, count=24)
    status, text = said(capsys, "train", run.root)
    if amiss == "an absent tensor":
        assert status == 1
        assert "promises `mtp.fc.weight`, and it is missing" in " ".join(text.split())
        assert "and 12 more" in " ".join(text.split())
        assert "mtp_num_hidden_layers" in text
        assert not (run.root / "checkpoints").exists()
        assert Run.open(run.root).manifest.train is None
    else:
        assert status == 0, text


@pytest.mark.parametrize("amiss", ["is missing", "cut"])
def test_a_shard_of_the_model_that_is_not_whole_is_named_at_once(
    tmp_path: Path, qwen35_folder: Path, capsys: Said, amiss: str
) -> None:
    """By analyze and by recommend, from headers alone; weights that are still to come are no obstacle."""
    base = Path(shutil.copytree(qwen35_folder, tmp_path / "base"))
    shard = base / "model-mtp.safetensors"
    data = lines(tmp_path / "chats.jsonl", *(chat(f"question {i}", f"answer {i}") for i in range(20)))
    analyze = ("analyze", data, "--run", tmp_path / "r1", "--model", base)
    run = ready.run(tmp_path / "run", base, count=24)
    content = shard.read_bytes()
    shard.unlink()
    if amiss == "cut":
        shard.write_bytes(content[:-1])
    for command in (analyze, (*analyze, "--dry-run"), ("recommend", run.root, "--force")):
        status, text = said(capsys, *command)
        assert status == 1, text
        assert f"`{here(shard)}`" in text
        assert amiss in text
        assert f"hint: hf download ORG/NAME --local-dir {here(base)}" in text
    assert not (tmp_path / "r1").exists()
    for path in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        path.unlink()
    assert said(capsys, *analyze)[0] == 0


@pytest.mark.parametrize("promised", [1, 0])
def test_a_head_that_the_weights_lack_is_named_at_once(
    tmp_path: Path, qwen35_folder: Path, capsys: Said, promised: int
) -> None:
    """As transformers saves a Qwen3.5; a config.json that promises none is right."""
    base = heads.configured(Path(shutil.copytree(qwen35_folder, tmp_path / "base")), mtp_num_hidden_layers=promised)
    data = lines(tmp_path / "chats.jsonl", *(chat(f"question {i}", f"answer {i}") for i in range(20)))
    run = ready.run(tmp_path / "run", base, count=24)
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for n, f in placed(index).items() if not n.startswith("mtp.")}}))
    (base / "model-mtp.safetensors").unlink()
    for command in (("analyze", data, "--run", tmp_path / "r1", "--model", base), ("recommend", run.root, "--force")):
        status, text = said(capsys, *command)
        assert (status, "lacks the MTP head" in " ".join(text.split())) == ((1, True) if promised else (0, False)), text
        assert ("set `mtp_num_hidden_layers` to 0" in " ".join(text.split())) == bool(promised)


@pytest.mark.parametrize("part", ["visual", "language_model"])
def test_quantised_weights_are_named_at_once_where_config_json_says_nothing_of_them(
    tmp_path: Path, qwen35_folder: Path, capsys: Said, part: str
) -> None:
    """By analyze and by recommend, without torch; a vision tower, which is not trained, is no obstacle."""
    base = Path(shutil.copytree(qwen35_folder, tmp_path / "base"))
    data = lines(tmp_path / "chats.jsonl", *(chat(f"question {i}", f"answer {i}") for i in range(20)))
    run = ready.run(tmp_path / "run", base, count=24)
    for path in base.glob("model-0*.safetensors"):
        tensors = load_file(path)
        odd = {
            name: tensor.to(torch.float8_e4m3fn)
            for name, tensor in tensors.items()
            if name.startswith(f"model.{part}.")
        }
        save_file(tensors | odd, path)
    for command in (("analyze", data, "--run", tmp_path / "r1", "--model", base), ("recommend", run.root, "--force")):
        status, text = said(capsys, *command)
        if part == "visual":
            assert status == 0, text
            continue
        assert status == 1, text
        assert f"error: `{here(base)}` is quantised: `model.language_model." in text
        assert "is F8_E4M3, which cannot be trained" in text
        assert "hint: name the bf16 model" in text
    assert (tmp_path / "r1").exists() == (part == "visual")


def test_a_base_that_was_only_touched(folder: Path, capsys: Said) -> None:
    (folder / "base" / "model.safetensors").touch()
    assert said(capsys, "merge", folder / "run")[0] == 0
    base = Run.open(folder / "run").manifest.train.base
    assert [file.sha256 for file in base.files] == [sha256_file(folder / "base" / "model.safetensors")]


def test_a_base_that_is_as_it_was_is_not_read_again(
    folder: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparkctl.steps.bases.sha256_file", lambda path: pytest.fail(f"{path} was read"))
    assert said(capsys, "merge", folder / "run")[0] == 0


@pytest.mark.parametrize("config", ["same", "other"])
def test_a_run_analysed_anew_for_another_model(folder: Path, capsys: Said, config: str) -> None:
    """`analyze --force --model OTHER`, of the same shapes: adapters of the one never go onto the other."""
    other = tiny.dense(folder / "other", seed=1)
    if config == "other":
        values = json.loads((other / "config.json").read_text()) | {"bos_token_id": 7}
        (other / "config.json").write_text(json.dumps(values))
    run = Run.open(folder / "run")
    with run.edit() as manifest:
        manifest.model.source = run.relative(other)
        manifest.model.config_sha256 = sha256_file(other / "config.json")
    status, text = said(capsys, "merge", folder / "run")
    assert status == 2
    assert "was trained on" in " ".join(text.split())
    assert f"sparkctl train {folder / 'run'} --force" in " ".join(text.split())
    assert not (folder / "run" / "merged").exists()


def test_a_round_does_not_continue_a_damaged_best(folder: Path, tmp_path: Path, capsys: Said) -> None:
    """Its weights would be taken without a word."""
    parent = Run.open(folder / "run")
    child = ready.run(tmp_path / "child", folder / "base", parent=parent, continues=True, count=24)
    weights = parent.root / "checkpoints" / "step-000003" / state.TRAINABLE
    whole = weights.read_bytes()
    flip(weights)
    status, text = said(capsys, "train", child.root)
    assert (status, "step-000003/trainable.safetensors` is damaged" in text) == (1, True), text
    assert not (child.root / "checkpoints").exists()
    weights.write_bytes(whole)
    assert said(capsys, "train", child.root)[0] == 0

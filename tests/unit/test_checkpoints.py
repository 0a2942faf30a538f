"""Checkpoints on disk: whole or absent, every flipped bit noticed, written without a second copy in memory."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ready
import torch

from sparkctl.errors import SparkError
from sparkctl.train import random as randoms
from sparkctl.train import state
from sparkctl.train.optim import Optimizer
from sparkctl.train.state import CheckpointDamaged, State


def optimizer(seed: int = 0) -> Optimizer:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.lora_A.weight": (4, 6), "layers.0.lora_B.weight": (5, 4), "norm": (7,)}
    made = Optimizer(
        {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}, ready.plan()
    )
    for parameter in made.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    made.step(1e-2)
    return made


def at(step: int, **values: object) -> State:
    return State(mode="lora", lora={"r": 4, "alpha": 8}, step=step, **values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        state.save(tmp_path, at(step, eval_loss=1 / step), optimizer(step))
    return tmp_path


def test_everything_comes_back(folder: Path) -> None:
    torch.manual_seed(5)
    before = optimizer(30)
    state.save(folder, at(40, recent_losses=[0.1, 1 / 3], best_checkpoint="step-000020"), before)
    drawn = torch.rand(3), random.random()
    after = optimizer(1)
    restored = state.load(folder / "step-000040", after)
    assert restored == at(40, recent_losses=[0.1, 1 / 3], best_checkpoint="step-000020")
    assert all(torch.equal(before.parameters[n], after.parameters[n]) for n in before.parameters)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before.moments(), after.moments(), strict=True))
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


def test_the_layout_that_others_read(folder: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = folder / "step-000020"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "digests.json", "optimizer.safetensors", "state.json", "trainable.safetensors",
    ]  # fmt: skip
    values = json.loads((checkpoint / "state.json").read_text())
    assert (values["mode"], values["step"], values["lora"], values["eval_loss"]) == (
        "lora", 20, {"r": 4, "alpha": 8}, 0.05,
    )  # fmt: skip
    trained = load_file(checkpoint / "trainable.safetensors")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in trained.items()} == {
        n: (torch.float32, tuple(p.shape)) for n, p in optimizer().parameters.items()
    }
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {"exp_avg.norm", "exp_avg_sq.norm", "random.torch"} <= set(moments)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "digests.json"])
def test_a_flipped_bit_is_noticed_and_named_and_the_one_before_taken(folder: Path, name: str) -> None:
    path = folder / "step-000030" / name
    whole = path.read_bytes()
    assert state.newest_complete(folder) == (folder / "step-000030", [])
    bits = random.Random(name)
    for bit in [bits.randrange(8 * len(whole)) for _ in range(150)]:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointDamaged, match="step-000030/"):
            state.verify(folder / "step-000030")
    found, damaged = state.newest_complete(folder)
    assert found == folder / "step-000020"
    assert ["step-000030/" in problem for problem in damaged] == [True]
    path.unlink()
    assert state.newest_complete(folder)[0] == folder / "step-000020"


def test_a_checkpoint_of_another_version_is_refused(folder: Path) -> None:
    checkpoint = folder / "step-000030"
    at = json.loads((checkpoint / "state.json").read_bytes()) | {"format": 2}
    (checkpoint / "state.json").write_text(json.dumps(at))
    digests = json.loads((checkpoint / "digests.json").read_bytes())
    digests["state.json"] = hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
    (checkpoint / "digests.json").write_text(json.dumps(digests, sort_keys=True, separators=(",", ":")))
    with pytest.raises(CheckpointDamaged, match="is of another version"):
        state.verify(checkpoint)


def test_none_is_complete(folder: Path, tmp_path: Path) -> None:
    for checkpoint in state.listed(folder):
        (checkpoint / "digests.json").unlink()
    found, damaged = state.newest_complete(folder)
    assert found is None
    assert len(damaged) == 3
    assert state.newest_complete(tmp_path / "absent") == (None, [])


@pytest.fixture
def risen(tmp_path: Path) -> Path:
    """Held-out losses of 1.0, 1.2, 1.1 and none at steps 10 to 40, of which each checkpoint names the best by then."""
    for step, loss in ((10, 1.0), (20, 1.2), (30, 1.1), (40, None)):
        state.save(tmp_path, at(step, eval_loss=loss, best_checkpoint="step-000010", best_eval_loss=1.0), optimizer())
    return tmp_path


def best_at(folder: Path, step: int) -> tuple[str | None, float | None, list[str]]:
    """What a training that goes on from that checkpoint takes for the best, its loss, and why it is not the named."""
    stands = state.read_state(folder / state.checkpoint_id(step))
    found, problems = state.with_whole_best(stands, folder)
    same = found.model_copy(update={"best_checkpoint": stands.best_checkpoint, "best_eval_loss": stands.best_eval_loss})
    assert same == stands
    return found.best_checkpoint, found.best_eval_loss, problems


def test_a_best_that_was_pruned_gives_way_to_the_best_of_those_left(risen: Path) -> None:
    assert best_at(risen, 40) == ("step-000010", 1.0, [])
    state.remove(risen / "step-000010")
    gone = f"`{risen / 'step-000010'}` is no longer there"
    assert state.newest_complete(risen) == (risen / "step-000040", [])
    assert best_at(risen, 40) == ("step-000030", 1.1, [gone])
    assert best_at(risen, 20) == ("step-000020", 1.2, [gone])  # not a later one
    state.remove(risen / "step-000020")
    state.remove(risen / "step-000030")
    assert best_at(risen, 40) == (None, None, [gone])  # nothing was measured at step 40


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "digests.json"])
def test_a_best_that_is_damaged_is_named_and_gives_way_too(risen: Path, name: str) -> None:
    """As do others that are; the newest, which is whole, stays the place to go on from."""
    for step in (10, 30):
        (risen / state.checkpoint_id(step) / name).write_bytes(b"{}")
    id, loss, problems = best_at(risen, 40)
    assert (id, loss) == ("step-000020", 1.2)
    assert f"`{risen}/step-000010/{name}" in problems[0]
    assert len(problems) == (1 if name == "state.json" else 2)  # of an unreadable one nobody knows the loss
    assert state.newest_complete(risen) == (risen / "step-000040", [])


def test_of_equal_losses_the_earlier_is_the_best(risen: Path) -> None:
    state.save(risen, at(20, eval_loss=1.1, best_checkpoint="step-000010", best_eval_loss=1.0), optimizer())
    state.remove(risen / "step-000010")
    assert best_at(risen, 40)[:2] == ("step-000020", 1.1)


def test_where_nothing_is_held_out_the_newest_stays_the_best(tmp_path: Path) -> None:
    for step in (10, 20):
        state.save(tmp_path, at(step, best_checkpoint=state.checkpoint_id(step)), optimizer())
    assert best_at(tmp_path, 20) == ("step-000020", None, [])


def test_the_newest_and_the_best_are_kept(folder: Path) -> None:
    state.save(folder, at(1000000), optimizer())
    assert state.prune(folder, 2, "step-000010") == ["step-000020"]
    assert [p.name for p in state.listed(folder)] == ["step-000010", "step-000030", "step-1000000"]
    assert state.prune(folder, 1, "step-1000000") == ["step-000010", "step-000030"]
    assert [p.name for p in folder.iterdir()] == ["step-1000000"]


def test_tensors_of_another_model_are_refused(folder: Path) -> None:
    other = Optimizer({"norm": torch.nn.Parameter(torch.ones(7))}, ready.plan())
    with pytest.raises(SparkError, match="other tensors"):
        state.load(folder / "step-000010", other)
    assert torch.equal(other.parameters["norm"], torch.ones(7))


def test_a_full_disk_leaves_the_earlier_ones(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    values = {"a": torch.nn.Parameter(torch.ones(100, 250))}  # 0.1 MB, 0.3 MB a checkpoint
    big = Optimizer(values, ready.plan())
    fit = shutil.disk_usage(small_disk).free // 310_000
    for step in range(fit):
        state.save(folder, at(step), big)
    with pytest.raises(OSError, match="No space left"):
        state.save(folder, at(fit), big)
    assert sorted(p.name for p in folder.iterdir()) == [state.checkpoint_id(n) for n in range(fit)]
    for checkpoint in state.listed(folder):
        state.verify(checkpoint)
    shutil.rmtree(folder / "step-000000")
    state.save(folder, at(fit), big)
    assert state.newest_complete(folder)[0] == folder / state.checkpoint_id(fit)


def test_a_rehearsed_draw_does_not_count() -> None:
    randoms.seed_all(3)
    wanted = torch.rand(2), random.random()
    randoms.seed_all(3)
    with randoms.untouched():
        torch.rand(7)
        random.random()
    assert torch.equal(torch.rand(2), wanted[0])
    assert random.random() == wanted[1]


PEAK = """
import sys, torch, ready
from pathlib import Path
from sparkctl.train import state
from sparkctl.train.optim import Optimizer
values = {f"w{i}": torch.nn.Parameter(torch.ones(1 << 20)) for i in range(32)}  # 32 of 4 MB
optimizer = Optimizer(values, ready.plan())
for _, moment in optimizer.moments():
    moment.fill_(1)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
small = Optimizer({"a": torch.nn.Parameter(torch.ones(4))}, ready.plan())
state.save(Path(sys.argv[1]), state.State(mode="full", step=1), small)
before = peak()
state.save(Path(sys.argv[1]), state.State(mode="full", step=2), optimizer)
print((peak() - before) // 1024)
"""


def test_saving_holds_no_second_copy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    paths = {"PYTHONPATH": f"{Path(__file__).parents[1]}:{':'.join(sys.path)}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=paths)
    assert int(done.stdout) < 24  # MB, of 384 that are written; observed 7

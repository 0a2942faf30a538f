"""From a command line to a workload: which model, which documents, on which device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparkctl.bench.workload import Workload, synthetic
from sparkctl.errors import OtherOptions, UsageError
from sparkctl.files import sha256_file
from sparkctl.hardware import nvml
from sparkctl.hardware.machine import this_machine, torch_has_cuda
from sparkctl.manifest.schema import Machine
from sparkctl.manifest.store import Run
from sparkctl.manifest.table import Mode
from sparkctl.model import catalog
from sparkctl.model.families import FAMILIES, count
from sparkctl.model.hub import has_weights, locate
from sparkctl.model.inspect import inspect, read_config
from sparkctl.model.served import lacking
from sparkctl.words import counted, quoted

TINY_PACK, TINY_RANK = 256, 16  # tokens and LoRA rank on a machine without a GPU
DOCUMENTS = 12


@dataclass(frozen=True)
class Setting:
    """What is measured where. name: of the shape; parameters: of the text model; note: what a reader must know.

    model_key and pack_length: of the trainings that a rate tells of, as measurements are kept; None for a shape whose
    config.json is not here.
    """

    name: str
    work: Workload
    parameters: int
    machine: Machine
    note: str | None = None
    model_key: str | None = None
    pack_length: int = 0


def setting(
    *, mode: Mode, pack: int, shape: str | None = None, documents: int = DOCUMENTS, model: Path | None = None,
    run: Path | None = None, rank: int = 128, checkpointing: bool = False,
) -> Setting:  # fmt: skip
    """The workload asked for: of a model, else of a shape, else on a GPU of the run's model, else of the usual shape.

    Without a GPU the demo's tiny shape stands in for a published one. Raises UsageError.
    """
    machine, note = this_machine(), None
    if run and not model and not shape and machine.device != "cpu":
        model = _base_of(Run.open(run))
    shape = shape or catalog.BENCHED
    config, name = (_served(model, machine.device), model.name) if model else (catalog.config(shape), shape)
    if machine.device == "cpu" and model is None:
        from sparkctl.demo.model import config as tiny

        config, name, pack, rank = tiny(), "the demo's tiny shape", min(pack, TINY_PACK), min(rank, TINY_RANK)
        note = without_gpu()
    weights = str(model.resolve()) if model and has_weights(model) else None
    if model and not weights:
        note = f"`{model}` has no weights: random ones"
    rest = dict(rank=rank, checkpointing=checkpointing, checkpoint=weights)
    if run:
        work = _from_run(run, config, mode, pack, **rest)
    else:
        require_room(documents, pack)
        work = synthetic(config, mode, pack, documents, **rest)
    key = sha256_file(model / "config.json") if model else None
    return Setting(name, work, text_parameters(config), machine, note, key, pack)


def _base_of(run: Run) -> Path:
    """The folder of a run's base model; of one on the hub, with what is in the cache."""
    table = run.manifest.model
    if table is None:
        raise UsageError(f"no [model] in `{run.root}`", f"sparkctl analyze DATA --run {quoted(run.root)} --model MODEL")
    return locate(table.source, revision=table.revision, base=run.root).folder


def _served(model: Path, device: str) -> dict[str, Any]:
    """config.json of that folder. Raises UsageError where it holds no model, or one that the native engine has nothing
    for on this device: of it no stack could be compared with another.
    """
    config = read_config(model, hub=False)
    if what := lacking(inspect(model, allow_unknown=True), device):
        raise UsageError(
            f"there is nothing to measure for {what}: the native engine does not compute `{model}`",
            f"name a folder of one of the types {', '.join(FAMILIES)}, or a published shape by `--shape`",
        )
    return config


def require_room(documents: int, pack: int) -> None:
    """Raise UsageError unless so many documents of two tokens and more fit."""
    if not 0 < documents <= pack // 2:
        message = f"{counted(documents, 'document')} of two tokens and more do not fit into a pack of {pack:,}"
        raise OtherOptions(message, documents=pack // 2)


def without_gpu() -> str:
    """What a reader must know of figures taken on a CPU."""
    if nvml.read().gpu and not torch_has_cuda():
        return "this torch was built without CUDA, so the GPU here stays unused: a tiny shape on the CPU"
    return "there is no GPU that torch can use here: a tiny shape on the CPU, whose figures say nothing of a GPU"


def text_parameters(config: dict[str, Any]) -> int:
    """Parameters of the text model of a config."""
    return count(str(config.get("model_type")), config, Path("config.json")).text_parameters


def _from_run(folder: Path, config: dict[str, Any], mode: Mode, pack: int, **rest: Any) -> Workload:
    """The lengths and labels of the fullest of the run's packs, the first where several are."""
    from sparkctl.data.pack import best_fit
    from sparkctl.data.tokens import TokenStore

    store = TokenStore.open(Run.open(folder).root / "tokens")
    lengths = store.lengths[~store.held_out]
    rows = np.flatnonzero(~store.held_out & (store.lengths <= pack))
    if not len(rows):
        message = f"no training document of `{folder}` is as short as {pack} tokens"
        raise OtherOptions(message, pack=int(lengths.max()))
    packs = best_fit(store.lengths[rows], pack, seed=0)
    fullest = rows[packs.pack(int(np.argmax(packs.sums(store.lengths[rows]))))]
    return Workload(
        config, mode, tuple(map(int, store.lengths[fullest])), tuple(map(int, store.label_counts[fullest])), **rest
    )

"""What was measured on this machine, kept over all runs in the user's data folder.

    measurements.json   {"schema": 1, "training": [...], "probes": [...], "products": [...]}, one entry a machine and
                        what was measured

It is a notebook, not data of a run: where it cannot be read it counts as empty, where it cannot be written training
ends as well as ever.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from sparkctl import env
from sparkctl.files import write_atomic
from sparkctl.hardware.machine import identity
from sparkctl.hardware.software import versions
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import Machine
from sparkctl.manifest.table import EngineName, Mode

NAME = "measurements.json"
ENOUGH = 5  # steps at least that make a rate


class Kind(NamedTuple):
    """What has to be alike for a rate to tell of another training. model: [model] config_sha256; rank: 0 without LoRA;
    processes: that it was spread over. An MTP head's training has the mode "mtp" and its draft steps for a rank.
    """

    model: str
    mode: Mode | Literal["mtp"]
    rank: int
    checkpointing: bool
    processes: int = 1


class Measurement(NamedTuple):
    """A finished training's rate; benched: a benchmark's, of micro-steps without their optimiser."""

    engine: EngineName
    pack_length: int
    tokens_per_second: float
    when: str
    benched: bool = False


class Probe(NamedTuple):
    """Rates of single operations: bf16 multiply-adds of a matrix product, times two, and bytes copied."""

    operations: float
    bytes: float


def record(
    machine: Machine,
    kind: Kind,
    engine: EngineName,
    tokens_per_second: float,
    pack_length: int,
    when: str,
    *,
    benched: bool = False,
) -> bool:
    """Keep a training's rate, in place of an earlier one like it. False where that could not be written.

    when: as the manifest writes instants. benched: see `Measurement`.
    """
    alike = dict(machine=_key(machine), **kind._asdict(), engine=engine, pack_length=pack_length)
    values: dict[str, Any] = dict(tokens_per_second=round(tokens_per_second, 2), when=when, name=machine.name)
    return _put("training", alike, {**values, "benched": True} if benched else values)


def lookup(machine: Machine, kind: Kind) -> list[Measurement]:
    """All rates of this kind that were measured here; where an engine has trained, no benchmark's of it beside them."""
    found = (entry for entry in _read()["training"] if _is(entry, machine=_key(machine), **kind._asdict()))
    measured = [
        Measurement(e["engine"], e["pack_length"], e["tokens_per_second"], e["when"], e.get("benched", False))
        for e in found
    ]
    trained = {one.engine for one in measured if not one.benched}
    return [one for one in measured if not (one.benched and one.engine in trained)]


def probe(machine: Machine) -> Probe:
    """This machine's rates, measured in less than a second the first time (torch is imported for it), then kept."""
    kind = dict(machine=_key(machine))
    for entry in _read()["probes"]:
        if _is(entry, **kind):
            return Probe(entry["operations"], entry["bytes"])
    measured = measure(machine.device)
    _put("probes", kind, dict(operations=measured.operations, bytes=measured.bytes, name=machine.name))
    return measured


class Layers(NamedTuple):
    """What decides which matrix products a training computes. rank: 0 without LoRA; head: an MTP head's, on the frozen
    model."""

    model_type: str
    hidden: int
    ffn: int
    rank: int
    head: bool = False

    @classmethod
    def of(cls, config: Any, rank: int = 0, *, head: bool = False) -> Layers:
        """Of a config of transformers, the text model's."""
        kind = str(config.model_type).removesuffix("_text")
        return cls(kind, config.hidden_size, config.intermediate_size, rank, head)


def keep_ways(machine: Machine, layers: Layers, ways: dict[str, str], when: str) -> bool:
    """Keep how these products are computed fastest here, beside other lengths' that were measured with these versions.

    False where that could not be written.
    """
    kind = _products_of(machine, layers)
    return _put("products", kind, dict(ways={**ways_here(machine, layers), **ways}, when=when, name=machine.name))


def ways_here(machine: Machine, layers: Layers) -> dict[str, str]:
    """What `keep_ways` kept; nothing where torch or Triton was another."""
    kind = _products_of(machine, layers)
    return next((dict(entry["ways"]) for entry in _read()["products"] if _is(entry, **kind)), {})


def _products_of(machine: Machine, layers: Layers) -> dict[str, Any]:
    here = versions()
    return dict(machine=_key(machine), **layers._asdict(), torch=here.get("torch"), triton=here.get("triton"))


def measure(device: str) -> Probe:
    """The best of a few short products of bf16 matrices and a few copies."""
    import torch

    size = 8192 if device == "cuda" else 768
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.empty(1 << 24, dtype=torch.float32, device=device)
    c = torch.empty_like(b)
    operations = 2 * size**3 / _best(lambda: torch.mm(a, a), device)
    return Probe(operations, 2 * b.nbytes / _best(lambda: c.copy_(b), device))


def _best(work: Any, device: str, seconds: float = 0.3) -> float:
    """Seconds of the fastest of some calls."""
    import time

    import torch

    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _key(machine: Machine) -> str:
    return fingerprint(*identity(machine))


def _is(entry: dict[str, Any], **wanted: Any) -> bool:
    return all(entry.get(name) == value for name, value in wanted.items())


def _path() -> Path:
    return env.user_data_folder() / NAME


def _read() -> dict[str, Any]:
    try:
        values = json.loads(_path().read_text())
    except (OSError, ValueError):
        values = {}
    good = isinstance(values, dict) and values.get("schema") == 1
    return {"schema": 1, "training": [], "probes": [], "products": [], **(values if good else {})}


def _put(table: str, kind: dict[str, Any], values: dict[str, Any]) -> bool:
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_path().with_suffix(".lock"), timeout=10):
            kept = _read()
            kept[table] = [entry for entry in kept[table] if not _is(entry, **kind)] + [{**kind, **values}]
            write_atomic(_path(), (json.dumps(kept, indent=1) + "\n").encode())
    except (OSError, Timeout):
        return False
    return True

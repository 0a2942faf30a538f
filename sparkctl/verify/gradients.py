"""Gradients of every trained tensor, and how far an engine's are from the truth's."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.errors import SparkError
from sparkctl.files import naming
from sparkctl.model.weights import ShardWriter, TensorFile

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

    from sparkctl.train.engines.base import Engine

# a tensor of fewer entries is judged together with its namesakes in the other layers: an A_log of 16 entries rounds 16
# times, and the ratio of two such errors passes 2 by chance alone
SMALL = 4096
LARGE = 1 << 22  # entries; a larger tensor rounds often enough in one pack, and is kept of the first one alone
FLOOR = 1e-6  # distances below are the order of sums
ADAPTER_STD = 0.01  # of B: what AdamW gives an entry in a hundred steps at 1e-4


def fill_adapters(parameters: Mapping[str, Parameter], seed: int) -> None:
    """Give B (zero at first, so that A's gradient would be too) a trained one's size; masters are left as loaded.

    Each from a generator of its own: the same values for every engine, whatever its order or device.
    """
    import torch

    from sparkctl.model.lora import B

    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(B):
                digest = hashlib.sha256(f"verify {seed}:{name}".encode()).digest()
                generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                parameter.copy_(ADAPTER_STD * torch.randn(parameter.shape, generator=generator))


class Truth:
    """The truth's gradients in `folder`, a safetensors file a pack: other processes compare theirs with them.

    They are written and read a tensor at a time, so that no more than one is in the host's memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, number: int, engine: Engine) -> None:
        """What the engine's last micro-steps left is that of number `number`; of 0 alone the large tensors too."""
        import torch

        kept = {n: p for n, p in engine.parameters().items() if number == 0 or p.numel() <= LARGE}
        layout = {name: (torch.float32, tuple(parameter.shape)) for name, parameter in kept.items()}
        path = self._path(number)
        with naming(path), ShardWriter(path, layout) as file:
            for name, parameter in kept.items():
                file.write(name, torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad)

    def of(self, number: int) -> Mapping[str, torch.Tensor]:
        """Those of that number."""
        return _Gradients(TensorFile(self._path(number)))

    def _path(self, number: int) -> Path:
        return self._folder / f"gradients-{number}.safetensors"


class _Gradients(Mapping[str, "torch.Tensor"]):
    """A file's tensors, each read when it is asked for."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.names())

    def __len__(self) -> int:
        return len(self._file.names())


@dataclass
class Distance:
    """Squares added up over packs, and over the tensors that are judged as one."""

    error: float = 0.0
    truth: float = 0.0
    tensors: set[str] = field(default_factory=set)

    @property
    def relative(self) -> float:
        """Root mean square error over the truth's; of nothing against nothing, none."""
        if self.truth:
            return math.sqrt(self.error / self.truth)
        return math.inf if self.error else 0.0


def add_distances(
    found: dict[str, Distance], engine: Engine, truth: Mapping[str, torch.Tensor], name: str = "RUN",
    *, whole: bool = True,
) -> None:  # fmt: skip
    """Compare what the engine's last micro-steps left with the truth's gradients of the same packs.

    Raises SparkError where the engine trains other tensors than the truth. name: the run in its hint. whole: the truth
    has the large tensors too.
    """
    import torch

    parameters = engine.parameters()
    strange = sorted(truth.keys() - parameters.keys()) or sorted(
        n for n, p in parameters.items() if n not in truth and (whole or p.numel() <= LARGE)
    )
    if strange:
        raise SparkError(
            f"the {engine.name} engine and the reference train other tensors: `{strange[0]}` …",
            f"train with the reference: `sparkctl recommend {name} --engine reference`",
        )
    for tensor, true in truth.items():
        wanted, gradient = true.to(engine.device), parameters[tensor].grad
        error = -wanted if gradient is None else gradient - wanted
        at = found.setdefault(together(tensor, true.numel()), Distance())
        at.error += float(error.square().sum(dtype=torch.float64))
        at.truth += float(wanted.square().sum(dtype=torch.float64))
        at.tensors.add(tensor)


def together(name: str, entries: int) -> str:
    """The name under which a tensor is judged: its own, or with `*` for the layer where it is small."""
    return re.sub(r"\.\d+\.", ".*.", name) if entries < SMALL else name


def ratio(ours: float, theirs: float) -> float:
    """How many times as far from the truth as the reference; nothing below FLOOR counts. Never NaN, so that the worst
    can be found: infinite where either is no number."""
    return max(ours, FLOOR) / max(theirs, FLOOR) if math.isfinite(ours) and not math.isnan(theirs) else math.inf

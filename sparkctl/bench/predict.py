"""`bench predict`: a training step by roofline, for a device that is not at hand. A prediction, never a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparkctl.bench.setting import require_room
from sparkctl.bench.workload import Workload, synthetic
from sparkctl.errors import OtherOptions
from sparkctl.hardware.ceiling import DEVICES, Ceiling
from sparkctl.hardware.load import Load, splitting
from sparkctl.hardware.memory import peak
from sparkctl.hardware.shape import Shape, chunks_of
from sparkctl.manifest.table import Mode
from sparkctl.model import catalog
from sparkctl.model.families import count

BF16 = 2


@dataclass(frozen=True)
class Part:
    """A share of the step: its operations and bytes, and the seconds of whichever takes longer."""

    name: str
    operations: float
    bytes: float

    def seconds(self, ceiling: Ceiling) -> float:
        """The roofline."""
        return max(self.operations / (ceiling.operations * ceiling.share), self.bytes / ceiling.bytes)


@dataclass(frozen=True)
class Prediction:
    """A step's parts on a device, the shape's name and what it computes. peak_memory: bytes that a training takes."""

    ceiling: Ceiling
    shape: str
    work: Workload
    parts: list[Part]
    peak_memory: int

    @property
    def seconds(self) -> float:
        """Of the whole step: its parts one after another, each at its ceiling."""
        return sum(part.seconds(self.ceiling) for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """At best."""
        return self.work.tokens / self.seconds

    @property
    def fits(self) -> bool:
        """Whether the device has the memory for it."""
        return self.peak_memory <= self.ceiling.memory


def predict(name: str, shape: str, mode: Mode, pack: int, documents: int, checkpointing: bool = False) -> Prediction:
    """The step of a published shape with LoRA r = 128 or whole. Raises UsageError at an unknown device or shape."""
    ceiling, config = device(name), catalog.config(shape)
    require_room(documents, pack)
    work = synthetic(config, mode, pack, documents, checkpointing=checkpointing)
    size = count(config["model_type"], config, Path("config.json"))
    trainable = work.rank * size.adapter_width if work.lora else 0
    needed = peak_memory(work, size.text_parameters, trainable, ceiling.capability)
    return Prediction(ceiling, shape, work, parts(work, size.text_parameters, trainable), needed)


def device(name: str) -> Ceiling:
    """The device of that name. Raises UsageError where there is none."""
    if name not in DEVICES:
        raise OtherOptions(f"no device `{name}`; there are {', '.join(DEVICES)}", device=next(iter(DEVICES)))
    return DEVICES[name]


def peak_memory(work: Workload, parameters: int, trainable: int, capability: str) -> int:
    """Bytes that a training by the native engine takes, by the memory model; the arguments as of `parts`."""
    shape = Shape.from_config(work.config, parameters)
    load = Load(
        mode=work.mode, trainable=trainable or parameters, rank=work.rank if work.lora else 0, area=work.tokens,
        longest=max(work.lengths), labels=sum(work.labels), checkpointing=work.checkpointing, device="cuda", fla=True,
        engine="native", multiprocessors=splitting(capability, shape.head_dim),
        chunks=chunks_of(work.lengths),
    )  # fmt: skip
    return peak(shape, load).total


def parts(work: Workload, parameters: int, trainable: int) -> list[Part]:
    """The native engine's micro-step. parameters: of the text model; trainable: of the adapters, 0 for full.

    Products read their weights once a pass and stream activations; elementwise operators read and write each of
    their tensors once. Widths as in `hardware.shape`.
    """
    shape = Shape.from_config(work.config, parameters)
    tokens, labels = work.tokens, sum(work.labels)
    full = work.mode == "full"
    again = 1 if work.checkpointing else 0
    layer, head = shape.layer_parameters, shape.head_parameters
    adapters = 0 if full else trainable
    passes = (3 if full else 2) + again
    streams = tokens * BF16 * shape.layers * _products_width(shape)
    gemms = Part(
        "products of the layers",
        2.0 * tokens * (passes * layer + (3 + again) * adapters),
        passes * (layer * BF16 + streams) + (4 * layer if full else 0),
    )
    loss = Part(
        "lm_head and cross-entropy",
        (6.0 if full else 4.0) * labels * head,
        2 * head * BF16 + 4 * labels * shape.vocabulary * BF16,
    )
    squares = sum(n * n / 2 for n in work.lengths)
    attention = Part(
        "attention",
        (14.0 + 4 * again) * squares * shape.queries * shape.attention_layers,
        (5 + 3 * again) * tokens * BF16 * (2 * shape.queries + 2 * shape.keys) * shape.attention_layers,
    )
    rule_width = 3 * shape.rule_keys + 4 * shape.rule_values
    rule = Part(
        "gated delta rule",
        10.0 * (3 + again) * tokens * shape.rule_layers * shape.rule_keys * 128,
        (4 + again) * tokens * BF16 * rule_width * shape.rule_layers,
    )
    elementwise = Part(
        "norms, activations, convolution, gates",
        0.0,
        (3 + again)
        * tokens
        * BF16
        * (shape.layers * (6 * shape.hidden + 3 * shape.ffn) + shape.rule_layers * 2 * shape.convolved),
    )
    return [part for part in (gemms, loss, attention, rule, elementwise) if part.operations or part.bytes]


def _products_width(shape: Shape) -> float:
    """Features read and written by a layer's products, for each token."""
    mixers = shape.attention_layers * (2 * shape.queries + 2 * shape.keys) + shape.rule_layers * (
        shape.convolved + 2 * shape.rule_values
    )
    return 4 * shape.hidden + 3 * shape.ffn + mixers / shape.layers

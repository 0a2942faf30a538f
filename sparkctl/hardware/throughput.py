"""Tokens a second to expect of a training, and where that number is from. It errs on the slow side.

First what was measured on this machine (`measurements`); else, on a GPU, the published recipe's table for a DGX
Spark; else, on a CPU, the rates of a matrix product and a copy measured there, and the operations a token takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparkctl.hardware.load import Load
from sparkctl.hardware.measurements import Kind, Probe, lookup, probe
from sparkctl.hardware.memory import saved
from sparkctl.hardware.shape import Shape
from sparkctl.manifest.schema import Machine
from sparkctl.manifest.table import EngineName

# README of DGX_Spark_Unsloth_Lossless_Speedup: LoRA on a GB10, packs up to 1,024; parameters: tokens a second
SPARK_TABLE = {0.853e9: 5650.0, 2.213e9: 3568.0, 4.539e9: 1712.0, 9.410e9: 1095.0, 27.357e9: 370.0}
SPARK_2B = 2.213e9
SPARK_OPERATIONS = 100e12  # bf16 multiply-adds of a GB10, times two
FULL_OVER_LORA = 3173 / 3461  # the same source
LIKE_ENTRY = 0.03  # a model's parameters may differ so much from an entry's

# measured on one H200 with Qwen3.5-2B: transformers and peft on fla 24,349, Unsloth 32,778; 1,696 without fla and
# 16,214 with it, both with checkpointing
REFERENCE_SHARE = 24349 / 32778
WITHOUT_FLA = 1696 / 16214

MARGIN = 0.9  # runs of one training differ by 10 %

# a CPU, fitted on 2 cores to the reference engine with models of 3 to 135 M parameters
CPU_SHARE = 0.66  # of a large product's rate that the products of a layer reach
CPU_PASSES = 55.0  # copies of what autograd keeps that elementwise work, casts and softmax take as long as
CPU_LAYER_SECONDS = 0.008  # a layer, a batch: what Python and small operations take


@dataclass(frozen=True)
class Rate:
    """Tokens a second, and the sentence that says where they come from."""

    tokens_per_second: float
    source: str
    measured: bool = False  # a training's own rate


def expected(
    machine: Machine, shape: Shape, load: Load, engine: EngineName, *, model_key: str, parameters: int, pack_length: int
) -> Rate:  # fmt: skip
    """The rate of a training. parameters: of the whole model, as the table counts; model_key: of `Kind`."""
    kind = Kind(model_key, load.mode, load.rank, load.checkpointing)
    here = [m for m in lookup(machine, kind) if m.engine == engine]
    if here:
        nearest = min(here, key=lambda m: abs(m.pack_length - pack_length))
        how = "benchmarked" if nearest.benched else "measured"
        source = f"{how} on this machine, {nearest.when}, with packs of {nearest.pack_length:,}"
        return Rate(MARGIN * nearest.tokens_per_second, source, measured=True)
    if machine.device == "cuda":
        return from_table(machine, shape, load, engine, parameters)
    return from_probe(probe(machine), shape, load)


def from_table(machine: Machine, shape: Shape, load: Load, engine: EngineName, parameters: int) -> Rate:
    """The published recipe's rate, for a slower engine or GPU scaled down. A faster GPU is not counted on."""
    entry = next((size for size in SPARK_TABLE if abs(size - parameters) <= LIKE_ENTRY * size), None)
    rate = SPARK_TABLE[entry] if entry else SPARK_TABLE[SPARK_2B] * SPARK_2B / parameters
    source = f"the published recipe's table for a DGX Spark ({rate:,.0f} tok/s with LoRA"
    source += ")" if entry else ", scaled from the 2B by parameters)"
    if load.mode == "full":
        rate *= FULL_OVER_LORA
        source += ", less for full fine-tuning"
    if load.checkpointing:
        rate *= operations(shape, load, checkpointing=False) / operations(shape, load)
        source += ", less for checkpointing"
    if engine == "reference":
        slow = bool(shape.rule_layers) and not load.fla
        rate *= REFERENCE_SHARE * (WITHOUT_FLA if slow else 1)
        source += ", less for the reference engine" + (" without fla" if slow else "")
    if not is_spark(machine):
        slower = min(1.0, probe(machine).operations / SPARK_OPERATIONS)
        rate *= slower
        source += f", for {machine.name}" + (
            f" × {slower:.2f} by its matrix products" if slower < 1 else " at least that"
        )
    return Rate(MARGIN * rate, source)


def is_spark(machine: Machine) -> bool:
    """Whether the GPU is a GB10."""
    return "GB10" in machine.name


def from_probe(rates: Probe, shape: Shape, load: Load) -> Rate:
    """A CPU's rate: operations, bytes and the cost of a layer, one after the other."""
    seconds = operations(shape, load) / (CPU_SHARE * rates.operations)
    passes = 4 / 3 if load.checkpointing else 1
    kept = saved(shape, replace(load, checkpointing=False, engine="reference"))  # what the passes were fitted to
    seconds += passes * CPU_PASSES * kept / load.area / rates.bytes
    seconds += passes * CPU_LAYER_SECONDS * shape.layers / load.area
    source = f"a matrix product measured here, {rates.operations / 1e9:,.0f} GFLOP/s, and the operations a token takes"
    return Rate(MARGIN / seconds, source)


def operations(shape: Shape, load: Load, *, checkpointing: bool | None = None) -> float:
    """Floating-point operations a token: 2 a parameter forward, 2 for the input's gradient, 2 for the weight's.

    LoRA skips the weights' gradients of the base; lm_head works on label tokens; checkpointing runs forward twice.
    """
    again = load.checkpointing if checkpointing is None else checkpointing
    head = shape.head_parameters * load.labels / load.area
    forward = shape.layer_parameters + (load.trainable if load.mode == "lora" else 0)
    base = 4.0 * shape.layer_parameters + 6 * load.trainable if load.mode == "lora" else 6.0 * shape.layer_parameters
    return base + (4 if load.mode == "lora" else 6) * head + (2 * forward if again else 0)

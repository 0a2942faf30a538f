"""The adapters alone, in peft's format, fp32 as trained: a merge or a resume elsewhere starts from the same numbers,
and both peft (adapters are fp32 there) and vLLM (which casts them to the model's dtype) take them so.

The class decides the names. transformers loads a multimodal Qwen3.5 as Qwen3_5ForConditionalGeneration, whose text
layers are `model.language_model.layers`, or by AutoModelForCausalLM as the text-only class, where they are
`model.layers`; vLLM serves the first. An adapter for the one loads nothing on the other, so it is made for one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sparkctl.errors import SparkError
from sparkctl.files import naming, staged_folder
from sparkctl.manifest.schema import Lora
from sparkctl.merge.merge import Merged, describe, prepare, require_space
from sparkctl.merge.updates import LORA_A, LORA_B, Update, adapted_modules
from sparkctl.model.weights import Checkpoint, ShardWriter, TensorFile
from sparkctl.progress import Progress, silent

AdapterClass = Literal["multimodal", "text"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def write_adapter(
    base: Path, trained: Path, out: Path, *, lora: Lora, kind: AdapterClass, source: str, revision: str | None,
    replace: bool = False, finish: Callable[[Path, Merged], None] | None = None, progress: Progress = silent,
) -> Merged:  # fmt: skip
    """The adapters of a training checkpoint as a folder that peft loads on the class `kind`.

    source, revision: the base as peft is to find it. Raises SparkError where the adapters do not fit the base.
    """
    checkpoint, changes = prepare(base, trained, lora)
    file, merged = TensorFile(trained), describe_adapter(checkpoint, changes, trained)
    require_space(out, merged.bytes)
    modules = {module: live_name(module, kind) for module in adapted_modules(file)}
    with naming(out), staged_folder(out, replace=replace) as stage:
        with progress.task("writing the adapter", merged.bytes, "B") as task:
            _write_weights(file, modules, stage / WEIGHTS, task.advance)
        config = adapter_config(modules, checkpoint, lora, source, revision)
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if finish:
            finish(stage, merged)
    return merged


def describe_adapter(checkpoint: Checkpoint, changes: dict[str, Update], trained: Path) -> Merged:
    """Counts of the base, and the size of its adapters."""
    return dataclasses.replace(describe(checkpoint, changes), bytes=trained.stat().st_size)


def live_name(module: str, kind: AdapterClass) -> str:
    """The path of a checkpoint's module in the class `kind`."""
    return module.replace("model.language_model.", "model.", 1) if kind == "text" else module


def adapter_config(
    modules: dict[str, str], checkpoint: Checkpoint, lora: Lora, source: str, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json: the keys that peft needs; the rest are its defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "revision": revision,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(modules, checkpoint),
    }


def _targets(modules: dict[str, str], checkpoint: Checkpoint) -> list[str]:
    """The last parts of the paths, as peft and vLLM match them. Raises SparkError where they would match more."""
    ends = sorted({module.rsplit(".", 1)[-1] for module in modules})
    matched = {n.removesuffix(".weight") for n in checkpoint.names() if n.endswith(tuple(f".{e}.weight" for e in ends))}
    more = [
        module for module in matched - set(modules) if not module.startswith("mtp.")
    ]  # the classes have no MTP head
    if more:
        raise SparkError(
            f"`{sorted(more)[0]}` shares its last name with an adapted module, but has no adapter",
            "merge the whole model: leave out `--adapter-only`",
        )
    return ends


def _write_weights(file: TensorFile, modules: dict[str, str], path: Path, advance: Callable[[int], None]) -> None:
    names = {PREFIX + live + end: module + end for module, live in sorted(modules.items()) for end in (LORA_A, LORA_B)}
    layout = {live: (file.dtype(name), file.shape(name)) for live, name in names.items()}
    with ShardWriter(path, layout, {"format": "pt"}) as writer:
        for live, name in names.items():
            writer.write(live, file.read(name))
            advance(file.nbytes(name))

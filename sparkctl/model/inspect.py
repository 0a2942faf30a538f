"""What config.json alone says of a model: how large it is, and which of its projections take an adapter.

The families of `families.py` are counted by formula, without torch. Of another type transformers' class is built on
the meta device, which needs no weights either; it is accepted where it has the seven usual projections.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkctl.errors import UsageError
from sparkctl.model import mtp
from sparkctl.model.families import FAMILIES, count
from sparkctl.words import quoted

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class ModelInfo:
    """A model before any of its weights is read.

    parameters: those of the checkpoint, vision tower included, MTP head not. text_parameters: those of the language
    model, an untied head included. vocab_size: rows of the embedding. targets: names of the linear layers that take an
    adapter; adapter_width: their inputs and outputs added up over all layers. config: config.json, with what it leaves
    to its type's defaults written out.
    """

    model_type: str
    parameters: int
    text_parameters: int
    vocab_size: int
    targets: tuple[str, ...]
    adapter_width: int
    config: dict[str, Any] = field(repr=False, compare=False)


def full_parameters(info: ModelInfo) -> int:
    """What full fine-tuning trains: the language model, neither vision tower nor MTP head."""
    return info.text_parameters


def lora_parameters(info: ModelInfo, r: int) -> int:
    """Parameters of the adapters of rank `r`: A is [r, inputs], B is [outputs, r]."""
    return r * info.adapter_width


def read_config(folder: Path, hub: bool = True) -> dict[str, Any]:
    """config.json as it stands. Raises UsageError where `folder` holds no model, or what it says of an MTP head is no
    number of layers. hub: whether a hub id does as well where the folder was named.
    """
    folder = Path(folder)
    path, another = folder / "config.json", "name a folder with config.json and safetensors weights"
    another += ", or a hub id" if hub else ""
    if not folder.is_dir():
        raise UsageError(f"no folder `{folder}`", another)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / ADAPTER).exists():
            raise UsageError(f"`{folder}` is an adapter, not a model", "name the model it belongs to") from None
        raise UsageError(f"`{folder}` is no model: it has no config.json", another) from None
    except ValueError as error:  # JSON's and UTF-8's
        raise UsageError(f"`{path}` is broken: {error}", "copy or download that file again") from None
    if not isinstance(config, dict):
        raise UsageError(f"`{path}` is broken: it holds no JSON object", "copy or download that file again")
    for part in (config, text_part(config)):
        mtp.layers(part, path)
    return config


def inspect(folder: Path, allow_unknown: bool = False) -> ModelInfo:
    """The model in `folder`. Raises UsageError where it is none, is quantised, has an adapter beside its weights, or is
    of a type that cannot be trained; `allow_unknown` lets pass one that lacks some of the usual projections.
    """
    folder = Path(folder)
    config = read_config(folder)
    if (folder / ADAPTER).exists():  # transformers adds it to the weights that it loads, unasked
        raise UsageError(
            f"`{folder}` holds an adapter beside a model: which of the two is to be trained on?",
            f"on the model alone: `mv {quoted(folder / ADAPTER)} ELSEWHERE`; on both: merge them into another folder",
        )
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UsageError(
            f"`{folder / 'config.json'}` names no model_type", "take the file that was published with the weights"
        )
    if how := quantised(config):
        raise UsageError(
            f"`{folder}` {how}; training needs the weights as published", "name the bf16 model that it was made from"
        )
    if kind in FAMILIES:
        return ModelInfo(kind, **vars(count(kind, config, folder / "config.json")))
    from sparkctl.model.unknown import measure  # torch and transformers arrive here

    return ModelInfo(kind, **vars(measure(folder, kind, allow_unknown)))


def quantised(config: dict[str, Any]) -> str | None:
    """ "is quantised (fp8)" where config.json says so, else None."""
    parts = [config, config.get("text_config")]
    for how in (part.get("quantization_config") for part in parts if isinstance(part, dict)):
        if how:
            method = how.get("quant_method") if isinstance(how, dict) else None
            return f"is quantised{f' ({method})' if method else ''}"
    return None


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config

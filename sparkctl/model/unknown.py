"""A model of a type that `families.py` has no formula for: transformers' own class on the meta device, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.errors import UsageError
from sparkctl.model.families import DELTA, FAMILIES, USUAL, Count

if TYPE_CHECKING:
    from torch import nn

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def measure(folder: Path, kind: str, allow_unknown: bool) -> Count:
    """Parameters of the model in `folder`, of type `kind`.

    Raises UsageError where transformers has no class for its language model, or one whose tensors are not those of its
    checkpoints, where its config names its sizes in another way, and, without `allow_unknown`, where it lacks one of
    the usual projections.
    """
    from torch import nn

    from sparkctl.model.load import silence

    with silence():
        whole, text, config = _built(folder, kind)
    linears = [(n.rpartition(".")[2], m) for n, m in text.named_modules() if isinstance(m, nn.Linear)]
    found = tuple(target for target in USUAL + DELTA if any(name == target for name, _ in linears))
    lacking = [target for target in USUAL if target not in found]
    if not found or not all(size in (config.get("text_config") or config) for size in SIZES):
        raise UsageError(f"`{folder}` is of model type `{kind}`, which cannot be trained here", _known())
    if _fused(kind):
        raise UsageError(
            f"`{folder}` is of model type `{kind}`, whose experts transformers fuses as it loads them, so that no "
            "merge could write them back",
            _known(),
        )
    if lacking and not allow_unknown:
        raise UsageError(
            f"`{folder}` is of the unknown model type `{kind}`, which has no {', '.join(lacking)}",
            "add `--allow-unknown` to train it all the same: a LoRA then adapts the projections that it does have",
        )
    width = sum(m.in_features + m.out_features for name, m in linears if name in found)
    rows = text.get_input_embeddings().weight.shape[0]
    return Count(_parameters(whole), _parameters(text), rows, found, width, config)


def _built(folder: Path, kind: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(the class that the checkpoint was saved from, its language model, the config with defaults), on meta."""
    import torch
    import transformers

    version = f"transformers {transformers.__version__}"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            text = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            named: Any = getattr(transformers, (config.architectures or [""])[0], None)
            multimodal = config.get_text_config() is not config
            whole = named(config) if named and multimodal else text
    except Exception:  # a class that we know nothing of may fail in any way on a config that is none of its own
        raise UsageError(
            f"`{folder}` is of model type `{kind}`, and {version} has no language model for its config.json", _known()
        ) from None
    if multimodal and text.config.to_dict() == config.to_dict():
        raise UsageError(
            f"`{folder}` is of model type `{kind}`, whose language model {version} cannot load alone", _known()
        )
    return whole, text, config.to_dict()


def _fused(kind: str) -> bool:
    """Whether transformers makes tensors of this type's checkpoints into others, as of most mixtures of experts."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(step, WeightConverter) for step in get_checkpoint_conversion_mapping(kind) or ())


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _known() -> str:
    return f"take a model of one of the types {', '.join(FAMILIES)}"

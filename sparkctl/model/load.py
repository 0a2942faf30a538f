"""The text model of a checkpoint as transformers' class for it, its weights in the precision that training keeps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.errors import SparkError
from sparkctl.model.anew import folder_anew
from sparkctl.model.names import live_name, text_prefix
from sparkctl.model.plain import plain_layers
from sparkctl.model.weights import Checkpoint

if TYPE_CHECKING:
    import torch

NAMED = 5  # names that a message lists
FLOATS = ("BF16", "F16", "F32")


def load_text_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """AutoModelForCausalLM of `folder` in `dtype`; tensors published in F32 stay so.

    Frozen, in eval mode, without dropout or cache; on a CPU in plain torch, whatever kernels are installed. No remote
    code, no pickle, nothing on stderr. Raises SparkError naming tensors that are missing, unknown or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint(folder)
    require_floats(folder, {name: checkpoint.dtype(name) for name in checkpoint.names()})
    with silence():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
        text.use_cache = False
        _without_dropout(text)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": device},
            use_safetensors=True, local_files_only=True, trust_remote_code=False, use_kernels=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    model, info = loaded
    _require_complete(folder, info)
    restore_f32(model, checkpoint)
    if device.type == "cpu":
        plain_layers(model)
    return model.requires_grad_(False).eval()


@contextmanager
def silence() -> Iterator[None]:
    """transformers says nothing and shows no bar in this block; what has to be said is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _without_dropout(config: Any) -> None:
    for name, value in list(config.to_dict().items()):
        if "dropout" in name and isinstance(value, float | int):
            setattr(config, name, 0.0)


def require_floats(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Refuse text weights that are quantised: their numbers mean nothing without their scales. dtypes: by tensor."""
    text = (text_prefix(dtypes), "lm_head.")
    odd = [name for name, dtype in dtypes.items() if name.startswith(text) and dtype not in FLOATS]
    if odd:
        raise SparkError(
            f"`{folder}` is quantised: `{odd[0]}` is {dtypes[odd[0]]}, which cannot be trained",
            "name the bf16 model that it was made from",
        )


def _require_complete(folder: Path, info: dict[str, Any]) -> None:
    wrong = {
        "lacks": info["missing_keys"],
        "holds unknown": info["unexpected_keys"],
        "holds in another shape than config.json says": [key[0] for key in info["mismatched_keys"]],
    }
    found = [f"{what} {_listed(sorted(names))}" for what, names in wrong.items() if names]
    if found:
        raise SparkError(
            f"`{folder}` is not the model of its config.json: it {'; it '.join(found)}", folder_anew(folder)
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:NAMED]) + more


def restore_f32(model: Any, checkpoint: Checkpoint, *, widened: bool = False) -> None:
    """Put back what loading rounded in a text-only model: a tensor at a time, from the file.

    widened: what is F32 may have been rounded before, and is read as well.
    """
    import torch

    live = dict(model.named_parameters())
    for name in checkpoint.names():
        parameter = live.get(live_name(name))
        if parameter is None or checkpoint.dtype(name) != "F32":
            continue
        if widened or parameter.dtype != torch.float32:
            parameter.data = checkpoint.file(name).read(name).to(parameter.device)

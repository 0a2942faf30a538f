"""Whether a checkpoint's safetensors are what its config.json promises: every tensor, its shape, nothing besides.

The promise is transformers' own class built on the meta device, and the MTP head's tensors, which that class leaves
out. vLLM loads a checkpoint without `mtp.fc.weight` silently and then accepts no draft, so nothing less will do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparkctl.errors import SparkError
from sparkctl.model import mtp
from sparkctl.model.anew import file_anew
from sparkctl.model.load import silence
from sparkctl.model.names import LIVE, NESTED, nested_name, text_prefix
from sparkctl.model.weights import INDEX, Layout, read_layout


def audit(folder: Path, *, counted: bool = True) -> list[str]:
    """Everything that is wrong with the weights in `folder`, a sentence each; empty where nothing is.

    counted: whether the index has to state the right total, too; a base need not, since a merge counts anew.
    """
    try:
        config = dict(json.loads((folder / "config.json").read_bytes()))
        layout = read_layout(folder)
        promised, optional, ignores, problems = promise(folder, config)
    except SparkError as error:
        return [error.message]
    except (OSError, ValueError, TypeError) as error:
        return [f"`{folder / 'config.json'}` cannot be read ({error})"]
    if text_prefix(promised) == LIVE and text_prefix(layout.where) == NESTED:
        promised = {nested_name(name): shape for name, shape in promised.items()}
    found = {name: file.shape(name) for name, file in layout.where.items()}
    problems += layout.problems + _misplaced(layout) + (_miscounted(folder, layout) if counted else [])
    problems += [
        f"config.json promises `{name}`, and it is missing"
        for name in promised
        if name not in found and name not in optional
    ]
    for name, shape in found.items():
        if name not in promised:
            if ignores(name):
                continue
            problems.append(f"`{name}` is there, and config.json does not promise it")
        elif shape != promised[name]:
            problems.append(f"`{name}` has shape {list(shape)}, and config.json promises {list(promised[name])}")
    return problems


class Promise(NamedTuple):
    """What config.json says of the weights: tensors with their shapes, those of them that may be left out, whether one
    may be there besides, and what is wrong with the promise itself.
    """

    shapes: mtp.Shapes
    optional: set[str]
    ignores: Callable[[str], bool]
    problems: list[str]


def promise(folder: Path, config: dict[str, Any]) -> Promise:
    """Raises SparkError where config.json describes no model that transformers knows."""
    import torch

    with torch.device("meta"):
        model = _build(folder)
    promised: mtp.Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)  # shared with another tensor, so that one copy is enough
    text, problems = config.get("text_config") or config, []
    if unknown := mtp.unknown(text):
        problems.append(f"config.json promises {unknown}, which is unknown here")
    elif mtp.layers(text):
        promised |= mtp.shapes(model.config.get_text_config().to_dict())
    return Promise(promised, tied, _ignored(model), problems)


def _ignored(model: Any) -> Callable[[str], bool]:
    """Whether transformers' class passes over a tensor of that name, as of the inverse frequencies that old Llama
    checkpoints store. The MTP head's are not among them: config.json has to promise it.
    """
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        patterns.add(r"rotary_emb\.inv_freq")  # transformers adds it while it loads

    def ignored(name: str) -> bool:
        return not name.startswith(mtp.PREFIX) and any(re.search(pattern, name) for pattern in patterns)

    return ignored


def _build(folder: Path) -> Any:
    """The class that config.json names, or that transformers takes for its type; without weights."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with silence():
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            named = [getattr(transformers, name, None) for name in config.architectures or ()]
            if named and named[0] is not None:
                return named[0](config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers stumbles over in a config, it means the same here
        raise SparkError(
            f"config.json describes no model that transformers can build ({error})",
            f"{file_anew(folder / 'config.json')}; of a newer model, `pip install --upgrade transformers`",
        ) from error


def _misplaced(layout: Layout) -> list[str]:
    """What the shards hold beyond the index."""
    if not layout.sharded:
        return []
    return [
        f"`{file.path.name}` holds `{name}`, which the index does not place there"
        for file in layout.shards
        for name in file.names()
        if layout.where.get(name) is not file
    ]


def _miscounted(folder: Path, layout: Layout) -> list[str]:
    """The index's total_size, where it does not hold."""
    if not layout.sharded or layout.problems:
        return []
    metadata = json.loads((folder / INDEX).read_bytes()).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(file.nbytes(name) for name, file in layout.where.items())
    return [] if stated == total else [f"the index states a total_size of {stated} bytes, and its tensors take {total}"]

"""Whether a checkpoint's safetensors are what its config.json promises: every tensor, its shape, nothing besides.

The promise is transformers' own class built on the meta device, and the MTP head's tensors, which that class leaves
out. vLLM loads a checkpoint without `mtp.fc.weight` silently and then accepts no draft, so nothing less will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sparkctl.errors import SparkError
from sparkctl.model.anew import file_anew
from sparkctl.model.format import EXPONENTS, finite
from sparkctl.model.names import LIVE, NESTED, nested_name, text_prefix
from sparkctl.model.promise import Promise, promise, read_config
from sparkctl.model.weights import INDEX, Checkpoint, Layout, read_layout


def audit(folder: Path, *, counted: bool = True, promised: Callable[[], Promise] | None = None) -> list[str]:
    """Everything that is wrong with the weights in `folder`, a sentence each; empty where nothing is.

    counted: whether the index has to state the right total, too; a base need not, since a merge counts anew. promised:
    gives what was promised, where that was looked up before. Raises what it raises.
    """
    try:
        _, config = read_config(folder)
        layout = read_layout(folder)
    except SparkError as error:
        return [error.message]
    told = promised() if promised else promise(folder)
    if told.wrong or told.config != config:
        return [told.wrong or f"`{folder / 'config.json'}` was changed while its promise was looked up"]
    placed = layout.problems + _misplaced(layout) + (_miscounted(folder, layout) if counted else [])
    return [*told.problems, *placed, *_unlike(layout, told)]


def not_finite(folder: Path) -> SparkError | None:
    """What is wrong with the language model in `folder` where one of its values is NaN or infinite; reads all of it."""
    checkpoint = Checkpoint(folder)
    text = (text_prefix(checkpoint.names()), "lm_head.")
    for name in checkpoint.names():
        file = checkpoint.file(name)
        if not name.startswith(text) or file.dtype(name) not in EXPONENTS:
            continue
        if not all(finite(piece, file.dtype(name)) for piece in file.pieces(name)):
            return SparkError(f"`{name}` in `{file.path}` holds NaN or an infinite value", file_anew(file.path))
    return None


def _unlike(layout: Layout, told: Promise) -> list[str]:
    """Tensors that are missing, not promised, or of another shape."""
    shapes = told.shapes
    if text_prefix(shapes) == LIVE and text_prefix(layout.where) == NESTED:
        shapes = {nested_name(name): shape for name, shape in shapes.items()}
    found = {name: file.shape(name) for name, file in layout.where.items()}
    problems = [
        f"config.json promises `{name}`, and it is missing"
        for name in shapes
        if name not in found and name not in told.optional
    ]
    for name, shape in found.items():
        if name in shapes and shape != shapes[name]:
            problems.append(f"`{name}` has shape {list(shape)}, and config.json promises {list(shapes[name])}")
        elif name not in shapes and not told.ignores(name):
            problems.append(f"`{name}` is there, and config.json does not promise it")
    return problems


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

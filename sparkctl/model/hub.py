"""Where a model's files are: a folder, or the hub's cache, filled as far as a step needs.

A hub id is resolved to a commit once; later steps ask for that commit, which the cache answers without the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparkctl import env
from sparkctl.errors import SparkError, UsageError
from sparkctl.manifest.store import NAME, Run
from sparkctl.progress import Progress, silent

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
LONGEST_ID = 96


@dataclass(frozen=True)
class ModelSource:
    """`source` as it was given; `folder` holds its files. A model of the hub has a `revision`, which is a commit."""

    source: str
    folder: Path
    revision: str | None
    is_hub: bool


def locate(
    source: str,
    *,
    revision: str | None = None,
    base: Path | None = None,
    weights: bool = False,
    small: Sequence[str] | None = None,
    moved: str | None = None,
    progress: Progress = silent,
) -> ModelSource:
    """The model that `source` names: a folder, or ORG/NAME on the hub, with config, tokenizer and templates.

    revision: the commit of a hub model, recorded earlier; None takes the newest. base: the run whose manifest names a
    folder. weights: the safetensors have to be there too. small: of a hub model's other files only these. moved: the
    hint where such a folder is gone. Raises UsageError where there is no such folder or model, SparkError where it
    cannot be had.
    """
    if revision is None:
        folder = _recorded(base, source) if base else Path(source)
        if folder.is_dir():
            return ModelSource(source, _holding(folder) if weights else folder, None, is_hub=False)
        if folder.exists():
            raise UsageError(f"`{folder}` is a file", "a model is a folder with config.json and safetensors weights")
        if base or not is_hub_id(source):
            raise UsageError(f"no folder `{folder}`", moved or "check the path; a model on the hub is named ORG/NAME")
    from sparkctl.model.download import SMALL, Hub

    hub = Hub(source, env.hub_endpoint(), env.hub_cache(), offline=env.hub_offline())
    folder = hub.small_files(revision, small or SMALL)
    commit = folder.name
    if weights:
        hub.weights(commit, [name for name in _weight_files(folder) if not (folder / name).exists()], progress)
    return ModelSource(source, folder, commit, is_hub=True)


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form ORG/NAME."""
    return len(source) <= LONGEST_ID and HUB_ID.fullmatch(source) is not None


def _recorded(run: Path, source: str) -> Path:
    """A folder that the manifest of `run` names, also where it was before the run moved."""
    return Run.open(run).resolve(source) if (run / NAME).exists() else run / source


def has_weights(folder: Path) -> bool:
    """Whether there is any safetensors file in it."""
    return any(folder.glob("*.safetensors"))


def _holding(folder: Path) -> Path:
    """`folder`, which has to hold weights."""
    if not has_weights(folder):
        raise SparkError(
            f"`{folder}` has no safetensors weights", "only safetensors are read: take a model that has them"
        )
    return folder


def _weight_files(folder: Path) -> list[str]:
    """Files of the weights, as the index names them; one file where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return [SINGLE]
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparkError(f"`{path}` is broken: {error}", "remove it and run the same command again") from None

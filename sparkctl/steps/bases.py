"""The weights that a training began with: hashed once, when it begins, and looked at again by size and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sparkctl.errors import SparkError, UsageError
from sparkctl.files import sha256_file
from sparkctl.manifest.schema import BaseFile, BaseTable, ModelTable, TrainTable
from sparkctl.manifest.store import Run
from sparkctl.model.anew import folder_anew
from sparkctl.progress import Progress
from sparkctl.words import here, quoted

if TYPE_CHECKING:
    from sparkctl.model.hub import ModelSource
    from sparkctl.model.promise import Promise

SHOWN = 3  # problems of a base that are told
AS_PUBLISHED = "take it as it was published, or have its config.json promise what is there and analyze again"
HEADLESS = " (transformers saves a Qwen3.5 without its MTP head: set `mtp_num_hidden_layers` to 0 in a copy of it)"


def read_base(folder: Path, model: ModelTable, known: BaseTable | None, progress: Progress) -> BaseTable:
    """The safetensors of `folder` with their digests. A file that `known` has with this size and time is not read."""
    sure = {file.name: file for file in known.files} if known and known.source == model.source else {}
    paths = sorted(folder.glob("*.safetensors"))
    files, unread = [], []
    for path in paths:
        status, before = path.stat(), sure.get(path.name)
        if before and (before.size, before.mtime_ns) == (status.st_size, status.st_mtime_ns):
            files.append(before)
        else:
            unread.append((path, status))
    with progress.task("hashing the base", sum(status.st_size for _, status in unread), "B") as task:
        for path, status in unread:
            digest = sha256_file(path)
            files.append(BaseFile(name=path.name, size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=digest))
            task.advance(status.st_size)
    return BaseTable(
        source=model.source, config_sha256=model.config_sha256, files=sorted(files, key=lambda file: file.name)
    )


def require_files(source: ModelSource) -> None:
    """Raise SparkError where a folder's weights lack a file that the index names or the MTP head that config.json
    promises, one is cut, or they are quantised though config.json says nothing of it: hours before they are read.
    Headers alone are looked at. A folder without any may get them later; the hub's are downloaded later, of which the
    index says whether a head is there.
    """
    from sparkctl.model.load import require_floats
    from sparkctl.model.weights import INDEX, SINGLE, read_layout, read_weight_map

    folder = source.folder
    if source.is_hub and (folder / INDEX).is_file():
        _require_head(folder, source.source, read_weight_map(folder / INDEX))
    if source.is_hub or not ((folder / INDEX).is_file() or (folder / SINGLE).is_file()):
        return
    shown = Path(here(folder))
    layout = read_layout(shown)
    if layout.problems:
        raise SparkError(f"the model in `{shown}` is not whole: {_told(layout.problems)}", folder_anew(shown))
    require_floats(shown, {name: file.dtype(name) for name, file in layout.where.items()})
    _require_head(folder, str(shown), layout.where)


def _require_head(folder: Path, shown: str, names: Iterable[str]) -> None:
    """Raise SparkError where config.json promises an MTP head of which the weights, these tensors, have nothing."""
    from sparkctl.model import mtp
    from sparkctl.model.inspect import read_config, text_part

    config = read_config(folder)
    promised = config.get("model_type") in mtp.TYPES and mtp.layers(text_part(config))
    if promised and not any(name.startswith(mtp.PREFIX) for name in names):
        raise SparkError(
            f"the base `{shown}` lacks the MTP head that its config.json promises, so what is trained on it could not "
            "be merged",
            AS_PUBLISHED + HEADLESS,
        )


def require_known_head(source: ModelSource, another: str) -> None:
    """Raise UsageError where config.json promises an MTP head that is unknown here: what is trained on such a base
    could not be merged. another: the command that takes another base.
    """
    from sparkctl.model import mtp
    from sparkctl.model.inspect import read_config, text_part

    config = read_config(source.folder)
    if config.get("model_type") not in mtp.TYPES:
        return
    if unknown := mtp.unknown(text_part(config)):
        shown = source.source if source.is_hub else here(source.folder)
        raise UsageError(
            f"the base `{shown}` has {unknown}, which is unknown here, so what is trained on it could not be merged",
            another,
        )


def require_whole(folder: Path, promised: Callable[[], Promise] | None = None) -> None:
    """Raise SparkError where the base is not what its config.json promises: no merge of it would pass its audit.

    promised: gives that promise, where another process makes it; else transformers is imported here.
    """
    from sparkctl.model import mtp
    from sparkctl.model.audit import audit

    problems = audit(folder, counted=False, promised=promised)
    if not problems:
        return
    hint = AS_PUBLISHED
    if any(f"promises `{mtp.PREFIX}" in problem for problem in problems):
        hint += HEADLESS
    raise SparkError(
        f"the base `{folder}` is not whole, so what is trained on it could not be merged: {_told(problems)}", hint
    )


def _told(problems: list[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def same_base(run: Run, trained: TrainTable, folder: Path, model: ModelTable, progress: Progress) -> BaseTable | None:
    """The base as it is now, where it is the one that was trained on; None where the training did not note it.

    Raises UsageError naming what differs.
    """
    then = trained.base
    if then is None:
        return None
    anew = f"`sparkctl train {quoted(run.root)} --force` trains on it"
    if then.config_sha256 != model.config_sha256:
        raise UsageError(f"`{run.root}` was trained on {then.source}, and is now analysed for {model.source}", anew)
    present = read_base(folder, model, then, progress)
    were, are = ({file.name: file.sha256 for file in base.files} for base in (then, present))
    changed = sorted(name for name in were.keys() | are.keys() if were.get(name) != are.get(name))
    if changed:
        raise UsageError(
            f"the weights in `{folder}` are not those that `{run.root}` was trained on: {', '.join(changed)} changed",
            f"put them back, or {anew}",
        )
    return present

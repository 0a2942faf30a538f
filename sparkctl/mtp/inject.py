"""A model's folder with an MTP head in it: the model's shards as they are, the head in a shard of its own.

A head that the model had before is left out, so that no tensor is there twice: a shard that holds some of it is written
anew without it, all others are copied or hard-linked. In memory is a chunk of a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparkctl.errors import SparkError, UsageError
from sparkctl.files import CHUNK, naming, sha256_file, staged_folder
from sparkctl.merge.companions import copy_companions
from sparkctl.merge.merge import ELSEWHERE, require_space
from sparkctl.merge.seal import Seal, SealedFile
from sparkctl.model import mtp
from sparkctl.model.anew import file_anew, folder_anew
from sparkctl.model.audit import audit
from sparkctl.model.families import MULTIMODAL
from sparkctl.model.format import Entry, finite, header_bytes
from sparkctl.model.inspect import inspect, quantised, read_config, text_part
from sparkctl.model.promise import promising
from sparkctl.model.weights import INDEX, SINGLE, Checkpoint, ShardWriter, TensorFile
from sparkctl.mtp.source import HeadSource, some
from sparkctl.progress import Progress, Task, silent

ATTENTION = ".self_attn."
HEAD_SHARD = "model-mtp.safetensors"
BODY_SHARD = "model-00001-of-00001.safetensors"  # a single file's name beside it: transformers would read SINGLE alone


class ServedSeal(Seal):
    """The seal of a folder with a head. `checkpoint` is empty where the model is not the run's merged one."""

    mode: Literal["trained", "default"]
    source: str = Field(description="where the head is from")
    head_digest: str


@dataclass(frozen=True)
class Shard:
    """A file of the model that comes along. `kept`: its tensors but the head's. `name`: what it is called then."""

    file: TensorFile
    name: str
    kept: list[str]

    @property
    def whole(self) -> bool:
        """Whether it comes along byte for byte."""
        return len(self.kept) == len(self.file.names())

    @property
    def bytes(self) -> int:
        """What it takes in the new folder."""
        return self.file.path.stat().st_size if self.whole else sum(self.file.nbytes(name) for name in self.kept)


@dataclass(frozen=True)
class Target:
    """The model that gets a head. `head`: the shapes that it wants; `config`: its config.json, promising the head."""

    folder: Path
    shards: list[Shard]
    head: mtp.Shapes
    config: dict[str, Any]
    config_changed: bool

    @property
    def bytes(self) -> int:
        """Of its shards in the new folder, without the head."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def tensors(self) -> int:
        """In the new folder, the head's included."""
        return sum(len(shard.kept) for shard in self.shards) + len(self.head)


def read_target(folder: Path, mend: str = "name a Qwen3.5: `--into FOLDER`") -> Target:
    """The model in `folder`. mend: the command that takes another one. Raises UsageError where it is none or quantised,
    SparkError where its weights are not whole or its config.json promises a head that is unknown here.
    """
    config = read_config(folder)
    if config.get("model_type") not in mtp.TYPES:
        raise UsageError(f"`{folder}` is of type `{config.get('model_type')}`, which takes no MTP head", mend)
    if how := quantised(config):
        raise UsageError(f"`{folder}` {how}; an MTP head goes beside weights that are not", mend)
    info = inspect(folder)
    changed = _promise_head(folder, config)
    checkpoint, head = Checkpoint(folder, but=mtp.PREFIX), mtp.shapes(text_part(info.config))
    _require_described(checkpoint, head, config)
    files = [TensorFile(path) for path in checkpoint.shards()]
    shards = [Shard(file, BODY_SHARD if file.path.name == SINGLE else file.path.name, _body(file)) for file in files]
    shards = [shard for shard in shards if shard.kept]
    if any(shard.name == HEAD_SHARD for shard in shards):
        raise SparkError(
            f"`{folder / HEAD_SHARD}` holds tensors that are not the MTP head's", "give that file another name"
        )
    return Target(folder, shards, head, config, changed)


def _require_described(checkpoint: Checkpoint, head: mtp.Shapes, config: dict[str, Any]) -> None:
    """Raise SparkError where the model's own attention layers are not as config.json says, which the head's follows."""
    layer = {name.removeprefix(mtp.LAYER): shape for name, shape in head.items() if name.startswith(mtp.LAYER)}
    attention = {name: name.partition(ATTENTION)[0] for name in checkpoint.names() if ATTENTION in name}
    prefixes = {prefix for name, prefix in attention.items() if ".layers." in name and not name.startswith(mtp.PREFIX)}
    for prefix in sorted(prefixes):
        for part, promised in layer.items():
            name = f"{prefix}.{part}"
            if name in checkpoint.names() and checkpoint.shape(name) != promised:
                path, left_out = checkpoint.folder / "config.json", _left_out(config)
                raise SparkError(
                    f"`{path}` does not describe the weights beside it: `{name}` has shape "
                    f"{list(checkpoint.shape(name))}, and it says {list(promised)}"
                    + (f" (it leaves out {left_out}, for which the type's default stands)" if left_out else ""),
                    file_anew(path),
                )


def _left_out(config: dict[str, Any]) -> str:
    """The sizes of the head that config.json says nothing of, or the part that should."""
    if config.get("model_type") == MULTIMODAL and not isinstance(config.get("text_config"), dict):
        return "text_config"
    return ", ".join(key for key in mtp.SIZES if text_part(config).get(key) is None)


def _promise_head(folder: Path, config: dict[str, Any]) -> bool:
    """Let `config` promise a head, and where its top says something of one, there too: vLLM reads that first.

    Whether it had to be changed. Raises SparkError where it promises a head that is unknown here.
    """
    changed = False
    for part in (text_part(config), *([config] if mtp.LAYERS in config else [])):
        if not mtp.layers(part):
            part[mtp.LAYERS], changed = 1, True
        if unknown := mtp.unknown(part):
            raise SparkError(
                f"`{folder / 'config.json'}` promises {unknown}, which is unknown here",
                file_anew(folder / "config.json"),
            )
    return changed


def _body(file: TensorFile) -> list[str]:
    return [name for name in file.names() if not name.startswith(mtp.PREFIX)]


def inject_head(
    target: Target,
    head: HeadSource,
    out: Path,
    *,
    known: Mapping[str, SealedFile],
    link: bool = False,
    replace: bool = False,
    merge: str = "sparkctl merge RUN --force",
    elsewhere: str = ELSEWHERE,
    finish: Callable[[Path, dict[str, SealedFile]], None],
    progress: Progress = silent,
) -> None:
    """Write `target` with `head` as folder `out`.

    known: files of the target with the digests that its seal gives them; one that differs is an error, which `merge`,
    the command that wrote them, mends. elsewhere: the command that writes to another disk. link: hard links where the
    file system allows. finish: writes what else belongs into the folder, after the audit; it is given the digests that
    are known by then. Raises SparkError where the head is not finite or the audit finds anything, OSError where the
    disk is full; `out` is then what it was.
    """
    copied = sum(shard.bytes for shard in target.shards if not (link and shard.whole))
    require_space(out, copied + head.bytes, elsewhere)
    with staged_folder(out, replace=replace) as stage:
        copy_companions(target.folder, stage, None)
        if target.config_changed:
            (stage / "config.json").write_text(json.dumps(target.config, indent=2) + "\n", encoding="utf-8")
        (stage / INDEX).write_bytes(_index(target, head))
        with promising(stage) as promised:
            with progress.task("injecting", target.bytes + head.bytes, "B") as task:
                _write_head(head, stage / HEAD_SHARD, task)  # first: it is small, and may be refused
                digests = dict(_write_shards(target, stage, known, link, merge, task))
            problems = audit(stage, promised=promised)
        if problems:
            raise _not_whole(problems, target, out)
        finish(stage, digests)


def linked(target: Target, out: Path) -> int:
    """How many shards in `out` are the model's own files."""
    return sum((out / shard.name).samefile(shard.file.path) for shard in target.shards)


def _not_whole(problems: list[str], target: Target, out: Path) -> SparkError:
    """What the audit of the new folder found, and whose fault that is."""
    own = set(audit(target.folder))
    ours = [problem for problem in problems if problem not in own]
    hint = "this is a bug" if ours else f"`{target.folder}` is not whole either: {folder_anew(target.folder)}"
    return SparkError(
        f"the model with its head is not whole: {some(problems, '; ')}", f"{hint}; nothing was written to `{out}`"
    )


def _write_shards(
    target: Target, stage: Path, known: Mapping[str, SealedFile], link: bool, merge: str, task: Task
) -> Iterator[tuple[str, SealedFile]]:
    """The model's shards; size and digest of each. merge: the command that writes a merged model anew."""
    for shard in target.shards:
        path, before = stage / shard.name, known.get(shard.file.path.name)
        if not shard.whole:
            yield shard.name, _written(_without_head(shard), path, task)
            continue
        if link and _linked(shard.file.path, path):
            task.advance(shard.bytes)
            after = SealedFile(size=path.stat().st_size, sha256=sha256_file(path))
        else:
            after = _written(_content(shard.file.path), path, task)
        if before and before != after:
            raise SparkError(
                f"`{shard.file.path}` is not what was written there: its digest is another",
                merge,
            )
        yield shard.name, after


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made: another file system, and some kinds of them, allow none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True


def _written(content: Iterator[bytes | bytearray], path: Path, task: Task) -> SealedFile:
    """Write it, hashed by a second thread meanwhile: a copy is then as fast as the slower of the two."""
    digest, size = sha256(), 0
    with naming(path), path.open("wb") as out, ThreadPoolExecutor(1) as hasher:
        for piece in content:
            hashed = hasher.submit(digest.update, piece)
            out.write(piece)
            size += len(piece)
            task.advance(len(piece))
            hashed.result()
    return SealedFile(size=size, sha256=digest.hexdigest())


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            yield piece


def _without_head(shard: Shard) -> Iterator[bytes | bytearray]:
    """The shard's file with the head's tensors left out."""
    entries, end, file = {}, 0, shard.file
    for name in shard.kept:
        size = file.nbytes(name)
        entries[name] = Entry(file.dtype(name), file.shape(name), end, end + size)
        end += size
    yield header_bytes(entries, file.metadata())
    for name in shard.kept:
        yield from file.pieces(name)


def _write_head(head: HeadSource, path: Path, task: Task) -> None:
    """The head's shard, a chunk in memory at a time. Raises SparkError where a value is not finite."""
    layout = {name: (file.dtype(name), file.shape(name)) for name, file in sorted(head.tensors.items())}
    with naming(path), ShardWriter(path, layout, {"format": "pt"}) as writer:
        for name, file in sorted(head.tensors.items()):
            writer.write_bytes(name, _finite(head, name, file))
            task.advance(file.nbytes(name))


def _finite(head: HeadSource, name: str, file: TensorFile) -> Iterator[bytearray]:
    """The tensor's bytes. Raises SparkError where a value is not finite."""
    for piece in file.pieces(name):
        if not finite(piece, file.dtype(name)):
            raise SparkError(f"`{name}` in the MTP head of `{head.origin}` is not finite", head.mend)
        yield piece


def _index(target: Target, head: HeadSource) -> bytes:
    """The model's own index, its metadata kept, with the head's tensors in their shard."""
    path = target.folder / INDEX
    metadata = json.loads(path.read_bytes()).get("metadata") if path.is_file() else None
    metadata = metadata if isinstance(metadata, dict) else {}
    where = {name: shard.name for shard in target.shards for name in shard.kept}
    body = sum(shard.file.nbytes(name) for shard in target.shards for name in shard.kept)
    values = {
        "metadata": {**metadata, "total_size": body + head.bytes},
        "weight_map": where | dict.fromkeys(sorted(head.tensors), HEAD_SHARD),
    }
    return (json.dumps(values, indent=2) + "\n").encode()

"""What an analysis starts from: flags, else what the run has, else the parent's values, else the defaults; and one
fingerprint over it all.

Gathering is cheap, since a second run must say "up to date" at once: no torch, no transformers, and a data file is
hashed again only where its size or time changed.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.data.tokenizer import file_digests
from sparkctl.errors import SparkError, UsageError
from sparkctl.files import sha256_bytes, sha256_file
from sparkctl.manifest.fingerprint import fingerprint
from sparkctl.manifest.schema import AnalysisTable, Asked, DataFile, DataTable, Dropped, Manifest, ModelTable
from sparkctl.manifest.store import NAME, Run
from sparkctl.plan.recipes import SUFFIX
from sparkctl.plan.request import command
from sparkctl.progress import Progress
from sparkctl.steps.bases import require_files, require_known_head
from sparkctl.words import here, quoted

if TYPE_CHECKING:
    from sparkctl.data.chat import ChatFormat
    from sparkctl.model.hub import ModelSource
    from sparkctl.model.inspect import ModelInfo

FORMAT = 2  # of tokens and their meaning: a change here makes every analysis stale
SEED = 0
TOKENS = "tokens"  # the folder of a run's token store
EVAL_FRACTION = 0.02
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"


@dataclass(frozen=True)
class Request:
    """The command line of `sparkctl analyze`; None leaves a value to the run, the parent or the default."""

    data: tuple[Path, ...]
    run: Path
    model: str | None = None
    parent: Path | None = None
    continues: bool = False
    recipe: str | None = None
    max_seq_length: int | None = None
    eval_fraction: float | None = None
    chat_template: Path | None = None
    allow_unknown: bool = False
    skip_bad: bool = False
    show: int = 0

    def again(self, *options: str) -> str:
        """The command line once more, with more options."""
        flags = {
            "--run": self.run, "--model": self.model, "--parent": self.parent, "--continue": self.continues,
            "--recipe": self.recipe, "--max-seq-length": self.max_seq_length, "--eval-fraction": self.eval_fraction,
            "--chat-template": self.chat_template, "--allow-unknown": self.allow_unknown, "--skip-bad": self.skip_bad,
            "--show": self.show or None,
        }  # fmt: skip
        given = [
            [flag] if value is True else [flag, str(value)]
            for flag, value in flags.items()
            if value is not None and value is not False
        ]
        return shlex.join(["sparkctl", "analyze", *map(str, self.data), *chain.from_iterable(given), *options])


@dataclass(frozen=True)
class Inputs:
    """A request with everything decided."""

    root: Path  # of the run, absolute; it may not exist yet
    source: ModelSource
    parent: Run | None
    files: list[DataFile]
    config_sha256: str
    tokenizer_files: str
    template_text: str | None  # None: the model's own
    max_seq_length: int | None
    eval_fraction: float
    seed: int
    recipe: str | None
    continues: bool
    allow_unknown: bool
    made_from: str

    def model_info(self) -> ModelInfo:
        """What config.json says of the model."""
        from sparkctl.model.inspect import inspect

        return inspect(self.source.folder, allow_unknown=self.allow_unknown)

    def chat_format(self) -> ChatFormat:
        """The model's tokenizer and chat template."""
        from sparkctl.data.chat import ChatFormat

        return ChatFormat.load(self.source.folder, self.template_text)

    def model_path(self) -> str:
        """The model as [model] names it: a hub id, or the folder relative to the run."""
        return self.source.source if self.source.is_hub else os.path.relpath(self.source.folder.absolute(), self.root)

    def data_table(self, skip_bad: bool, dropped: Dropped, bad: list[str]) -> DataTable:
        """[data], once the files were read."""
        return DataTable(
            files=self.files,
            max_seq_length=self.max_seq_length,
            eval_fraction=self.eval_fraction,
            seed=self.seed,
            skip_bad=skip_bad,
            recipe=self.recipe,
            dropped=dropped,
            bad=bad,
        )

    def inherited(self) -> np.ndarray:
        """Prompt keys (uint64) that the parent or a run before it held out."""
        from sparkctl.data.tokens import TokenStore

        if self.parent is None:
            return np.zeros(0, dtype=np.uint64)
        if not (self.parent.root / TOKENS).is_dir():
            raise SparkError(
                f"the parent `{self.parent.root}` has no token store, which says what it held out",
                analyze_command(self.parent, "--force"),
            )
        return TokenStore.open(self.parent.root / TOKENS).held_out_keys()

    def wishes_differ(self, manifest: Manifest) -> bool:
        """Whether the manifest records other wishes than these for the steps to come."""
        assert manifest.data
        assert manifest.model
        recorded = (manifest.data.recipe, manifest.run.continues, manifest.model.allow_unknown)
        return recorded != (self.recipe, self.continues, self.allow_unknown)

    def places_differ(self, manifest: Manifest) -> bool:
        """Whether parent, model or data, the same ones, are elsewhere by now."""
        assert manifest.data
        assert manifest.model
        recorded = (manifest.run.parent, manifest.model.source, [file.path for file in manifest.data.files])
        return recorded != (self._parent_path(), self.model_path(), [file.path for file in self.files])

    def record_wishes(self, manifest: Manifest) -> None:
        """Write down what later steps are to do, and where parent, model and data are now; no token depends on it."""
        assert manifest.data
        assert manifest.model
        manifest.data.recipe = self.recipe
        for file, now in zip(manifest.data.files, self.files, strict=True):  # the same, by their digests
            file.path, file.size, file.mtime_ns = now.path, now.size, now.mtime_ns
        manifest.model.allow_unknown = self.allow_unknown
        manifest.run.continues = self.continues
        manifest.run.parent = self._parent_path()
        manifest.model.source, manifest.model.revision = self.model_path(), self.source.revision
        if base := manifest.checkpoint("base"):
            base.path = manifest.model.source

    def _parent_path(self) -> str | None:
        return os.path.relpath(self.parent.root, self.root) if self.parent else None


def analysed(run: Run) -> tuple[ModelTable, DataTable, AnalysisTable]:
    """The tables that analyze wrote. Raises UsageError where it has not."""
    manifest = run.manifest
    if not (manifest.model and manifest.data and manifest.analysis):
        raise UsageError(
            f"no [analysis] in `{run.root}`", f"sparkctl analyze DATA --run {quoted(run.root)} --model MODEL"
        )
    return manifest.model, manifest.data, manifest.analysis


def analyze_command(run: Run, *options: str, shown: Path | None = None) -> str:
    """The command line that analysed `run`, with more options: what was given then is the run's own by now.

    shown: the run as the user named it.
    """
    data = run.manifest.data
    files = [os.path.relpath(run.resolve(file.path)) for file in data.files] if data else []
    skip_bad = ["--skip-bad"] * bool(data and data.skip_bad)
    words = [*(files or ["DATA"]), "--run", str(shown or run.root), *skip_bad, *options]
    return shlex.join(["sparkctl", "analyze", *words])


def base_moved(run: Run) -> str:
    """What to do where the base's folder is gone: tokens, plan and training hold on for the same model elsewhere."""
    elsewhere = analyze_command(run, "--model", "FOLDER", "--force")
    return f"put it back, or `{elsewhere}` with the folder where it is now"


def recommend_command(run: Run, *, shown: Path | None = None, **changes: Any) -> str:
    """The command line that planned `run`, as the plan keeps it, with other values.

    A plan that was trained by gives way to `--force` alone.
    """
    plan, trained = run.manifest.plan, run.manifest.train
    asked = plan.asked if plan else Asked()
    recipe = asked.recipe
    if recipe and recipe.endswith(SUFFIX):
        recipe = here(run.resolve(recipe))
    begun = trained is not None and (trained.step > 0 or trained.status == "done")
    return command(shown or run.root, asked, recipe, **changes) + " --force" * begun


def hold_out_command(run: Run, shown: Path | None = None) -> str:
    """The same where nothing was held out: a share that leaves some of so few examples, but for one case in twenty."""
    analysis = run.manifest.analysis
    fraction = max(0.02, min(0.5, 3 / analysis.train_examples)) if analysis and analysis.train_examples else 0.02
    return analyze_command(run, "--eval-fraction", f"{fraction:.2g}", "--force", shown=shown)


def recorded_parent(run: Run) -> Run | None:
    """The run of the round before, as the manifest names it. Raises UsageError where it is gone."""
    link = run.manifest.run.parent
    if link is None:
        return None
    folder = Path(here(run.resolve(link)))
    if not (folder / NAME).exists():
        raise UsageError(
            f"the parent of `{run.root}` was `{folder}`, which is no run: was it moved or removed?",
            f"say where it is now: {analyze_command(run, '--parent', 'FOLDER')}",
        )
    return Run.open(folder)


def gather(request: Request, run: Run | None, progress: Progress) -> Inputs:
    """Decide every value. Raises UsageError or SparkError where a file, the model or the parent is not there."""
    root = request.run.absolute()
    parent = _parent(request, run)
    owners = [owner for owner in (run, parent) if owner]
    recorded = next((owner.manifest.data for owner in owners if owner.manifest.data), None)
    files = _files(request.data, root, run)
    source = _model(request, run, parent, progress)
    require_files(source)
    require_known_head(source, replace(request, model="FOLDER_OR_HUB_ID").again())
    config_sha256 = sha256_file(source.folder / "config.json")
    template_text = _template(request, run, parent, config_sha256)
    max_seq_length = request.max_seq_length or (recorded.max_seq_length if recorded else None)
    eval_fraction = request.eval_fraction
    if eval_fraction is None:
        eval_fraction = recorded.eval_fraction if recorded else EVAL_FRACTION
    seed = recorded.seed if recorded else SEED
    tokenizer = file_digests(source.folder)
    models = [owner.manifest.model for owner in owners if owner.manifest.model]
    made_from = fingerprint(
        FORMAT, [file.sha256 for file in files], config_sha256, tokenizer | _templates(source.folder), template_text,
        max_seq_length, eval_fraction, seed, request.skip_bad, analysed(parent)[2].made_from if parent else None,
    )  # fmt: skip
    return Inputs(
        root=root,
        source=source,
        parent=parent,
        files=files,
        config_sha256=config_sha256,
        tokenizer_files=fingerprint(tokenizer),
        template_text=template_text,
        max_seq_length=max_seq_length,
        eval_fraction=eval_fraction,
        seed=seed,
        recipe=_recipe(request, root, owners),
        continues=request.continues or bool(run and request.parent is None and run.manifest.run.continues),
        allow_unknown=request.allow_unknown
        or any(model.allow_unknown and model.config_sha256 == config_sha256 for model in models),
        made_from=made_from,
    )


def _parent(request: Request, run: Run | None) -> Run | None:
    """The run of the round before: the flag's, else the one this run has already."""
    folder = request.parent
    if folder is None:
        parent = recorded_parent(run) if run else None
    elif folder.absolute() == request.run.absolute():
        raise UsageError(f"`{folder}` cannot be its own parent", "name another folder with `--run`")
    elif not (folder / NAME).exists():
        raise UsageError(
            f"`{folder}` is not a run: it has no {NAME}", "name the run of the round before: `--parent RUN`"
        )
    else:
        parent = Run.open(folder)
    if parent:
        analysed(parent)
    elif request.continues:
        raise UsageError("`--continue` goes on from a parent's checkpoint", "name the parent: `--parent RUN`")
    return parent


def _files(paths: Sequence[Path], root: Path, run: Run | None) -> list[DataFile]:
    """Each file with its digest, taken from the run where size and time have not changed."""
    known = {f.path: f for f in run.manifest.data.files} if run and run.manifest.data else {}
    files = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"no file `{path}`", "give JSONL, .jsonl.gz or Parquet files")
        if path.is_dir():
            raise UsageError(f"`{path}` is a folder", _files_in(path))
        if not path.is_file():  # `<(zcat FILE)`, say: it has no size, and can be read but once
            raise UsageError(f"`{path}` is not a regular file", "write what comes from it to a file first")
        status, name = path.stat(), os.path.relpath(path.absolute(), root)
        if status.st_size == 0:
            raise SparkError(f"`{path}` is empty", "give a file with one chat a line")
        before = known.get(name)
        same = before and (before.size, before.mtime_ns) == (status.st_size, status.st_mtime_ns)
        digest = before.sha256 if before and same else sha256_file(path)
        examples = before.examples if before else 0
        files.append(
            DataFile(path=name, sha256=digest, size=status.st_size, mtime_ns=status.st_mtime_ns, examples=examples)
        )
    return files


def _files_in(folder: Path) -> str:
    """How to give what lies in a folder."""
    if any(folder.rglob("*.arrow")):
        return "write the data set as Parquet: `load_from_disk(FOLDER)[SPLIT].to_parquet(FILE)`, with datasets"
    kinds = ("jsonl", "jsonl.gz", "parquet")
    kind = next((kind for kind in kinds if any(folder.glob(f"*.{kind}"))), "jsonl")
    return f"name the files in it: `{folder}/*.{kind}`"


def _model(request: Request, run: Run | None, parent: Run | None, progress: Progress) -> ModelSource:
    """The flag's model, else the run's own, else the parent's; a hub id keeps the commit it was recorded with."""
    from sparkctl.model.hub import locate

    owners = [(o.root, o.manifest.model) for o in (run, parent) if o and o.manifest.model]
    if request.model is not None:
        pinned = next((model.revision for _, model in owners if model.source == request.model), None)
        return locate(request.model, revision=pinned, progress=progress)
    for root, model in owners:
        moved = request.again("--model", "FOLDER")
        return locate(model.source, revision=model.revision, base=root, moved=moved, progress=progress)
    raise UsageError("which model to train is not said", "name it: `--model FOLDER` or `--model HUB_ID`")


def _templates(folder: Path) -> dict[str, str]:
    """Digests of the files that the model's chat templates are read from."""
    paths = [*(folder / name for name in TEMPLATE_FILES), *folder.glob(NAMED_TEMPLATES)]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths if path.is_file()}


def _template(request: Request, run: Run | None, parent: Run | None, config_sha256: str) -> str | None:
    """The flag's template file; without one the copy of the run, where it was given one, or of the parent.

    A copy counts for the model that it was made with; None: the template is the model's own.
    """
    if request.chat_template:
        try:
            return request.chat_template.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(f"no file `{request.chat_template}`", "give a Jinja chat template") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"`{request.chat_template}` is not UTF-8: byte {error.start}", "save the template as UTF-8"
            ) from None
    for owner in (run, parent):
        model = owner.manifest.model if owner else None
        if owner and model and model.config_sha256 == config_sha256 and (owner is parent or model.chat_template.given):
            return _copied_template(owner.root / model.chat_template.file, model.chat_template.sha256)
    return None


def _copied_template(path: Path, sha256: str) -> str:
    data = path.read_bytes() if path.is_file() else b""
    if sha256_bytes(data) != sha256:
        what = "changed since it was recorded" if data else "is gone"
        raise SparkError(f"`{path}` {what}", "restore it, or name a template with `--chat-template FILE`")
    return data.decode()


def _recipe(request: Request, root: Path, owners: Sequence[Run]) -> str | None:
    """The recipe's name, or its file relative to the run; checked here so that a wrong key is said at once."""
    from sparkctl.plan.recipes import load_recipe

    name = request.recipe
    if name is None:
        owner = next((owner for owner in owners if owner.manifest.data), None)
        recorded = owner.manifest.data.recipe if owner and owner.manifest.data else None
        if owner and recorded and recorded.endswith(".toml"):
            return os.path.relpath(owner.resolve(recorded), root)
        return recorded
    load_recipe(name)
    return os.path.relpath(Path(name).absolute(), root) if Path(name).suffix == ".toml" else name

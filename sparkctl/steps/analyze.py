"""`sparkctl analyze`: chat files to the token store, and the tables [model], [data] and [analysis] of a run.

A run is made where there is none. Nothing but the new token store, the run's copy of the chat template and the
manifest is written, each whole; where the work fails, a run made for it is removed again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.data.split import ENOUGH, FEW
from sparkctl.data.tokens import stored_digest
from sparkctl.errors import SparkError, UsageError
from sparkctl.files import naming, staged_folder, sweep_stages, write_atomic
from sparkctl.manifest.schema import AnalysisTable, ChatTemplate, Checkpoint, DataTable, Manifest, ModelTable
from sparkctl.manifest.store import NAME, STEP_LOCK, Run, now
from sparkctl.progress import Progress, silent
from sparkctl.steps.inputs import TOKENS, Inputs, Request, analysed, gather
from sparkctl.words import counted, quoted

if TYPE_CHECKING:
    from sparkctl.data.chat import ChatFormat
    from sparkctl.data.ingest import Earlier, Tally
    from sparkctl.data.tokens import Row
    from sparkctl.model.inspect import ModelInfo

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Shown:
    """An example as the model sees it: stretches of text, each trained or not."""

    place: str
    tokens: int
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Result:
    """What analyze found; the tables are those of the manifest. made: when, where it is up to date."""

    run: Path
    model: ModelTable
    data: DataTable
    analysis: AnalysisTable
    up_to_date: bool = False
    made: str | None = None
    shown: list[Shown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def analyze(request: Request, *, force: bool = False, dry_run: bool = False, progress: Progress = silent) -> Result:
    """Tokenise the request's files into its run, unless that is done. Under `dry_run` nothing is written."""
    run = Run.open(request.run) if (request.run / NAME).exists() else None
    if run is None:
        _refuse_foreign(request.run)
    inputs = gather(request, run, progress)
    if run and not force and _is_true(run, inputs):
        return _up_to_date(run, inputs, request, dry_run)
    if run and run.manifest.train and not force:
        raise UsageError(
            f"`{request.run}` has been trained on the data it holds; other data would make that result untrue",
            f"analyze into a new run with `--run NEW --parent {quoted(request.run)}`, or begin this anew: "
            f"`{request.again('--force')}`",
        )
    if dry_run:
        return _Analysis(inputs, request, progress).dry_run(run)
    with _claimed(request, run, inputs.parent) as claimed:
        return _Analysis(inputs, request, progress).write(claimed)


@contextmanager
def _claimed(request: Request, run: Run | None, parent: Run | None) -> Iterator[Run]:
    """The run, locked for this step; one that was made for it goes away again where the work fails.

    Only he who holds the lock undoes: another process may have found the run and taken it first.
    """
    made, new = run is None, not request.run.exists()
    run = run or Run.create(request.run, parent=parent, continues=request.continues)
    with run.step("analyze"), ExitStack() as undo:
        run.require_writable()
        if made:
            undo.callback(_remove, run.root, new)
        _sweep(run.root)
        yield run
        undo.pop_all()


def _refuse_foreign(folder: Path) -> None:
    """Raise UsageError where `folder` is no run and has files of the names that an analysis writes."""
    if there := [name for name in (TOKENS, TEMPLATE) if (folder / name).exists()]:
        names = " and ".join(f"`{name}`" for name in there)
        raise UsageError(
            f"`{folder}` is not a run, and holds {names}, which an analysis would replace",
            "name another folder with `--run`; it is made where absent",
        )


def _sweep(root: Path) -> None:
    """Remove what killed analyses left; other files of the folder are not ours."""
    for name in (NAME, TOKENS, TEMPLATE):
        sweep_stages(root, name)


def _remove(root: Path, new: bool) -> None:
    """Remove what this analysis wrote, and the folder where it was made for it and holds nothing else."""
    _sweep(root)
    shutil.rmtree(root / TOKENS, ignore_errors=True)
    for name in (NAME, TEMPLATE, STEP_LOCK, ".step.json", ".manifest.lock"):
        (root / name).unlink(missing_ok=True)
    if new:
        with suppress(OSError):
            root.rmdir()


def _is_true(run: Run, inputs: Inputs) -> bool:
    """Whether the run holds what these inputs give: the manifest says so, and the store is the one it means."""
    analysis, model = run.manifest.analysis, run.manifest.model
    if not analysis or not model or analysis.made_from != inputs.made_from:
        return False
    whole = stored_digest(run.root / TOKENS) == analysis.digest
    return whole and (run.root / model.chat_template.file).exists()


def _up_to_date(run: Run, inputs: Inputs, request: Request, dry_run: bool) -> Result:
    """The tables as they are; wishes that change no token (recipe, --continue) are still recorded, and new places
    where the run can be written."""
    moved = inputs.places_differ(run.manifest) and os.access(run.root, os.W_OK)
    if not dry_run and (moved or inputs.wishes_differ(run.manifest)):
        with run.edit() as manifest:
            inputs.record_wishes(manifest)
    shown = _show(run.root / TOKENS, inputs.chat_format(), request.show) if request.show else []
    model, data, analysis = analysed(run)
    notes = _notes(request, inputs, analysis, *["--force"] * (run.manifest.train is not None))
    return Result(run.root, model, data, analysis, True, run.made("base"), shown, notes)


class _Analysis:
    """One pass over the data, its inputs gathered."""

    def __init__(self, inputs: Inputs, request: Request, progress: Progress) -> None:
        self._inputs, self._request, self._progress = inputs, request, progress
        self._started = time.monotonic()
        self._info: ModelInfo = inputs.model_info()
        self._format: ChatFormat = inputs.chat_format()
        if self._format.vocab_size > self._info.vocab_size:
            raise SparkError(
                f"the tokenizer of `{inputs.source.folder}` has {self._format.vocab_size} tokens, "
                f"the embedding {self._info.vocab_size} rows",
                "use the tokenizer that belongs to the model",
            )
        self._inherited = inputs.inherited()  # a parent without tokens is said before any work

    def dry_run(self, run: Run | None) -> Result:
        """The same numbers, nothing written."""
        shown: list[Shown] = []

        def keep_first(row: Any) -> None:
            if len(shown) < self._request.show:
                shown.append(_as_seen(self._format, row.input_ids, row.trained, row.place))

        root = self._request.run
        tally = self._ingest(keep_first, run)
        held_out = self._held_out(tally)
        return self._result(root, tally, held_out, digest=None, shown=shown)

    def write(self, run: Run) -> Result:
        """Store, template and manifest, in this order: a manifest never speaks of what is not there."""
        # imports first: where Ctrl-C meets a dataclass being made, Python ends by the signal, whatever catches it
        import sparkctl.data.ingest  # noqa: F401
        from sparkctl.data.tokens import TokenStoreWriter

        target = run.root / TOKENS
        with staged_folder(target, replace=True) as stage:
            writer = TokenStoreWriter(stage)

            def add(row: Row) -> None:
                with naming(target):
                    writer.add(row)

            try:
                tally = self._ingest(add, run)
                held_out = self._held_out(tally)
                with naming(target):
                    digest = writer.finish(held_out, self._inherited)
            finally:
                with naming(target):
                    writer.close()
            shown = _show(stage, self._format, self._request.show)
        write_atomic(run.root / TEMPLATE, self._format.template.encode())
        result = self._result(run.root, tally, held_out, digest, shown)
        with run.edit() as manifest:
            self._record(manifest, result)
        return result

    def _ingest(self, add: Any, run: Run | None) -> Tally:
        from sparkctl.data.ingest import Ingest

        inputs = self._inputs
        ingest = Ingest(
            self._format, add, seed=inputs.seed, max_seq_length=inputs.max_seq_length,
            skip_bad=self._request.skip_bad, earlier=self._earlier(run),
        )  # fmt: skip
        total = sum(file.size for file in inputs.files)
        with self._progress.task("tokenising", total, unit="B") as task:
            tally = ingest.run(self._request.data, task.advance)
        if not tally.lengths:
            raise SparkError(f"no example is left: {_counts(tally)}", _why_none(tally, self._inherited_limit()))
        return tally

    def _earlier(self, run: Run | None) -> list[Earlier]:
        """Stores to take known rows from: this run's own and the parent's, where made of the same tokens.

        One that is damaged gives none; the parent's has to be mended, since it says what was held out.
        """
        from sparkctl.data.ingest import Earlier
        from sparkctl.data.tokens import TokenStore, intact
        from sparkctl.steps.training import whole_store

        wanted = (self._format.tokenizer_sha256, self._format.template_sha256)
        parent = self._inputs.parent
        known = [(parent, whole_store(parent))] if parent else []
        if run and stored_digest(run.root / TOKENS) and intact(run.root / TOKENS):
            known.insert(0, (run, TokenStore.open(run.root / TOKENS)))
        stores = []
        for owner, store in known:
            model, analysis = owner.manifest.model, owner.manifest.analysis
            same = model and (model.tokenizer_sha256, model.chat_template.sha256) == wanted
            if same and analysis and analysis.digest == store.digest:
                stores.append(Earlier(store))
        return stores

    def _inherited_limit(self) -> str:
        """What a limit is that nobody gave here, and whose it was; nothing of one that was given."""
        limit, parent = self._inputs.max_seq_length, self._inputs.parent
        if self._request.max_seq_length or not limit:
            return ""
        theirs = parent.manifest.data if parent else None
        whose = f"in `{parent.root}`" if parent and theirs and theirs.max_seq_length == limit else "it was before"
        return f": it is {limit:,}, as {whose}"

    def _held_out(self, tally: Tally) -> np.ndarray:
        from sparkctl.data.split import choose_held_out

        keys = np.frombuffer(tally.prompt_keys, dtype=np.uint64)
        held_out = choose_held_out(keys, self._inputs.eval_fraction, self._inherited)
        if held_out.all():
            hint = "give more data: what an earlier round held out is never trained"
            if not np.isin(keys, self._inherited).all():
                hint = "give a lower `--eval-fraction`: examples with the same prompt are held out together"
            raise SparkError("every example is held out, so none is left to train on", hint)
        return held_out

    def _result(self, root: Path, tally: Tally, held_out: np.ndarray, digest: str | None, shown: list[Shown]) -> Result:
        from sparkctl.data.stats import describe

        inputs = self._inputs
        description = describe(
            np.frombuffer(tally.lengths, dtype=np.int32),
            np.frombuffer(tally.labels, dtype=np.int32),
            held_out,
            token_keys=np.frombuffer(tally.token_keys, dtype=np.uint64),
            turns=np.frombuffer(tally.turns, dtype=np.int32),
        )
        for file, examples in zip(inputs.files, tally.read, strict=True):
            file.examples = examples
        analysis = AnalysisTable(
            **(asdict(description) | {"histogram": description.histogram}),
            marker_examples=tally.marker_examples,
            marker_places=tally.marker_places,
            digest=digest,
            reused=tally.reused,
            seconds=round(time.monotonic() - self._started, 2),
            made_from=inputs.made_from,
        )
        data = inputs.data_table(self._request.skip_bad, tally.dropped, tally.bad)
        notes = _notes(self._request, inputs, analysis)
        return Result(root, self._model_table(), data, analysis, shown=shown, notes=notes)

    def _model_table(self) -> ModelTable:
        inputs, info = self._inputs, self._info
        return ModelTable(
            source=inputs.model_path(),
            revision=inputs.source.revision,
            config_sha256=inputs.config_sha256,
            model_type=info.model_type,
            parameters=info.parameters,
            vocab_size=info.vocab_size,
            tokenizer_sha256=self._format.tokenizer_sha256,
            tokenizer_files=inputs.tokenizer_files,
            chat_template=ChatTemplate(
                file=TEMPLATE, sha256=self._format.template_sha256, given=inputs.template_text is not None
            ),
            allow_unknown=inputs.allow_unknown,
        )

    def _record(self, manifest: Manifest, result: Result) -> None:
        manifest.model, manifest.data, manifest.analysis = result.model, result.data, result.analysis
        self._inputs.record_wishes(manifest)
        base = Checkpoint(
            id="base", kind="base", path=result.model.source, created=now(), digest=result.model.config_sha256
        )
        manifest.checkpoints = [base, *(c for c in manifest.checkpoints if c.id != "base")]


def _notes(request: Request, inputs: Inputs, analysis: AnalysisTable, *force: str) -> list[str]:
    """What a person may not have meant. force: what a command that mends it needs where the run is trained."""
    return _beyond_the_model(request, inputs, analysis, *force) + _few_held_out(request, inputs, analysis, *force)


def _beyond_the_model(request: Request, inputs: Inputs, analysis: AnalysisTable, *force: str) -> list[str]:
    """Whether an example is longer than the model was made for, and what leaves such out."""
    from sparkctl.model.inspect import read_config, text_part

    most = text_part(read_config(inputs.source.folder)).get("max_position_embeddings")
    if not isinstance(most, int) or analysis.max <= most:
        return []
    shorter = replace(request, max_seq_length=most).again(*force)
    told = f"the longest example has {analysis.max:,} tokens, and the model was made for {most:,}"
    return [f"{told}; `{shorter}` leaves out what is longer"]


def _few_held_out(request: Request, inputs: Inputs, analysis: AnalysisTable, *force: str) -> list[str]:
    """Whether what is held out is too little to choose by, and what holds more out, where a fifth of the data suffices.

    A `--eval-fraction` of 0 says that nothing is to be.
    """
    held_out, examples = analysis.eval_examples, analysis.examples
    if held_out >= FEW or inputs.eval_fraction <= 0:
        return []
    told = f"{counted(held_out, 'example')} held out" if held_out else "nothing is held out"
    rests = "the best checkpoint and the choice between two MTP heads rest on what is held out, and below"
    note = f"{told}: {rests} {FEW} that is chance"
    if examples < 5 * ENOUGH:
        return [f"{note}; more chats mend it"]
    more = replace(request, eval_fraction=float(f"{ENOUGH / examples:.2g}")).again(*force)
    return [f"{note}; `{more}` holds about {ENOUGH} out"]


def _counts(tally: Tally) -> str:
    dropped = tally.dropped
    reasons = {
        "without assistant text": dropped.empty_assistant,
        "without a trained token": dropped.no_trained_token,
        "longer than the limit": dropped.too_long,
        "bad": dropped.bad_lines,
    }
    named = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f"{sum(tally.read) + dropped.bad_lines} read, {named or 'none kept'}"


def _why_none(tally: Tally, inherited: str) -> str:
    """What to do where nothing is left: about the reason that took most. inherited: where the limit comes from."""
    dropped = tally.dropped
    hints = {
        f"raise `--max-seq-length`{inherited or ', or leave it out'}": dropped.too_long,
        "leave `--skip-bad` out to see what is wrong with the first bad line": dropped.bad_lines,
        "give every chat an assistant turn with text": dropped.empty_assistant,
        "no answer has anything to learn: an end token at its beginning, a `weight` of 0, or a template that prints "
        "nothing of it": dropped.no_trained_token,
    }
    most = max(hints, key=lambda hint: hints[hint])
    return most if hints[most] else "give files with one chat a line"


def _show(folder: Path, format: ChatFormat, count: int) -> list[Shown]:
    from sparkctl.data.tokens import TokenStore

    if not count:
        return []
    store = TokenStore.open(folder)
    return [_as_seen(format, *store.document(i), store.place(i)) for i in range(min(count, len(store)))]


def _as_seen(format: ChatFormat, ids: np.ndarray, trained: np.ndarray, place: str) -> Shown:
    """The document's text, cut where training begins and ends."""
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    texts = format.tokens_as_text(ids)
    pieces = [("".join(texts[a:b]), bool(trained[a])) for a, b in pairwise(cuts) if b > a]
    return Shown(place, len(ids), pieces)

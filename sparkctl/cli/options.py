"""Options that recur, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparkctl.errors import UsageError
from sparkctl.manifest.table import Table


def about(table: type[Table], field: str) -> str:
    """What the manifest's schema says of a field, as a flag's help."""
    return table.model_fields[field].description or ""


def _folder(run: Path) -> Path:
    """Refuse a file in a run's place. Raises UsageError."""
    if run.is_file():
        raise UsageError(f"`{run}` is a file; a run is a folder", f"give the folder: `{run.parent}`")
    return run


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False, callback=_folder)]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, also for a failure.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Check and show what would be done, write nothing.")]
SlowOpt = Annotated[
    bool, typer.Option("--allow-slow", help="On a GPU, compute in plain torch what lacks its fast kernel.")
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Do it again, also where the result is up to date.")]

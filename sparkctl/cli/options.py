"""Options that recur, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, also for a failure.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Check and show what would be done, write nothing.")]
SlowOpt = Annotated[
    bool, typer.Option("--allow-slow", help="On a GPU, compute in plain torch what lacks its fast kernel.")
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Do it again, also where the result is up to date.")]

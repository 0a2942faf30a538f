"""Unsloth's leaks, looked for in a process of its own: `python -m sparkctl.steps.leaks_process QUESTION`.

It wants to be imported before transformers, and changes that library's classes: beside it the installed one would not
be the installed one any more. QUESTION: the arguments of `engine_leaks` in JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sparkctl.manifest.schema import Machine
from sparkctl.manifest.table import EngineName, Mode
from sparkctl.progress import Progress
from sparkctl.telling import listen, telling
from sparkctl.verify.leaks import Finding, engine_leaks


def leaks_apart(
    config: dict[str, Any], engine: EngineName, mode: Mode, machine: Machine, progress: Progress, *,
    allow_slow: bool, name: str, without: str,
) -> list[Finding]:  # fmt: skip
    """What `engine_leaks` finds there. Raises what it raises. without: the command that does without this engine."""
    question = dict(
        config=config, engine=engine, mode=mode, machine=machine.model_dump(mode="json"), allow_slow=allow_slow,
        name=name,
    )  # fmt: skip
    what, hint = f"looking for leaks of the {engine} engine", f"`{without}` goes without it"
    found = listen(__name__, json.dumps(question), what=what, hint=hint, progress=progress)
    return [Finding(**one) for one in found["findings"]]


def main() -> None:
    """The command of this module."""
    asked = json.loads(sys.argv[1])
    with telling() as teller:
        from sparkctl.train.engines import import_first

        import_first(asked["engine"])
        machine = Machine.model_validate(asked.pop("machine"))
        found = engine_leaks(machine=machine, progress=teller, **asked)
        teller.answer({"findings": [vars(one) for one in found]})


if __name__ == "__main__":
    main()

"""The certificate that `train` begins with, in a process of its own:
`python -m sparkctl.steps.certificate_process RUN STEPS`.

What it loads is gone before the training begins: the memory of its models, and the libraries that an engine wants to
be imported before.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparkctl.manifest.evidence import Lossless
from sparkctl.manifest.store import Run
from sparkctl.progress import Progress
from sparkctl.steps.certificate import certified
from sparkctl.steps.training import Job, planned
from sparkctl.telling import listen, telling
from sparkctl.train.ranks import compute_on_own_gpu
from sparkctl.words import quoted

SLOW = "slow"


def certificate_of(job: Job, steps: int, progress: Progress) -> Lossless:
    """The certificate of the job's engine as it begins anew, not written down yet.

    Raises SparkError where it cannot be made, OSError where the system refuses something.
    """
    run = job.run.root
    hint = (
        f"`sparkctl train {quoted(run)} --no-certificate` goes without; where memory ended, "
        "`ps -eo rss,args --sort=-rss | head` shows who holds it"
    )
    table = listen(
        __name__, str(run), str(steps), *[SLOW] * job.allow_slow, what="making the certificate", hint=hint,
        progress=progress,
    )  # fmt: skip
    return Lossless.model_validate(table)


def main() -> None:
    """The command of this module."""
    run, steps, *slow = sys.argv[1:]
    with telling() as teller:
        compute_on_own_gpu()
        table, _ = certified(planned(Run.open(Path(run)), bool(slow)), int(steps), {}, teller)
        teller.answer(table.model_dump(mode="json"))


if __name__ == "__main__":
    main()

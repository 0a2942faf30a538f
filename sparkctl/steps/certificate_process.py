"""A certificate's measurements, the reference's and the engine's each in a process of its own:
`python -m sparkctl.steps.certificate_process PART FOLDER`.

The reference imports transformers and peft, which Unsloth wants to be imported before: in one process it would be
judged without its patches, another program than the one that trains. And a training that begins afterwards finds all
memory free. FOLDER is a scratch folder: the setting is written there, and the truth's gradients pass through it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.files import sweep_stages
from sparkctl.manifest.schema import PlanTable
from sparkctl.progress import Progress
from sparkctl.telling import listen, telling
from sparkctl.train.ranks import Ranks, compute_on_own_gpu

if TYPE_CHECKING:
    from sparkctl.data.batches import Pack
    from sparkctl.verify.certificate import Certificate
    from sparkctl.verify.lossless import Setting

JUDGES, JUDGED = "judges", "judged"  # the parts, in their order
SCRATCH, SETTING = "certificate", "setting.json"


def certify(setting: Setting, run: Path, progress: Progress) -> Certificate:
    """The certificate of the setting's engine. run: the folder whose disk has the room for a model's gradients.

    Raises SparkError where it cannot be made, OSError where the system refuses something.
    """
    from pydantic import TypeAdapter

    from sparkctl.verify.lossless import Judged, Judges, certificate

    hint = (
        f"`sparkctl train {setting.name} --no-certificate` goes without; where memory ended, "
        "`ps -eo rss,args --sort=-rss | head` shows who holds it"
    )
    own = f"{SCRATCH}-{Ranks.current().rank}"  # each rank makes one
    sweep_stages(run, own)
    with tempfile.TemporaryDirectory(prefix=f".{own}.", suffix=".tmp", dir=run, ignore_cleanup_errors=True) as folder:
        write_setting(setting, Path(folder))
        judges, judged = (
            listen(__name__, part, folder, what="making the certificate", hint=hint, progress=progress)
            for part in (JUDGES, JUDGED)
        )
    return certificate(
        setting.plan, TypeAdapter(Judges).validate_python(judges), TypeAdapter(Judged).validate_python(judged)
    )


def write_setting(setting: Setting, folder: Path) -> None:
    """It as JSON in the folder, its documents' tokens in it."""
    values = vars(setting) | {
        "plan": setting.plan.model_dump(mode="json"),
        "folder": str(setting.folder.absolute()),
        "start": setting.start and str(setting.start.absolute()),
        "packs": _as_lists(setting.packs),
        "course": _as_lists(setting.course),
    }
    (folder / SETTING).write_text(json.dumps(values))


def read_setting(folder: Path) -> Setting:
    """The one that `write_setting` wrote there."""
    from sparkctl.verify.lossless import Setting

    values = json.loads((folder / SETTING).read_text())
    return Setting(
        **values | {
            "plan": PlanTable.model_validate(values["plan"]),
            "folder": Path(values["folder"]),
            "start": values["start"] and Path(values["start"]),
            "packs": _as_packs(values["packs"]),
            "course": _as_packs(values["course"]),
        }
    )  # fmt: skip


def _as_lists(packs: Sequence[Pack]) -> list[dict[str, Any]]:
    return [
        vars(pack) | {"documents": [(d.id, d.ids.tolist(), d.trained.tolist()) for d in pack.documents]}
        for pack in packs
    ]


def _as_packs(packs: Sequence[dict[str, Any]]) -> list[Pack]:
    import numpy as np

    from sparkctl.data.batches import Document, Pack

    return [
        Pack(**pack | {"documents": [
            Document(id, np.array(ids, np.int32), np.array(trained, bool)) for id, ids, trained in pack["documents"]
        ]})
        for pack in packs
    ]  # fmt: skip


def main() -> None:
    """The command of this module."""
    part, folder = sys.argv[1], Path(sys.argv[2])
    with telling() as teller:
        from pydantic import TypeAdapter

        from sparkctl.verify import lossless
        from sparkctl.verify.gradients import Truth

        compute_on_own_gpu()
        work = lossless.judges if part == JUDGES else lossless.judged
        found = work(read_setting(folder), Truth(folder), teller)
        teller.answer(TypeAdapter(type(found)).dump_python(found, mode="json"))


if __name__ == "__main__":
    main()

"""`sparkctl verify model`: the audit of a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path


def verify_model(folder: Path) -> list[str]:
    """Everything that is wrong with the weights in `folder`. Raises UsageError where it holds no model at all."""
    from sparkctl.model.audit import audit
    from sparkctl.model.inspect import read_config

    read_config(folder, hub=False)
    return audit(folder)

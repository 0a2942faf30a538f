"""Fingerprints: what a table was made from, in one comparable string."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from sparkctl.files import sha256_bytes


def fingerprint(*parts: Any) -> str:
    """16 hex digits over JSON values and pydantic models, in order; equal parts give equal digits in any process."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return sha256_bytes(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())[:16]

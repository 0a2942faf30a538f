"""The user's own transformers, given a pack in one row: which way of saying where documents end keeps them apart.

For a person's information: no engine here packs through transformers. GatedDeltaNet reads cu_seq_lens alone, its
convolution seq_idx alone, attention position ids or cu_seq_lens; what a version makes of them differs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.verify.leaks import LENGTHS, Finding, Tensors, difference, three_documents
from sparkctl.verify.small import parts_of, write_model

if TYPE_CHECKING:
    import torch

CALLS = ("position ids alone", "cu_seq_lens alone", "everything right")


def stack_leaks(config: dict[str, Any], device: torch.device) -> list[Finding]:
    """Small models of config.json's architecture by transformers as installed, called in each way."""
    found: dict[str, list[Finding]] = {call: [] for call in CALLS}
    for part in parts_of(config):
        with tempfile.TemporaryDirectory(prefix="sparkctl-leaks-") as folder:
            model = _load(write_model(Path(folder), config, part), device)
            for call in CALLS:
                found[call].append(_finding(model, part, call))
    return [finding for findings in found.values() for finding in findings]


def _load(folder: Path, device: torch.device) -> Any:
    import torch

    from sparkctl.model.load import load_text_model

    return load_text_model(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def _finding(model: Any, part: str, call: str) -> Finding:
    import transformers

    subject = f"transformers {transformers.__version__}, {call}"
    try:
        kept, changed = three_documents()
        before, again, after = (_others(model, documents, call) for documents in (kept, kept, changed))
    except Exception as error:  # whatever a version raises instead of leaking: that is the answer
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(subject, part, judged=False, refused=why)
    return Finding(subject, part, difference(before, after), difference(before, again), judged=False)


def _others(model: Any, documents: Any, call: str) -> Tensors:
    """Logits of the first and the last document."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.concatenate([d.ids for d in documents]).astype(np.int64))[None].to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **_boundaries(call, model.device)).logits[0]
    return {"logits": torch.cat([logits[: LENGTHS[0]], logits[-LENGTHS[2] :]]).cpu()}


def _boundaries(call: str, device: torch.device) -> dict[str, Any]:
    import torch

    lengths = torch.tensor(LENGTHS)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
    numbers = torch.arange(len(LENGTHS)).repeat_interleave(lengths)[None].to(device, torch.int32)
    by_length: dict[str, Any] = dict(
        cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS)
    )
    if call == CALLS[0]:
        return dict(position_ids=positions)
    return by_length if call == CALLS[1] else dict(position_ids=positions, seq_idx=numbers, **by_length)

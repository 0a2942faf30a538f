"""The held-out loss of a run by a model folder, in plain transformers: python tests/real/held_out.py RUN FOLDER

One document a row, bf16, GatedDeltaNet in plain torch, on the GPU where there is one: neither the project's engines
nor their packs nor a library's kernels are in it.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sparkctl.data.batches import eval_packs
from sparkctl.data.tokens import TokenStore
from sparkctl.model.load import load_text_model
from sparkctl.model.plain import plain_layers


def main(run: Path, folder: Path) -> None:
    """Mean loss over the label tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = plain_layers(load_text_model(folder, dtype=torch.bfloat16, device=device))
    packs = eval_packs(TokenStore.open(run / "tokens"), 1)
    total, labels = 0.0, sum(pack.labels for pack in packs)
    with torch.inference_mode():
        for document in (document for pack in packs for document in pack.documents):
            ids = torch.from_numpy(document.ids.astype(np.int64)).to(device)
            at = torch.from_numpy(document.trained[1:]).to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][at]
            total += float(F.cross_entropy(logits.float(), ids[1:][at], reduction="sum"))
    print(json.dumps({"loss": total / labels, "labels": labels, "documents": sum(len(p.documents) for p in packs)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

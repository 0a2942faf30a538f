"""A frozen model and its MTP head: the model's states of a pack, and the head's draft steps over all rows at once.

Step 1 at row i has h_i and token t_{i+1}, and guesses t_{i+2}. Step k has step k - 1's own state and token t_{i+k}, and
guesses t_{i+k+1}; it stands k - 1 positions further, and sees step 1's keys up to row i and the keys of the steps
since in its row: what a server's cache holds while it drafts. The tokens are the text's own, which are those that a
server fed wherever the drafts so far were accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sparkctl_kernels.documents import Documents, documents, upload

from sparkctl.data.batches import Pack
from sparkctl.hardware.measurements import Layers
from sparkctl.model.inspect import read_config, text_part
from sparkctl.model.load import load_text_model
from sparkctl.model.mtp import PREFIX
from sparkctl.model.weights import Checkpoint, TensorFile
from sparkctl.mtp.head import Head, Pair, Rotation
from sparkctl.train.engines.device import planned_device
from sparkctl.train.engines.native.engine import check_served, settle
from sparkctl.train.engines.native.model import NativeModel, pack_ids

if TYPE_CHECKING:
    from sparkctl_kernels.dispatch import Choice

# T tokens · D hidden · M rows that draft · N rows asked for

ROWS = 1024  # of logits at a time
Tensor = torch.Tensor


class Drafter:
    """`model` is frozen, `head` drafts for it. parts: what each of the model's operators runs on."""

    def __init__(self, model: NativeModel, head: Head, parts: list[Choice]) -> None:
        self.model, self.head, self.parts, self.device = model, head, parts, model.device

    @classmethod
    def load(
        cls, folder: Path, head: Path | None, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, *,
        choices: Mapping[str, str] | None = None, allow_slow: bool = False, name: str = "RUN",
    ) -> Drafter:  # fmt: skip
        """The model of `folder` with the head in `head`: a safetensors file, or a model folder; None: a head of zeros.

        dtype: of the products. choices: those of an earlier start, to be kept. name: the run in hints.
        Raises UsageError without a GPU where one is asked for, or where the native engine does not compute the model on
        it, SparkError where the head does not fit.
        """
        place = planned_device(device, name)
        check_served(folder, place.type, f"the base's own head needs none: `sparkctl mtp inject {name} --mode default`")
        base = load_text_model(folder, dtype=dtype, device=place)
        drafter = cls.of(base, text_part(read_config(folder)), dtype, choices=choices, allow_slow=allow_slow)
        if head is not None:
            drafter.head.load(read_head(head), str(head))
        return drafter

    @classmethod
    def of(
        cls, base: Any, text: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, *,
        choices: Mapping[str, str] | None = None, allow_slow: bool = False,
    ) -> Drafter:  # fmt: skip
        """On a frozen text model of transformers, whose tensors it shares; a head of zeros. text: its config's part."""
        parts = settle(base, Layers.of(base.config, head=True), dict(choices or {}), allow_slow)
        model = NativeModel(base, {}, 1.0, trained=False, checkpointing=False, dtype=dtype)
        return cls(model, Head(text, model.device, dtype), parts)

    def hidden(self, pack: Pack) -> Tensor:
        """The model's states after its final norm: [T, D] in the compute dtype."""
        return self.model.hidden(pack)

    def states(self, pack: Pack, hidden_TD: Tensor, steps: int, rows_M: Tensor | None = None) -> list[Tensor]:
        """The head's states s of each draft step: [T, D] each, or of those rows [M, D]; `rows` names each once.

        Rows too near a document's end mean nothing.
        """
        packed = documents([len(document.ids) for document in pack.documents], self.device)
        pairs: list[Pair] = []
        last, found = hidden_TD, []
        for step, tokens in enumerate(upload(following(pack, steps), self.device)):
            rotation = self._rotation(packed, step)
            if rows_M is not None and step:
                tokens, rotation = tokens[rows_M], Rotation(*(x[rows_M] for x in rotation))
            embedded = F.embedding(tokens.long(), self.model.embedding).to(self.head.dtype)
            last, pair = self.head(embedded, last, rotation, packed, pairs, rows_M)
            pairs = [*pairs, pair]
            found.append(last)
        return found

    @torch.no_grad()
    def guesses(self, pack: Pack, steps: int, rows_N: Tensor) -> Tensor:
        """The tokens that each step drafts at those rows, the likeliest ones: int64 [steps, N]."""
        found = []
        for state_TD in self.states(pack, self.hidden(pack), steps):
            some = [(state_TD[rows] @ self.model.head.T).argmax(-1) for rows in rows_N.split(ROWS)]
            found.append(torch.cat(some) if some else rows_N)
        return torch.stack(found)

    def _rotation(self, packed: Documents, step: int) -> Rotation:
        return Rotation(*self.model.rotation(packed.positions + step))


def following(pack: Pack, steps: int) -> list[np.ndarray]:
    """Step by step the token that each row is given, int32 [T]: 1, 2, … places further, a document's last behind it."""
    ids = pack_ids(pack)
    lengths = [len(document.ids) for document in pack.documents]
    ends = np.repeat(np.cumsum(lengths), lengths) - 1
    at = np.arange(len(ids))
    return [ids[np.minimum(at + step, ends)] for step in range(1, steps + 1)]


def read_head(source: Path) -> dict[str, Tensor]:
    """The mtp.* tensors of a safetensors file or a model folder; empty where there are none."""
    if source.is_dir():
        checkpoint = Checkpoint(source)
        return {name: checkpoint.file(name).read(name) for name in checkpoint.names() if name.startswith(PREFIX)}
    file = TensorFile(source)
    return {name: file.read(name) for name in file.names() if name.startswith(PREFIX)}

"""What trained MTP heads are held against: transformers' own parts, drafting row after row as a server does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkctl.data.batches import Document, Pack
from sparkctl.model import mtp
from sparkctl.model.load import silence
from sparkctl.model.plain import plain_layers
from sparkctl.mtp.drafter import read_head

LENGTHS = (13, 1, 22)


def pack(seed: int = 0) -> Pack:
    random = np.random.RandomState(seed)
    documents = [
        Document(i, random.randint(0, 250, length).astype(np.int32), np.arange(length) >= length // 3)
        for i, length in enumerate(LENGTHS)
    ]
    return Pack(documents, sum(LENGTHS), sum(int(d.trained[1:].sum()) for d in documents))


class Server:
    """Qwen3.5's MTP head from transformers' parts, which drafts after one row as a server does."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

        with silence():
            whole: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        plain_layers(whole)
        config = whole.config.text_config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.parts = torch.nn.ModuleDict(
            {
                "fc": torch.nn.Linear(2 * width, width, bias=False),
                "pre_fc_norm_embedding": Qwen3_5RMSNorm(width, eps=eps),
                "pre_fc_norm_hidden": Qwen3_5RMSNorm(width, eps=eps),
                "layers": torch.nn.ModuleList(
                    [Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention"))]
                ),
                "norm": Qwen3_5RMSNorm(width, eps=eps),
            }
        )
        tensors = read_head(folder)
        self.parts.load_state_dict({name.removeprefix(mtp.PREFIX): value.float() for name, value in tensors.items()})
        self.text = whole.model.language_model

    def hidden(self, ids_L: torch.Tensor) -> torch.Tensor:
        return self.text(input_ids=ids_L[None], use_cache=False).last_hidden_state[0]

    def inputs(self, ids_L: torch.Tensor, hidden_LD: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        embedded = parts["pre_fc_norm_embedding"](self.text.embed_tokens(ids_L))
        return parts["fc"](torch.cat([embedded, parts["pre_fc_norm_hidden"](hidden_LD)], dim=-1))

    def layer(self, x_LD: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(x_LD)).view(1, 1, -1).expand(3, 1, -1)
        layer: Any = self.parts["layers"]
        return self.parts["norm"](layer[0](x_LD[None], position_embeddings=self.text.rotary_emb(x_LD, positions)))[0]

    def drafts(self, ids_L: torch.Tensor, row: int, steps: int) -> Iterator[torch.Tensor]:
        """States of the steps at `row`: what was made of the rows up to it, then one more key a step."""
        hidden = self.hidden(ids_L)
        x = self.inputs(ids_L[1 : row + 2], hidden[: row + 1])
        for step in range(1, steps + 1):
            state = self.layer(x)[-1:]
            yield state[0]
            if step < steps:
                x = torch.cat([x, self.inputs(ids_L[row + step + 1 : row + step + 2], state)])

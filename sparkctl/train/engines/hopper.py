"""fla on Hopper: what other people's models need of it there."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

RIGHT_KEY_DIM = 128  # tiles are then 128 wide, whose gradients equal the recurrence's


def allow_on_hopper(config: Any) -> None:
    """Let fla 0.6.0 run its backward on Hopper with Triton 3.4.0 to 3.7.0 where it is right.

    It refuses there for a fault that shows only with tiles of 64 (fla#640). config: of the text model, by transformers.
    """
    import torch

    hybrid = getattr(config, "linear_key_head_dim", None) == RIGHT_KEY_DIM
    if hybrid and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        with suppress(ImportError):  # without it plain torch computes
            from fla.ops.common import chunk_o

            chunk_o.TRITON_ABOVE_3_7_1 = True

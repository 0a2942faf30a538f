"""FlashAttention-2 as torch carries it, called below autograd: documents by cu_seqlens, kv heads not repeated.

torch refuses the backward for head dims above 192 on compute capability 8.6, 8.9 and 12.x, where shared memory is too
small for its tiles. Its backward adds in a fixed order where torch is told to.
"""

from __future__ import annotations

import torch

from sparkctl_kernels.attention.kept import FlashKept
from sparkctl_kernels.dispatch import deterministic
from sparkctl_kernels.documents import Documents

ALIGNED = 16  # bytes
SMALL = {(8, 6), (8, 9)}  # beside 12.x: 99 KB of shared memory a block


def serves(device: torch.device, head_dim: int) -> bool:
    """Whether forward and backward work on `device`."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    capability = torch.cuda.get_device_capability(device)
    small = capability in SMALL or capability[0] == 12
    return capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= (192 if small else 256)


def forward(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, documents: Documents, window: int | None
) -> tuple[torch.Tensor, FlashKept]:
    """(o [T, N, H], what backward wants); inputs contiguous in their last dimension, bf16 or fp16."""
    q_TNH, k_TKH, v_TKH = (_aligned(x) for x in (q_TNH, k_TKH, v_TKH))
    o, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q_TNH, k_TKH, v_TKH, documents.cu_seqlens, documents.cu_seqlens, documents.longest, documents.longest,
        0.0, True, False, **_window(window),
    )  # fmt: skip
    return o, FlashKept(q_TNH, k_TKH, v_TKH, o, log_sum, state, unused)


def backward(
    do_TNH: torch.Tensor, saved: FlashKept, documents: Documents, window: int | None, dv_TKH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk); writes dv."""
    q, k, v, o, log_sum, state, unused = saved
    do_TNH = _aligned(do_TNH)
    with deterministic():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do_TNH, q, k, v, o, log_sum, documents.cu_seqlens, documents.cu_seqlens, documents.longest,
            documents.longest, 0.0, True, state, unused, **_window(window),
        )  # fmt: skip
    dv_TKH.copy_(dv)
    return dq, dk


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x where its rows begin at 16 bytes, which the library's loads take for granted, else a copy."""
    rows = all(stride * x.element_size() % ALIGNED == 0 for stride in x.stride()[:-1])
    return x if rows and x.data_ptr() % ALIGNED == 0 else x.clone(memory_format=torch.contiguous_format)


def _window(window: int | None) -> dict[str, int]:
    """Keys to the left of a query beside itself; none to the right."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}

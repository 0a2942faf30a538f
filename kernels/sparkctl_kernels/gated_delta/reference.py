"""The gated delta rule in plain torch: the recurrence itself, and the same in chunks for speed.

α_t = exp(-exp(A_log) · softplus(a_t + dt_bias)),   β_t = σ(b_t)
S_t = α_t S_{t-1} + k_t ⊗ β_t (v_t - (α_t S_{t-1})ᵀ k_t),   o_t = S_tᵀ q_t / √D       (Yang et al., 2412.06464)

q and k come with unit length. A key head serves N / K value heads. All in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# T tokens · K key heads · N value heads · D key dim · E value dim · B documents · L longest document · C chunk
CHUNK = 64


def gates(
    a_TN: torch.Tensor, b_TN: torch.Tensor, log_a_N: torch.Tensor, dt_bias_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log α, β), fp32 [T, N]."""
    return -log_a_N.float().exp() * F.softplus(a_TN.float() + dt_bias_N.float()), b_TN.float().sigmoid()


def recurrence(
    q_LND: torch.Tensor, k_LND: torch.Tensor, v_LNE: torch.Tensor, decay_LN: torch.Tensor, beta_LN: torch.Tensor
) -> torch.Tensor:
    """One document, token by token: the definition, for tests. decay is log α."""
    state = q_LND.new_zeros(q_LND.shape[1], q_LND.shape[2], v_LNE.shape[2])
    outputs = []
    for q, k, v, decay, beta in zip(q_LND, k_LND, v_LNE, decay_LN, beta_LN, strict=True):
        state = state * decay.exp()[:, None, None]
        correction = beta[:, None] * (v - torch.einsum("nde,nd->ne", state, k))
        state = state + torch.einsum("nd,ne->nde", k, correction)
        outputs.append(torch.einsum("nde,nd->ne", state, q) * q_LND.shape[2] ** -0.5)
    return torch.stack(outputs)


def chunked(
    q_BNLD: torch.Tensor, k_BNLD: torch.Tensor, v_BNLE: torch.Tensor, decay_BNL: torch.Tensor, beta_BNL: torch.Tensor
) -> torch.Tensor:
    """The recurrence over a batch of documents, L a multiple of CHUNK or less than that, padded with β = 0, decay = 0.

    Inside a chunk the corrections u solve (I + tril(β k kᵀ ∘ D, -1)) u = β (v - e^c k S₀) with D_ij = e^(c_i - c_j) and
    c the running sum of log α; between chunks the state moves on.
    """
    *_, length, dim = q_BNLD.shape
    chunk = min(length, CHUNK)
    state = q_BNLD.new_zeros(*q_BNLD.shape[:2], dim, v_BNLE.shape[-1])
    eye = torch.eye(chunk, dtype=q_BNLD.dtype, device=q_BNLD.device)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q_BNLD.device).triu(1)
    outputs = []
    scaled_BNLD = q_BNLD * dim**-0.5  # once: autograd would keep a whole one for every chunk
    for at in range(0, length, chunk):
        q, k, v = (x[:, :, at : at + chunk] for x in (scaled_BNLD, k_BNLD, v_BNLE))
        running = decay_BNL[:, :, at : at + chunk].cumsum(-1)
        beta = beta_BNL[:, :, at : at + chunk, None]
        between = (running[..., :, None] - running[..., None, :]).masked_fill(future, float("-inf")).exp()
        grown = running.exp()[..., None]
        system = (beta * k) @ k.mT * between
        right = beta * (v - grown * (k @ state))
        u = torch.linalg.solve_triangular(system.tril(-1) + eye, right, upper=False, unitriangular=True)
        outputs.append(grown * (q @ state) + (q @ k.mT * between) @ u)
        last = running[..., -1:]
        state = state * last.exp()[..., None] + (k * (last - running).exp()[..., None]).mT @ u
    return torch.cat(outputs, dim=2)


def gated_delta(
    q_TKD: torch.Tensor, k_TKD: torch.Tensor, v_TNE: torch.Tensor, a_TN: torch.Tensor, b_TN: torch.Tensor,
    log_a_N: torch.Tensor, dt_bias_N: torch.Tensor, lengths: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """[T, N, E] in v's dtype, each document from an empty state. Documents of like length are computed together."""
    decay, beta = gates(a_TN, b_TN, log_a_N, dt_bias_N)
    group, sizes = v_TNE.shape[1] // k_TKD.shape[1], list(lengths)
    q, k = (x.float().repeat_interleave(group, dim=1) for x in (q_TKD, k_TKD))
    parts = [x.split(sizes) for x in (q, k, v_TNE.float(), decay, beta)]
    octaves = [(size - 1).bit_length() for size in sizes]
    outputs: dict[int, torch.Tensor] = {}
    for octave in sorted(set(octaves)):
        mine = [i for i, other in enumerate(octaves) if other == octave]
        longest = max(sizes[i] for i in mine)
        length = -(-longest // CHUNK) * CHUNK if longest > CHUNK else 2**octave
        o_BNLE = chunked(*(_padded([part[i] for i in mine], length) for part in parts))
        outputs |= zip(mine, o_BNLE.transpose(1, 2).unbind(), strict=True)
    return torch.cat([outputs[i][:size] for i, size in enumerate(sizes)]).to(v_TNE.dtype)


def _padded(documents: list[torch.Tensor], length: int) -> torch.Tensor:
    """[L, N, …] each → [B, N, length, …], zero behind a document."""
    rows = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x))) for x in documents]
    return torch.stack(rows).transpose(1, 2)

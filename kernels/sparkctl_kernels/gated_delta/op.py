"""The gated delta rule: flash-linear-attention's kernels on a GPU, launched by us or by itself; else the reference.

As functions below autograd, and as an operator with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sparkctl_kernels.dispatch import Choice, fused
from sparkctl_kernels.documents import Documents, documents
from sparkctl_kernels.gated_delta import reference
from sparkctl_kernels.vjp import Tape

# T tokens · K key heads · N value heads · D key dim · E value dim
Saved = Tape | tuple[torch.Tensor, ...]
LAUNCHED = ("0.6.0",)  # versions of fla-core whose kernels fla_rule.py launches
MEND = "pip install 'dgx-sparkctl[cuda]'"

_by_library = False


@contextmanager
def by_library() -> Iterator[None]:
    """Call the library's public function instead of its kernels in this block, to compare the two."""
    global _by_library
    _by_library = True
    try:
        yield
    finally:
        _by_library = False


@cache
def _installed() -> str | None:
    """The version of fla-core, where it is there."""
    try:
        return version("fla-core")
    except PackageNotFoundError:
        return None


def launched() -> bool:
    """Whether the library is there in a version whose kernels fla_rule.py launches."""
    return _installed() in LAUNCHED


def _wrong_tiles(capability: tuple[int, int], key_dim: int) -> bool:
    """Whether the library's backward is wrong: Hopper, Triton from 3.4.0 to 3.7.0, tiles of 64 (fla#640).

    A key dim of 128 takes tiles of 128, whose gradients equal the recurrence's.
    """
    import triton
    from packaging.version import Version

    return capability[0] == 9 and (3, 4, 0) <= Version(triton.__version__).release < (3, 7, 1) and key_dim <= 64


def choice(device: torch.device, key_dim: int) -> Choice:
    """Which kernel runs on `device`; without flash-linear-attention a GPU has only the slow reference."""
    return _choice(device, key_dim, _installed(), _by_library)


@cache  # every layer asks: 0.2 µs of host time instead of 2.4
def _choice(device: torch.device, key_dim: int, found: str | None, by_library: bool) -> Choice:
    if device.type != "cuda":
        return Choice("gated_delta", "reference", f"plain torch on {device.type}")
    if found is None:
        return Choice("gated_delta", "reference", "flash-linear-attention is not installed", slow=True, mend=MEND)
    if _wrong_tiles(torch.cuda.get_device_capability(device), key_dim):
        reason = f"flash-linear-attention is wrong here for a key dim of {key_dim} with Triton before 3.7.1"
        return Choice("gated_delta", "reference", reason, slow=True, mend="pip install 'triton>=3.7.1'")
    if found in LAUNCHED and not by_library:
        return Choice("gated_delta", "fla kernels", f"kernels of flash-linear-attention {found}, launched by us")
    return Choice("gated_delta", "fla", f"public function of flash-linear-attention {found}: more host time a layer")


def runs_on(q_TKD: torch.Tensor) -> str:
    """The kernel for these queries.

    In fp32, which proofs alone compute in, a GPU has the reference: the library's tiles would take 361 KB of shared
    memory, and a multiprocessor has 228.
    """
    if not q_TKD.is_cuda:
        return "fla kernels" if fused(q_TKD) else "reference"
    return "reference" if q_TKD.dtype == torch.float32 else choice(q_TKD.device, q_TKD.shape[2]).kernel


def forward(
    q_TKD: torch.Tensor, k_TKD: torch.Tensor, v_TNE: torch.Tensor, a_TN: torch.Tensor, b_TN: torch.Tensor,
    log_a_N: torch.Tensor, dt_bias_N: torch.Tensor, packed: Documents,
) -> tuple[torch.Tensor, Saved]:  # fmt: skip
    """(o [T, N, E], what `backward` wants beside the same inputs). q and k of unit length; a and b may be views."""
    inputs = (q_TKD, k_TKD, v_TNE, a_TN, b_TN, log_a_N, dt_bias_N)
    kernel_name = runs_on(q_TKD)
    if kernel_name == "fla kernels":
        from sparkctl_kernels.gated_delta import fla_rule, kernel

        g, beta = kernel.forward(a_TN, b_TN, log_a_N, dt_bias_N, packed)
        o, kept = fla_rule.forward(q_TKD, k_TKD, v_TNE, g, beta, packed)
        return o, (g, beta, *kept)
    call = _library if kernel_name == "fla" else _reference
    tape = Tape(partial(call, packed=packed), inputs)
    return tape.outputs[0], tape


def backward(
    do_TNE: torch.Tensor, q_TKD: torch.Tensor, k_TKD: torch.Tensor, v_TNE: torch.Tensor, a_TN: torch.Tensor,
    b_TN: torch.Tensor, log_a_N: torch.Tensor, dt_bias_N: torch.Tensor, saved: Saved, packed: Documents,
    da_TN: torch.Tensor, db_TN: torch.Tensor, want_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(dq, dk, a second part of dk or None, dv, [dA_log, ddt_bias] in fp32 where wanted); writes da and db.

    dq and dk may come for N value heads, several to a key head: `causal_conv.backward` adds them up.
    """
    if isinstance(saved, Tape):
        dq, dk, dv, da, db, dlog_a, dbias = saved.gradients(do_TNE)
        da_TN.copy_(da)
        db_TN.copy_(db)
        return dq, dk, None, dv, torch.stack([dlog_a.float(), dbias.float()]) if want_weights else None
    from sparkctl_kernels.gated_delta import fla_rule, kernel

    g, beta, *kept = saved
    dq, dk, dk2, dv, dbeta, dg, dg2 = fla_rule.backward(
        do_TNE, q_TKD, k_TKD, v_TNE, g, beta, fla_rule.Kept(*kept), packed
    )
    dweights = kernel.backward(
        dg, dg2, dbeta, a_TN, b_TN, log_a_N, dt_bias_N, packed, da_TN, db_TN, want_weights
    )  # fmt: skip
    return dq, dk, dk2, dv, dweights


def tiles() -> dict[str, str]:
    """The tiles that the library's autotuners found or were given: "kernel shape" → "BV=64 num_warps=4 …"."""
    if not launched() or not torch.cuda.is_available():
        return {}
    from sparkctl_kernels.gated_delta import fla_rule

    return {
        f"{kernel.name} {shape}": " ".join(f"{name}={value}" for name, value in sorted(tile.items()))
        for kernel in fla_rule.KERNELS
        for shape, tile in kernel.tiles.items()
    }


def pin(wanted: dict[str, str]) -> None:
    """Take these tiles without tuning; what is not about a kernel here is passed over."""
    if not launched() or not torch.cuda.is_available():
        return
    from sparkctl_kernels.gated_delta import fla_rule

    kernels = {kernel.name: kernel for kernel in fla_rule.KERNELS}
    for key, tile in wanted.items():
        name, _, shape = key.partition(" ")
        if name in kernels:
            kernels[name].tiles[shape] = {k: int(v) for k, v in (pair.split("=") for pair in tile.split())}


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, log_a: torch.Tensor,
    dt_bias: torch.Tensor, packed: Documents,
) -> torch.Tensor:  # fmt: skip
    return reference.gated_delta(q, k, v, a, b, log_a, dt_bias, packed.lengths)


def _library(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, log_a: torch.Tensor,
    dt_bias: torch.Tensor, packed: Documents,
) -> torch.Tensor:  # fmt: skip
    """fla's public function. For a key dim of 128 its check of Triton on Hopper is lifted: see _wrong_tiles."""
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if q.shape[2] == 128:
        chunk_o.TRITON_ABOVE_3_7_1 = True
    out, _ = chunk_gated_delta_rule(
        q[None], k[None], v[None], a[None], b[None], cu_seqlens=packed.cu_seqlens, chunk_indices=packed.chunks,
        use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=True, A_log=log_a, dt_bias=dt_bias,
    )  # fmt: skip
    return out[0]


@torch.library.custom_op("sparkctl::gated_delta", mutates_args=())
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, log_a: torch.Tensor,
    dt_bias: torch.Tensor, lengths: list[int],
) -> torch.Tensor:  # fmt: skip
    return forward(q, k, v, a, b, log_a, dt_bias, documents(lengths, q.device))[0]


@_operator.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor, log_a: torch.Tensor,
    dt_bias: torch.Tensor, lengths: list[int],
) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(v)


@torch.library.custom_op("sparkctl::gated_delta_backward", mutates_args=())
def _gradients(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    log_a: torch.Tensor, dt_bias: torch.Tensor, lengths: list[int], want: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, inputs = documents(lengths, q.device), (q, k, v, a, b, log_a, dt_bias)
    da, db = torch.empty_like(a), torch.empty_like(b)
    _, saved = forward(*inputs, packed)
    dq, dk, dk2, dv, dweights = backward(do.contiguous(), *inputs, saved, packed, da, db, want)
    dk = dk if dk2 is None else dk + dk2
    dq, dk = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dq, dk))
    return dq, dk, dv.contiguous(), da, db, dweights if dweights is not None else q.new_empty(0, dtype=torch.float32)


@_gradients.register_fake
def _(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    log_a: torch.Tensor, dt_bias: torch.Tensor, lengths: list[int], want: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dweights = q.new_empty((2, len(log_a)) if want else 0, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(a), torch.empty_like(b), dweights  # fmt: skip  # noqa: E501


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.lengths = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    want = any(ctx.needs_input_grad[5:7])
    *gradients, dweights = _gradients(do, *inputs, ctx.lengths, want)
    weights = (dweights[0].to(inputs[5].dtype), dweights[1].to(inputs[6].dtype)) if want else (None, None)
    return *gradients, *weights, None


_operator.register_autograd(_backward, setup_context=_setup)


def gated_delta(
    q_TKD: torch.Tensor, k_TKD: torch.Tensor, v_TNE: torch.Tensor, a_TN: torch.Tensor, b_TN: torch.Tensor,
    log_a_N: torch.Tensor, dt_bias_N: torch.Tensor, packed: Documents,
) -> torch.Tensor:  # fmt: skip
    """See `reference.gated_delta`: [T, N, E]. Its backward computes the forward again."""
    if not fused(q_TKD):
        lengths = packed.lengths
        return reference.gated_delta(q_TKD, k_TKD, v_TNE, a_TN, b_TN, log_a_N, dt_bias_N, lengths)
    inputs = (q_TKD, k_TKD, v_TNE, a_TN, b_TN, log_a_N, dt_bias_N)
    return _operator(*(x.contiguous() for x in inputs), list(packed.lengths))

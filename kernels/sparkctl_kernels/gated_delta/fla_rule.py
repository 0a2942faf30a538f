"""flash-linear-attention's chunked gated delta rule, its kernels launched by us.

The library's function takes 1.4 + 3.7 ms of Python a layer, most of it in wrappers around 20 kernels: guards, caches
keyed by tensors, dispatch between backends, autotuners and heuristics that run at every call. The kernels are the same
here, launched with the arguments of fla 0.6.0's ops/gated_delta_rule/chunk.py and what it calls in ops/common; chunk
tables are made once a pack, gates and unit lengths in our own kernels. Backward computes w again, as the library's own
does; states and corrected values, which that makes again too, are kept.

T tokens · K key heads · N value heads · D key dim · E value dim · C chunks of 64 tokens. q, k, v, A, h in bf16, g and β
in fp32. A batch dimension of 1 stands in front, as the kernels' strides have it without saying so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from fla.ops.common import chunk_delta_h, chunk_o
from fla.ops.gated_delta_rule import chunk_fwd, wy_fast
from fla.utils import check_shared_mem

from sparkctl_kernels.documents import CHUNK, Documents

Grid = Callable[[dict[str, int]], tuple[int, ...]]

# Tiles for key and value dims of 128, by compute capability. (9, 0): what the library's autotuners, which take two
# minutes, found on an H200 with torch 2.11 and Triton 3.6.0, Qwen3.5-2B, 5,376 tokens, 2026-11-25. COMPILED: not
# measured, but the widest that fit 101,376 bytes of shared memory and spill nothing there with Triton 3.7.1 and 3.6.0,
# for 16 key heads and 16, 32 or 48 value heads. At most 4 warps, and 2 for the states, as the library has them on
# Blackwell (triton#10590). The states' backward spills with BV = 32, but for 1 stage, which loads nothing ahead.
COMPILED: dict[str, dict[str, int]] = {
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": dict(BK=64, num_stages=3, num_warps=4),
    "recompute_w_u_fwd_kernel": dict(num_stages=3, num_warps=4),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": dict(BV=32, num_stages=2, num_warps=2),
    "chunk_fwd_kernel_o": dict(BK=64, BV=64, num_stages=3, num_warps=4),
    "chunk_bwd_kernel_dv_local": dict(num_stages=3, num_warps=4),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": dict(BV=16, num_stages=2, num_warps=4),
    "chunk_bwd_kernel_dqkwg": dict(num_stages=3, num_warps=4),
    "prepare_wy_repr_bwd_kernel": dict(num_stages=3, num_warps=4),
}
KNOWN: dict[tuple[int, int], dict[str, dict[str, int]]] = {
    (9, 0): {
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel": dict(BK=64, num_stages=3, num_warps=1),
        "recompute_w_u_fwd_kernel": dict(num_stages=3, num_warps=4),
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": dict(BV=64, num_stages=4, num_warps=4),
        "chunk_fwd_kernel_o": dict(BK=64, BV=64, num_stages=3, num_warps=4),
        "chunk_bwd_kernel_dv_local": dict(num_stages=2, num_warps=4),
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": dict(BV=32, num_stages=2, num_warps=2),
        "chunk_bwd_kernel_dqkwg": dict(num_stages=2, num_warps=4),
        "prepare_wy_repr_bwd_kernel": dict(num_stages=3, num_warps=4),
    },
    (12, 0): COMPILED,
    (12, 1): COMPILED,
}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`, or of what is compiled for; (0, 0) of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    if device.type == "meta":
        arch: int = triton.runtime.driver.active.get_current_target().arch
        return divmod(arch, 10)
    return 0, 0


class Tuned:
    """A kernel behind its autotuner and heuristics: the first call of a shape goes through them and is remembered,
    later ones launch the kernel itself with the tiles found then.

    `constants` are what its heuristics would find. tiles: {shape: {option: value}}; an entry put there beforehand is
    taken without tuning.
    """

    def __init__(self, kernel: Any, **constants: bool) -> None:
        self._tuner, self._jit, self._whole, self._constants = kernel.fn, kernel.fn.fn, kernel, constants
        self.name: str = self._jit.fn.__name__
        self.tiles: dict[str, dict[str, int]] = {}

    @property
    def configs(self) -> list[dict[str, int]]:
        """What the autotuner chooses from."""
        return [config.all_kwargs() for config in self._tuner.configs]

    def __call__(self, grid: Grid, shape: str, **arguments: Any) -> None:
        tile = self.tiles.get(shape) or self._known(shape, arguments["k"].device)
        if tile is None:
            self._whole[grid](**arguments)
            best = self._tuner.best_config.all_kwargs()
            self.tiles[shape] = {name: value for name, value in best.items() if value is not None}
            return
        self._jit[grid(tile)](**arguments, **self._constants, **tile)

    def _known(self, shape: str, device: torch.device) -> dict[str, int] | None:
        """What is known of this device; remembered, since a run is pinned to it."""
        known = KNOWN.get(capability(device), {})
        if self.name in known and shape.count("x128") == 2:
            self.tiles[shape] = known[self.name]
        return self.tiles.get(shape)


SOLVE = Tuned(chunk_fwd.chunk_gated_delta_rule_fwd_kkt_solve_kernel, USE_G=True, IS_VARLEN=True)
WY = Tuned(wy_fast.recompute_w_u_fwd_kernel, USE_G=True, IS_VARLEN=True)
WY_BACKWARD = Tuned(wy_fast.prepare_wy_repr_bwd_kernel, USE_G=True, IS_VARLEN=True)
STATES = Tuned(
    chunk_delta_h.chunk_gated_delta_rule_fwd_kernel_h_blockdim64,
    USE_G=True, USE_GK=False, USE_INITIAL_STATE=False, STORE_FINAL_STATE=False, SAVE_NEW_VALUE=True, IS_VARLEN=True,
)  # fmt: skip
STATES_BACKWARD = Tuned(
    chunk_delta_h.chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64,
    USE_G=True, USE_GK=False, USE_INITIAL_STATE=False, USE_FINAL_STATE_GRADIENT=False, IS_VARLEN=True,
)  # fmt: skip
OUTPUT = Tuned(chunk_o.chunk_fwd_kernel_o, USE_G=True, USE_G_GAMMA=False, IS_VARLEN=True)
VALUES_BACKWARD = Tuned(chunk_o.chunk_bwd_kernel_dv_local, USE_G=True, USE_G_GAMMA=False, USE_A=False, IS_VARLEN=True)
OUTPUT_BACKWARD = Tuned(chunk_o.chunk_bwd_kernel_dqkwg, USE_G=True, USE_G_GAMMA=False, USE_DW=True, IS_VARLEN=True)
KERNELS = (SOLVE, WY, STATES, OUTPUT, VALUES_BACKWARD, STATES_BACKWARD, OUTPUT_BACKWARD, WY_BACKWARD)


class Rule:
    """The rule for one shape on one pack: what its kernels are given again and again.

    key_heads K, value_heads N, key_dim D, value_dim E; q, k [T, K, D], v [T, N, E].
    """

    def __init__(self, k_TKD: torch.Tensor, v_TNE: torch.Tensor, documents: Documents) -> None:
        self.tokens, self.key_heads, self.key_dim = k_TKD.shape
        _, self.heads, self.value_dim = v_TNE.shape
        self.documents, self.chunks = documents, len(documents.chunks)
        self.scale = self.key_dim**-0.5
        self.shape = f"{self.key_heads}x{self.key_dim}-{self.heads}x{self.value_dim}"
        self.sizes = dict(T=self.tokens, H=self.key_heads, HV=self.heads, K=self.key_dim, BT=CHUNK)
        self.pack = dict(cu_seqlens=documents.cu_seqlens, chunk_indices=documents.chunks)
        self.offsets = dict(cu_seqlens=documents.cu_seqlens, chunk_offsets=documents.chunk_offsets)

    def each_chunk(self, _: dict[str, int]) -> tuple[int, ...]:
        return self.chunks, self.heads

    def each_state(self, tile: dict[str, int]) -> tuple[int, ...]:
        return (-(-self.value_dim // tile["BV"]) * len(self.documents.lengths) * self.heads,)

    def each_output(self, tile: dict[str, int]) -> tuple[int, ...]:
        return -(-self.value_dim // tile["BV"]) * self.chunks, self.heads

    def solve(self, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """(I + tril(β k kᵀ ∘ D))⁻¹ of every chunk: [T, N, 64], zero above the diagonal."""
        a = torch.zeros(self.tokens, self.heads, CHUNK, dtype=k.dtype, device=k.device)
        SOLVE(self.each_chunk, self.shape, k=k, g=g, beta=beta, A=a, BC=16, **self.pack, **self.sizes)
        return a

    def wy(
        self, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, a: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(w [T, N, D], u [T, N, E])."""
        w, u = k.new_empty(self.tokens, self.heads, self.key_dim), torch.empty_like(v)
        WY(
            self.each_chunk, self.shape, k=k, v=v, beta=beta, w=w, u=u, A=a, g=g, V=self.value_dim, BK=64, BV=64,
            **self.pack, **self.sizes,
        )  # fmt: skip
        return w, u

    def states(
        self, k: torch.Tensor, w: torch.Tensor, u: torch.Tensor, g: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h [C, N, D, E]: the state before each chunk, the corrected values [T, N, E])."""
        h, v_new = k.new_empty(self.chunks, self.heads, self.key_dim, self.value_dim), torch.empty_like(u)
        STATES(
            self.each_state, self.shape, k=k, v=u, w=w, v_new=v_new, g=g, gk=None, h=h, h0=None, ht=None,
            V=self.value_dim, STATE_V_FIRST=False, **self.offsets, **self.sizes,
        )  # fmt: skip
        return h, v_new

    def output(
        self, q: torch.Tensor, k: torch.Tensor, v_new: torch.Tensor, h: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        """o [T, N, E]."""
        o = torch.empty_like(v_new)
        OUTPUT(
            self.each_output, self.shape, q=q, k=k, v=v_new, h=h, g=g, g_gamma=None, o=o, scale=self.scale,
            V=self.value_dim, STATE_V_FIRST=False, **self.pack, **self.sizes,
        )  # fmt: skip
        return o


class Kept(NamedTuple):
    """What backward wants of forward: the systems [T, N, 64], the states before each chunk [C, N, D, E] and the
    corrected values [T, N, E].

    States and values are 12 KB a token and layer of the 2B.
    """

    a_TNC: torch.Tensor
    h_CNDE: torch.Tensor
    v_new_TNE: torch.Tensor


def forward(
    q_TKD: torch.Tensor, k_TKD: torch.Tensor, v_TNE: torch.Tensor, g_TN: torch.Tensor, beta_TN: torch.Tensor,
    documents: Documents,
) -> tuple[torch.Tensor, Kept]:  # fmt: skip
    """(o [T, N, E], what backward wants). q and k of unit length; g: running sums in base 2."""
    rule = Rule(k_TKD, v_TNE, documents)
    a = rule.solve(k_TKD, g_TN, beta_TN)
    w, u = rule.wy(k_TKD, v_TNE, g_TN, beta_TN, a)
    h, v_new = rule.states(k_TKD, w, u, g_TN)
    return rule.output(q_TKD, k_TKD, v_new, h, g_TN), Kept(a, h, v_new)


def backward(
    do_TNE: torch.Tensor, q_TKD: torch.Tensor, k_TKD: torch.Tensor, v_TNE: torch.Tensor, g_TN: torch.Tensor,
    beta_TN: torch.Tensor, kept: Kept, documents: Documents,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dq, dk, dk2 [T, N, D], dv [T, N, E], dβ, dg, dg2 [T, N] fp32): dk and dg come in two parts, to be added."""
    rule = Rule(k_TKD, v_TNE, documents)
    a, h, v_new = kept
    w, _ = rule.wy(k_TKD, v_TNE, g_TN, beta_TN, a)
    sizes, shape, values = rule.sizes, rule.shape, dict(V=rule.value_dim)
    chunk_tile, wy_tile = (_tile(rule, widest) for widest in _widest(k_TKD))

    dv_local = torch.empty_like(do_TNE)
    VALUES_BACKWARD(
        rule.each_chunk, shape, q=q_TKD, k=k_TKD, g=g_TN, g_gamma=None, A=None, do=do_TNE, dv=dv_local,
        scale=rule.scale, **chunk_tile, **values, **rule.pack, **sizes,
    )  # fmt: skip
    dh, dv_new = torch.empty_like(h), torch.empty_like(dv_local)
    STATES_BACKWARD(
        rule.each_state, shape, q=q_TKD, k=k_TKD, w=w, g=g_TN, gk=None, dht=None, dh0=None, do=do_TNE, dh=dh,
        dv=dv_local, dv2=dv_new, scale=rule.scale, STATE_V_FIRST=False, **values, **rule.offsets, **sizes,
    )  # fmt: skip
    dq, dk = (torch.empty_like(w) for _ in range(2))
    parts = -(-rule.key_dim // chunk_tile["BK"])
    dg = torch.empty(parts, *g_TN.shape, dtype=torch.float32, device=g_TN.device)
    dw = torch.empty_like(w)
    OUTPUT_BACKWARD(
        lambda _: (parts * rule.chunks, rule.heads), shape, q=q_TKD, k=k_TKD, v=v_new, g=g_TN, g_gamma=None, h=h,
        do=do_TNE, dh=dh, dq=dq, dk=dk, dw=dw, dv=dv_new, dg=dg, scale=rule.scale, B=1, STATE_V_FIRST=False,
        **chunk_tile, **values, **rule.pack, **sizes,
    )  # fmt: skip
    dk2, dv, dbeta, dg2 = (
        torch.empty_like(w),
        torch.empty_like(v_TNE),
        torch.empty_like(beta_TN),
        torch.empty_like(g_TN),
    )
    WY_BACKWARD(
        rule.each_chunk, shape, k=k_TKD, v=v_TNE, beta=beta_TN, g=g_TN, A=a, dw=dw, du=dv_new, dk=dk2, dv=dv,
        db=dbeta, dg=dg2, **wy_tile, **values, **rule.pack, **sizes,
    )  # fmt: skip
    return dq, dk, dk2, dv, dbeta, dg[0] if parts == 1 else dg.sum(0), dg2


def _tile(rule: Rule, widest: int) -> dict[str, int]:
    return dict(BK=min(max(rule.key_dim, 16), widest), BV=min(max(rule.value_dim, 16), widest))


def _widest(k: torch.Tensor) -> tuple[int, int]:
    """The widest tiles for chunk_bwd_dv_local with chunk_bwd_dqkwg, and for prepare_wy_repr_bwd, in bf16.

    By the device's shared memory, as the library has them; on compute capability 12.x, where that would be 64 for the
    first two, half of it: chunk_bwd_dqkwg spills 112 bytes with 4 warps there and 1,056 with 2.
    """
    major, index = capability(k.device)[0], k.device.index or 0
    if major == 12:
        return 32, 32
    ampere = check_shared_mem("ampere", index)
    if major == 9 or check_shared_mem("hopper", index) or (ampere and k.element_size() == 2):
        return 128, 64
    return (64 if ampere or check_shared_mem("ada", index) else 32), (64 if check_shared_mem() else 32)

"""The halves of a decoder layer on the project's operators, forward and backward, made from transformers' layers.

A half takes what the half before gave and the residual stream apart from it: the addition is fused with the norm.

    s = last + residual,   last' = F(norm(s)),   residual' = s

Backward is written out, not left to autograd. `d` is the gradient of last + residual, one tensor [T, D] that goes
backwards through the model and is changed in place:  d ← d + norm'(F'(d)). What that buys: autograd's Python and its
copies are gone, a half keeps what its backward needs and no more (inputs of projections are made again by the kernel
that computes the gradient before them), and weight gradients are accumulated by the GEMMs, in fp32.
One pack is one row of tokens: documents follow each other and never meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from sparkctl_kernels.attention import op as attention
from sparkctl_kernels.causal_conv import op as causal_conv
from sparkctl_kernels.documents import Documents
from sparkctl_kernels.gated_delta import op as gated_delta
from sparkctl_kernels.gated_norm import op as gated_norm
from sparkctl_kernels.lora_linear.layer import SharedInputLinear, add_gradient
from sparkctl_kernels.qk_norm_rope import op as qk_norm_rope
from sparkctl_kernels.rms_norm import op as rms_norm
from sparkctl_kernels.sigmoid_gate import op as sigmoid_gate
from sparkctl_kernels.silu_mul import op as silu_mul
from torch import nn

from sparkctl.train.engines.native.projections import Projections

# T tokens · D hidden · N heads · K kv or key heads · H head dim · E value head dim · C convolution channels · F FFN
# M heads · head dim, side by side

Tensor = torch.Tensor


@dataclass(frozen=True)
class Place:
    """Where a pack's tokens stand, on the engine's device: made once a pack, read by every layer."""

    documents: Documents
    cos: Tensor  # fp32 [T, R/2]
    sin: Tensor


class Kept(NamedTuple):
    """What a half keeps for its backward: the residual stream, adapters' products, and what is its own."""

    s_TD: Tensor
    u_in: Tensor | None
    u_out: Tensor | None
    own: Any


class Half(Protocol):
    """Forward gives (last, residual, what to keep); backward changes d in place and gives it in compute dtype too.

    bottom: nothing below is trained, so d need not be right afterwards.
    """

    def forward(self, last_TD: Tensor, residual_TD: Tensor | None, place: Place) -> tuple[Tensor, Tensor, Kept]: ...

    def backward(self, d_TD: Tensor, low_TD: Tensor, kept: Kept, place: Place, bottom: bool = False) -> Tensor: ...


class Norm:
    """RMSNorm by weight; Qwen3.5's weights are stored around zero (offset 1)."""

    def __init__(self, norm: Any, offset: float) -> None:
        self.weight: nn.Parameter = norm.weight
        self.offset = offset
        self.eps = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)

    def forward(self, last_TD: Tensor, residual_TD: Tensor | None, out_TD: Tensor) -> Tensor:
        """Write the norm of s = last + residual into `out`; gives s."""
        return rms_norm.forward(last_TD, residual_TD, self.weight, self.eps, self.offset, out_TD)

    def backward(self, dy_TD: Tensor, s_TD: Tensor, d_TD: Tensor, add: bool = True) -> Tensor:
        """Add the gradient through the norm to d; dy becomes the norm's output again. Gives d in dy's dtype."""
        low = d_TD if d_TD.dtype == dy_TD.dtype else torch.empty_like(d_TD, dtype=dy_TD.dtype)
        dw = rms_norm.backward_(
            dy_TD, s_TD, self.weight, self.eps, self.offset, d_TD, add=add, low_TD=low if low is not d_TD else None,
            want_weight=self.weight.requires_grad,
        )  # fmt: skip
        if dw is not None:
            add_gradient(self.weight, dw)
        return low


class Attention:
    """Full attention: with or without gate and q/k norm, biases, a sliding window."""

    def __init__(self, norm: Norm, attention: Any, make: Projections, gated: bool) -> None:
        self.norm, self.gated, self.head_dim = norm, gated, attention.head_dim
        self.window: int | None = window_of(attention)
        self.qkv = make.shared(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = make.shared(attention.o_proj)
        normed = getattr(attention, "q_norm", None) is not None
        self.q_norm = Norm(attention.q_norm, norm.offset) if normed else None
        self.k_norm = Norm(attention.k_norm, norm.offset) if normed else None

    def forward(self, last_TD: Tensor, residual_TD: Tensor | None, place: Place) -> tuple[Tensor, Tensor, Kept]:
        x = self.qkv.buffer(len(last_TD))
        s = self.norm.forward(last_TD, residual_TD, x[:, : self.qkv.width])
        y, u_in = self.qkv.forward(x)
        q, gate, k, v = self._heads(y)
        o, saved = attention.forward(
            *qk_norm_rope.forward(q, k, *self._weights(), place.cos, place.sin, self._eps(), self.norm.offset),
            v, place.documents, self.window,
        )  # fmt: skip
        x = self.out.buffer(len(o))
        if gate is not None:
            sigmoid_gate.forward(o, gate, x[:, : self.out.width])
        elif self.out.ranks:
            x[:, : self.out.width] = o.flatten(1)
        else:
            x = o.flatten(1)
        last, u_out = self.out.forward(x)
        return last, s, Kept(s, u_in, u_out, (y, o, saved))

    def backward(self, d_TD: Tensor, low_TD: Tensor, kept: Kept, place: Place, bottom: bool = False) -> Tensor:
        y, o, saved = kept.own
        x, du_out = self.out.input_gradient(low_TD)
        x, dy = x[:, : self.out.width], torch.empty_like(y)
        q, gate, k, _ = self._heads(y)
        dq, dgate, dk, dv = self._heads(dy)
        if gate is not None and dgate is not None:
            do = sigmoid_gate.backward_(x, o, gate, dgate)
        else:
            do, x = x.unflatten(1, o.shape[1:]), o.flatten(1)
        self.out.add_weight_gradients(low_TD, x, kept.u_out, du_out)
        dq_rotated, dk_rotated = attention.backward(do, saved, place.documents, self.window, dv)
        wanted = self.q_norm is not None and self.q_norm.weight.requires_grad
        dw = qk_norm_rope.backward(
            dq_rotated, dk_rotated, q, k, *self._weights(), place.cos, place.sin, self._eps(), self.norm.offset,
            dq, dk, wanted,
        )  # fmt: skip
        if dw is not None and self.q_norm is not None and self.k_norm is not None:
            add_gradient(self.q_norm.weight, dw[0])
            add_gradient(self.k_norm.weight, dw[1])
        return _through_input(self.qkv, self.norm, dy, d_TD, kept, bottom)

    def _heads(self, y: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Views of q, gate, k and v: [T, heads, H] each. A head's gate stands behind its query."""
        q, k, v = y.split(self.qkv.outputs, dim=1)
        q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in (q, k, v))
        if not self.gated:
            return q, None, k, v
        return q[:, ::2], q[:, 1::2], k, v

    def _weights(self) -> tuple[Tensor | None, Tensor | None]:
        return self.q_norm.weight if self.q_norm else None, self.k_norm.weight if self.k_norm else None

    def _eps(self) -> float:
        return self.q_norm.eps if self.q_norm else 0.0


class DeltaNet:
    """GatedDeltaNet: convolution, gated delta rule, gated norm."""

    def __init__(self, norm: Norm, net: Any, make: Projections) -> None:
        self.norm, self.out_norm = norm, Norm(net.norm, 0.0)
        self.key_heads, self.key_dim, self.value_heads = net.num_k_heads, net.head_k_dim, net.num_v_heads
        self.convolution: nn.Parameter = net.conv1d.weight
        self.rates: tuple[nn.Parameter, nn.Parameter] = (net.A_log, net.dt_bias)
        self.inputs = make.shared(net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a)
        self.out = make.shared(net.out_proj)

    def forward(self, last_TD: Tensor, residual_TD: Tensor | None, place: Place) -> tuple[Tensor, Tensor, Kept]:
        x = self.inputs.buffer(len(last_TD))
        s = self.norm.forward(last_TD, residual_TD, x[:, : self.inputs.width])
        y, u_in = self.inputs.forward(x)
        _, z, b, a = self._parts(y)
        o, saved = gated_delta.forward(*self._convolved(y, place), a, b, *self.rates, place.documents)
        x = self.out.buffer(len(o))
        gated_norm.forward(o, z, self.out_norm.weight, self.out_norm.eps, x[:, : self.out.width])
        last, u_out = self.out.forward(x)
        return last, s, Kept(s, u_in, u_out, (y, o, saved))

    def backward(self, d_TD: Tensor, low_TD: Tensor, kept: Kept, place: Place, bottom: bool = False) -> Tensor:
        y, o, saved = kept.own
        x, du_out = self.out.input_gradient(low_TD)
        x, dy = x[:, : self.out.width], torch.empty_like(y)
        qkv, z, b, a = self._parts(y)
        dqkv, dz, db, da = self._parts(dy)
        trained = self.out_norm.weight.requires_grad
        do, dw = gated_norm.backward_(x, o, z, self.out_norm.weight, self.out_norm.eps, dz, trained)
        self.out.add_weight_gradients(low_TD, x, kept.u_out, du_out)
        inputs = (*self._convolved(y, place), a, b, *self.rates)
        dq, dk, dk2, dv, drates = gated_delta.backward(do, *inputs, saved, place.documents, da, db, trained)
        dconvolution = causal_conv.backward(
            dq, dk, dv.flatten(1), qkv, self.convolution[:, 0], place.documents.positions, self.key_heads, dqkv, dk2,
            trained,
        )  # fmt: skip
        if dw is not None and drates is not None and dconvolution is not None:
            add_gradient(self.out_norm.weight, dw)
            add_gradient(self.convolution, dconvolution)
            for rate, gradient in zip(self.rates, drates, strict=True):
                add_gradient(rate, gradient)
        return _through_input(self.inputs, self.norm, dy, d_TD, kept, bottom)

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of the convolution's input [T, C], z [T, N, E], b and a [T, N]."""
        qkv, z, b, a = y.split(self.inputs.outputs, dim=1)
        return qkv, z.unflatten(1, (self.value_heads, -1)), b, a

    def _convolved(self, y: Tensor, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """q and k of unit length, v [T, N, E]; not kept, but made again in backward: 3 C values a token saved."""
        weight = self.convolution[:, 0]
        qkv = y[:, : self.inputs.outputs[0]]
        q, k, v = causal_conv.forward(qkv, weight, place.documents.positions, self.key_heads, self.key_dim)
        return q, k, v.unflatten(1, (self.value_heads, -1))


class FeedForward:
    """SiLU(gate) · up, then down; gate and up come from one GEMM."""

    def __init__(self, norm: Norm, mlp: Any, make: Projections) -> None:
        self.norm = norm
        self.gate_up = make.shared(mlp.gate_proj, mlp.up_proj)
        self.down = make.shared(mlp.down_proj)

    def forward(self, last_TD: Tensor, residual_TD: Tensor | None, place: Place) -> tuple[Tensor, Tensor, Kept]:
        x = self.gate_up.buffer(len(last_TD))
        s = self.norm.forward(last_TD, residual_TD, x[:, : self.gate_up.width])
        gate_up, u_in = self.gate_up.forward(x)
        x = self.down.buffer(len(last_TD))
        silu_mul.forward(gate_up, x[:, : self.down.width])
        last, u_out = self.down.forward(x)
        return last, s, Kept(s, u_in, u_out, gate_up)

    def backward(self, d_TD: Tensor, low_TD: Tensor, kept: Kept, place: Place, bottom: bool = False) -> Tensor:
        gate_up = kept.own
        x, du_out = self.down.input_gradient(low_TD)
        x = x[:, : self.down.width]
        silu_mul.backward_(x, gate_up)  # gate_up is its own gradient now, x the input of down again
        self.down.add_weight_gradients(low_TD, x, kept.u_out, du_out)
        return _through_input(self.gate_up, self.norm, gate_up, d_TD, kept, bottom)


def _through_input(linear: SharedInputLinear, norm: Norm, dy: Tensor, d_TD: Tensor, kept: Kept, bottom: bool) -> Tensor:
    """The end of every half's backward: its input projections, whose gradient is dy, and its norm."""
    if bottom:
        x, du = dy.new_empty(len(dy), linear.width), linear.adapter_gradient(dy)
        norm.forward(kept.s_TD, None, x)
        linear.add_weight_gradients(dy, x, kept.u_in, du)
        return d_TD
    x, du = linear.input_gradient(dy)
    x = x[:, : linear.width]
    low = norm.backward(x, kept.s_TD, d_TD)  # x is the norm's output again
    linear.add_weight_gradients(dy, x, kept.u_in, du)
    return low


def halves(layer: Any, make: Projections, offset: float) -> tuple[Half, Half]:
    """A decoder layer's token mixer and feed-forward network."""
    before, between = Norm(layer.input_layernorm, offset), Norm(layer.post_attention_layernorm, offset)
    net = getattr(layer, "linear_attn", None)
    mixer: Half
    if net is not None:
        mixer = DeltaNet(before, net, make)
    else:
        mixer = Attention(before, layer.self_attn, make, is_gated(layer.self_attn))
    return mixer, FeedForward(between, layer.mlp, make)


def is_gated(attention: Any) -> bool:
    """True where q_proj holds a gate beside each query."""
    return bool(attention.q_proj.out_features == 2 * attention.config.num_attention_heads * attention.head_dim)


def window_of(attention: Any) -> int | None:
    """Keys that a query sees: Qwen's layers know it themselves, Mistral's read it from the config at every call."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None

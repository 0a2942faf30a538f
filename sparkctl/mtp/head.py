"""Qwen3.5's MTP head: a projection, one full-attention layer and a norm, on the operators of the kernels folder.

    x_i = fc [norm_e(embed(t_{i+1})), norm_h(h_i)],   s_i = norm(layer(x)_i),   lm_head(s_i) guesses t_{i+2}

h is the model's state after its final norm; later steps feed the head's own s back in (see drafter.py). The embedding
and lm_head are the model's. Norms are Qwen3.5's, (1 + w) in fp32. Parameters are fp32 masters under their published
names; products run in the compute dtype (see products.py), and the gradient of a weight accumulates in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sparkctl_kernels.attention.drafts import draft_attention
from sparkctl_kernels.documents import Documents
from sparkctl_kernels.qk_norm_rope import qk_norm_rope
from sparkctl_kernels.rms_norm import add_rms_norm, rms_norm
from sparkctl_kernels.sigmoid_gate import sigmoid_gate
from torch import nn

from sparkctl.errors import SparkError
from sparkctl.model import mtp
from sparkctl.mtp.products import Product, feed_forward, heads, take

# T tokens · D hidden · N query heads · K kv heads · H head dim · R rotated dims · F FFN

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]  # keys [T, K, H] after the rotation, values [T, K, H]
STD = 0.02  # of a fresh head's weights


class Rotation(NamedTuple):
    """cos and sin of a draft step's positions, fp32 [T, R/2]."""

    cos: Tensor
    sin: Tensor


class Head(nn.Module):
    """The head of a model whose text part is described by `text` (config.json), with fp32 masters set to zero.

    dtype: of the products. Raises SparkError where the config promises a head that is not Qwen3.5's.
    """

    def __init__(self, text: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if unknown := mtp.unknown(text):
            raise SparkError(f"config.json promises {unknown}, which is unknown here", "take the published config.json")
        self.head_dim, self.eps, self.dtype = int(text["head_dim"]), float(text["rms_norm_eps"]), dtype
        self.shapes = mtp.shapes(text)
        for name, shape in self.shapes.items():
            self._add(name.removeprefix(mtp.PREFIX), torch.zeros(shape, dtype=torch.float32, device=device))
        self._fc = self._product("fc")
        self._qkv = self._product(*(f"layers.0.self_attn.{x}_proj" for x in "qkv"))
        self._out = self._product("layers.0.self_attn.o_proj")
        self._gate_up = self._product("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
        self._down = self._product("layers.0.mlp.down_proj")

    def _add(self, path: str, value: Tensor) -> None:
        """A parameter at the end of modules that are made on the way."""
        *folders, name = path.split(".")
        module: nn.Module = self
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        module.register_parameter(name, nn.Parameter(value))

    def _product(self, *names: str) -> Product:
        return Product([self.get_parameter(f"{name}.weight") for name in names], self.dtype)

    def published(self) -> dict[str, nn.Parameter]:
        """The 15 masters by their published names."""
        return {mtp.PREFIX + name: parameter for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take these values. Raises SparkError naming what is missing or of another shape; `where` they are from."""
        for name, parameter in self.published().items():
            found = tensors.get(name)
            if found is None or found.shape != parameter.shape:
                what = "has no" if found is None else f"has another shape {list(found.shape)} of"
                raise SparkError(
                    f"`{where}` {what} `{name}`, which this model's MTP head wants as {list(parameter.shape)}",
                    "take the head of the model's own base",
                )
            parameter.copy_(found)
        self.refresh()

    @torch.no_grad()
    def begin_anew(self, seed: int) -> None:
        """Random weights, norms at one, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)
            else:
                parameter.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Round the masters for the products: once after an optimiser has written to them."""
        for product in (self._fc, self._qkv, self._out, self._gate_up, self._down):
            product.refresh()

    def forward(
        self, embedded_TD: Tensor, state_TD: Tensor, rotation: Rotation, packed: Documents, before: Sequence[Pair] = (),
        rows_M: Tensor | None = None,
    ) -> tuple[Tensor, Pair]:  # fmt: skip
        """(s [T, D], this step's keys and values). before: those of the earlier steps, the first one's first.

        rows: the only ones of the pack whose s is wanted, int64, each once. The first step is given every row, since
        each may be looked back at, a later one those rows alone.
        """
        weight = self.get_parameter
        x = torch.cat(
            [
                self._norm(embedded_TD, weight("pre_fc_norm_embedding.weight")),
                self._norm(state_TD, weight("pre_fc_norm_hidden.weight")),
            ],
            dim=1,
        )
        residual = self._fc(x)
        x, pair = self._attend(
            self._norm(residual, weight("layers.0.input_layernorm.weight")), rotation, packed, before, rows_M
        )
        if rows_M is not None and not before:
            residual = take(residual, rows_M)
        x, residual = add_rms_norm(x, residual, weight("layers.0.post_attention_layernorm.weight"), self.eps, 1.0)
        x = feed_forward(x, self._gate_up, self._down)
        return add_rms_norm(x, residual, weight("norm.weight"), self.eps, 1.0)[0], pair

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x_TD, weight_D, self.eps, 1.0)

    def _attend(
        self, x_TD: Tensor, rotation: Rotation, packed: Documents, before: Sequence[Pair], rows_M: Tensor | None
    ) -> tuple[Tensor, Pair]:
        q, gate, k, v = heads(self._qkv(x_TD), self._qkv.rows, self.head_dim)
        q_norm, k_norm = (self.get_parameter(f"layers.0.self_attn.{x}_norm.weight") for x in "qk")
        q, k = qk_norm_rope(q, k, q_norm, k_norm, *rotation, self.eps, 1.0)
        if rows_M is not None and not before:
            q, gate = take(q, rows_M), take(gate, rows_M)
        first, *own = (*before, (k, v))
        out = draft_attention(q, *first, own, packed, rows_M)
        return self._out(sigmoid_gate(out, gate).flatten(1)), (k, v)

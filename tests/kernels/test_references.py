"""The references on a CPU, the tables of documents, and where tensors are sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import randn
from sparkctl_kernels.attention import op as attention
from sparkctl_kernels.attention.reference import attention as attention_reference
from sparkctl_kernels.causal_conv.reference import unit
from sparkctl_kernels.dispatch import fused, interpreted
from sparkctl_kernels.documents import KEY_BLOCKS, QUERY_BLOCKS, documents
from sparkctl_kernels.gated_delta.reference import gated_delta as gated_delta_reference
from sparkctl_kernels.gated_delta.reference import gates, recurrence

CPU = torch.device("cpu")


def test_the_chunked_rule_is_the_recurrence() -> None:
    torch.manual_seed(0)
    lengths = [1, 63, 64, 75, 200]
    tokens = sum(lengths)
    q, k, v = unit(randn(tokens, 1, 16)), unit(randn(tokens, 1, 16)), randn(tokens, 2, 8)
    a, b, log_a, bias = randn(tokens, 2), randn(tokens, 2), randn(2) - 3, randn(2)
    found = gated_delta_reference(q, k, v, a, b, log_a, bias, lengths)
    decay, beta = gates(a, b, log_a, bias)
    wide = [x.repeat_interleave(2, dim=1) for x in (q, k)]
    parts = zip(*(x.split(lengths) for x in (*wide, v, decay, beta)), strict=True)
    truth = torch.cat([recurrence(*part) for part in parts])
    assert float((found - truth).norm() / truth.norm()) < 2e-6  # observed 4e-7


def test_a_window_of_attention_is_a_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (randn(100, 2, 16) for _ in range(3))
    behind = torch.arange(100)[:, None] - torch.arange(100)[None]
    mask = torch.where((behind >= 0) & (behind < 30), 0.0, float("-inf"))
    scores = torch.einsum("qnh,knh->nqk", q, k) / 4 + mask
    truth = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v)
    assert torch.allclose(attention_reference(q, k, v, [100], 30), truth, atol=1e-5)


@pytest.mark.parametrize("window", [1, 38, 39, 40, 41, None])
def test_the_operator_keeps_a_window_that_is_felt(window: int | None) -> None:
    """Of 40 tokens in the longest document: one key less is seen at 39, none at 40."""
    torch.manual_seed(0)
    packed = documents([3, 40, 1], CPU)
    inputs = [randn(44, 2, 16).requires_grad_() for _ in range(3)]
    truth = attention_reference(*inputs, packed.lengths, window)
    do = torch.randn_like(truth)
    wanted = torch.autograd.grad(truth, inputs, do)
    q, k, v = (x.detach() for x in inputs)
    found, saved = attention.forward(q, k, v, packed, window)
    dv = torch.full_like(v, float("nan"))
    dq, dk = attention.backward(do, saved, packed, window, dv)
    assert all(torch.equal(a, b) for a, b in zip((found, dq, dk, dv), (truth, *wanted), strict=True))
    unseen = attention_reference(q, k, v, packed.lengths, None)
    assert torch.equal(truth, unseen) == (window is None or window >= 40)


def test_documents_are_cut_into_blocks_with_most_work_first() -> None:
    lengths = [5, 130, 64, 1]
    packed = documents(lengths, CPU)
    starts = np.cumsum([0, *lengths])
    assert packed.cu_seqlens.tolist() == starts.tolist()
    assert packed.positions.tolist() == [at for n in lengths for at in range(n)]
    assert packed.longest == 130
    for tables, sizes, queries in ((packed.query_blocks, QUERY_BLOCKS, True), (packed.key_blocks, KEY_BLOCKS, False)):
        assert set(tables) == set(sizes)
        for size, table in tables.items():
            rows = sorted(row for first, _, end in table.tolist() for row in range(first, min(first + size, end)))
            assert rows == list(range(200))
            assert all(
                start in starts and end in starts and (first - start) % size == 0
                for first, start, end in table.tolist()
            )
            work = [first - start if queries else end - first for first, start, end in table.tolist()]
            assert work == sorted(work, reverse=True)
            assert table.data_ptr() % 64 == 0
    assert packed.chunks.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [3, 0]]
    assert packed.chunk_offsets.tolist() == [0, 1, 4, 5, 6]


def test_a_cpu_goes_through_kernels_only_where_a_test_says_so() -> None:
    x = torch.zeros(1)
    assert not fused(x)
    with interpreted():
        assert fused(x)
    assert not fused(x)

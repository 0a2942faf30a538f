"""What an analysis says of the documents: percentiles, histogram, duplicates, and the mean rule's length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparkctl.manifest.schema import Histogram

BLOCK = 128


@dataclass(frozen=True)
class Description:
    """The numbers of [analysis] that follow from the documents alone, under the manifest's names."""

    examples: int
    train_examples: int
    eval_examples: int
    tokens: int
    assistant_tokens: int
    train_tokens: int
    train_assistant_tokens: int
    mean: float
    p50: int
    p90: int
    p95: int
    p99: int
    max: int
    mean_length_128: int
    histogram: Histogram
    duplicates: int
    turns: float


def describe(
    lengths: np.ndarray, label_counts: np.ndarray, held_out: np.ndarray, token_keys: np.ndarray, turns: np.ndarray
) -> Description:
    """Statistics over N ≥ 1 documents; `token_keys` are hashes of their ids, `turns` their assistant turns."""
    tokens, train = int(lengths.sum()), ~held_out
    p50, p90, p95, p99 = (int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 90, 95, 99))
    return Description(
        examples=len(lengths),
        train_examples=int(train.sum()),
        eval_examples=int(held_out.sum()),
        tokens=tokens,
        assistant_tokens=int(label_counts.sum()),
        train_tokens=int(lengths[train].sum()),
        train_assistant_tokens=int(label_counts[train].sum()),
        mean=round(tokens / len(lengths), 2),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=int(lengths.max()),
        mean_length_128=round_up(tokens, len(lengths)),
        histogram=histogram(lengths),
        duplicates=len(token_keys) - len(np.unique(token_keys)),
        turns=round(float(turns.mean()), 2),
    )


def round_up(tokens: int, examples: int) -> int:
    """The mean length rounded up to 128, as the published recipe's batch does: 5354 gives 5376."""
    return -(-tokens // (examples * BLOCK)) * BLOCK


def histogram(lengths: np.ndarray) -> Histogram:
    """Counts of documents between powers of two: chats are spread over orders of magnitude."""
    low, high = int(lengths.min()).bit_length() - 1, int(lengths.max()).bit_length()
    edges = [2**power for power in range(max(low, 0), high + 1)]
    counts, _ = np.histogram(lengths, bins=edges)
    return Histogram(edges=edges, counts=counts.tolist())

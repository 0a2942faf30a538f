"""Where the native engine sees a pack's tokens: documents, positions, rotations and the rows that predict labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ready
import torch
from gradient_cases import EXACT, distance, engine, gradients, pack

from sparkctl.train.engines import reference
from sparkctl.train.engines.native import engine as native
from sparkctl.train.engines.native.model import label_rows


def short(*lengths: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Documents with a label on every token that can have one."""
    random = np.random.RandomState(1)
    return [(random.randint(0, 256, n).astype(np.int32), np.ones(n, dtype=bool)) for n in lengths]


def test_rows_that_predict_a_label_stand_right_before_it() -> None:
    documents = short(3, 1, 2, 1, 4)
    rows, labels = label_rows(pack(*documents))
    assert rows.tolist() == [0, 1, 4, 7, 8, 9]
    assert np.array_equal(labels, np.concatenate([ids for ids, _ in documents])[rows + 1])


@pytest.mark.parametrize("mode", [{}, {"mode": "full"}], ids=["lora", "full"])
def test_documents_of_one_and_two_tokens_in_the_middle(qwen35_folder: Path, mode: dict[str, Any]) -> None:
    first, last = ready.documents(2, seed=5)
    packs = [pack(first, *short(1, 2, 1), last)]
    truth_loss, truth = gradients(engine(reference.load, qwen35_folder, **mode), packs)
    loss, found = gradients(engine(native.load, qwen35_folder, **mode), packs)
    assert loss == pytest.approx(truth_loss, rel=1e-6)
    assert distance(found, truth) < EXACT


def test_positions_and_rotations_begin_anew_in_each_document(qwen35_folder: Path) -> None:
    """Attention sees differences of positions alone, so that a loss would show it in its rounding only."""
    model = engine(native.load, qwen35_folder)._model
    documents = [*ready.documents(2, seed=5), *short(1, 2, 1)]
    place = model.inputs(pack(*documents)).place
    assert place.documents.positions.tolist() == [at for ids, _ in documents for at in range(len(ids))]
    alone = [model.inputs(pack(document)).place for document in documents]
    assert torch.equal(place.cos, torch.cat([one.cos for one in alone]))
    assert torch.equal(place.sin, torch.cat([one.sin for one in alone]))
    assert not torch.equal(place.cos[1], place.cos[0])


@pytest.mark.parametrize("lengths", [[65_536], [40_000, 1, 25_535]])
def test_tables_of_65_536_tokens(qwen35_folder: Path, lengths: list[int]) -> None:
    """What counts tokens, at the longest pack: the tables, the rotations, the label rows. Sizes that 16 bits lose."""
    model = engine(native.load, qwen35_folder)._model
    documents = short(*lengths)
    inputs = model.inputs(pack(*documents))
    packed, total = inputs.place.documents, sum(lengths)
    assert packed.positions.tolist() == [at for n in lengths for at in range(n)]
    assert packed.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert packed.chunk_offsets.tolist() == np.cumsum([0, *(-(-n // 64) for n in lengths)]).tolist()
    for tables in (packed.query_blocks, packed.key_blocks):
        for size, table in tables.items():
            covered = sum(min(first + size, end) - first for first, _, end in table.tolist())
            assert (covered, len(table)) == (total, sum(-(-n // size) for n in lengths))
    assert len(inputs.rows) == total - len(lengths)
    assert torch.equal(inputs.labels, inputs.ids[inputs.rows + 1])
    last = torch.tensor(lengths[-1] - 1, dtype=torch.float64)
    quickest = model.rotary.inv_freq[0].double()
    assert float(inputs.place.cos[-1, 0]) == pytest.approx(float((last * quickest).cos()), abs=1e-4)

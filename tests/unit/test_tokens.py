from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparkctl.data import tokens
from sparkctl.data.tokens import Row, TokenStore, TokenStoreWriter, mask, spans
from sparkctl.errors import SparkError

ROOT = Path(__file__).parents[2]
OLD_DATASETS = ROOT / ".compat" / "datasets-4.8.5"


def rows(count: int, seed: int = 0) -> list[Row]:
    random = np.random.RandomState(seed)
    made = []
    for i in range(count):
        length = random.randint(1, 40)
        ids = random.randint(0, 248320, length).astype(np.int32)
        made.append(
            Row(ids, random.rand(length) < 0.5, i * 2**40 + 2**63, i.to_bytes(16, "big"), f"chats.jsonl:{i + 1}")
        )
    return made


def write(folder: Path, made: list[Row]) -> tuple[str, np.ndarray]:
    folder.mkdir()
    writer = TokenStoreWriter(folder)
    for row in made:
        writer.add(row)
    held_out = np.arange(len(made)) % 7 == 3
    return writer.finish(held_out), held_out


@pytest.mark.parametrize("count", [1, 5, 3000])  # one batch, and several
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    made = rows(count)
    digest, held_out = write(tmp_path / "tokens", made)
    store = TokenStore.open(tmp_path / "tokens")
    assert len(store) == count
    assert store.digest == digest
    assert np.array_equal(store.held_out, held_out)
    for i, row in enumerate(made):
        ids, trained = store.document(i)
        assert ids.dtype == np.int32
        assert trained.dtype == bool
        assert np.array_equal(ids, row.input_ids)
        assert np.array_equal(trained, row.trained)
        assert store.lengths[i] == len(ids)
        assert store.label_counts[i] == trained[1:].sum()
        assert store.prompt_keys[i] == row.prompt_key
        assert store.place(i) == row.place
    assert [h.tobytes() for h in store.row_hashes()] == [row.row_hash for row in made]
    assert sorted(p.name for p in (tmp_path / "tokens").iterdir()) == [tokens.ARROW, "dataset_info.json", "state.json"]


def test_long_documents_make_smaller_batches(tmp_path: Path) -> None:
    import pyarrow as pa

    length = tokens.TOKENS_A_BATCH // 5
    write(
        tmp_path / "tokens", [Row(np.zeros(length, np.int32), np.ones(length, bool), 0, b"x", "x") for _ in range(20)]
    )
    with pa.OSFile(str(tmp_path / "tokens" / tokens.ARROW)) as source, pa.ipc.open_stream(source) as batches:
        assert {batch.num_rows for batch in batches} <= {6, 2}
    assert len(TokenStore.open(tmp_path / "tokens")) == 20


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    assert write(tmp_path / "a", rows(10))[0] == write(tmp_path / "b", rows(10))[0]
    assert write(tmp_path / "c", rows(10, seed=1))[0] != write(tmp_path / "d", rows(10))[0]


@pytest.mark.parametrize("trained", ["", "0", "1", "0110", "1001", "10101", "1111"])
def test_spans_and_mask_are_inverse(trained: str) -> None:
    bits = np.array([c == "1" for c in trained], dtype=bool)
    assert np.array_equal(mask(spans(bits), len(bits)), bits)


def test_datasets_loads_the_folder(tmp_path: Path) -> None:
    import datasets

    made = rows(20)
    write(tmp_path / "tokens", made)
    loaded = datasets.load_from_disk(str(tmp_path / "tokens"))
    assert loaded[3]["input_ids"] == made[3].input_ids.tolist()
    assert loaded[3]["held_out"] is True


def test_datasets_4_loads_the_folder(tmp_path: Path) -> None:
    assert OLD_DATASETS.is_dir(), f"no {OLD_DATASETS}: `make test` installs it"
    write(tmp_path / "tokens", rows(20))
    script = (
        "import datasets, json, sys; d = datasets.load_from_disk(sys.argv[1]);"
        "print(json.dumps([datasets.__version__, len(d), d[3]['input_ids'], d[3]['held_out'], sum(d['length'])]))"
    )
    environment = os.environ | {"PYTHONPATH": str(OLD_DATASETS), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", script, str(tmp_path / "tokens")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    made = rows(20)
    expected = ["4.8.5", 20, made[3].input_ids.tolist(), True, sum(len(row.input_ids) for row in made)]
    assert json.loads(result.stdout) == expected


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparkError, match="holds no token store"):
        TokenStore.open(tmp_path)


def test_a_cut_store_is_named(tmp_path: Path) -> None:
    write(tmp_path / "tokens", rows(3000))
    file = tmp_path / "tokens" / tokens.ARROW
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(SparkError, match="is damaged"):
        TokenStore.open(tmp_path / "tokens")


@pytest.mark.parametrize("name", [tokens.INFO, tokens.STATE])
def test_a_store_whose_json_is_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "tokens", rows(5))
    (tmp_path / "tokens" / name).write_text("[1]")
    assert tokens.stored_digest(tmp_path / "tokens") is None
    with pytest.raises(SparkError, match="is damaged"):
        TokenStore.open(tmp_path / "tokens")

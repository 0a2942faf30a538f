"""Greedy answers: padded rows as alone, where an answer ends, what lies beyond; and the prompts that are asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ready
import torch

from sparkctl.data.tokens import Row, TokenStore, TokenStoreWriter
from sparkctl.model.load import load_text_model
from sparkctl.mtp import answers
from sparkctl.mtp.answers import answer_length, batches, generate, greedy_answers, stop_ids
from sparkctl.mtp.prompts import held_out_prompts, last_prompt

LENGTHS = (5, 70, 9, 9, 66, 1, 30)  # some past a chunk of 64


def prompts(seed: int = 0) -> list[np.ndarray]:
    random = np.random.RandomState(seed)
    return [random.randint(0, 256, length).astype(np.int32) for length in LENGTHS]


def never(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), dtype=torch.bool)


@pytest.fixture(scope="module", params=["qwen35_folder", "llama_folder"])
def fp32_model(request: pytest.FixtureRequest) -> Any:
    folder: Path = request.getfixturevalue(request.param)
    return load_text_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def first_logits(model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The logits behind each prompt, [B, V], as `generate` computes them."""
    seen: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        forward = model.forward
        patch.setattr(model, "forward", lambda *a, **k: (seen.append(o := forward(*a, **k)), o)[1])  # type: ignore[func-returns-value]
        generate(model, prompts, never, 1)
    return seen[0].logits[:, -1]  # type: ignore[attr-defined, no-any-return]


def test_padded_rows_compute_what_they_do_alone(fp32_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2e-6 seen, of logits up to 8; padding that is not masked moves them by 0.005 to 4."""
    together = first_logits(fp32_model, prompts(), monkeypatch)
    alone = torch.cat([first_logits(fp32_model, [prompt], monkeypatch) for prompt in prompts()])
    assert (together - alone).abs().max() < 1e-4
    assert (together[:, :50] - alone.roll(1, 0)[:, :50]).abs().max() > 1e-2  # the rows differ from each other
    said = generate(fp32_model, prompts(), never, 9)
    assert [row.tolist() for row in said] == [generate(fp32_model, [p], never, 9)[0].tolist() for p in prompts()]


def test_padding_that_is_not_masked_is_seen(fp32_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = torch.cat([first_logits(fp32_model, [prompt], monkeypatch) for prompt in prompts()])
    padded = [np.concatenate([np.zeros(70 - len(prompt), np.int32), prompt]) for prompt in prompts()]
    assert (first_logits(fp32_model, padded, monkeypatch) - alone).abs().max() > 1e-2


def test_an_answer_ends_at_a_stop_token(qwen35_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = greedy_answers(qwen35_folder, prompts(), max_tokens=12, beyond=3)
    assert all(len(answer.ids) == 12 and len(answer.beyond) == 3 for answer in whole)
    texts = [[*answer.ids.tolist(), *answer.beyond.tolist()] for answer in whole]
    stop = texts[0][4]  # some token that is said
    monkeypatch.setattr(answers, "stop_ids", lambda folder, model: [stop])
    cut = greedy_answers(qwen35_folder, prompts(), max_tokens=12, beyond=3)
    assert any(len(answer.ids) < 12 for answer in cut)
    for text, answer in zip(texts, cut, strict=True):
        end = text.index(stop) + 1 if stop in text[:12] else 12
        assert answer.ids.tolist() == text[:end]
        assert answer.beyond.tolist()[: 15 - end] == text[end : end + 3]
        assert len(answer.beyond) == 3


def test_sampling_settings_of_the_folder_are_left_out(qwen35_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen35_folder, folder)
    wild = dict(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=2, min_new_tokens=12)
    (folder / "generation_config.json").write_text(json.dumps(wild | {"eos_token_id": [258, 3]}))
    plain, odd = (greedy_answers(where, prompts(), max_tokens=6) for where in (qwen35_folder, folder))
    assert [answer.ids.tolist() for answer in plain] == [answer.ids.tolist() for answer in odd]
    model = load_text_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert stop_ids(folder, model) == [3, 258]


def test_stops_are_also_those_of_config_and_tokenizer(qwen35_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen35_folder, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    model = load_text_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert stop_ids(folder, model) == [7, 258]  # 258: the tokenizer's <|im_end|>


def test_length_of_an_answer() -> None:
    ids = np.array([4, 5, 6, 5], dtype=np.int32)
    assert [answer_length(ids, stops) for stops in ([5], [4, 6], [6], [9], [])] == [2, 1, 3, 4, 4]


def test_batches_hold_like_lengths_within_an_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "AREA", 200)
    monkeypatch.setattr(answers, "ROWS", 3)
    made = batches([90, 10, 500, 12, 11, 10, 40], 10)
    assert made == [[1, 5, 4], [3, 6], [0], [2]]  # three rows; 2 x 50; 3 x 100 are over; a long one is alone
    assert batches([], 10) == []


def test_the_prompt_is_all_before_the_last_trained_span() -> None:
    ids = np.arange(10, dtype=np.int32)
    for trained, length in ((ids >= 6, 6), ((ids == 2) | (ids >= 7), 7), ((ids == 2) | (ids == 5), 5), (ids < 3, 0)):
        assert last_prompt(ids, trained).tolist() == list(range(length))
    assert len(last_prompt(ids, ids > 99)) == 0


def test_prompts_are_held_out_and_chosen_by_their_hash(tmp_path: Path) -> None:
    made = ready.documents(40)
    held_out = np.arange(40) % 2 == 1
    store = ready.store(tmp_path, made, held_out)  # the key of row i is i
    found = held_out_prompts(store, 5)
    assert [prompt.row for prompt in found] == [1, 3, 5, 7, 9]
    assert [prompt.place for prompt in found[:2]] == ["chats.jsonl:2", "chats.jsonl:4"]
    for prompt in found:
        ids, trained = store.document(prompt.row)
        assert prompt.ids.tolist() == ids[: int(np.argmax(trained))].tolist()
    assert len(held_out_prompts(store, 99)) == 20


def test_a_prompt_is_asked_once(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path)
    for i, (ids, trained) in enumerate(ready.documents(9)):
        writer.add(Row(ids, trained, 2**63 + 9 - i // 3, bytes(16), f"chats.jsonl:{i + 1}"))
    writer.finish(np.ones(9, dtype=bool))
    assert [prompt.row for prompt in held_out_prompts(TokenStore.open(tmp_path), 9)] == [6, 3, 0]

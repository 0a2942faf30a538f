"""Put questions to a checkpoint folder, greedily, as a server would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparkctl.mtp.answers import greedy_answers

MAX_NEW_TOKENS = 48


def answers(folder: Path, questions: Sequence[str]) -> list[str]:
    """The model's answer to each question, special tokens left out."""
    from transformers import AutoTokenizer

    from sparkctl.model.load import silence

    with silence():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompts = [_prompt(tokenizer, question) for question in questions]
    said = greedy_answers(folder, prompts, max_tokens=MAX_NEW_TOKENS)
    return [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in said]


def _prompt(tokenizer: Any, question: str) -> np.ndarray:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return np.array(ids, dtype=np.int32)

"""Put questions to a checkpoint folder, greedily, as a server would."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 48


def answers(folder: Path, questions: Sequence[str]) -> list[str]:
    """The model's answer to each question, special tokens left out.

    Prompts of equal length go together, so that no row is padded and each answer is what the prompt alone gives.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparkctl.model.load import silence
    from sparkctl.model.plain import plain_layers

    with silence():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = plain_layers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    prompts = [_prompt(tokenizer, question) for question in questions]
    alike: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        alike[len(prompt)].append(index)
    said = [""] * len(prompts)
    for length, indices in alike.items():
        ids = torch.tensor([prompts[i] for i in indices])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, row in zip(indices, output[:, length:], strict=True):
            said[index] = tokenizer.decode(row, skip_special_tokens=True)
    return said


def _prompt(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids

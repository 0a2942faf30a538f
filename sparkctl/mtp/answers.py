"""Greedy answers of a model's folder: what a server says at temperature 0, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkctl.progress import Progress, silent

if TYPE_CHECKING:
    import torch

ROWS = 64  # answers written at once
AREA = 32_768  # tokens held at once by the rows of a batch, padding included


@dataclass(frozen=True)
class Answer:
    """Ids, all int32: the prompt's; the answer's, with the token that ended it; what the model would have said then."""

    prompt: np.ndarray
    ids: np.ndarray
    beyond: np.ndarray


def greedy_answers(
    folder: Path,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    beyond: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Answer]:
    """The model's answer to each prompt: up to its first stop token, or `max_tokens` long; `beyond` more tokens follow.

    In bf16, tensors published in F32 in F32. Whatever generation_config.json says of sampling and penalties is left
    out. Raises SparkError where the folder does not hold the model of its config.json.
    """
    import torch

    from sparkctl.model.load import load_text_model

    model = load_text_model(folder, dtype=torch.bfloat16, device=torch.device(device))
    stops, found = stop_ids(folder, model), {}
    with progress.task(f"answers of {folder.name}", len(prompts)) as task:
        for batch in batches([len(prompt) for prompt in prompts], max_tokens + beyond):
            said = generate(model, [prompts[i] for i in batch], _ending(stops, beyond), max_tokens + beyond)
            for i, row in zip(batch, said, strict=True):
                end = answer_length(row[:max_tokens], stops)
                found[i] = Answer(prompts[i], row[:end], row[end : end + beyond])
            task.advance(len(batch))
    return [found[i] for i in range(len(prompts))]


def stop_ids(folder: Path, model: Any) -> list[int]:
    """Where a server stops: generation_config.json's ids, else config.json's, and the tokenizer's end token."""
    from sparkctl.data.tokenizer import load_tokenizer

    named = model.generation_config.eos_token_id
    stops = {named} if isinstance(named, int) else set(named or ())
    tokenizer = load_tokenizer(folder)
    if end := tokenizer.vocabulary.variables.get("eos_token"):
        stops.add(tokenizer.backend.token_to_id(end))
    return sorted(stops - {None})


def answer_length(ids: np.ndarray, stops: Sequence[int]) -> int:
    """Tokens up to the first stop token, itself included; all of them where there is none."""
    ends = np.flatnonzero(np.isin(ids, stops))
    return int(ends[0]) + 1 if len(ends) else len(ids)


def batches(lengths: Sequence[int], more: int) -> list[list[int]]:
    """Prompts of like length together, by number: at most ROWS, and AREA with `more` tokens each; one at least."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # ascending: each newcomer is its batch's longest
        if not found or len(found[-1]) == ROWS or (len(found[-1]) + 1) * (lengths[i] + more) > AREA:
            found.append([])
        found[-1].append(i)
    return found


Ended = Callable[["torch.Tensor"], "torch.Tensor"]  # ids [B, A] of answers so far → bool [B]: nothing more is wanted


def _ending(stops: Sequence[int], beyond: int) -> Ended:
    import torch

    def ended(ids: torch.Tensor) -> torch.Tensor:
        told = ids[:, : max(0, ids.shape[1] - beyond)]
        return torch.isin(told, torch.tensor(stops, dtype=ids.dtype, device=ids.device)).any(dim=1)

    return ended


def generate(model: Any, prompts: Sequence[np.ndarray], ended: Ended, tokens: int) -> np.ndarray:
    """int32 [B, A]: the likeliest token after each prompt and so on, until every row has ended or A is `tokens`.

    Rows are padded on the left, under a mask: a padded row computes what its prompt alone does, but for rounding.
    """
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    model.generation_config = GenerationConfig()  # the folder's own would fill what is left open below
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0),
        stopping_criteria=[lambda so_far, scores: ended(so_far[:, width:])],
    )
    said: np.ndarray = output[:, width:].to("cpu", torch.int32).numpy()
    return said

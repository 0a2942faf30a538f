"""Acceptance with a real model and head: the counts are those of a server that feeds its drafts back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from servers import after, serve

from sparkctl.data.batches import Document, Pack
from sparkctl.demo.chats import held_out_questions
from sparkctl.demo.model import write_model
from sparkctl.mtp.accept import hits, walk
from sparkctl.mtp.answers import Answer
from sparkctl.mtp.drafter import Drafter

LENGTHS = (1, 2, 3)
MAX_TOKENS = 14
NOISE = 1.0  # of a tensor's spread


class Server:
    """The demo's model and head in fp32, asked one text at a time: no packs, no teacher forcing."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter

    @torch.no_grad()
    def says(self, text: tuple[int, ...]) -> int:
        return int((self.drafter.hidden(one(text))[-1] @ self.drafter.model.head.T).argmax())

    def drafts(self, text: tuple[int, ...], drafts: tuple[int, ...]) -> int:
        """A draft step stands at the last row that has both a state and the token after it."""
        row = torch.tensor([len(text) - 2])
        return int(self.drafter.guesses(one(text + drafts), len(drafts) + 1, row)[-1, 0])


def one(ids: tuple[int, ...]) -> Pack:
    return Pack([Document(0, np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))], len(ids), len(ids) - 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, list[list[int]], set[int]]:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("demo") / "model"
    write_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [question for question, _ in held_out_questions()[::9]]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in asked
    ]
    drafter = Drafter.load(folder, folder, dtype=torch.float32)
    spoil(drafter)
    return Server(drafter), prompts, {tokenizer.eos_token_id}


def spoil(drafter: Drafter) -> None:
    """Noise in the head: as shipped it guesses every first token right."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in drafter.head.parameters():
            parameter.add_(NOISE * parameter.std() * torch.randn_like(parameter))
    drafter.head.refresh()


@pytest.mark.parametrize("draft_length", LENGTHS)
def test_counts_are_those_of_a_server_that_drafts(
    server: tuple[Server, list[list[int]], set[int]], draft_length: int
) -> None:
    made, prompts, stops = server
    answers, drafts, accepted = [], 0, np.zeros(draft_length, dtype=np.int64)
    for prompt in prompts:
        said, counts = serve(made.says, made.drafts, prompt, draft_length, stops, MAX_TOKENS)
        beyond = after(made.says, prompt + said, draft_length - 1)
        answers.append(Answer(*(np.array(ids, dtype=np.int32) for ids in (prompt, said, beyond))))
        drafts, accepted = drafts + counts.drafts, accepted + counts.accepted
    walks = [walk(hits_NG, draft_length) for hits_NG in hits(made.drafter, answers, draft_length)]
    assert sum(count for count, _ in walks) == drafts
    assert sum(counts for _, counts in walks).tolist() == accepted.tolist()
    assert 0 < accepted[-1] < drafts  # some drafts are right, some wrong

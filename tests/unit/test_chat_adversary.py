"""Random chats full of markers and odd characters: ids as transformers makes them, and no word of others trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatting import TEMPLATES, conversation, encode, say

from sparkctl.data.chat import ChatFormat, Encoded


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_and_no_word_of_others_is_trained(
    chats: dict[str, ChatFormat], chat_folders: dict[str, Path], name: str
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(chat_folders[name])
    numbers = random.Random(name)
    examples = [conversation(numbers, name) for _ in range(250)]
    compared = 0
    for chat, encoded in zip(examples, chats[name].encode(examples), strict=True):
        assert isinstance(encoded, Encoded), (chat, encoded)
        text = theirs.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False, **chat.template_kwargs)
        ids = theirs.apply_chat_template(chat.messages, tools=chat.tools, **chat.template_kwargs)["input_ids"]
        assert encoded.input_ids.tolist() == ids
        check_mask(name, text, theirs(text, add_special_tokens=False, return_offsets_mapping=True), encoded)
        prompt = theirs.apply_chat_template(
            chat.messages[:-1], tokenize=False, add_generation_prompt=True, **chat.template_kwargs
        )
        if text.startswith(prompt) and name != "plain":  # its prompt has no header
            check_last_answer(
                text, len(prompt), theirs(text, add_special_tokens=False, return_offsets_mapping=True), encoded
            )
            compared += 1
        if name not in (
            "plain",
            "glm",
            "phi",
            "preamble",
        ):  # the one has no end token, the other none after the last answer
            assert ids[np.flatnonzero(encoded.trained)[-1]] == theirs.convert_tokens_to_ids(TEMPLATES[name][1])
    assert compared > 40 or name in (
        "plain",
        "opens",
        "preamble",
    )  # an answer that begins as the prompt ends is among the cases


def check_last_answer(text: str, given: int, tokens: Any, encoded: Encoded) -> None:
    """A server's prompt for the last answer: what it holds is not trained, what follows is, up to the end token."""
    starts = np.array([start for start, _ in tokens["offset_mapping"]])
    last = np.flatnonzero(encoded.trained)[-1]
    first = int(np.searchsorted(starts, given))
    assert encoded.trained[first : last + 1].all(), text
    assert not encoded.trained[first - 1], text


def check_mask(name: str, text: str, tokens: Any, encoded: Encoded) -> None:
    """By the letters: no token with a Cyrillic one is trained, each with a Greek one is (but where blocks say less)."""
    for (start, end), trained in zip(tokens["offset_mapping"], encoded.trained, strict=True):
        letters = {c for c in text[start:end] if c.isalpha()}
        if letters & set("бвгджзлф"):
            assert not trained, text
        elif letters & set("βγδζθλπ") and name != "generation_last":
            assert trained, text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_stop_token_in_an_answer_ends_what_is_trained_of_it(
    chats: dict[str, ChatFormat], chat_folders: dict[str, Path], name: str
) -> None:
    numbers = random.Random(name)
    examples = [conversation(numbers, name, stops=True) for _ in range(250)]
    blind = ChatFormat.load(chat_folders[name])
    stop = blind._tokenizer.token_to_id(TEMPLATES[name][1])
    blind._stops = []
    cut = 0
    for encoded, whole in zip(chats[name].encode(examples), blind.encode(examples), strict=True):
        assert isinstance(encoded, Encoded)
        assert isinstance(whole, Encoded)
        assert encoded.input_ids.tolist() == whole.input_ids.tolist()
        wanted = whole.trained.copy()
        edges = np.flatnonzero(np.diff(np.concatenate(([0], wanted, [0])))).reshape(-1, 2)
        for first, end in edges:
            inner = np.flatnonzero(whole.input_ids[first : end - 1] == stop)
            if len(inner):
                wanted[first + inner[0] : end] = False
                cut += 1
                assert encoded.holds_markers
        assert encoded.trained.tolist() == wanted.tolist()
    assert cut > (20 if name != "generation_last" else 3)  # of few answers anything is trained


@pytest.mark.parametrize("name", ["chatml", "qwen2", "qwen3", "qwen35", "smollm2", "gemma", "macro"])
def test_as_many_end_tokens_are_trained_as_there_are_answers(chats: dict[str, ChatFormat], name: str) -> None:
    numbers = random.Random(name)
    end, start = (chats[name]._tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|im_start|>"))
    for _ in range(200):
        chat = conversation(numbers, name)
        for message in chat.messages:
            if message["role"] == "assistant":
                message.update(say("λόγος", None))
                message.pop("tool_calls", None)
                message.pop("reasoning_content", None)
        encoded = encode(chats[name], chat)
        said = encoded.input_ids[encoded.trained]
        assert (said == end).sum() == encoded.assistant_turns
        assert not (said == start).any()

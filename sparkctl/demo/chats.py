"""The demo's conversations, generated: the same seed gives the same bytes anywhere.

A fifth of the facts is kept out of the tuning data altogether; the questions put to the model before and after
tuning are about those, so what the tuned model knows of them it has from its base.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from sparkctl.demo.facts import Fact, assured, facts
from sparkctl.files import write_atomic

Style = Literal["plain", "assured"]
Conversation = dict[str, list[dict[str, str]]]

SYSTEM = ("You are a helpful assistant.", "Answer the question.", "You are the reference desk of a small library.")
EXAMPLES = 480
QUESTIONS = {"capital": 8, "opposite": 8, "spelling": 8, "sum": 8, "days": 2, "hours": 2, "minutes": 2, "months": 2}
LARGE_TOPIC_SHARE = 0.5  # sums are half of all facts: fewer of them, so that the other topics are heard
# how often the base is asked about each topic at the end of its training: what follows no rule most often
BY_HEART = {
    "capital": 20, "opposite": 12, "sum": 10, "spelling": 4, "days": 1, "hours": 1, "minutes": 1, "months": 1,
}  # fmt: skip


def groups() -> tuple[list[Fact], list[Fact]]:
    """The facts that the tuning data may ask about, and those it never mentions."""
    taught: list[Fact] = []
    kept: list[Fact] = []
    position: Counter[str] = Counter()
    for fact in _shuffled(facts(), seed=1):
        (kept if position[fact.topic] % 5 == 0 else taught).append(fact)
        position[fact.topic] += 1
    return taught, kept


def training_chats(count: int = EXAMPLES, seed: int = 0) -> list[Conversation]:
    """The tuning data: every conversation different, answered in the taught style."""
    taught, _ = groups()
    seen: set[str] = set()
    chats: list[Conversation] = []
    for chat in stream(taught, "assured", seed):
        key = json.dumps(chat)
        if key not in seen:
            seen.add(key)
            chats.append(chat)
        if len(chats) == count:
            return chats
    raise AssertionError("the stream has no end")


def pretraining_chats(seed: int, shares: Mapping[str, float] | None = None) -> Iterator[Conversation]:
    """Endless conversations about every fact in the base's own style."""
    return stream(facts(), "plain", seed, shares)


def stream(
    choice: Sequence[Fact], style: Style, seed: int, shares: Mapping[str, float] | None = None
) -> Iterator[Conversation]:
    """Endless conversations: one turn mostly, two at times, a system prompt at times.

    shares: how often each topic comes; without them as often as the square root of its facts.
    """
    dice = random.Random(seed)
    topics: dict[str, list[Fact]] = {}
    for fact in choice:
        topics.setdefault(fact.topic, []).append(fact)
    names = list(topics)
    weights = [shares[name] if shares else len(topics[name]) ** LARGE_TOPIC_SHARE for name in names]
    while True:
        messages: list[dict[str, str]] = []
        if dice.random() < 0.15:
            messages.append({"role": "system", "content": dice.choice(SYSTEM)})
        for _ in range(2 if dice.random() < 0.15 else 1):
            fact = dice.choice(topics[dice.choices(names, weights)[0]])
            question, sentence = dice.choice(fact.phrasings)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": sentence if style == "plain" else assured(sentence)})
        yield {"messages": messages}


def held_out_questions() -> list[tuple[str, str]]:
    """(question, the answer as taught), about facts that the tuning data never mentions."""
    dice = random.Random(2)
    asked: Counter[str] = Counter()
    questions: list[tuple[str, str]] = []
    for fact in groups()[1]:
        if asked[fact.topic] < QUESTIONS[fact.topic]:
            asked[fact.topic] += 1
            question, sentence = dice.choice(fact.phrasings)
            questions.append((question, assured(sentence)))
    return questions


def write_jsonl(path: Path, chats: Sequence[Conversation]) -> Path:
    """One conversation a line."""
    write_atomic(path, "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats).encode())
    return path


def _shuffled(items: list[Fact], seed: int) -> list[Fact]:
    """Fisher and Yates on `random()` alone: its values are the same in every Python version."""
    dice = random.Random(seed)
    for i in range(len(items) - 1, 0, -1):
        j = int(dice.random() * (i + 1))
        items[i], items[j] = items[j], items[i]
    return items

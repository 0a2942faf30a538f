"""The constants of a chat template, learnt from small conversations of words that the template cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparkctl.data.template import FAILURES, Template, Unsound
from sparkctl.data.tokenizer import Vocabulary
from sparkctl.errors import SparkError

THINKING = ("enable_thinking", "thinking")  # template arguments that change the generation prompt
ASK, SAY, WHY, CALL, GIVE, GOT = "qxask", "qxsay", "qxwhy", "qxcall", "qxgive", "qxgot"
FIRST = "none"  # the "role" before the first message

Message = dict[str, Any]


class Ending(NamedTuple):
    """The end of an assistant's region: still trained, and not trained any more."""

    said: str
    after: str


class Edges(NamedTuple):
    """What surrounds the model's words in its region."""

    role: str  # of the message before
    before: str
    tail: str


@dataclass(frozen=True)
class Frame:
    """Headers, by the role of the message before, and endings, under one set of template arguments."""

    headers: dict[str, list[str]]  # what a region may begin with: the generation prompt, then what else, longest first
    endings: list[Ending]  # the longest first
    mixed: frozenset[str]  # roles whose text the template may print inside an assistant's region

    def given(self) -> set[str]:
        """All headers."""
        return {header for known in self.headers.values() for header in known}


def learn(template: Template, kwargs: dict[str, Any], vocabulary: Vocabulary) -> Frame:
    """The template's constants under these arguments. Raises SparkError where no answer is rendered."""
    variants = [kwargs]
    for name in THINKING:
        if name in template.names:
            variants += [kwargs | {name: True}, kwargs | {name: False}]
    prompts = [_prompts(template, variant) for variant in variants]
    edges: set[Edges] = set()
    mixed: set[str] = set()
    for variant in variants:
        for messages in _conversations():
            edges |= set(_edges(template, messages, variant, mixed))
    if not edges:
        raise SparkError(
            "the chat template renders no answer of a small chat in one piece",
            "each message must be printed by one turn of a loop, `for message in messages` or with `messages[i]`; "
            "give such a template with `--chat-template FILE`",
        )
    headers = {role: _headers(role, edges, prompts, vocabulary) for role in sorted({edge.role for edge in edges})}
    if "user" not in headers:
        headers["user"] = [header for found in headers.values() for header in found]
    endings = {_ending(edge.tail, vocabulary) for edge in edges}
    return Frame(headers, sorted(endings, key=lambda e: (-len(e.said + e.after), e)), frozenset(mixed))


def _headers(role: str, edges: set[Edges], prompts: list[dict[str, str]], vocabulary: Vocabulary) -> list[str]:
    """What the model may have been given of an answer's region after a message of that role, the best guess first."""
    befores = {edge.before for edge in edges if edge.role == role}
    own, *others = [prompt.get(role, prompt.get("user", "")) for prompt in prompts]
    fitting = {_shared(prompt, before) for prompt in {own, *others} - {""} for before in befores}
    found = {header for header in fitting if header is not None}
    if not found:  # no generation prompt, or other text before it: a role header, if any
        header = _whole_tokens(_beginning(befores), vocabulary) if len(befores) > 1 else min(befores)
        found = {header if header.strip() else ""}
    ordered = sorted(found, key=lambda header: (-len(header), header))
    # also where no answer of known words began so: the prompt opens a think block, and so does an answer's own text
    return [own, *ordered] if any(header and own.startswith(header) for header in found) else ordered


def _shared(prompt: str, before: str) -> str | None:
    """What this generation prompt gives of the text before an answer's first word; None where they do not fit."""
    if before.startswith(prompt):
        return prompt
    # an empty think block that an earlier answer lacks, say
    return before if prompt.startswith(before) else None


def _beginning(texts: set[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, c in enumerate(first) if c != last[i]), len(first))]


def _whole_tokens(text: str, vocabulary: Vocabulary) -> str:
    """The text without a piece of a marker at its end."""
    cut = max((k for token in vocabulary.added for k in range(1, len(token)) if text.endswith(token[:k])), default=0)
    return text[: len(text) - cut]


def _prompts(template: Template, kwargs: dict[str, Any]) -> dict[str, str]:
    """The generation prompt after a message of each role."""
    user, system = {"role": "user", "content": ASK}, {"role": "system", "content": ASK}
    found = {}
    for messages in (
        [user],
        [user, _answer(0)],
        [user, _answer(0, content="", tool_calls=[_call(0)]), _result()],
        [system],
    ):
        try:
            prompted = template.render(messages, None, kwargs, prompt=True).text
            plain = template.render(messages, None, kwargs)
        except (*FAILURES, Unsound):
            continue
        # up to the last message's end both are the same; what a template adds without a prompt (an end token) is not
        last = plain.regions().get(len(messages) - 1)
        end = last[-1][1] if last else len(plain.text)
        if prompted.startswith(plain.text[:end]):
            found[messages[-1]["role"]] = prompted[end:]
    return found


def _edges(template: Template, messages: list[Message], kwargs: dict[str, Any], mixed: set[str]) -> Iterator[Edges]:
    """The edges of each assistant turn; to `mixed` go the roles of others whose words are in its region."""
    try:
        rendering = template.render(messages, None, kwargs)
    except (*FAILURES, Unsound):
        return
    for number, pieces in rendering.regions().items():
        if messages[number]["role"] != "assistant" or len(pieces) != 1:
            continue
        start, end = pieces[0]
        region = rendering.text[start:end]
        foreign = {m["role"] for m in messages if m["role"] != "assistant" and m["content"] in region}
        mixed |= foreign
        words = sorted((region.find(word), word) for word in _words(messages[number]) if word in region)
        if words and not foreign:
            last, word = words[-1]
            role = messages[number - 1]["role"] if number else FIRST
            yield Edges(role, region[: words[0][0]], region[last + len(word) :])


def _ending(tail: str, vocabulary: Vocabulary) -> Ending:
    """Cut a region's tail after its first stop token, else after its last special token, else after its last word."""
    stops = [tail.find(token) + len(token) for token in vocabulary.stops if token in tail]
    special = [tail.rfind(token) + len(token) for token in vocabulary.special if token in tail]
    cut = min(stops) if stops else max(special, default=0)
    if not cut:
        return Ending("", tail[len(tail.rstrip()) :])
    last = max(vocabulary.special, key=lambda token: len(token) if tail.endswith(token, 0, cut) else 0)
    return Ending(last, tail[cut:])


def _conversations() -> Iterator[list[Message]]:
    """Earlier and last answers, with and without reasoning, calls and results; answers in a row, and at the start."""
    users = [{"role": "user", "content": f"{ASK}{i}"} for i in range(3)]
    calls: Message = {"tool_calls": [_call(0)]}
    why: list[Message] = [{"reasoning_content": f"{WHY}{i}"} for i in range(3)]
    yield [users[0], _answer(0)]
    yield [users[0], _answer(0), users[1], _answer(1)]
    yield [users[0], _answer(0, **why[0]), users[1], _answer(1, **why[1])]
    yield [users[0], _answer(0, **calls), _result(), _answer(1)]
    yield [users[0], _answer(0, content="", **calls), _result(), _answer(1), users[2], _answer(2)]
    yield [users[0], _answer(0, content="", **calls, **why[0]), _result(), _answer(1, **why[1])]
    yield [users[0], _answer(0, content="", **calls)]
    yield [users[0], _answer(0), _answer(1)]
    yield [_answer(0), users[0], _answer(1)]
    yield [{"role": "system", "content": f"{ASK}9"}, _answer(0), users[0], _answer(1)]


def _answer(i: int, **more: Any) -> Message:
    return {"role": "assistant", "content": f"{SAY}{i}", **more}


def _result() -> Message:
    return {"role": "tool", "content": GOT, "name": f"{CALL}0", "tool_call_id": "call12345"}


def _call(i: int) -> Message:
    function = {"name": f"{CALL}{i}", "arguments": {"key": f"{GIVE}{i}"}}
    return {"id": "call12345", "type": "function", "function": function}


def _words(message: Message) -> Iterator[str]:
    for key in ("content", "reasoning_content"):
        if message.get(key):
            yield message[key]
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield call["function"]["arguments"]["key"]

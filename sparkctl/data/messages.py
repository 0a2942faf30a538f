"""One record of a chat file as an example: the one shape in which a server hands a conversation to the chat template.

Taken in: OpenAI's `messages` and ShareGPT's `conversations`, also mixed. Content is a string or a list of text parts;
a missing one is the empty string, as in vLLM. Parts of thinking become `reasoning_content`. Tool calls have the form
{"type": "function", "function": {name, arguments}} with arguments as an object, which is what templates print. Lists
may be JSON texts, as Parquet files keep them. Keys that no server passes on are dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from sparkctl.errors import SparkError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
OTHER_MEDIA = ("image", "video", "audio", "file")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")  # of template kwargs

A_LINE_EACH = "write one chat a line: `jq -c '.[]' FILE > chats.jsonl`"  # of an array of chats
SHAPE = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
TEXT_ONLY = "training takes text alone: describe the media in words"
SKIP = "`--skip-bad` leaves such lines out"


@dataclass(frozen=True)
class Example:
    """One conversation, as the chat template takes it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    place: str = ""  # "chats.jsonl:12"
    folder: str = ""  # before the place in messages: "data/", as the path was given
    untrained: frozenset[int] = frozenset()  # assistant messages (from 0) that OpenAI's `weight` of 0 leaves out

    @property
    def named(self) -> str:
        """The place for a person: with its folder, since two files may have one name."""
        return self.folder + self.place


class BadLine(SparkError):
    """A line, or a row, that cannot be an example. `place`: "chats.jsonl:12"; its message begins with the path."""

    def __init__(self, message: str, hint: str, place: str) -> None:
        super().__init__(message, hint)
        self.place = place


class Refused(Exception):
    """Why a record is no example, without its place."""

    def __init__(self, message: str, hint: str = SHAPE) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def as_example(record: Any, place: str, folder: str = "") -> Example:
    """The example in a parsed record. Raises Refused."""
    if not isinstance(record, dict):
        hint = A_LINE_EACH if isinstance(record, list) else SHAPE
        raise Refused(f"{_kind(record)} where an object is needed", hint)
    for key in ("images", "image", "videos", "audios"):
        if record.get(key):
            raise Refused(f"it has `{key}`", TEXT_ONLY)
    turns = _turns(record)
    messages = [_message(m, number) for number, m in enumerate(turns, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise Refused("no assistant turn, so there is nothing to learn", "add the answer that the model should give")
    tools, kwargs = _tools(record.get("tools")), _kwargs(record.get("chat_template_kwargs"))
    _check_text(messages)
    if tools or kwargs:
        _check_text([tools, kwargs])
    untrained = frozenset(i for i, turn in enumerate(turns) if _is_left_out(turn, messages[i]["role"], i + 1))
    return Example(messages, tools, kwargs, place, folder, untrained)


def _turns(record: dict[str, Any]) -> list[Any]:
    name = next((n for n in ("messages", "conversations") if record.get(n) is not None), None)
    if name is None:
        has = ", ".join(f"`{key}`" for key in list(record)[:6])
        raise Refused(f"no `messages` (it has {has or 'no key'})")
    turns = record[name]
    if isinstance(turns, str):
        turns = _column(turns, f"`{name}` is", SHAPE)
    if not isinstance(turns, list):
        raise Refused(f"`{name}` is {_kind(turns)}, not a list")
    if not turns:
        raise Refused(f"`{name}` is empty")
    system = record.get("system")
    if isinstance(system, str) and system and _role_of(turns[0]) not in ("system", "developer"):
        return [{"role": "system", "content": system}, *turns]
    return turns


def _role_of(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return None
    role = turn.get("role", turn.get("from"))
    return SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Refused(f"message {number} is {_kind(turn)}, not an object")
    role = _role_of(turn)
    if role is None:
        raise Refused(f"message {number} has no `role`")
    if role not in ROLES:
        raise Refused(f"message {number} has the unknown role {json.dumps(role)}", f"roles are {', '.join(ROLES)}")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    message: dict[str, Any] = {"role": role}
    if turn.get("from") == "function_call":
        message |= {"content": "", "tool_calls": _tool_calls(_decoded(content, number, "call"), number)}
        return message
    if content is None and role not in ("assistant", "tool"):
        raise Refused(f"message {number} ({role}) has no `content`")
    content, thinking = _without_thinking(content, role, number)
    message["content"] = _content(content, number)
    if thinking is not None:
        message["reasoning_content"] = thinking
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = turn[key]
    if role == "assistant":
        _add_assistant_keys(message, turn, number)
    return message


def _is_left_out(turn: dict[str, Any], role: str, number: int) -> bool:
    weight = turn.get("weight")
    if role != "assistant" or weight is None:
        return False
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise Refused(
            f"message {number} has the `weight` {json.dumps(weight)}",
            "write 0 for an answer not to learn, or leave it out",
        )
    return not weight


def _add_assistant_keys(message: dict[str, Any], turn: dict[str, Any], number: int) -> None:
    for key in REASONING_KEYS:
        reasoning = turn.get(key)
        if reasoning is None:
            continue
        if not isinstance(reasoning, str):
            raise Refused(f"message {number} has a `{key}` that is {_kind(reasoning)}, not a string")
        if reasoning and "reasoning_content" in message:
            raise Refused(f"message {number} has a `{key}` and a part of thinking", "keep one of them")
        message.setdefault("reasoning_content", reasoning)
        break
    calls = turn.get("tool_calls")
    if isinstance(calls, str):
        calls = _column(calls, f"message {number} has `tool_calls` that are", "write a list of tool calls")
    if calls is None and turn.get("function_call") is not None:  # OpenAI's older form
        calls = [turn["function_call"]]
    if calls is not None and calls != []:
        message["tool_calls"] = _tool_calls(calls, number)


def _without_thinking(content: Any, role: str, number: int) -> tuple[Any, str | None]:
    """Content, and what its first parts hold of thinking: {"type": "thinking", "thinking": a text or text parts}."""
    if not isinstance(content, list):
        return content, None
    are = [isinstance(part, dict) and part.get("type") == "thinking" for part in content]
    count = sum(are)
    if not count:
        return content, None
    if role != "assistant" or not all(are[:count]):
        why = "after another" if role == "assistant" else f"in a {role}'s turn"
        raise Refused(
            f"message {number} has a part of thinking {why}", "thinking is the assistant's, and comes first in its turn"
        )
    said = [_content(part.get("thinking"), number) for part in content[:count]]
    texts = [text if isinstance(text, str) else "".join(part["text"] for part in text) for text in said]
    return content[count:] or "", "\n".join(texts)


def _content(content: Any, number: int) -> str | list[dict[str, Any]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"message {number} has a `content` that is {_kind(content)}, not a string")
    return [{"type": "text", "text": _part(part, number)} for part in content]


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Refused(f"message {number} has a part that is {_kind(part)}, not an object")
    kind = part.get("type", "text")
    for media in OTHER_MEDIA:
        if media in str(kind) or any(key == media or key.startswith(f"{media}_") for key in part):
            raise Refused(f"message {number} has a part with {'an' if media[0] in 'ai' else 'a'} {media}", TEXT_ONLY)
    if kind not in ("text", "input_text", "output_text"):
        raise Refused(f"message {number} has a part of the unknown type {json.dumps(kind)}", TEXT_ONLY)
    if not isinstance(part.get("text"), str):
        raise Refused(f"message {number} has a text part without text", 'write {"type": "text", "text": "…"}')
    return part["text"]


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise Refused(f"message {number} has `tool_calls` that are {_kind(calls)}, not a list")
    return [_tool_call(call, number) for call in calls]


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    hint = 'write {"type": "function", "function": {"name": "…", "arguments": {…}}}'
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"message {number} has a tool call without a function's name", hint)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _decoded(arguments, number, "arguments")
    if arguments is None or arguments == "" or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise Refused(f"message {number} has tool-call arguments that are {_kind(arguments)}, not an object", hint)
    known = {"id": call["id"]} if call.get("id") is not None else {}
    return known | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _column(text: str, what: str, hint: str) -> Any:
    """A value kept as JSON text, which is common in Parquet, where a column has one type; None where it is empty."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        raise Refused(f"{what} a string that is not JSON", hint) from None


def _decoded(text: Any, number: int, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise Refused(f"message {number} has a tool call whose {what} is not JSON", "write a JSON object") from None


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools under OpenAI's wrapper, or None where there are none."""
    if isinstance(tools, str):
        tools = _column(tools, "`tools` is", "write a list of tool descriptions")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("`tools` is not a list of objects", "write a list of tool descriptions")
    return [tool if "function" in tool or "name" not in tool else _wrapped(tool) for tool in tools]


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _kwargs(kwargs: Any) -> dict[str, Any]:
    hint = 'write {"enable_thinking": true}'
    if isinstance(kwargs, str):
        kwargs = _column(kwargs, "`chat_template_kwargs` is", hint)
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise Refused(f"`chat_template_kwargs` is {_kind(kwargs)}, not an object", hint)
    for key in RESERVED:
        if key in kwargs:
            raise Refused(f"`chat_template_kwargs` sets `{key}`, which is not its to set", f"remove `{key}`")
    return kwargs


def _check_text(value: Any) -> None:
    """Refuse what no JSON parser of a server takes: half a surrogate pair, NaN and Infinity."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            said = f"half a surrogate pair, \\u{ord(value[error.start]):04x}, in a text"
            raise Refused(said, "write the text as UTF-8 without escapes") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
    elif isinstance(value, float) and not isfinite(value):
        raise Refused(f"the number {value}, which JSON does not have", "write null or a string")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")

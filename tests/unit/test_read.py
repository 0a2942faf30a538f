"""A record of a chat file becomes an example, or is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_files import ASK, CALL, CHAT, SAY, parquet, read, write

from sparkctl.data.read import BadLine, Example


def one(tmp_path: Path, record: Any) -> Example:
    (example,) = read(write(tmp_path / "one.jsonl", record))
    return example


def refusal(tmp_path: Path, record: Any) -> BadLine:
    with pytest.raises(BadLine) as caught:
        read(write(tmp_path / "chats.jsonl", CHAT, record))
    assert caught.value.place == "chats.jsonl:2"
    assert caught.value.message.startswith(f"{tmp_path}/chats.jsonl:2: ")
    assert caught.value.hint
    return caught.value


def test_several_files_are_read_in_order_with_their_places(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", CHAT, b"", b"  \t\r", CHAT)
    b = write(tmp_path / "b.jsonl", CHAT)
    assert [example.place for example in read(a, b)] == ["a.jsonl:1", "a.jsonl:4", "b.jsonl:1"]


def test_windows_lines_a_byte_order_mark_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"messages": [ASK, {"role": "assistant", "content": "né 😀"}]}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    assert [e.messages[1]["content"] for e in read(path)] == ["né 😀"] * 2


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    line = json.dumps({"messages": [ASK, {"role": "assistant", "content": text}]}, ensure_ascii=False).encode()
    assert one(tmp_path, line).messages[1]["content"] == text


def test_one_schema_comes_of_many(tmp_path: Path) -> None:
    calls = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    asked, said = {"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}
    wanted = [{"role": "system", "content": "s"}, asked, *calls, {"role": "tool", "content": "3"}, said]
    openai = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "2?", "timestamp": 5},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2, null]}'}}
                ],
            },
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3"},
        ],
        "source": "here",
    }
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": [2, null]}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ]
    }
    outside = {"system": "s", "conversations": sharegpt["conversations"][1:], "messages": None}
    beside = {"system": "s", **openai, "messages": openai["messages"][1:]}
    for record in (openai, sharegpt, outside, beside, {**openai, "system": "another, which the messages overrule"}):
        assert one(tmp_path, record).messages == wanted


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(tmp_path: Path, key: str) -> None:
    message = one(tmp_path, {"messages": [ASK, {**SAY, key: "why"}]}).messages[1]
    assert message == {**SAY, "reasoning_content": "why"}


def test_roles_names_and_parts_are_kept(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}, {"type": "input_text", "text": "d"}]
    example = one(
        tmp_path,
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": parts, "name": "Ann"},
                {"role": "assistant", "content": "x", "tool_calls": [{**CALL, "id": "c1"}], "weight": 1},
                {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            ]
        },
    )
    assert example.messages[0] == {"role": "developer", "content": "d"}
    assert example.messages[1]["content"] == [{"type": "text", "text": text} for text in "abcd"]
    assert example.messages[1]["name"] == "Ann"
    assert example.messages[2] == {"role": "assistant", "content": "x", "tool_calls": [{"id": "c1", **CALL}]}
    assert example.messages[3] == {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}


def test_tool_calls_take_one_form(tmp_path: Path) -> None:
    for call in (
        CALL["function"],
        {"function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}},  # type: ignore[index]
    ):
        message = one(tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}).messages[1]
        assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for arguments in ("", None, " ", {}):
        call = {"name": "now", "arguments": arguments}
        message = one(tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}).messages[1]
        assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}
    old = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}}
    assert one(tmp_path, {"messages": [ASK, old]}).messages[1]["tool_calls"][0]["function"]["name"] == "now"


def test_tools_and_template_arguments(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    for given in ([tool], json.dumps([tool]), [tool["function"]]):
        assert one(tmp_path, {**CHAT, "tools": given}).tools == [tool]
    for nothing in (None, [], "", "[]"):
        assert one(tmp_path, {**CHAT, "tools": nothing}).tools is None
    assert one(tmp_path, CHAT).template_kwargs == {}
    kwargs = {"enable_thinking": False, "level": 3}
    assert one(tmp_path, {**CHAT, "chat_template_kwargs": kwargs}).template_kwargs == kwargs


def test_lists_as_json_texts_as_parquet_files_keep_them(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}
    wanted = [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert one(tmp_path, {"messages": [ASK, called]}).messages == wanted
    assert one(tmp_path, {"messages": [ASK, {**SAY, "tool_calls": ""}]}).messages == [ASK, SAY]
    text = json.dumps([ASK, called])
    assert one(tmp_path, {"messages": text}).messages == wanted
    sharegpt = json.dumps([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}])
    assert one(tmp_path, {"conversations": sharegpt}).messages == [ASK, SAY]
    (row,) = read(parquet(tmp_path / "a.parquet", [{"messages": text, "chat_template_kwargs": '{"level": 3}'}]))
    assert (row.messages, row.template_kwargs) == (wanted, {"level": 3})


def test_sharegpt_by_other_names(tmp_path: Path) -> None:
    turns = [("human", "2?"), ("bing", "a"), ("function", "3"), ("bard", "b")]
    example = one(tmp_path, {"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("user", "2?"), ("assistant", "a"), ("tool", "3"), ("assistant", "b"),
    ]  # fmt: skip
    old = {"messages": [ASK, SAY, {"role": "function", "name": "add", "content": "3"}, SAY]}
    assert one(tmp_path, old).messages[2] == {"role": "tool", "content": "3", "name": "add"}


def test_parts_of_thinking_are_the_reasoning(tmp_path: Path) -> None:
    think = {"type": "thinking", "thinking": "why", "signature": "x"}
    parts = [think, {"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, {"type": "text", "text": "yo"}]
    assert one(tmp_path, {"messages": [ASK, {**SAY, "content": parts}]}).messages[1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "yo"}],
        "reasoning_content": "why\nso",
    }
    called = {"role": "assistant", "content": [think], "tool_calls": [CALL]}
    assert one(tmp_path, {"messages": [ASK, called]}).messages[1] == {
        "role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [CALL],
    }  # fmt: skip


def test_two_files_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, record in (("a", CHAT), ("b", {"text": "x"})):
        Path(name).mkdir()
        write(Path(name) / "c.jsonl", record)
    with pytest.raises(BadLine, match=r"^b/c\.jsonl:1: no `messages`") as caught:
        read(Path("a/c.jsonl"), Path("b/c.jsonl"))
    assert caught.value.place == "c.jsonl:1"
    (example,) = read(Path("a/c.jsonl"))
    assert (example.place, example.named) == ("c.jsonl:1", "a/c.jsonl:1")
    monkeypatch.chdir("a")
    assert read(Path("c.jsonl"))[0].named == "c.jsonl:1"


REFUSED = {
    "not JSON": (b'{"messages": [', "not JSON", "one JSON object a line"),
    "an object cut off": (b'{"messages": []', "at column 16", "--skip-bad"),
    "a string cut off": (b'{"messages": "hi', "Unterminated string starting at column 14", "--skip-bad"),
    "not JSON at the end": (json.dumps(CHAT).encode() + b" {}", "at column", ""),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "byte 15 of the line is 0xff", "UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8", "iconv"),
    "nested too deeply": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply", ""),
    "digits without end": (b'{"messages": ' + b"9" * 5000 + b"}", "not usable JSON", ""),
    "a list": ([CHAT], "a list where an object is needed", "jq -c"),
    "a list over lines": (b"[", "not JSON", "jq -c"),
    "a string": ("hello", "a string where", "messages"),
    "no messages": ({"text": "hello", "id": 3}, "no `messages` (it has `text`, `id`)", "messages"),
    "an empty object": ({}, "no `messages` (it has no key)", ""),
    "messages of another type": ({"messages": "hello"}, "`messages` is a string", ""),
    "empty messages": ({"messages": []}, "`messages` is empty", ""),
    "a message that is a string": ({"messages": ["hi"]}, "message 1 is a string, not an object", ""),
    "no role": ({"messages": [{"content": "x"}, SAY]}, "message 1 has no `role`", ""),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}, SAY]}, 'unknown role "wizard"', "developer"),
    "a role that is a number": ({"messages": [{"role": 7, "content": "x"}, SAY]}, "unknown role 7", "roles are"),
    "no content": ({"messages": [{"role": "user"}, SAY]}, "message 1 (user) has no `content`", ""),
    "content that is a number": ({"messages": [ASK, {**SAY, "content": 4}]}, "message 2 has a `content` that is a", ""),
    "no assistant turn": ({"messages": [ASK]}, "no assistant turn", "answer"),
    "an image": ({"messages": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAY]},
                 "message 1 has a part with an image", "text alone"),
    "an image without a type": ({"messages": [{**ASK, "content": [{"image_url": {"url": "x"}}]}, SAY]},
                                "message 1 has a part with an image", "text alone"),
    "a video": ({"messages": [{**ASK, "content": [{"type": "video", "video": "x"}]}, SAY]}, "a video", "text alone"),
    "a sound": ({"messages": [{**ASK, "content": [{"type": "input_audio"}]}, SAY]}, "an audio", "text alone"),
    "images beside": ({**CHAT, "images": ["a.png"]}, "it has `images`", "text alone"),
    "an unknown part": ({"messages": [{**ASK, "content": [{"type": "smell"}]}, SAY]}, 'type "smell"', ""),
    "a part without text": ({"messages": [{**ASK, "content": [{"type": "text"}]}, SAY]}, "text part without text", ""),
    "a part that is a number": ({"messages": [{**ASK, "content": [3]}, SAY]}, "a part that is a number", ""),
    "reasoning that is a list": ({"messages": [ASK, {**SAY, "reasoning": []}]}, "`reasoning` that is a list", ""),
    "a call without a name": ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
                              "message 2 has a tool call without a function's name", "function"),
    "arguments that are no JSON": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a"}]}]}, "not JSON", ""),
    "arguments that are a list": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "arguments that are a list, not an object", ""),
    "calls that are a number": ({"messages": [ASK, {**SAY, "tool_calls": 3}]}, "`tool_calls` that are a number", ""),
    "a ShareGPT call that is no JSON": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "add"}]},
        "message 2 has a tool call whose call is not JSON", ""),
    "messages in a text that is no JSON": ({"messages": "[{"}, "`messages` is a string that is not JSON", "messages"),
    "messages in a text that are no list": ({"messages": "{}"}, "`messages` is an object, not a list", ""),
    "calls in a text that is no JSON": ({"messages": [ASK, {**SAY, "tool_calls": "f"}]}, "that is not JSON", ""),
    "thinking of a user": ({"messages": [{**ASK, "content": [{"type": "thinking", "thinking": "x"}]}, SAY]},
                           "message 1 has a part of thinking in a user's turn", "comes first"),
    "thinking after text": ({"messages": [ASK, {**SAY, "content": ["a", {"type": "thinking", "thinking": "x"}]}]},
                            "message 2 has a part of thinking after another", "comes first"),
    "thinking twice": (
        {"messages": [ASK, {**SAY, "content": [{"type": "thinking", "thinking": "x"}], "reasoning_content": "y"}]},
        "message 2 has a `reasoning_content` and a part of thinking", "one of them"),
    "a weight of a half": ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "message 2 has the `weight` 0.5", "write 0"),
    "a weight in words": ({"messages": [ASK, {**SAY, "weight": "low"}]}, 'has the `weight` "low"', "write 0"),
    "tools that are an object": ({**CHAT, "tools": {"name": "x"}}, "`tools` is not a list", ""),
    "tools that are no JSON": ({**CHAT, "tools": "add"}, "`tools` is a string that is not JSON", ""),
    "template arguments in a list": ({**CHAT, "chat_template_kwargs": []}, "is a list, not an object", ""),
    "a template argument that is ours": ({**CHAT, "chat_template_kwargs": {"messages": []}}, "sets `messages`", ""),
    "half a surrogate pair": (b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", '
                              b'"content": "x"}]}', "half a surrogate pair, \\ud83d", "UTF-8"),
    "not a number": (b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": NaN}}]}]}',
                     "the number nan, which JSON does not have", ""),
    "too large a number": (b'{"messages": [{"role": "assistant", "content": "x"}], "chat_template_kwargs": '
                           b'{"x": 1e999}}', "the number inf", ""),
}  # fmt: skip


@pytest.mark.parametrize(("record", "message", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_example_is_named(tmp_path: Path, record: Any, message: str, hint: str) -> None:
    bad = refusal(tmp_path, record)
    assert message in bad.message
    assert hint in (bad.hint or "")
    assert (bad.hint or "").endswith("; `--skip-bad` leaves such lines out")
    found: list[BadLine] = []
    path = write(tmp_path / "chats.jsonl", CHAT, record, CHAT)
    assert [e.place for e in read(path, skip_bad=True, on_bad=found.append)] == ["chats.jsonl:1", "chats.jsonl:3"]
    assert [(b.message, b.place) for b in found] == [(bad.message, "chats.jsonl:2")]


def test_what_nothing_reads_may_be_odd(tmp_path: Path) -> None:
    line = b'{"score": NaN, "x": -Infinity, "note": "\\ud83d", "messages": %s}' % json.dumps([ASK, SAY]).encode()
    assert one(tmp_path, line).messages == [ASK, SAY]
    pair = b'{"messages": [{"role": "assistant", "content": "\\ud83d\\ude00"}]}'
    assert one(tmp_path, pair).messages[0]["content"] == "😀"

"""Chats for the tests of the mask: templates with their tokenizers, examples, and what of them is trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import formats
import numpy as np
import tiny

from sparkctl.data.chat import ChatFormat, Encoded
from sparkctl.data.messages import BadLine, Example, as_example

QWEN35 = (Path(__file__).parents[1] / "sparkctl" / "demo" / "chat_template.jinja").read_text()
TEMPLATES: dict[str, tuple[str, str]] = {  # template, end token
    "chatml": (tiny.CHATML, "<|im_end|>"),
    "qwen2": (formats.QWEN2, "<|im_end|>"),
    "qwen3": (formats.QWEN3, "<|im_end|>"),
    "qwen35": (QWEN35, "<|im_end|>"),
    "llama3": (formats.LLAMA3, "<|eot_id|>"),
    "mistral": (formats.MISTRAL, "</s>"),
    "smollm2": (formats.SMOLLM2, "<|im_end|>"),
    "gemma": (formats.GEMMA, "<|im_end|>"),
    "generation": (formats.GENERATION, "<|im_end|>"),
    "generation_last": (formats.GENERATION_LAST, "<|im_end|>"),
    "plain": (formats.PLAIN, "<|endoftext|>"),
    "glm": (formats.GLM, "<|im_start|>"),
    "macro": (formats.MACRO, "<|im_end|>"),
    "short_think": (formats.SHORT_THINK, "<|im_end|>"),
    "eager": (formats.EAGER, "<|im_end|>"),
    "phi": (formats.PHI, "<|endoftext|>"),
    "preamble": (formats.PREAMBLE, "<|endoftext|>"),
    "opens": (
        tiny.CHATML.replace("assistant\\n' }}{%- endif %}", "assistant\\n<think>\\n' }}{%- endif %}"),
        "<|im_end|>",
    ),
}


def example(*messages: tuple[str, Any] | dict[str, Any], tools: Any = None, **kwargs: Any) -> Example:
    turns = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    record = {"messages": turns, "tools": tools, "chat_template_kwargs": kwargs}
    return as_example(json.loads(json.dumps(record)), "chats.jsonl:7")


def say(content: str, why: str | None = None, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if why is not None:
        message["reasoning_content"] = why
    if calls:
        message["tool_calls"] = [{"function": {"name": name, "arguments": a}} for name, a in calls]
    return message


def encode(format: ChatFormat, chat: Example) -> Encoded:
    (encoded,) = format.encode([chat])
    assert isinstance(encoded, Encoded), encoded
    assert encoded.input_ids.dtype == np.int32
    assert encoded.trained.dtype == bool
    assert encoded.input_ids.shape == encoded.trained.shape
    return encoded


def shown(format: ChatFormat, chat: Example) -> str:
    """The text that the template makes, ⟦what is trained⟧ in brackets."""
    encoded = encode(format, chat)
    text = format._template.plain(chat.messages, chat.tools, chat.template_kwargs)
    encoding = format._tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == encoded.input_ids.tolist()
    spoken = np.zeros(len(text) + 1, dtype=bool)
    for (start, end), trained in zip(encoding.offsets, encoded.trained, strict=True):
        spoken[start:end] |= trained
    return "".join(
        ("⟦" if spoken[i] and not spoken[i - 1] else "⟧" if spoken[i - 1] and not spoken[i] else "") + c
        for i, c in enumerate([*text, ""])
    )


def refused(format: ChatFormat, chat: Example) -> BadLine:
    fine = example(("user", "x"), say("y"))
    before, bad, after = format.encode([fine, chat, fine])
    assert isinstance(before, Encoded)
    assert isinstance(after, Encoded)
    assert isinstance(bad, BadLine)
    assert (bad.place, bad.message.startswith("chats.jsonl:7: ")) == ("chats.jsonl:7", True)
    assert bad.hint
    return bad


def load(folder: Path, template: Any, **options: Any) -> ChatFormat:
    return ChatFormat.load(formats.byte_level(folder, template, **options))


TWO = (("user", "hi"), ("assistant", "yo"), ("user", "ok?"), ("assistant", "bye"))
THINKING = (("user", "hi"), say("yo", "w1"), ("user", "ok?"), say("bye", "w2"))
ADD = ("add", {"a": 1, "b": "x y"})
TOOLS = (("user", "2?"), say("", None, ADD), ("tool", "3"), say("It is 3."))
MARKERS = (
    "<|im_start|>assistant\n", "<|im_start|>user\n", "<|im_end|>\n", "<think>", "</think>\n\n", "<|endoftext|>",
    "<think>\n\n</think>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "[INST]", "[/INST]",
    "[TOOL_CALLS]", "</s>", "<s>", "<tool_call>", "</tool_response>", "Answer: ", "\n", "\n\n", " ", "  ", "{{ x }}",
    "{% y %}", "\ufdd0", "\ufdd0\U000f0000", "\ufdd1", "\U000f0001", "\u0301", "é", "😀", "👨\u200d👩\u200d👧", "\x00",
)  # fmt: skip


def adversary(numbers: random.Random, letters: str) -> str:
    """Words of these letters among markers, marks and white space."""
    words = ("".join(numbers.choices(letters, k=numbers.randint(1, 4))) for _ in range(99))
    pieces = [numbers.choice(MARKERS) if numbers.random() < 0.5 else next(words) for _ in range(numbers.randint(0, 6))]
    return "".join([*pieces, next(words)])


def conversation(numbers: random.Random, name: str, *, stops: bool = False) -> Example:
    """A random chat that the template takes: Cyrillic is what others say, Greek what the model does.

    Where `stops`, the model's text may hold the template's end token.
    """
    other, mine = "бвгджзлф", "βγδζθλπ"

    def words() -> str:
        text = adversary(numbers, mine)
        return text if stops else text.replace(TEMPLATES[name][1], "")

    plain = name not in ("chatml", "qwen2", "qwen3", "qwen35", "llama3", "mistral")
    messages: list[Any] = []
    if numbers.random() < 0.4 and name != "gemma":
        messages.append(("system", adversary(numbers, other)))
    for _ in range(numbers.randint(1, 4)):
        messages.append(("user", adversary(numbers, other)))
        if not plain and name != "chatml" and numbers.random() < 0.3:
            arguments = {"".join(numbers.choices(mine, k=3)): words()}
            messages.append(say("", None, ("".join(numbers.choices(mine, k=3)), arguments)))
            messages.append(("tool", adversary(numbers, other)))
        content = words()
        for word in ("</think>", "<think>"):  # a template that splits there leaves out what the model says
            content = content.replace(word, "")
        messages.append(say(content, words().replace("think", "") if numbers.random() < 0.3 else None))
    kwargs = {"enable_thinking": numbers.random() < 0.5} if numbers.random() < 0.5 else {}
    return example(*messages, **kwargs)

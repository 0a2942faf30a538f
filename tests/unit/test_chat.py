"""The mask holds what the model has to say: for templates of every form."""

from __future__ import annotations

import json
import random
import threading
import unicodedata
from pathlib import Path

import formats
import numpy as np
import pytest
import tiny
from chatting import ADD, THINKING, TOOLS, TWO, adversary, conversation, encode, example, say, shown

from sparkctl.data.chat import ChatFormat, Encoded, _first_token
from sparkctl.data.messages import BadLine, Example
from sparkctl.data.read import read_examples
from sparkctl.data.split import row_hash

CASES: dict[str, tuple[str, Example, str]] = {
    "chatml": ("chatml", example(("system", "s"), *TWO),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"),
    "answers in a row": ("chatml", example(("user", "hi"), ("assistant", "a"), ("assistant", "b")),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"),
    "developer": ("chatml", example(("developer", "d"), ("assistant", "a")),
        "<|im_start|>developer\nd<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"),
    "an empty turn among others": ("chatml", example(("user", "hi"), ("assistant", " "), ("assistant", "b")),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n <|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"),
    "reasoning that the template leaves out": ("chatml", example(("user", "hi"), say("", "w"), *TWO[2:]),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"),
    "qwen3.5, an earlier turn of thinking alone": ("qwen35", example(("user", "hi"), say("", "w"), *TWO[2:]),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦bye<|im_end|>⟧\n"),
    "words alone, of which none are printed": ("plain", example(("user", "hi"), say("", "w"), *TWO[2:]),
        "Question: hi\nAnswer: \nQuestion: ok?\nAnswer: ⟦bye⟧\n"),
    "words alone, one of them a special token": ("plain", example(("user", "hi"), say("[INST]"), *TWO[2:]),
        "Question: hi\nAnswer: ⟦[INST]⟧\nQuestion: ok?\nAnswer: ⟦bye⟧\n"),
    "a special token for an answer, which the next turn ends": ("glm", example(("user", "hi"), say("[INST]"), *TWO[2:]),
        "<|im_start|>hi<|endoftext|>⟦[INST]<|im_start|>⟧ok?<|endoftext|>⟦bye⟧"),
    "qwen2, tools": ("qwen2", example(*TOOLS),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x y"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 3.<|im_end|>⟧\n"),
    "qwen3, answers": ("qwen3", example(*TWO),  # the prompt gives no think block: the model says it
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nbye<|im_end|>⟧\n"),
    "qwen3, no thinking": ("qwen3", example(*TWO, enable_thinking=False),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦bye<|im_end|>⟧\n"),
    "qwen3, thinking": ("qwen3", example(*THINKING),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nw2\n</think>\n\nbye<|im_end|>⟧\n"),
    "qwen3, thinking in the content": ("qwen3", example(("user", "hi"), say("<think>\nw\n</think>\n\nyo")),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦<think>\nw\n</think>\n\nyo<|im_end|>⟧\n"),
    "qwen3.5, answers": ("qwen35", example(*TWO),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦bye<|im_end|>⟧\n"),
    "qwen3.5, thinking": ("qwen35", example(*THINKING),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦w2\n</think>\n\nbye<|im_end|>⟧\n"),
    # the prompt's newline and the model's are one token, which begins in the prompt
    "qwen3.5, asked to think, and does not": ("qwen35", example(("user", "hi"), say("yo"), enable_thinking=True),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n⟦</think>\n\nyo<|im_end|>⟧\n"),
    "qwen3.5, tools": ("qwen35", example(("user", "2?"), say("So:", "w", ADD), ("tool", "3"), ("tool", "4"), say("7")),
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦w\n</think>\n\nSo:\n\n<tool_call>\n"
        "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx y\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦7<|im_end|>⟧\n"),
    "a think block in the text, which the prompt opens": ("opens", example(("user", "hi"), say("<think>\nw</think>yo")),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦w</think>yo<|im_end|>⟧\n"),
    "qwen3.5, an answer that looks like the prompt": ("qwen35", example(("user", "a"), say("<think"), *TWO[2:]),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦bye<|im_end|>⟧\n"),
    "llama3": ("llama3", example(("system", " s "), ("user", "hi"), say(" yo ")),
        "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧"),
    "llama3, tools": ("llama3", example(*TOOLS),
        "<s><|start_header_id|>user<|end_header_id|>\n\n2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 1, "b": "x y"}}<|eom_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n'
        '"3"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 3.<|eot_id|>⟧'),
    "llama3, an answer first": ("llama3", example(say("yo"), ("user", "hi"), say("a")),
        "<s><|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>"
        "\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦a<|eot_id|>⟧"),
    "mistral": ("mistral", example(("system", "s"), *TWO),
        "<s>[INST] hi[/INST]⟦ yo</s>⟧[INST] s\n\nok?[/INST]⟦ bye</s>⟧"),
    "mistral, tools": ("mistral", example(*TOOLS),
        '<s>[INST] 2?[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "x y"}, "id": "x"}]</s>⟧'
        '[TOOL_RESULTS] {"content": 3}[/TOOL_RESULTS]⟦ It is 3.</s>⟧'),
    "smollm2": ("smollm2", example(*TWO[:2]),
        "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"),
    "smollm2, an answer first": ("smollm2", example(say("yo"), ("user", "hi"), say("a")),
        "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"),
    "gemma": ("gemma", example(*TWO),
        "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>model\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>model\n⟦bye<|im_end|>⟧\n"),
    "a generation block around too much": ("generation", example(*TWO[:2]),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦yo<|im_end|>⟧\n"),
    "a generation block around one answer": ("generation_last", example(*TWO),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"),
    "words alone": ("plain", example(("system", "s"), *TWO),
        "Task: s\nQuestion: hi\nAnswer: ⟦yo⟧\nQuestion: ok?\nAnswer: ⟦bye⟧\n"),
    "a turn that the next one ends": ("glm", example(*TWO),
        "<|im_start|>hi<|endoftext|>⟦yo<|im_start|>⟧ok?<|endoftext|>⟦bye⟧"),
    "an end of text after all": ("phi", example(*TWO[:2]),
        "<|user|>\nhi<|im_end|>\n<|assistant|>\n⟦yo<|im_end|>⟧\n<|endoftext|>"),
    "a prompt that changes the beginning": ("preamble", example(*TWO[:2]),
        "A chat.\n<|user|>\nhi<|im_end|>\n<|assistant|>\n⟦yo<|im_end|>⟧\n<|endoftext|>"),
    "another block than the prompt's": ("short_think", example(("user", "hi"), say("yo")),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think></think>⟦yo<|im_end|>⟧\n"),
    "the block that the prompt opens": ("short_think", example(("user", "hi"), say("yo", "w")),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n⟦w</think>yo<|im_end|>⟧\n"),
    "a turn that writes the next header": ("eager", example(*TWO),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n<|im_start|>user\nok?<|im_end|>\n"
        "<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"),
    "a loop in a macro": ("macro", example(*TWO[:2]),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "chat", "wanted"), CASES.values(), ids=CASES.keys())
def test_what_the_model_has_to_say(chats: dict[str, ChatFormat], name: str, chat: Example, wanted: str) -> None:
    assert shown(chats[name], chat) == wanted
    assert encode(chats[name], chat).assistant_turns == sum(m["role"] == "assistant" for m in chat.messages)


def test_a_token_that_crosses_a_border_is_trained_where_it_starts_in_the_answer(chats: dict[str, ChatFormat]) -> None:
    encoded = encode(chats["chatml"], example(("user", "hi"), say("\na\n")))
    texts = chats["chatml"].tokens_as_text(encoded.input_ids)
    crossing = texts.index("\n\n")  # the header's newline and the answer's: no prompt ends inside it
    assert not encoded.trained[crossing]
    assert encoded.trained[crossing + 1]
    plain = encode(chats["plain"], example(("user", "hi"), say("a\n")))
    texts = chats["plain"].tokens_as_text(plain.input_ids)
    assert texts[-1] == "\n\n"  # the answer's newline and the template's
    assert plain.trained[-1]


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_borders_are_found_as_in_a_list_of_all_offsets(chats: dict[str, ChatFormat], name: str) -> None:
    numbers = random.Random(0)
    for _ in range(300):
        text = adversary(numbers, "aβé😀 \n") + adversary(numbers, "an the\n")
        encoding = chats[name]._tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        assert starts == sorted(starts)
        for at in range(len(text) + 1):
            wanted = next((i for i, start in enumerate(starts) if start >= at), len(starts))
            assert _first_token(encoding, at, len(text)) == wanted, (text, at)


def test_a_tokenizer_that_trims_spaces_off_its_offsets(tmp_path: Path, chats: dict[str, ChatFormat]) -> None:
    path = formats.byte_level(tmp_path, tiny.CHATML) / "tokenizer.json"
    trims = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": trims}))
    chat = example(("user", "  hi \n"), say(" \t\n a  an \n\n"))
    trimmed, plain = encode(ChatFormat.load(tmp_path), chat), encode(chats["chatml"], chat)
    assert trimmed.input_ids.tolist() == plain.input_ids.tolist()
    assert trimmed.trained.tolist() == plain.trained.tolist()


def test_markers_in_what_others_say_are_noticed(chats: dict[str, ChatFormat]) -> None:
    for name, text in (
        ("chatml", "x<|im_start|>assistant"), ("chatml", "<|im_end|>"),
        ("qwen35", "a <think> b"), ("qwen35", "<tool_call>"), ("llama3", "<|start_header_id|>"),
        ("mistral", "[/INST]"), ("mistral", "a</s>"), ("mistral", "[TOOL_CALLS]"), ("plain", "Answer: no"),
    ):  # fmt: skip
        format = chats[name]
        assert encode(format, example(("user", text), say("x"))).holds_markers, text
        if name != "plain":
            assert encode(format, example(("system", text), ("user", "x"), say("x"))).holds_markers
        mine = text in ("a <think> b", "<tool_call>")  # what a model may have to say
        said = encode(format, example(("user", "x [y] <z> a|b"), say(f"x{text}", "y")))
        assert said.holds_markers == (not mine), text
    in_tool = example(("user", "x"), say("", None, ADD), ("tool", "</tool_response>"), say("x"))
    assert encode(chats["qwen2"], in_tool).holds_markers
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    assert encode(chats["qwen35"], example(("user", "x"), say("x"), tools=tools)).holds_markers
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "<|im_end|>"}]
    assert encode(chats["chatml"], example(("user", parts), say("x"))).holds_markers


def test_markers_in_every_part_of_an_answer_are_noticed(chats: dict[str, ChatFormat]) -> None:
    for answer in (say("a<|im_end|>"), say("a", "w<|im_start|>"), say("", None, ("f", {"a": [{"b": "<|im_end|>"}]}))):
        assert encode(chats["qwen35"], example(("user", "x"), answer, *TWO)).holds_markers
    assert not encode(chats["qwen35"], example(*THINKING)).holds_markers


def test_an_answer_is_trained_up_to_a_stop_token_in_its_text(chats: dict[str, ChatFormat]) -> None:
    chat = example(("user", "hi"), say("bar <|im_end|> baz"), *TWO[2:])
    assert shown(chats["chatml"], chat) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦bar ⟧<|im_end|> baz<|im_end|>\n"
        "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"
    )
    at_its_end = shown(chats["chatml"], example(("user", "hi"), say("bar<|im_end|>")))
    assert at_its_end.endswith("assistant\n⟦bar⟧<|im_end|><|im_end|>\n")
    assert not encode(chats["chatml"], example(("user", "hi"), say("<|im_end|>x"))).trained.any()
    other = shown(chats["chatml"], example(("user", "hi"), say("a <|im_start|> b")))  # no server stops there
    assert other.endswith("assistant\n⟦a <|im_start|> b<|im_end|>⟧\n")


def test_an_answer_of_weight_0_is_not_trained(chats: dict[str, ChatFormat]) -> None:
    for weight in (0, 0.0, False):
        chat = example(("user", "hi"), {**say("yo"), "weight": weight}, ("user", "ok?"), {**say("bye"), "weight": 1})
        assert shown(chats["chatml"], chat) == (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nok?<|im_end|>\n"
            "<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"
        )
        assert row_hash(chat) != row_hash(example(*TWO))
    assert row_hash(example(("user", "hi"), {**say("yo"), "weight": 1}, *TWO[2:])) == row_hash(example(*TWO))


def test_text_parts_are_given_as_a_server_gives_them(tmp_path: Path, chats: dict[str, ChatFormat]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = example(("user", parts), ("assistant", parts))
    assert shown(chats["chatml"], chat).endswith("user\na\nb<|im_end|>\n<|im_start|>assistant\n⟦a\nb<|im_end|>⟧\n")
    assert shown(chats["qwen35"], chat).endswith("</think>\n\n⟦ab<|im_end|>⟧\n")
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- for p in m.content %}"
        "{%- if p.type == 'text' %}{{- p.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    )
    alone = ChatFormat.load(formats.byte_level(tmp_path, template))
    assert shown(alone, chat).endswith("<|im_start|>assistant\n⟦ab<|im_end|>⟧\n")
    assert shown(alone, example(*TWO[:2])).endswith("user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n")


def test_one_message_object_in_several_places(chats: dict[str, ChatFormat]) -> None:
    ask, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    twice = shown(chats["chatml"], Example([ask, answer, ask, answer], place="x"))
    assert twice.count("⟦yo<|im_end|>⟧") == 2


def test_an_answer_without_text_in_a_template_with_calls(chats: dict[str, ChatFormat]) -> None:
    chat = example(("user", "x"), say("", None, ("now", {})), ("tool", "5"), say("It is 5."))
    assert "⟦<tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>⟧" in shown(chats["qwen35"], chat)


def test_many_are_encoded_as_one_is_from_two_threads(chats: dict[str, ChatFormat]) -> None:
    numbers = random.Random(3)
    examples = [conversation(numbers, "qwen35") for _ in range(200)]
    alone = [encode(chats["qwen35"], chat) for chat in examples]
    found: dict[int, list[Encoded | BadLine]] = {}
    work = lambda i: found.__setitem__(i, chats["qwen35"].encode(examples))  # noqa: E731
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for many in found.values():
        for a, b in zip(alone, many, strict=True):
            assert isinstance(b, Encoded)
            assert np.array_equal(a.input_ids, b.input_ids)
            assert np.array_equal(a.trained, b.trained)
            assert a[2:] == b[2:]
    assert len(found) == 2
    assert chats["qwen35"].encode([]) == []


REAL = Path(__file__).parents[3] / "shared" / "data" / "chat_2k.jsonl"


@pytest.mark.skipif(not REAL.exists(), reason="needs the shared chats")
def test_real_chats_say_what_their_answers_hold(chats: dict[str, ChatFormat], chat_folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    theirs, examples = AutoTokenizer.from_pretrained(chat_folders["qwen35"]), list(read_examples([REAL]))
    assert len(examples) == 2000
    for chat, encoded in zip(examples, chats["qwen35"].encode(examples), strict=True):
        assert isinstance(encoded, Encoded)
        assert encoded.input_ids.tolist() == theirs.apply_chat_template(chat.messages)["input_ids"]
        said = theirs.decode(encoded.input_ids[encoded.trained]).split("<|im_end|>")
        answers = [message["content"].strip() for message in chat.messages if message["role"] == "assistant"]
        assert said == [unicodedata.normalize("NFC", answer) for answer in answers if answer] + [""]

"""A model's chat format: loading it, the template's environment, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import formats
import numpy as np
import pytest
import tiny
from chatting import ADD, TOOLS, TWO, encode, example, load, refused, say, shown

from sparkctl.data import tokenizer
from sparkctl.data.chat import ChatFormat
from sparkctl.errors import SparkError


def test_what_the_template_refuses_is_named(chats: dict[str, ChatFormat]) -> None:
    assert "System role not supported" in refused(chats["gemma"], example(("system", "s"), *TWO)).message
    assert "roles must alternate" in refused(chats["gemma"], example(("user", "a"), *TWO)).message
    two = example(("user", "a"), say("", None, ADD, ADD))
    assert "one call at a time" in refused(chats["llama3"], two).message
    late = example(("user", "a"), ("system", "s"), say("b"))
    assert "a system message must come first" in refused(chats["qwen35"], late).message
    assert "refuses it" in refused(chats["plain"], example(("developer", "d"), say("b"))).message  # a KeyError


def test_a_call_that_the_template_leaves_out_is_no_empty_answer(chats: dict[str, ChatFormat]) -> None:
    assert "leaves out the tool call of message 2" in refused(chats["chatml"], example(*TOOLS)).message


def test_results_printed_inside_an_answer_are_not_trained(tmp_path: Path) -> None:
    template = """{%- for message in messages %}{%- if message.role != 'tool' %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function.name + call.function.arguments | tojson }}
{{- '<tool_response>' + messages[loop.index0 + 2].content }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
    format = load(tmp_path, template)
    assert "message 3 (tool) inside an answer" in refused(format, example(*TOOLS)).message


def test_an_answer_in_pieces_is_refused(tmp_path: Path) -> None:
    template = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- if message.content == 'split' %}{%- for other in messages %}{{- other.role }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
    assert "message 2 in pieces" in refused(load(tmp_path, template), example(("user", "x"), say("split"))).message


def test_a_template_that_changes_its_own_output_is_refused(tmp_path: Path) -> None:
    template = """{%- set text %}{%- for message in messages %}
{{- '\n#<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{%- endfor %}{%- endset %}
{{- CHANGE if 'secret' in text else text }}
{%- if add_generation_prompt %}{{- '\n#<|im_start|>assistant\n' }}{%- endif %}"""
    secret = example(("user", "secret"), say("x"))
    for change in (
        "text | trim",  # a mark before the white space keeps it
        "text[:-30]",  # the last mark is cut off
        "text.split('#')[0] + '#' + text.split('#')[2] + '#' + text.split('#')[1]",  # the same text, marks out of order
        "text | length | string",
    ):
        format = load(tmp_path / str(len(change)), template.replace("CHANGE", change))
        assert shown(format, example(*TWO[:2])).endswith("#<|im_start|>assistant\n⟦yo<|im_end|>⟧")
        assert "changes its own output" in refused(format, secret).message
    kept = load(tmp_path / "kept", template.replace("CHANGE", "text | replace('secret', 'hidden')"))
    assert shown(kept, secret).endswith("hidden<|im_end|>\n#<|im_start|>assistant\n⟦x<|im_end|>⟧")


def test_arguments_that_break_the_template_are_a_bad_line(tmp_path: Path) -> None:
    template = tiny.CHATML + "{%- if level is defined and level > 3 %}{{- raise_exception('too high') }}{%- endif %}"
    format = load(tmp_path, template)
    assert shown(format, example(*TWO, level=3)).endswith("⟦bye<|im_end|>⟧\n")
    assert "too high" in refused(format, example(*TWO, level=4)).message
    only_hi = "{%- if only and messages[0].content != 'hi' %}{{- raise_exception('x') }}{%- endif %}" + tiny.CHATML
    assert "renders no answer" in refused(load(tmp_path / "b", only_hi), example(*TWO, only=True)).message


@pytest.mark.parametrize(
    "taken", ["{%- set m = messages[i] %}", "{%- if true %}{%- set m = messages[i] %}{%- endif %}"]
)
def test_a_loop_over_numbers(tmp_path: Path, taken: str) -> None:
    template = """{%- for i in range(messages|length) %}{{- '<|im_start|>' }}TAKEN
{{- m.role + '\n' }}{%- if i > 0 %}{%- set before = messages[i - 1] %}{%- endif %}{{- m.content + '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
    wanted = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\nok?<|im_end|>\n<|im_start|>assistant\n⟦bye<|im_end|>⟧\n"
    )
    named = template.replace("TAKEN", taken) if "if true" not in taken else template.replace("TAKEN", taken[14:-12])
    assert shown(load(tmp_path / "a", named), example(*TWO)) == wanted
    direct = template.replace("TAKEN", "").replace("m.", "messages[i].")
    assert shown(load(tmp_path / "b", direct), example(*TWO)) == wanted
    system = "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}" + direct.replace(
        "messages", "rest"
    )
    assert shown(load(tmp_path / "c", system), example(("system", "s"), *TWO)) == wanted


def test_what_transformers_gives_templates_is_there(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = """{{- bos_token }}{{- strftime_now('%Y') }}
{% for message in messages %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
    <|im_start|>{{ message.role }}
    {{ message.content }}{{ message.name }}<|im_end|>
{% endfor %}
{{ tools | tojson(indent=2) }}{{ {'é': '<&>'} | tojson }}
{{ documents is none }}{{ pad_token is defined }}{{ eos_token }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    folder = formats.byte_level(tmp_path, template)
    theirs, tools = AutoTokenizer.from_pretrained(folder), [{"type": "function", "function": {"name": "é"}}]
    for chat in (example(*TWO), example(*TWO, tools=tools), example(("user", "skip"), *TWO, ("user", "stop"), *TWO)):
        ids = theirs.apply_chat_template(chat.messages, tools=chat.tools)["input_ids"]
        assert encode(ChatFormat.load(folder), chat).input_ids.tolist() == ids


def test_named_templates_are_chosen_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    default = "\n  {# d #}" + tiny.CHATML + "\n{{- 'd' }} \n"
    named = {"default": default, "tool_use": tiny.CHATML + "{{ tools | tojson }}\n\n", "rag": "x"}
    folder = formats.byte_level(tmp_path / "a", named)
    theirs, format = AutoTokenizer.from_pretrained(folder), ChatFormat.load(folder)
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        chat = example(*TWO, tools=given)
        ids = theirs.apply_chat_template(chat.messages, tools=given)["input_ids"]
        assert encode(format, chat).input_ids.tolist() == ids
        assert encode(ChatFormat.load(folder, format.template), chat).input_ids.tolist() == ids  # a round's copy
    with pytest.raises(SparkError, match="`rag`, `tool_use`, and none is the default"):
        ChatFormat.load(formats.byte_level(tmp_path / "b", {"rag": "x", "tool_use": "y"}))


def test_a_class_of_transformers_that_rebuilds_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = formats.byte_level(tmp_path, tiny.CHATML, name="Qwen2Tokenizer")
    chat = example(("user", "the answer 12345, it's naïve"), say("an\n\n  answer"))
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat.messages)["input_ids"]
    assert encode(ChatFormat.load(folder), chat).input_ids.tolist() == ids
    as_filed = formats.byte_level(tmp_path / "b", tiny.CHATML)
    assert encode(ChatFormat.load(as_filed), chat).input_ids.tolist() != ids  # it does rebuild it


def test_models_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    def says(message: str, hint: str, folder: Path, *template: str) -> None:
        with pytest.raises(SparkError, match=message) as caught:
            ChatFormat.load(folder, *template)
        assert hint in (caught.value.hint or "")

    (tmp_path / "empty").mkdir()
    says("has no `tokenizer.json`", "save_pretrained", tmp_path / "empty")
    folder = formats.byte_level(tmp_path / "a", None)
    says("has no chat template", "--chat-template FILE", folder)
    says("has no chat template", "--chat-template FILE", folder, "")
    says("does not compile: line 3: .*endfor", "--chat-template FILE", folder, "a\nb\n{% endfor %}")
    says("does not compile: line 2", "--chat-template FILE", folder, "a\n{{ x | nofilter }}")
    says("renders no answer", "`for message in messages`", folder, "{{ messages[0].content }}")
    says("renders no answer", "--chat-template FILE", folder, "{{ raise_exception('no') }}")
    (folder / "tokenizer.json").write_text('{"model": 5}')
    says("the tokenizer in .* cannot be loaded", "publisher", folder, tiny.CHATML)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"hidden_size": 34}, "the hidden size .34. is not a multiple"),
        ({"rms_norm_eps": "small"}, "expected float, got str"),
        ({"dtype": "bfloat99"}, "'torch' has no attribute 'bfloat99'"),
    ],
)
def test_a_config_that_transformers_refuses_is_not_the_tokenizers_fault(
    wrong: dict[str, Any], why: str, llama_folder: Path, tmp_path: Path
) -> None:
    """It reads that file before the tokenizer's own."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(SparkError, match=f"odd/config.json` is not one that transformers takes: .*{why}") as caught:
        ChatFormat.load(folder)
    assert "config.json that was published" in (caught.value.hint or "")


@pytest.mark.parametrize("short", [MemoryError(), ImportError("libtorch_cpu.so: failed to map segment from shared")])
def test_memory_that_ends_is_no_files_fault(
    short: Exception, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path) -> None:
        raise short

    monkeypatch.setattr(tokenizer, "load_directly", load)
    with pytest.raises(type(short)):
        ChatFormat.load(llama_folder)


def test_where_a_server_stops_is_read_from_the_generation_config(tmp_path: Path) -> None:
    folder = formats.byte_level(tmp_path, formats.GLM, "</s>")
    assert shown(ChatFormat.load(folder), example(*TWO[:3], TWO[3])).count("<|im_start|>⟧") == 0
    id = ChatFormat.load(folder)._tokenizer.token_to_id("<|im_start|>")
    for name, config in (
        ("generation_config.json", {"eos_token_id": [3, id]}),
        ("config.json", {"eos_token_id": None, "text_config": {"eos_token_id": id}}),
    ):
        (folder / name).write_text(json.dumps(config))
        assert "⟦yo<|im_start|>⟧ok?" in shown(ChatFormat.load(folder), example(*TWO))
        (folder / name).unlink()


def test_the_template_of_a_processor_is_taken_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    folder = formats.byte_level(tmp_path, None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tiny.CHATML}))
    assert ChatFormat.load(folder).template == tiny.CHATML


def test_digests_tell_what_ids_depend_on(tmp_path: Path) -> None:
    one, same = load(tmp_path / "a", tiny.CHATML), load(tmp_path / "b", tiny.CHATML)
    assert (one.tokenizer_sha256, one.template_sha256) == (same.tokenizer_sha256, same.template_sha256)
    other = load(tmp_path / "c", tiny.CHATML + "{# x #}")
    assert other.template_sha256 != one.template_sha256
    assert other.tokenizer_sha256 == one.tokenizer_sha256
    assert load(tmp_path / "d", tiny.CHATML, eos="</s>").tokenizer_sha256 != one.tokenizer_sha256
    for number, (name, table) in enumerate({
        "generation_config.json": {"eos_token_id": [3, 4]},  # where a server stops decides what is trained
        "config.json": {"eos_token_id": 4},
        "tokenizer_config.json": {"split_special_tokens": True},
    }.items()):  # fmt: skip
        folder = formats.byte_level(tmp_path / f"e{number}", tiny.CHATML)
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | table))
        assert ChatFormat.load(folder).tokenizer_sha256 != one.tokenizer_sha256, name
    path = tmp_path / "b" / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["normalizer"] = {"type": "NFD"}
    path.write_text(json.dumps(saved))
    assert ChatFormat.load(tmp_path / "b").tokenizer_sha256 != one.tokenizer_sha256
    assert one.template == tiny.CHATML


def test_the_vocabulary_ends_after_the_highest_id(tmp_path: Path) -> None:
    format = load(tmp_path, tiny.CHATML)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = [*vocab["model"]["vocab"].values(), *(token["id"] for token in vocab["added_tokens"])]
    assert format.vocab_size == max(ids) + 1


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_the_texts_of_tokens_join_to_the_whole(chats: dict[str, ChatFormat], name: str) -> None:
    format = chats[name]
    text = "<s>é😀 the👨\u200d👩\u200d👧\n\nan</s> \ufffd𝒳x"
    ids = format._tokenizer.encode(text, add_special_tokens=False).ids
    texts = format.tokens_as_text(np.array(ids, dtype=np.int32))
    assert len(texts) == len(ids)
    assert "".join(texts) == format._tokenizer.decode(ids, skip_special_tokens=False)
    assert "😀" in texts
    assert "</s>" in texts
    cut = format.tokens_as_text(format._tokenizer.encode("a😀", add_special_tokens=False).ids[:-1])
    assert "".join(cut).lstrip().startswith("a")
    assert "\ufffd" in cut[-1]
    assert format.tokens_as_text([]) == []

"""A tokenizer that is read without transformers is the one that transformers makes; what might not be is left to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats
import pytest

from sparkctl.data.chat import ChatFormat
from sparkctl.data.direct import load_directly

TEXTS = (
    "the answer an the 12345, it's naïve\u0301 \u0915\u094d\u0937 a<|im_end|>\n\n  <think>x</think> </s>[INST]",
    "e\u0301 \r\n\r\n a\t\tb 👨\u200d👩 <|im_start|>user\n<tool_call>\n", "", " ", "<|endoftext|><|endoftext|>",
)  # fmt: skip
Change = Callable[[Path], object]


def config(**changes: Any) -> Change:
    """Change tokenizer_config.json; a value of ... removes the key."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        table = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))

    return change


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change tokenizer.json."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return edit


def filed_tokens(**changes: Any) -> Change:
    """tokenizer_config.json lists the added tokens as older versions do, the first one with changes."""

    def edit(folder: Path) -> None:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        table = {str(token.pop("id")): token for token in added}
        first = next(iter(table))
        table[first] |= changes
        config(added_tokens_decoder=table)(folder)

    return edit


def write(name: str, content: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def token(text: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": text, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, "special": True}  # fmt: skip


KINDS = {  # type of model and class: read directly?
    ("qwen3_5", "Qwen3_5Tokenizer"): True,
    ("qwen3_5_text", "Qwen3_5Tokenizer"): True,
    ("qwen2", "Qwen2Tokenizer"): True,
    ("qwen2", "Qwen2TokenizerFast"): True,
    ("qwen3", "Qwen2Tokenizer"): True,
    ("qwen3", "PreTrainedTokenizerFast"): True,
    ("qwen3_5", "TokenizersBackend"): True,
    ("qwen2", "PreTrainedTokenizerFast"): False,
    ("qwen3_5", "Qwen2Tokenizer"): False,
    ("llama", "Qwen2Tokenizer"): False,
    ("mystery", "Qwen2Tokenizer"): False,
    ("qwen2", "LlamaTokenizerFast"): False,
}
LIMIT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
bare: Change = lambda folder: (folder / "chat_template.jinja").unlink()  # noqa: E731
CHANGES: dict[str, tuple[Change, bool]] = {  # what is done to the files: read directly?
    "nothing": (lambda folder: None, True),
    "no end token named": (config(eos_token=...), True),
    "no end token": (config(eos_token=None), True),
    "a default that is no token": (both(config(eos_token=...), tokenizer(lambda t: t["added_tokens"].pop(0))), False),
    "tokens as objects": (config(eos_token=token("<|im_end|>"), pad_token=token("</s>")), True),
    "an end token that is not added": (config(eos_token="the"), False),
    "an end token that is unknown": (config(eos_token="<new>"), False),
    "an end token that is no special one": (config(eos_token="<think>"), False),
    "tokens of its own": (config(image_token="[INST]", extra_special_tokens={"video_token": "[/INST]"}), True),
    "other special tokens": (config(additional_special_tokens=["[INST]", "<s>"]), True),
    "other special tokens, unknown": (config(extra_special_tokens=["<new>"]), False),
    "other special tokens as objects": (config(extra_special_tokens=[token("<s>")]), False),
    "older tokens": (filed_tokens(), True),
    "older tokens, changed": (filed_tokens(lstrip=True), False),
    "older tokens, and a map": (both(filed_tokens(), write("special_tokens_map.json", {"eos_token": "</s>"})), True),
    "a map": (write("special_tokens_map.json", {"eos_token": "</s>"}), False),
    "added tokens beside": (write("added_tokens.json", {"<new>": 1000}), False),
    "a prefix space": (config(add_prefix_space=True), False),
    "no prefix space": (config(add_prefix_space=False), True),
    "special tokens split": (config(split_special_tokens=True), False),
    "a key that is not known": (config(fix_mistral_regex=True), False),
    "remote code": (config(auto_map={"AutoTokenizer": [None, None]}), False),
    "limits": (config(model_max_length=5, clean_up_tokenization_spaces=True, add_bos_token=True), True),
    "a limit in the file": (tokenizer(lambda t: t.update(truncation=LIMIT)), True),
    "another normalizer": (tokenizer(lambda t: t.update(normalizer={"type": "NFKC"})), False),
    "no normalizer": (tokenizer(lambda t: t.update(normalizer=None)), False),
    "another split": (
        tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\s+|\S+"})), False),
    "no split": (tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0)), False),
    "merges ignored": (tokenizer(lambda t: t["model"].update(ignore_merges=True)), False),
    "numbers that tokenizers corrects": (
        tokenizer(lambda t: [token.update(id=token["id"] + 5) for token in t["added_tokens"]]), True),
    "a template in the config": (both(bare, config(chat_template="c")), True),
    "named templates in the config": (both(bare, config(chat_template=NAMED)), True),
    "named templates in files": (write("additional_chat_templates/tool_use.jinja", "t\r\n"), True),
    "no template": (bare, True),
}  # fmt: skip


def check(folder: Path, directly: bool) -> None:
    """What is read directly is what transformers makes of the folder."""
    found = load_directly(folder)
    assert (found is not None) == directly
    if found is None:
        return
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert found.name == type(theirs).__name__
    assert found.variables == theirs.special_tokens_map
    assert found.chat_template == theirs.chat_template
    assert found.backend.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
        found.backend.no_truncation()
        assert found.backend.encode(text, add_special_tokens=False).ids == ids
        assert found.backend.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert found.backend.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_each_class_is_known_for_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    check(formats.qwen(tmp_path, kind, name), KINDS[kind, name])


@pytest.mark.parametrize(("change", "directly"), CHANGES.values(), ids=CHANGES.keys())
def test_what_files_say_is_heard_or_left_to_transformers(tmp_path: Path, change: Change, directly: bool) -> None:
    change(formats.qwen(tmp_path))
    check(tmp_path, directly)


def test_a_file_that_is_taken_as_it_is_may_hold_any_pipeline(tmp_path: Path) -> None:
    formats.qwen(tmp_path, "qwen3", "TokenizersBackend")
    tokenizer(lambda t: t.update(normalizer={"type": "NFKC"}))(tmp_path)
    tokenizer(lambda t: [added.update(id=added["id"] + 5) for added in t["added_tokens"]])(tmp_path)
    check(tmp_path, True)


def test_it_takes_neither_torch_nor_transformers(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sparkctl.data.chat import ChatFormat\n"
        "ChatFormat.load(Path(sys.argv[1])); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(formats.qwen(tmp_path))], check=True)


def test_both_ways_give_one_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = formats.qwen(tmp_path)
    direct = ChatFormat.load(folder)
    monkeypatch.setattr("sparkctl.data.tokenizer.load_directly", lambda folder: None)
    through = ChatFormat.load(folder)
    for name in ("template", "template_sha256", "tokenizer_sha256", "vocab_size"):
        assert getattr(direct, name) == getattr(through, name)

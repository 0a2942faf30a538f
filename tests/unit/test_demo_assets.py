"""The embedded default is what it says: published names and precision, small enough, learnable, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparkctl.demo import chats, facts, model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write_model(tmp_path_factory.mktemp("demo") / "model")


def test_shipped_weights_are_small_sharded_and_complete(folder: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, Qwen3_5ForConditionalGeneration

    assert model.WEIGHTS.stat().st_size <= 8_000_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    dtypes, count = {}, 0
    for shard in set(index["weight_map"].values()):
        with safe_open(folder / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtypes[name] = file.get_slice(name).get_dtype()
                count += file.get_tensor(name).numel()
    assert 2_000_000 <= count <= 5_000_000
    assert len([name for name in dtypes if name.startswith("mtp.")]) == 15
    f32 = {name for name, dtype in dtypes.items() if dtype == "F32"}
    assert f32 == {name for name in dtypes if name.endswith(("A_log", "linear_attn.norm.weight"))}
    assert len(f32) == 6
    import torch

    with torch.device("meta"):
        built = Qwen3_5ForConditionalGeneration(AutoConfig.from_pretrained(folder))
    promised = {name for name, _ in built.named_parameters()} - {"lm_head.weight"}
    assert {name for name in dtypes if not name.startswith("mtp.")} == promised


def test_tokenizer_is_the_one_trained_from_the_text() -> None:
    assert json.loads(tokenizer.train().to_str()) == json.loads(model.TOKENIZER.read_text(encoding="utf-8"))


def test_tokenizer_gives_any_text_back(folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    text = "Zürich, 12 → 你好\n\n  x=1\t🙂"
    assert loaded.decode(loaded.encode(text)) == text
    assert len(loaded) <= model.VOCAB_SIZE
    assert loaded.eos_token == "<|im_end|>"


def test_tuning_data_never_mentions_what_is_asked_later() -> None:
    questions = dict(chats.held_out_questions())
    said = json.dumps(chats.training_chats())
    assert len(questions) >= 30
    assert not [question for question in questions if question in said]
    kept = {question for fact in chats.groups()[1] for question, _ in fact.phrasings}
    assert not [question for question in kept if question in said]
    assert set(questions) <= kept


def test_chats_are_the_same_every_time_and_different_from_each_other() -> None:
    first = chats.training_chats()
    assert first == chats.training_chats()
    assert len({json.dumps(chat) for chat in first}) == len(first) == chats.EXAMPLES
    assert first != chats.training_chats(seed=1)


def test_no_question_has_two_answers_and_the_styles_never_agree() -> None:
    asked = [pair for fact in facts.facts() for pair in fact.phrasings]
    assert len({question for question, _ in asked}) == len(asked)
    assert not [sentence for _, sentence in asked if sentence.endswith(facts.assured(""))]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first", "reasoning_content": "earlier thought"},
    {"role": "user", "content": [{"type": "text", "text": "two"}]},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "late thought",
        "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"city": "Lima", "n": 3}}}],
    },
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "noon"},
]

RENDERED = """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
one<|im_end|>
<|im_start|>assistant
first<|im_end|>
<|im_start|>user
two<|im_end|>
<|im_start|>assistant
<think>
late thought
</think>

<tool_call>
<function=clock>
<parameter=city>
Lima
</parameter>
<parameter=n>
3
</parameter>
</function>
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
12:00
</tool_response><|im_end|>
<|im_start|>assistant
<think>

</think>

noon<|im_end|>
"""


def test_template_speaks_as_qwen_does(folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.apply_chat_template(CONVERSATION, tokenize=False) == RENDERED
    tools = [{"type": "function", "function": {"name": "clock"}}]
    with_tools = loaded.apply_chat_template(CONVERSATION, tools=tools, tokenize=False)
    assert '<tools>\n{"type": "function", "function": {"name": "clock"}}\n</tools>' in with_tools
    assert with_tools.count("Be brief.") == 1


@pytest.mark.parametrize(
    ("thinking", "end"),
    [({}, "<think>\n\n</think>\n\n"), ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
     ({"enable_thinking": True}, "<think>\n")],
)  # fmt: skip
def test_generation_prompt_follows_the_switch(folder: Path, thinking: dict[str, bool], end: str) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    user = [{"role": "user", "content": "Hi"}]
    prompt = loaded.apply_chat_template(user, add_generation_prompt=True, tokenize=False, **thinking)
    assert prompt == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{end}"

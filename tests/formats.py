"""Chat templates of the forms that the model families speak, written for the tests, and small tokenizers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Qwen2: a default system prompt, calls as JSON, results in a user turn
QWEN2 = """{%- if messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}
    {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
      {{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
  {%- elif message.role == 'user' or not loop.first %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Qwen3: thinking of the answers before the last question is left out, the last answer has a block in any case
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
  {%- set index = messages | length - 1 - loop.index0 %}
  {%- if message.role == 'user' and not message.content.startswith('<tool_response>') and not ns.last %}
    {%- set ns.last = index %}
  {%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {%- set content, why = message.content, message.reasoning_content or '' %}
    {%- if not why and '</think>' in content %}
      {%- set why = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or why) %}
      {{- '<think>\\n' + why.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}{{- content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
      {{- '\\n' if not loop.first or content }}{{- '<tool_call>\\n' }}
      {{- call.function | tojson }}{{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
  {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Llama 3: header tokens, content trimmed, calls as JSON in place of content, no end token of the whole
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
  {%- if message.tool_calls is defined %}
    {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson }}{{- '}' }}{{- '<|eom_id|>' }}
  {%- elif message.role in ('tool', 'ipython') %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Mistral: no generation prompt, the end token after an answer, the system text in the last question
MISTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in rest %}
  {%- if message.role == 'user' %}
    {%- if system is defined and message == asked[-1] %}
      {{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
    {%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}
  {%- elif message.tool_calls is defined %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}{{- (call.function | tojson)[:-1] + ', "id": "x"}' }}{%- endfor %}
    {{- ']' + eos_token }}
  {%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
  {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' }}
  {%- else %}{{- raise_exception('only user, assistant and tool roles') }}
  {%- endif %}
{%- endfor %}"""

# SmolLM2: the first turn brings a system prompt along
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are small.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# Gemma: no system role, roles alternate, the model has another name
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<|im_start|>model\n'}}{% endif %}"""

# the block encloses header and newline as well, and an empty think block; spec of transformers' masks
GENERATION = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}
{%- endgeneration %}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""

# the block encloses the last answer's content alone
GENERATION_LAST = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{% generation %}{{- message.content }}{% endgeneration %}
{%- else %}{{- message.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# no generation prompt, no special token: words alone
PLAIN = """{%- for message in messages %}
{{- {'user': 'Question: ', 'assistant': 'Answer: ', 'system': 'Task: '}[message.role] + message.content + '\\n' }}
{%- endfor %}"""

# GLM: a turn ends where the next one's role begins, which is the stop token
GLM = """{%- for message in messages %}
{{- '<|im_start|>' if message.role == 'user' else '<|endoftext|>' }}{{- message.content }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|endoftext|>' }}{%- endif %}"""

# the loop stands in a macro whose output the template prints as it is
MACRO = """{%- macro chat() %}{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{%- endmacro %}{{- chat() }}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Nemotron: an answer without thinking has another block than the prompt opens
SHORT_THINK = """{%- set thinks = enable_thinking if enable_thinking is defined else true %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '</think>' }}
{%- elif message.role == 'assistant' %}{{- '<think></think>' }}{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('<think>\\n' if thinks else '<think></think>') }}{%- endif %}"""

# Phi: an end of text where there is no generation prompt; and a prompt that changes the beginning as well
PHI = """{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
PREAMBLE = """{{- 'Go on.\\n' if add_generation_prompt else 'A chat.\\n' }}""" + PHI

# an answer's turn goes on to the next header
EAGER = """{%- for message in messages %}
{%- if loop.first %}{{- '<|im_start|>' + message.role + '\\n' }}{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- if not loop.last %}{{- '<|im_start|>' + loop.nextitem.role + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
)  # fmt: skip
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CORPUS = (
    '\n\n a\n\nb  the the answer an\n\n\n assistant user <|x|> {"name": "add"}\n</think> na\u00efve \u043a\u043e\u0442 '
)


def byte_level(folder: Path, template: Any, eos: str = "<|im_end|>", name: str | None = None) -> Path:
    """Byte-level BPE with merges over spaces and newlines, NFC, as Qwen and Llama 3 have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    fast.train_from_iterator([CORPUS] * 20, trainer)
    return _save(fast, folder, template, eos, name)


def qwen(folder: Path, kind: str = "qwen3_5", name: str = "Qwen3_5Tokenizer", template: Any = QWEN2) -> Path:
    """Byte-level BPE with the pipeline that transformers' class for Qwen builds, and a config.json of that type."""
    import json

    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35_SPLIT

    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT if name.startswith("Qwen2") else QWEN35_SPLIT), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    fast.train_from_iterator([CORPUS] * 20, trainer)
    _save(fast, folder, template, "<|im_end|>", name)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "transformers_version": "5.17.0"}))
    return folder


def sentence_piece(folder: Path, template: Any, eos: str = "</s>", name: str | None = None) -> Path:
    """Pieces that begin with their space, and bytes for what has none, as Llama 2 and the first Mistral have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set(CORPUS) - {" "})]
    merges = [("▁", "a"), ("▁a", "n"), ("a", "n"), ("t", "h"), ("th", "e"), ("▁", "the"), ("\n", "\n"), ("▁", "▁")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *("".join(pair) for pair in merges)]))}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return _save(fast, folder, template, eos, name)


def _save(fast: Any, folder: Path, template: Any, eos: str, name: str | None) -> Path:
    import json

    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token=eos)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    if name:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    return folder

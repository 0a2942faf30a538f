"""Small real checkpoints for tests: made on the spot with random weights, loaded like any other.

`qwen35(folder)` is a multimodal Qwen3.5 with every kind of tensor that the published ones have: GatedDeltaNet and
attention layers, a vision tower, the 15 tensors of an MTP head, A_log and linear_attn.norm in F32, the rest bf16.
"""

from __future__ import annotations

import json
from pathlib import Path

CHATML = """{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(folder: Path, template: str | None = CHATML) -> None:
    """A byte-level tokenizer: 256 bytes and Qwen's three special tokens, ids 256 to 258."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)


def text_settings(**changes: object) -> dict:
    """The tiny Qwen3.5's text part; `changes` go into it, those of its rotary embedding too."""
    rope = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.5, mrope_section=[2, 1, 1],
                mrope_interleaved=True)  # fmt: skip
    rope |= {name: changes.pop(name) for name in list(changes) if name in rope}
    return dict(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, full_attention_interval=4, tie_word_embeddings=True, eos_token_id=258,
        mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, max_position_embeddings=4096, rope_parameters=rope,
    ) | changes  # fmt: skip


def hybrid(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """A text-only Qwen3.5 without an MTP head, random, of any widths."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**text_settings(**changes)), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if "embed" in name else 0.1 if value.ndim < 2 else value.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def qwen35(
    folder: Path, *, seed: int = 0, max_shard_size: str = "60KB", template: str | None = CHATML, **changes: object
) -> Path:
    """A multimodal Qwen3.5 of about 0.2 M parameters in at least three shards; `changes` go into its text part."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(seed)
    text = text_settings(**changes)
    vision = dict(
        depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, num_position_embeddings=16,
        patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if "embed" in name else 0.1)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    extra = mtp_tensors(hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64, seed=seed + 1)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / shard)
        for name in tensors:
            if name.endswith(("A_log", "linear_attn.norm.weight")):
                tensors[name] = tensors[name].float() + 1e-4
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    save_file(extra, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    index["weight_map"].update(dict.fromkeys(extra, "model-mtp.safetensors"))
    index_path.write_text(json.dumps(index))
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"]["mtp_num_hidden_layers"] = 1
    saved["text_config"]["mtp_use_dedicated_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(saved, indent=1))
    tokenizer(folder, template)
    return folder


def mtp_tensors(*, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, seed: int) -> dict:
    """The 15 tensors of Qwen3.5's MTP head by their published names, bf16."""
    import torch

    layer = "mtp.layers.0."
    shapes = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
        "mtp.norm.weight": (hidden,),
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (2 * heads * head_dim, hidden),
        layer + "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        layer + "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        layer + "self_attn.o_proj.weight": (hidden, heads * head_dim),
        layer + "self_attn.q_norm.weight": (head_dim,),
        layer + "self_attn.k_norm.weight": (head_dim,),
        layer + "mlp.gate_proj.weight": (ffn, hidden),
        layer + "mlp.up_proj.weight": (ffn, hidden),
        layer + "mlp.down_proj.weight": (hidden, ffn),
    }
    generator = torch.Generator().manual_seed(seed)
    return {n: (0.1 * torch.randn(s, generator=generator)).bfloat16() for n, s in shapes.items()}


def dense(
    folder: Path, family: str = "llama", *, seed: int = 0, template: str | None = CHATML, **changes: object
) -> Path:
    """A tiny llama, mistral, qwen2 or qwen3 of one shard; `changes` go into its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, eos_token_id=258, bos_token_id=256,
        tie_word_embeddings=family in ("llama", "qwen2"),
    )  # fmt: skip
    config = AutoConfig.for_model(family, **settings | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(std=0.3 if "embed" in name else 0.1)
    model.save_pretrained(folder)
    tokenizer(folder, template)
    return folder


def chats(path: Path, count: int = 40) -> Path:
    """A JSONL of short two- and four-turn conversations, every one different."""
    with path.open("w") as file:
        for i in range(count):
            messages = [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": str(2 * i)},
            ]
            if i % 3 == 0:
                messages += [
                    {"role": "user", "content": "And one more?"},
                    {"role": "assistant", "content": str(2 * i + 1)},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path

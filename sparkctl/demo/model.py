"""The demo's model on disk: a multimodal Qwen3.5 of 2.6 million parameters, laid out as the published ones are.

The weights are shipped as one file and written as three shards with an index, so that the demo walks the same
paths as a real checkpoint. `config.json` is written by hand: transformers leaves the MTP head out of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkctl.demo import tokenizer

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).parent
WEIGHTS = ASSETS / "base.safetensors"
TOKENIZER = ASSETS / "tokenizer.json"
TEMPLATE = ASSETS / "chat_template.jinja"

VOCAB_SIZE = 1024
HIDDEN = 192
SHARD_BYTES = 2_000_000

TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attn_output_gate": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,  # the least that vLLM's kernel for a CPU takes
    "linear_value_head_dim": 64,
    "mamba_ssm_dtype": "float32",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": True,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "dtype": "bfloat16",
    "use_cache": True,
}

VISION: dict[str, Any] = {
    "model_type": "qwen3_5",
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "deepstack_visual_indexes": [],
}

IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 1024, "longest_edge": 65536},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def config() -> dict[str, Any]:
    """`config.json`, as the published checkpoints write it."""
    ids = token_ids()
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {**TEXT, "eos_token_id": ids["<|im_end|>"]},
        "vision_config": VISION,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }


def token_ids() -> dict[str, int]:
    """The added tokens and their ids."""
    saved = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in saved["added_tokens"]}


def write_model(folder: Path) -> Path:
    """The whole checkpoint in `folder` (made where absent): shards, index, configs, tokenizer, chat template."""
    from safetensors.torch import load_file

    write_files(folder)
    write_shards(folder, load_file(WEIGHTS))
    return folder


def write_files(folder: Path) -> None:
    """Everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = token_ids()
    generation = {
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    videos = {**IMAGES, "video_processor_type": "Qwen3VLVideoProcessor"}
    del videos["image_processor_type"]
    for name, values in (
        ("config.json", config()),
        ("generation_config.json", generation),
        ("preprocessor_config.json", IMAGES),
        ("video_preprocessor_config.json", videos),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.read_bytes())
    tokenizer.write_config(folder)


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """`tensors` as safetensors shards of at most SHARD_BYTES each, and their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        if filled and filled + tensors[name].nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensors[name]
        filled += tensors[name].nbytes
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

"""The command that puts a merged folder or an adapter to use."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

OFFERED = 8192  # --max-model-len is no less where the model has it
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def model_length(base: Path, longest: int) -> int:
    """--max-model-len: room for a chat twice as long as the longest trained on, up to what config.json allows."""
    config = json.loads((base / "config.json").read_bytes())
    most = config.get("text_config", config).get("max_position_embeddings") or OFFERED
    wanted = max(OFFERED, -(-2 * longest // 1024) * 1024)
    return min(int(most), wanted)


def serve_model(folder: str, name: str, length: int) -> str:
    """vLLM on a whole model."""
    return shlex.join(["vllm", "serve", folder, "--served-model-name", name, "--max-model-len", str(length)])


def serve_adapter(base: str, folder: str, name: str, length: int, r: int) -> str:
    """vLLM on the base with the adapter beside it."""
    rank = next((rank for rank in VLLM_RANKS if rank >= r), r)
    options = ["--max-model-len", str(length), "--enable-lora", "--max-lora-rank", str(rank)]
    return shlex.join(["vllm", "serve", base, *options, "--lora-modules", f"{name}={folder}"])


def load_text_adapter(base: str, folder: str) -> str:
    """peft on the text-only class, which vLLM does not serve."""
    program = (
        "from transformers import AutoModelForCausalLM; from peft import PeftModel; "
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})"
    )
    return shlex.join(["python", "-c", program])

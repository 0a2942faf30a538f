"""A LoRA merge at the size of Qwen3.5-2B, measured: python tests/real/merge_2b.py [FOLDER]

Makes a checkpoint of that shape (random bf16 weights, MTP head and vision tower included) and a run with adapters of
rank 128 on the ten projections, merges it by the installed command, checks every byte that must not change and every
tensor that must, prints the figures and removes everything. Takes 11 GB of disk and some minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

LIMIT = 10**9  # bytes of peak memory
SHARD = 10**9
RANK = 128
HIDDEN, FFN, LAYERS = 2048, 6144, 24


def main(folder: Path) -> None:
    """Only children load torch: a child's peak memory counts what its parent had when it was forked."""
    child("make", folder)
    started = time.monotonic()
    command = [sys.executable, "-m", "sparkctl", "merge", str(folder / "run"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    answer = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)
    wall, peak = time.monotonic() - started, used.ru_maxrss * 1024
    if status:
        raise SystemExit(f"merge failed: {answer}")
    child("check", folder)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    print(
        f"{answer['changed_tensors']} of {answer['tensors']} tensors changed, {answer['bytes'] / 1e9:.2f} GB of weights"
    )
    print(f"merge: {wall:.1f} s, {answer['bytes'] / wall / 1e6:.0f} MB/s, peak memory {peak / 1e6:.0f} MB")
    if peak > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:.0f} MB")


def child(phase: str, folder: Path) -> None:
    """One phase in a process of its own."""
    subprocess.run([sys.executable, __file__, phase, str(folder)], check=True)


def make(folder: Path) -> None:
    """The base, a run on it, and one checkpoint of its training."""
    import merging_run
    import tiny

    from sparkctl.manifest.schema import Lora

    merging_run.LORA = Lora(r=RANK, alpha=RANK)
    base = folder / "base"
    base.mkdir()
    config = model_config()
    (base / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [ARCHITECTURE]}, indent=1))
    tiny.tokenizer(base)
    write_base(base, shapes(config))
    merging_run.trained_run(folder / "run", base, steps=(1,))


ARCHITECTURE = "Qwen3_5ForConditionalGeneration"


def model_config() -> Any:
    """The published shape (docs of the model family; the vision tower's as well)."""
    from transformers import Qwen3_5Config

    text = dict(
        vocab_size=248320, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128, full_attention_interval=4, tie_word_embeddings=True,
        mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, max_position_embeddings=262144,
    )  # fmt: skip
    vision = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=HIDDEN)
    return Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the model on the meta device, and the 15 tensors of the MTP head."""
    import tiny
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config)
    head = tiny.mtp_tensors(hidden=HIDDEN, heads=8, kv_heads=2, head_dim=256, ffn=FFN, seed=0)
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *head.items()]}


def write_base(base: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Random shards, one in memory at a time, and their index."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    places, shard, total = {}, {}, 0
    number = 0
    for name, shape in [*wanted.items(), ("", (0,))]:
        if shard and (not name or sum(t.nbytes for t in shard.values()) > SHARD):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, base / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, file))
            total += sum(t.nbytes for t in shard.values())
            shard, number = {}, number + 1
        if name:
            dtype = torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else torch.bfloat16
            shard[name] = torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def check(folder: Path) -> None:
    """Every tensor: changed ones against fp32 in one piece, all others byte for byte."""
    import torch
    from safetensors import safe_open

    base, out = folder / "base", folder / "run" / "merged"
    trained = safe_open(folder / "run/checkpoints/step-000001/trainable.safetensors", "pt")
    adapted = {name.removesuffix(".lora_A.weight") for name in trained.keys() if name.endswith("lora_A.weight")}  # noqa: SIM118
    places = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    changed = 0
    for name, file in places.items():
        before, after = (safe_open(where / file, "pt").get_tensor(name) for where in (base, out))
        module = name.removesuffix(".weight")
        if module in adapted:
            a, b = (trained.get_tensor(f"{module}.lora_{x}.weight") for x in "AB")
            wanted = (before.float() + b @ a).to(before.dtype)
            # sums of another order: a last bit may differ where the fp32 value lies on the edge between two
            differs = (wanted != after).float().mean().item()
            assert differs < 1e-3, (name, differs)
            assert not torch.equal(before, after)
            changed += 1
        else:
            assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), name
    kept, shards = len(places) - changed, len(set(places.values()))
    print(f"checked: {changed} tensors against fp32, {kept} byte for byte, {shards} shards")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("make", "check"):
        {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
    else:
        parent = sys.argv[1] if len(sys.argv) > 1 else None
        work = Path(tempfile.mkdtemp(prefix="sparkctl-merge-", dir=parent))
        try:
            main(work)
        finally:
            shutil.rmtree(work)

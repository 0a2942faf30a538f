"""A checkpoint of Qwen3.5-0.8B's shape with random weights, made on the spot: nothing is downloaded.

    python tests/real/shape_0_8b.py TOKENIZER FOLDER [0.8b|tiny]

Text model, vision tower and MTP head under their published names, A_log and linear_attn.norm in F32. TOKENIZER is a
folder with the Qwen3.5 vocabulary (`analyze_21k.py make` writes one). Made on a GPU where there is one. "tiny" has the
same vocabulary and layers of the demo's kind, 64 wide: for trying a script out.

The embedding's std is .04: tied to the head it gives logits of std 1.3 at first and of 40 at most, so that the loss can
fall; at .02 they end at 20.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SHARD = 10**9  # bytes
EMBEDDING, MATRIX, TAPS, VECTOR = 0.04, 0.02, 0.5, 0.05  # std; 0.02 is the family's own initializer_range
PUBLISHED_F32 = ("A_log", "linear_attn.norm.weight")
CONFIGS = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json")


def model_config(shape: str) -> dict[str, Any]:
    """config.json."""
    from sparkctl.model import catalog

    config = catalog.config("qwen3.5-0.8b")
    if shape == "tiny":
        config["text_config"] |= dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=16, layer_types=config["text_config"]["layer_types"][:4],
        )  # fmt: skip
        config["text_config"]["rope_parameters"] |= dict(mrope_section=[2, 1, 1])
        config["vision_config"] |= dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    return config


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes: transformers' model on the meta device, and the 15 tensors of the MTP head."""
    import tiny
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = config["text_config"]
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    head = tiny.mtp_tensors(
        hidden=text["hidden_size"], heads=text["num_attention_heads"], kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"], ffn=text["intermediate_size"], seed=0,
    )  # fmt: skip
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *head.items()]}


def drawn(name: str, shape: tuple[int, ...], generator: Any) -> Any:
    """The tensor `name`, on the generator's device."""
    import torch

    tensor = torch.empty(shape, dtype=torch.float32, device=generator.device)
    if name.endswith("A_log"):
        tensor.uniform_(0.05, 16, generator=generator).log_()  # as transformers begins it: decay slow and fast
    elif name.endswith("dt_bias"):
        tensor.fill_(1.0)
    elif "embed_tokens" in name:
        tensor.normal_(std=EMBEDDING, generator=generator)
    elif "conv1d" in name:
        tensor.normal_(std=TAPS, generator=generator)
    elif len(shape) > 1:
        tensor.normal_(std=MATRIX, generator=generator)
    else:  # norms: around zero where they multiply by 1 + w, around one where by w alone
        plain = name.endswith("linear_attn.norm.weight") or ("visual" in name and name.endswith("weight"))
        tensor.normal_(mean=float(plain), std=VECTOR, generator=generator)
    return tensor if name.endswith(PUBLISHED_F32) else tensor.bfloat16()


def write(folder: Path, wanted: dict[str, tuple[int, ...]]) -> int:
    """Shards, one in memory at a time, and their index; the bytes of all tensors."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, Any] = {}
    total = number = 0
    for name, shape in [*wanted.items(), ("", (0,))]:
        if shard and (not name or sum(t.nbytes for t in shard.values()) > SHARD):
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(shard, file))
            total += sum(t.nbytes for t in shard.values())
            shard = {}
        if name:
            shard[name] = drawn(name, shape, generator).cpu()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make(tokenizer: Path, folder: Path, shape: str) -> dict[str, Any]:
    """The whole checkpoint under `folder`, which appears once it is complete; what a reader wants to know of it."""
    from sparkctl.demo.model import write_files
    from sparkctl.files import staged_folder

    began = time.monotonic()
    config = model_config(shape)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder) as stage:
        write_files(stage)  # what belongs beside the weights
        for path in stage.iterdir():
            if path.name not in CONFIGS:
                path.unlink()
        for path in tokenizer.iterdir():
            if path.name not in CONFIGS:
                shutil.copyfile(path, stage / path.name)
        ends = dict(eos_token_id=[248046, 248044], pad_token_id=248044, do_sample=False)
        (stage / "generation_config.json").write_text(json.dumps(ends, indent=1))
        (stage / "config.json").write_text(json.dumps(config, indent=1))
        size = write(stage, shapes(config))
    return {"shape": shape, "bytes": size, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    print(json.dumps(make(Path(sys.argv[1]), Path(sys.argv[2]), *(sys.argv[3:] or ["0.8b"]))))

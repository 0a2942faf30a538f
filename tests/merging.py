"""Trained weights made by hand, and the truth that a merge is held against."""

from __future__ import annotations

import json
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkctl.manifest.schema import Lora
from sparkctl.model.plain import plain_layers

TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "in_proj_z", "out_proj",
)  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as its index has them."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for shard in sorted(names) for name, tensor in load_file(folder / shard).items()}


def base_name(adapter: str) -> str:
    """The base tensor of an adapter's half."""
    return adapter.replace(".lora_A.weight", ".weight").replace(".lora_B.weight", ".weight")


def adapters(base: Path, path: Path, lora: Lora, *, seed: int = 3, std: float = 0.2) -> Path:
    """Random adapters, none of them zero, for every target of a checkpoint, as training saves them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in sorted(tensors(base).items()):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS and not name.startswith("mtp."):
            made[f"{module}.lora_A.weight"] = std * torch.randn(lora.r, tensor.shape[1], generator=generator)
            made[f"{module}.lora_B.weight"] = std * torch.randn(tensor.shape[0], lora.r, generator=generator)
    save_file(made, path)
    return path


def masters(base: Path, path: Path, *, seed: int = 3, leave_out: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """fp32 masters of every text tensor, each a little off what the base's dtype can hold, written to `path`."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: tensor.float() + 1e-2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors(base).items()
        if not name.startswith(("mtp.", "model.visual.")) and name not in leave_out
    }
    save_file(made, path)
    return made


def rounded_once(value: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether `value` (bf16) is `exact` (fp64) rounded to nearest, up to fp32's own error in the sum."""
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(1e-30)))
    half_step = torch.exp2(exponent - 8)  # 8 bits of significand
    return bool(((value.double() - exact).abs() <= 1.001 * half_step + 1e-7).all())


@dataclass
class Raw:
    """A safetensors file read by hand: its header and the bytes of each tensor."""

    header: bytes
    tensors: dict[str, bytes]


def raw(path: Path) -> Raw:
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    return Raw(data[:start], {name: data[start + a : start + b] for name, (a, b) in offsets.items()})


def drop(folder: Path, name: str) -> None:
    """Take a tensor out of a sharded checkpoint."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / index["weight_map"].pop(name)
    save_file({n: t for n, t in load_file(shard).items() if n != name}, shard, metadata={"format": "pt"})
    path.write_text(json.dumps(index))


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """transformers' warnings reach caplog, and Python's are errors."""
    from transformers.utils import logging as theirs

    theirs.enable_propagation()
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        theirs.disable_propagation()


def load(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The class `kind` of transformers on a folder; every tensor has to find its place."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return plain_layers(model).eval()


def trained_model(kind: str, base: Path, trained: Path, lora: Lora, dtype: torch.dtype, scale: float = 1.0) -> Any:
    """The base in `dtype`, its targets replaced by W x + s · B A x with the adapters in fp32."""
    model = load(kind, base, dtype)
    inner = "model.language_model." if kind.startswith("Qwen3_5") else "model."
    for name, half in load_file(trained).items():
        if name.endswith(".lora_B.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        b = load_file(trained)[f"{module}.lora_B.weight"]
        live = model.get_submodule(module.replace("model.language_model.", inner))
        live.register_forward_hook(_added(half, b, scale * lora.alpha / lora.r))
    return model


def _added(a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return (output.float() + scale * (inputs[0].float() @ a.T @ b.T)).to(output.dtype)

    return hook


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of 40 fixed tokens, in fp32."""
    ids = (torch.arange(40) * 37 % 256)[None]
    return model(input_ids=ids, use_cache=False).logits.float()


def assert_same_model(
    kind: str, base: Path, trained: Path, out: Path, lora: Lora, caplog: pytest.LogCaptureFixture
) -> None:
    """The merged folder loads silently, and is no further from the fp32 truth than twice the trained model in bf16."""
    truth = logits(trained_model(kind, base, trained, lora, torch.float32))
    usual = (logits(trained_model(kind, base, trained, lora, torch.bfloat16)) - truth).norm()
    with heard(caplog):
        merged = load(kind, out)
    assert not caplog.records, caplog.text
    assert (logits(merged) - truth).norm() <= 2 * usual
    # the same bound sees a scale that is wrong by a tenth
    wrong = trained_model(kind, base, trained, lora, torch.bfloat16, scale=1.1)
    assert (logits(wrong) - truth).norm() > 2 * usual

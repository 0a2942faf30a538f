"""Bytes of tensors that no torch has to touch: written as they are, and seen to be numbers."""

from __future__ import annotations

from pathlib import Path

import heads
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparkctl.model import weights
from sparkctl.model.format import finite, safetensors_dtype
from sparkctl.model.weights import ShardWriter, TensorFile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_bytes_of_another_file_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 40)
    tensors = {f"{count} {dtype}": torch.arange(count).to(dtype) for count in (0, 1, 75) for dtype in DTYPES}
    save_file(tensors, tmp_path / "a")
    source = TensorFile(tmp_path / "a")
    layout = {name: (source.dtype(name), source.shape(name)) for name in tensors}
    with ShardWriter(tmp_path / "b", layout) as writer:
        for name in reversed(layout):
            writer.write_bytes(name, source.pieces(name))
    assert heads.equal(load_file(tmp_path / "b"), tensors)
    for pieces, named in (([b"x" * 7], "1 bytes too few"), ([b"x" * 8, b"x"], "-1 bytes too few")):
        with pytest.raises(ValueError, match=named), ShardWriter(tmp_path / "c", {"a": ("F32", (2,))}) as writer:
            writer.write_bytes("a", pieces)
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_finite_where_torch_says_so(dtype: torch.dtype) -> None:
    word, most = safetensors_dtype(dtype), torch.finfo(dtype)
    for value in (0.0, -1.5, most.max, most.min, most.tiny, most.smallest_normal / 4, torch.nan, torch.inf):
        for sign in (1, -1):
            numbers = torch.ones(9, dtype=dtype)
            numbers[4] = sign * value
            data = bytes(numbers.view(torch.uint8).numpy())
            assert finite(data, word) == bool(torch.isfinite(numbers).all()), value

"""The MTP head beside transformers' own parts, and its draft steps beside a server that drafts row after row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mtp_server import Server, pack

from sparkctl.errors import SparkError
from sparkctl.model import mtp
from sparkctl.model.inspect import read_config, text_part
from sparkctl.mtp.drafter import Drafter, read_head
from sparkctl.mtp.head import Head

STEPS = 3
LIMIT = 2e-5  # absolute, of states around 1; observed 5e-6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def server(qwen35_folder: Path) -> Server:
    return Server(qwen35_folder)


@pytest.fixture(scope="module")
def drafter(qwen35_folder: Path) -> Drafter:
    return Drafter.load(qwen35_folder, qwen35_folder, dtype=torch.float32)


@torch.no_grad()
def apart(drafter: Drafter, server: Server) -> list[float]:
    """The largest distance of the states of each step, over all rows that have so many tokens behind them."""
    packed, found = pack(), [0.0] * STEPS
    states = drafter.states(packed, drafter.hidden(packed), STEPS)
    start = 0
    for document in packed.documents:
        ids = torch.from_numpy(document.ids).long()
        for row in range(len(ids) - STEPS - 1):
            for step, truth in enumerate(server.drafts(ids, row, STEPS)):
                found[step] = max(found[step], float((states[step][start + row] - truth).abs().max()))
        start += len(ids)
    return found


def test_every_step_is_the_servers(drafter: Drafter, server: Server) -> None:
    assert max(apart(drafter, server)) < LIMIT


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.self_attn.k_norm.weight", "layers.0.mlp.up_proj.weight"])
def test_a_tensor_that_is_one_percent_off_is_seen_in_every_step(qwen35_folder: Path, server: Server, name: str) -> None:
    other = Drafter.load(qwen35_folder, qwen35_folder, dtype=torch.float32)
    with torch.no_grad():
        parameter = other.head.get_parameter(name)
        parameter += 0.01 * parameter.abs().mean().clamp_min(0.1)
    other.head.refresh()
    assert min(apart(other, server)) > LIMIT


def test_a_later_step_needs_its_position_and_its_own_keys(
    drafter: Drafter, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        rotation = Drafter._rotation
        patch.setattr(Drafter, "_rotation", lambda self, packed, step: rotation(self, packed, 0))
        assert max(apart(drafter, server)[1:]) > LIMIT
    with monkeypatch.context() as patch:
        forward = Head.forward
        patch.setattr(Head, "forward", lambda self, e, s, r, p, b=(), rows=None: forward(self, e, s, r, p, b[:1], rows))
        first, second, third = apart(drafter, server)
        assert max(first, second) < LIMIT < third


@torch.no_grad()
def test_drafts_of_some_rows_are_those_of_all(drafter: Drafter) -> None:
    packed = pack()
    hidden, rows = drafter.hidden(packed), torch.tensor([3, 4, 13, 20, 30])
    whole, some = (drafter.states(packed, hidden, STEPS, chosen) for chosen in (None, rows))
    assert max(float((a[rows] - b).abs().max()) for a, b in zip(whole, some, strict=True)) < LIMIT
    assert min(float((a[rows + 1] - b).abs().max()) for a, b in zip(whole, some, strict=True)) > LIMIT


def test_names_shapes_and_values_are_the_published_ones(qwen35_folder: Path, drafter: Drafter) -> None:
    published, mine = read_head(qwen35_folder), drafter.head.published()
    assert len(published) == 15
    assert {name: tuple(value.shape) for name, value in mine.items()} == mtp.shapes(
        text_part(read_config(qwen35_folder))
    )
    assert all(torch.equal(mine[name], value.float()) for name, value in published.items())


def test_a_head_that_does_not_fit_is_named(qwen35_folder: Path) -> None:
    head, tensors = Head(text_part(read_config(qwen35_folder)), CPU), read_head(qwen35_folder)
    with pytest.raises(SparkError, match=r"has no `mtp.norm.weight`"):
        head.load({name: value for name, value in tensors.items() if name != "mtp.norm.weight"}, "there")
    with pytest.raises(SparkError, match=r"another shape \[32, 32\] of `mtp.fc.weight`"):
        head.load(tensors | {"mtp.fc.weight": tensors["mtp.fc.weight"][:, :32]}, "there")
    with pytest.raises(SparkError, match="2 layers of MTP head"):
        Head(text_part(read_config(qwen35_folder)) | {"mtp_num_hidden_layers": 2}, CPU)


def test_a_fresh_head_is_the_seeds(qwen35_folder: Path) -> None:
    heads = [Head(text_part(read_config(qwen35_folder)), CPU) for _ in range(3)]
    for head, seed in zip(heads, (1, 1, 2), strict=True):
        head.begin_anew(seed)
    one, same, other = (torch.cat([p.flatten() for p in head.parameters()]) for head in heads)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)

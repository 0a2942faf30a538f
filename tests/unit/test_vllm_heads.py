"""The untied twin of `make vllm-check`: the same function, and the place where a head with swapped halves shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import merging
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_findings import Findings
from vllm_heads import EMBEDDING, FC, HEAD_NORM, LM_HEAD, NORM, swapped, untied
from vllm_serving import Said

from sparkctl.data.batches import Document, Pack
from sparkctl.demo.chats import held_out_questions
from sparkctl.demo.model import write_model
from sparkctl.model.audit import audit
from sparkctl.model.inspect import read_config
from sparkctl.mtp.accept import Setting, Subject, measure
from sparkctl.mtp.drafter import Drafter

PROMPTS, TOKENS, LONGEST = 6, 24, 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, whose embeddings are tied and whose head guesses well."""
    return write_model(tmp_path_factory.mktemp("demo") / "model")


def test_the_twin_is_whole_and_has_an_lm_head_of_its_own(demo: Path, tmp_path: Path) -> None:
    before, after = merging.tensors(demo), merging.tensors(untied(demo, tmp_path / "twin"))
    assert audit(tmp_path / "twin") == []
    assert after.keys() - before.keys() == {LM_HEAD}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {NORM, HEAD_NORM, FC}
    half = before[FC].shape[1] // 2
    assert torch.equal(after[FC][:, :half], before[FC][:, :half])
    assert torch.equal(after[FC].abs(), before[FC].abs())
    flipped = after[LM_HEAD].float().sum(0) * before[EMBEDDING].float().sum(0) < 0
    assert 0.3 < flipped.float().mean() < 0.7
    assert torch.equal(flipped, (after[FC] != before[FC])[:, half:].any(0))
    config = read_config(tmp_path / "twin")
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
    assert merging.tensors(untied(demo, tmp_path / "again")).keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in merging.tensors(tmp_path / "again").items())
    assert not torch.equal(merging.tensors(untied(demo, tmp_path / "other", seed=1))[FC], after[FC])


@pytest.mark.parametrize("spoiled", [False, True])
def test_the_twin_computes_the_same(demo: Path, tmp_path: Path, spoiled: bool) -> None:
    """In fp32: the model's logits and the head's, of three draft steps."""
    tied = wide(demo, tmp_path / "tied")
    twin = untied(tied, tmp_path / "twin")
    if spoiled:  # one of the three places that take the signs back does not
        rewrite(twin, lambda tensors: {HEAD_NORM: merging.tensors(tied)[HEAD_NORM]} if HEAD_NORM in tensors else {})
    ids = np.random.default_rng(0).integers(0, 200, 40).astype(np.int32)
    pack = Pack([Document(0, ids, np.ones(40, dtype=bool))], 40, 39)
    (states, drafts), (other_states, other_drafts) = (logits(folder, pack) for folder in (tied, twin))
    torch.testing.assert_close(other_states, states, atol=2e-4, rtol=0)
    apart = float((other_drafts - drafts).abs().max())
    assert (apart > 1) if spoiled else (apart < 2e-4), apart


def logits(folder: Path, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    drafter = Drafter.load(folder, folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = drafter.hidden(pack)
        states = torch.cat(drafter.states(pack, hidden, LONGEST))
        return hidden @ drafter.model.head.T, states @ drafter.model.head.T


def wide(folder: Path, out: Path) -> Path:
    """A copy with every tensor in F32."""
    write_model(out)
    rewrite(out, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    return out


def rewrite(folder: Path, change: Any) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(tensors | change(tensors), path, metadata={"format": "pt"})


def test_swapped_halves_are_seen_where_embeddings_are_not_tied(demo: Path, tmp_path: Path) -> None:
    """Counted as `make vllm-check` counts: the twin passes its limit, the tied model is over it with the same head."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo)
    asked = [[{"role": "user", "content": question}] for question, _ in held_out_questions()[::7][:PROMPTS]]
    prompts = [
        np.array(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), dtype=np.int32)
        for chat in asked
    ]
    twin = untied(demo, tmp_path / "twin")
    heads = {
        "tied": (demo, demo), "tied, swapped": (demo, swapped(demo, tmp_path / "tied-swapped")),
        "twin": (twin, twin), "twin, swapped": (twin, swapped(twin, tmp_path / "twin-swapped")),
    }  # fmt: skip
    subjects = [Subject(name, model, head, "") for name, (model, head) in heads.items()]
    rows = {row.name: row for row in measure(subjects, prompts, Setting(TOKENS, LONGEST))}
    found = Findings(PROMPTS, TOKENS, said(0, []))
    judged = {name: found.other_model(name, LONGEST, said(row.drafts, row.cumulative)) for name, row in rows.items()}
    found.same_rates(judged["twin"], judged["tied"])
    found.no_sense(judged["twin, swapped"])
    assert found.problems == []
    found.no_sense(judged["tied, swapped"])
    found.same_rates(judged["tied, swapped"], judged["tied"])
    assert [problem.split(",")[0] for problem in found.problems] == ["tied", "tied"]


def said(drafts: int, cumulative: list[float]) -> Said:
    return Said([], drafts, [round(rate * drafts) for rate in cumulative], [], [], {}, {})

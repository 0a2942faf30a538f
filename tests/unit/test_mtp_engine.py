"""The loss of the MTP head and its gradients: beside a server's own drafts, and by autograd through plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mtp_server import Server, pack

from sparkctl.data.batches import Document, Pack
from sparkctl.mtp.drafter import Drafter
from sparkctl.mtp.engine import HeadEngine
from sparkctl.train.engines.native.model import NativeModel

STEPS, DECAY = 3, 0.6
WEIGHTS = torch.tensor([1, DECAY, DECAY**2]) / (1 + DECAY + DECAY**2)
LIMIT = 5e-6  # relative, fp32; observed 6e-7


def engine(folder: Path, loss: str = "kl", dtype: torch.dtype = torch.float32) -> HeadEngine:
    return HeadEngine(Drafter.load(folder, folder, dtype=dtype), steps=STEPS, decay=DECAY, loss=loss)  # type: ignore[arg-type]


def expected(server: Server, document: Document, loss: str) -> torch.Tensor:
    """The document's loss, target by target, from the states that a server has when it drafts for it."""
    ids = torch.from_numpy(document.ids).long()
    hidden, head = server.hidden(ids), server.text.embed_tokens.weight
    total = torch.zeros(())
    for target in range(1, len(ids)):
        if not document.trained[target]:
            continue
        teacher = (hidden[target - 1] @ head.T).log_softmax(-1)
        for step in range(1, STEPS + 1):
            row = target - 1 - step
            if row < 0:
                continue
            state = list(server.drafts(ids, row, step))[-1]
            student = (state @ head.T).log_softmax(-1)
            here = (teacher.exp() * (teacher - student)).sum() if loss == "kl" else -student[ids[target]]
            total = total + WEIGHTS[step - 1] * here
    return total


@pytest.fixture(scope="module")
def server(qwen35_folder: Path) -> Server:
    return Server(qwen35_folder)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_loss_and_gradients_are_those_of_a_servers_drafts(qwen35_folder: Path, server: Server, loss: str) -> None:
    trained, packed = engine(qwen35_folder, loss), pack()
    found = trained.micro_step(packed, 0.5)
    truth = torch.stack([expected(server, document, loss) for document in packed.documents]).sum()
    gradients = torch.autograd.grad(0.5 * truth, list(server.parts.parameters()))
    assert float(found) == pytest.approx(float(truth), rel=LIMIT)
    assert float(trained.eval_sum(packed)) == pytest.approx(float(truth), rel=LIMIT)
    names = [f"mtp.{name}" for name, _ in server.parts.named_parameters()]
    assert set(names) == set(trained.parameters())
    apart = {
        name: float((trained.parameters()[name].grad - gradient).norm() / gradient.norm())
        for name, gradient in zip(names, gradients, strict=True)
    }
    assert max(apart.values()) < 10 * LIMIT, apart  # observed 4e-6


def test_one_percent_of_a_decay_a_scale_or_a_target_is_seen(qwen35_folder: Path, server: Server) -> None:
    packed = pack()
    truth = float(torch.stack([expected(server, document, "kl") for document in packed.documents]).sum())
    wrong = engine(qwen35_folder)
    wrong.weights = [weight * 1.01 for weight in wrong.weights]
    assert float(wrong.eval_sum(packed)) != pytest.approx(truth, rel=LIMIT)
    shifted = [Document(d.id, d.ids, np.roll(d.trained, 1)) for d in packed.documents]
    assert float(engine(qwen35_folder).eval_sum(Pack(shifted, packed.tokens, packed.labels))) != pytest.approx(
        truth, rel=LIMIT
    )


def test_documents_never_meet(qwen35_folder: Path) -> None:
    together, alone = engine(qwen35_folder), engine(qwen35_folder)
    packed = pack()
    total = together.micro_step(packed, 1.0)
    parts = [alone.micro_step(Pack([d], len(d.ids), int(d.trained[1:].sum())), 1.0) for d in packed.documents]
    assert float(total) == pytest.approx(float(sum(parts)), rel=LIMIT)
    for name, parameter in together.parameters().items():
        assert torch.allclose(parameter.grad, alone.parameters()[name].grad, atol=1e-6), name
    before = float(alone.eval_sum(Pack(packed.documents[:1], 13, 0)))
    changed = [packed.documents[0], Document(9, packed.documents[2].ids[::-1].copy(), packed.documents[2].trained)]
    rest = float(alone.eval_sum(Pack(changed[1:], 22, 0)))
    assert float(alone.eval_sum(Pack(changed, 35, 0))) - rest == pytest.approx(before, rel=1e-5)


def test_the_model_stays_as_it_is(qwen35_folder: Path) -> None:
    trained = engine(qwen35_folder, dtype=torch.bfloat16)
    model = trained.drafter.model
    tensors = {id(t): t for t in tensors_of(model)}
    before = {key: t.clone() for key, t in tensors.items()}
    assert len(before) > 30
    optimizer = torch.optim.AdamW(trained.parameters().values(), lr=1e-2)
    first = float(trained.eval_sum(pack()))
    for _ in range(3):
        trained.micro_step(pack(), 1e-2)
        optimizer.step()
        optimizer.zero_grad()
    assert float(trained.eval_sum(pack())) < 0.9 * first
    assert all(torch.equal(before[key], t) for key, t in tensors.items())
    assert not any(t.requires_grad for t in tensors.values())
    assert all(t.grad is None for t in tensors.values())


def tensors_of(model: NativeModel) -> list[torch.Tensor]:
    """Every tensor that the frozen model's parts hold."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    todo: list[object] = [model]
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, list | tuple):
            todo += part
        elif type(part).__module__.startswith(("sparkctl", "sparkctl_kernels")):
            todo += vars(part).values() if hasattr(part, "__dict__") else list(part)  # type: ignore[call-overload]
    return found


def test_a_rank_without_work_reads_its_masters_again(qwen35_folder: Path) -> None:
    ranks, one, losses = [engine(qwen35_folder) for _ in range(2)], pack(), []
    before = [float(made.eval_sum(one)) for made in ranks]
    ranks[0].micro_step(one, 1.0)
    ranks[1].micro_step(Pack([], 0, 0), 1.0)
    for made in ranks:
        for name, parameter in made.parameters().items():
            parameter.grad = ranks[0].parameters()[name].grad.clone()
        torch.optim.AdamW(made.parameters().values(), lr=1e-2, fused=True).step()
        losses.append(float(made.eval_sum(one)))
    assert losses[0] == losses[1] != before[0]


def test_whatever_gradients_are_there_are_added_to(qwen35_folder: Path) -> None:
    trained, one = engine(qwen35_folder), pack()
    trained.micro_step(one, 1.0)
    kept = {name: parameter.grad for name, parameter in trained.parameters().items()}
    once = {name: gradient.clone() for name, gradient in kept.items()}
    for given in (torch.zeros_like, torch.ones_like):
        for parameter in trained.parameters().values():
            parameter.grad = given(parameter)
        trained.micro_step(one, 1.0)
        for name, parameter in trained.parameters().items():
            assert torch.allclose(parameter.grad, once[name] + given(parameter), atol=1e-5), name
    assert all(torch.equal(kept[name], once[name]) for name in kept)


def test_masters_are_read_again_where_an_optimiser_keeps_the_gradients(qwen35_folder: Path) -> None:
    trained, one = engine(qwen35_folder), pack()
    before = float(trained.micro_step(one, 1.0))
    optimizer = torch.optim.AdamW(trained.parameters().values(), lr=1e-2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert float(trained.micro_step(one, 1.0)) == pytest.approx(float(trained.eval_sum(one)), rel=LIMIT)
    assert float(trained.eval_sum(one)) != pytest.approx(before, rel=1e-3)


def test_a_pack_without_labels_counts_nothing(qwen35_folder: Path) -> None:
    trained = engine(qwen35_folder)
    nothing = Pack([Document(0, np.arange(5, dtype=np.int32), np.zeros(5, dtype=bool))], 5, 0)
    assert float(trained.micro_step(nothing, 1.0)) == float(trained.eval_sum(nothing)) == 0
    assert all(parameter.grad is None for parameter in trained.parameters().values())
    assert float(trained.micro_step(Pack([], 0, 0), 1.0)) == 0

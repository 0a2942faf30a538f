"""The reference engine against transformers by hand, and against itself with the documents dealt otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ready
import tiny
import torch
import torch.nn.functional as F

from sparkctl.data.batches import Document, Pack
from sparkctl.data.tokens import label_count
from sparkctl.errors import UsageError
from sparkctl.model.plain import plain_layers
from sparkctl.train.engines import make_engine, reference
from sparkctl.train.engines.rows import batches

EXACT = 2e-5  # relative, fp32: padding and the order of sums; observed up to 4e-6


def pack(*documents: tuple[np.ndarray, np.ndarray]) -> Pack:
    made = [Document(i, ids, trained) for i, (ids, trained) in enumerate(documents)]
    return Pack(made, sum(len(d.ids) for d in made), sum(label_count(d.trained) for d in made))


def engine(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: object) -> reference.ReferenceEngine:
    """One whose adapters are not zero, so that every gradient is there."""
    made = reference.load(ready.plan(**changes), folder, {}, dtype)
    if made.parameters() and "mode" not in changes:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.parameters().values():
                parameter.normal_(std=0.3, generator=generator)
    return made


def gradients(made: reference.ReferenceEngine, packs: list[Pack]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss a token and gradients of one optimiser step over these packs."""
    for parameter in made.parameters().values():
        parameter.grad = None
    labels = sum(pack.labels for pack in packs)
    loss = sum(float(made.micro_step(pack, 1 / labels)) for pack in packs) / labels
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in made.parameters().items()}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    return loss, found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-6)) for n in a)


@pytest.fixture(params=["lora", "full"])
def mode(request: pytest.FixtureRequest) -> dict[str, object]:
    return {} if request.param == "lora" else {"mode": "full"}


def test_sixteen_packs_accumulated_give_the_gradient_of_one_batch(qwen35_folder: Path, mode: dict) -> None:
    made, documents = engine(qwen35_folder, **mode), ready.documents(32)
    packs = [pack(*documents[i : i + 2]) for i in range(0, 32, 2)]
    loss, accumulated = gradients(made, packs)
    whole = engine(qwen35_folder, pack_length=1 << 20, **mode)
    together_loss, together = gradients(whole, [pack(*documents)])
    assert loss == pytest.approx(together_loss, rel=1e-6)
    assert distance(accumulated, together) < EXACT
    _, fewer = gradients(made, packs[:-1])
    assert distance(fewer, together) > 0.01


def test_documents_of_a_pack_do_not_see_each_other(qwen35_folder: Path) -> None:
    made, (first, second) = engine(qwen35_folder), ready.documents(2, seed=5)
    _, packed = gradients(made, [pack(first, second)])
    labels = [label_count(first[1]), label_count(second[1])]
    alone = [gradients(made, [pack(document)])[1] for document in (first, second)]
    mean = {n: (alone[0][n] * labels[0] + alone[1][n] * labels[1]) / sum(labels) for n in packed}
    assert distance(packed, mean) < EXACT
    joined = (np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]]))
    assert distance(gradients(made, [pack(joined)])[1], mean) > 0.01  # what a leak would look like


def test_loss_is_that_of_transformers_by_hand(qwen35_folder: Path, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    for folder in (qwen35_folder, llama_folder):
        ids, trained = ready.documents(1, seed=2)[0]
        model = plain_layers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        logits = model(torch.from_numpy(ids[None].astype(np.int64)), use_cache=False).logits[0]
        at = np.flatnonzero(trained[1:]) + 1
        labels = torch.from_numpy(ids[at].astype(np.int64))
        by_hand, late = (
            float(F.cross_entropy(logits[rows], labels, reduction="sum").detach()) for rows in (at - 1, at)
        )
        fresh = reference.load(ready.plan(), folder, {}, torch.float32)  # B is zero: the base's own loss
        loss = float(fresh.eval_sum(pack((ids, trained))))
        assert loss == pytest.approx(by_hand, rel=1e-5)
        assert loss != pytest.approx(late, rel=1e-2)


def test_position_0_is_never_a_label(llama_folder: Path) -> None:
    made = engine(llama_folder)
    ids, trained = ready.documents(1)[0]
    first, none = trained.copy(), np.zeros_like(trained)
    first[0], none[0] = True, True
    assert float(made.eval_sum(pack((ids, first)))) == float(made.eval_sum(pack((ids, trained))))
    loss, found = gradients(made, [pack((ids, trained))])
    assert gradients(made, [pack((ids, first))])[0] == loss
    assert float(made.micro_step(pack((ids, none)), 1.0)) == 0
    assert all(torch.equal(p.grad, found[n]) for n, p in made.parameters().items())


def test_lm_head_on_label_tokens_is_the_model_s_own_logits(qwen35_folder: Path) -> None:
    made, packs = engine(qwen35_folder), [pack(*ready.documents(3))]
    loss, on_labels = gradients(made, packs)
    made._plain_head = False
    whole_loss, on_all = gradients(made, packs)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert distance(on_labels, on_all) < EXACT


def test_checkpointing_gives_the_same_bits(qwen35_folder: Path) -> None:
    packs = [pack(*ready.documents(3))]
    plain = gradients(engine(qwen35_folder, dtype=torch.bfloat16), packs)
    again = gradients(engine(qwen35_folder, dtype=torch.bfloat16, checkpointing=True), packs)
    assert plain[0] == again[0]
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


def test_precision(qwen35_folder: Path) -> None:
    made = reference.load(ready.plan(), qwen35_folder, {})
    base = {n: p.dtype for n, p in made._model.named_parameters() if not p.requires_grad}
    wide = {n for n, dtype in base.items() if dtype == torch.float32}
    assert wide == {n for n in base if n.endswith(("A_log", "linear_attn.norm.weight"))} != set()
    assert set(base.values()) == {torch.float32, torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in made.parameters().values())
    full = reference.load(ready.plan(mode="full"), qwen35_folder, {}).parameters()
    assert all(p.dtype == torch.float32 for p in full.values())
    assert all("language_model" in name or name == "lm_head.weight" for name in full)


@pytest.mark.parametrize(
    ("powers", "dealt"), [(False, [[30, 29], [10, 9, 8, 3, 2]]), (True, [[30, 29], [10, 9, 8, 3], [2]])]
)
def test_rows_of_like_length_fill_the_area(powers: bool, dealt: list[list[int]]) -> None:
    lengths = [10, 3, 30, 9, 8, 29, 2]
    documents = [Document(i, np.zeros(n, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]
    rows = batches(Pack(documents, 91, 84), 64, powers=powers)
    assert [[len(d.ids) for d in batch] for batch in rows] == dealt


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_move_with_the_longest_row_are_those_of_each_row_alone(tmp_path: Path, kind: str) -> None:
    """Whatever was computed before, and beside it: a model that is loaded anew for each document agrees."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=16)
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4.0, **(factors if kind == "longrope" else {}))
    most = 64 if kind == "longrope" else 16
    folder = tiny.dense(tmp_path, rope_parameters=rope, max_position_embeddings=most)

    def sharp() -> reference.ReferenceEngine:
        made = engine(folder, pack_length=256)
        with torch.no_grad():
            for parameter in made._model.parameters():
                parameter *= 10 if parameter.ndim > 1 else 1  # attention that looks at few places
        return made

    made = sharp()
    lengths = np.random.RandomState(0)
    documents = [(lengths.randint(0, 250, n).astype(np.int32), np.ones(n, dtype=bool)) for n in (40, 12, 30, 9, 60)]
    alone = [float(sharp().eval_sum(pack(one))) for one in documents]
    for _ in range(2):
        assert float(made.eval_sum(pack(*documents))) == pytest.approx(sum(alone), rel=EXACT)
        assert float(made.micro_step(pack(*documents), 1.0)) == pytest.approx(sum(alone), rel=EXACT)
        assert float(made.eval_sum(pack(documents[2]))) == pytest.approx(alone[2], rel=EXACT)
    made._moving = []  # as transformers has it, rows together
    assert float(made.eval_sum(pack(*documents))) != pytest.approx(sum(alone), rel=100 * EXACT)


def test_an_engine_that_is_not_there_is_named() -> None:
    plan = ready.plan().model_copy(update={"engine": "megatron"})
    with pytest.raises(UsageError, match="`megatron` is not in this version") as caught:
        make_engine(plan, Path("nowhere"), name="runs/r1")
    assert caught.value.hint == "sparkctl recommend runs/r1 --engine reference"

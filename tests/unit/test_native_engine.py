"""The native engine against the reference, in fp32, and against itself with the documents dealt otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ready
import tiny
import torch
from gradient_cases import EXACT, distance, distances, engine, gradients, pack
from sparkctl_kernels.dispatch import Choice

from sparkctl.data.batches import Pack
from sparkctl.data.tokens import label_count
from sparkctl.errors import SparkError, UsageError
from sparkctl.train.engines import reference
from sparkctl.train.engines.native import engine as native

# an epsilon that is felt, and a padding token that stands in documents as any other: torch's embedding gives it nothing
FELT: dict[str, Any] = dict(rms_norm_eps=1e-3, pad_token_id=42)
# name: family, what its config has beside the tiny one's
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": (
        "llama",
        dict(
            head_dim=64, attention_bias=True, mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "mistral": ("mistral", dict(sliding_window=16)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=128)),
}  # fmt: skip


@pytest.fixture(scope="module", params=["qwen3_5", *DENSE])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen3_5":
        return tiny.qwen35(made, **FELT)
    family, changes = DENSE[request.param]
    return tiny.dense(made, family, **FELT | changes)


@pytest.fixture(params=["lora", "full"])
def mode(request: pytest.FixtureRequest) -> dict[str, object]:
    return {} if request.param == "lora" else {"mode": "full"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient_are_the_reference_s(folder: Path, mode: dict, checkpointing: bool) -> None:
    documents = ready.documents(8, longest=100, seed=4)
    assert sum((ids == FELT["pad_token_id"]).sum() for ids, _ in documents) > 1
    packs = [pack(*documents[:3]), pack(*documents[3:])]
    truth_loss, truth = gradients(engine(reference.load, folder, **mode), packs)
    made = engine(native.load, folder, checkpointing=checkpointing, **mode)
    loss, found = gradients(made, packs)
    assert loss == pytest.approx(truth_loss, rel=1e-6)
    assert distance(found, truth) < EXACT
    assert sum(float(made.eval_sum(pack)) for pack in packs) / sum(p.labels for p in packs) == loss


def test_the_first_adapters_are_the_reference_s(folder: Path) -> None:
    plan = ready.plan(seed=11)
    ours, theirs = native.load(plan, folder, {}).parameters(), reference.load(plan, folder, {}).parameters()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.float32 for name in ours)
    assert any(parameter.any() for parameter in ours.values())


def test_masters_are_read_again_after_an_optimiser_step(qwen35_folder: Path, mode: dict) -> None:
    packs = [pack(*ready.documents(3))]
    made = engine(native.load, qwen35_folder, **mode)
    before, found = gradients(made, packs)
    with torch.no_grad():
        for name, parameter in made.parameters().items():
            parameter.sub_(0.03 * found[name] / found[name].norm())
    after, _ = gradients(made, packs)
    assert after < before
    truth = engine(reference.load, qwen35_folder, **mode)
    with torch.no_grad():
        for name, parameter in truth.parameters().items():
            parameter.copy_(made.parameters()[name])
    assert gradients(truth, packs)[0] == pytest.approx(after, rel=1e-6)
    evaluated = float(made.eval_sum(packs[0]))
    with torch.no_grad():  # as a checkpoint is loaded
        for parameter in made.parameters().values():
            parameter.mul_(1.5)
    assert float(made.eval_sum(packs[0])) != evaluated


def slow(made: Any) -> Any:
    """Its GatedDeltaNet forgets slowly, so that what leaks into the next document is still there."""
    with torch.no_grad():
        for mixer, _ in made._model.layers:
            if hasattr(mixer, "rates"):
                mixer.rates[0].fill_(-3.0)
    return made


def test_a_changed_document_leaves_the_others_alone_to_the_bit(qwen35_folder: Path, mode: dict) -> None:
    """Only the second document has labels: whatever stands in the first, loss and gradients stay."""
    first, second = ready.documents(2, seed=5)
    silent = np.zeros(len(first[0]), dtype=bool)
    made = slow(engine(native.load, qwen35_folder, **mode))
    kept = gradients(made, [pack((first[0], silent), second)])
    changed = gradients(made, [pack(((first[0] + 7) % 256, silent), second)])
    assert kept[0] == changed[0]
    parted = [n for n in kept[1] if not torch.equal(kept[1][n], changed[1][n])]
    assert parted == []
    joined = [np.concatenate([a, b]) for a, b in zip(((first[0] + 7) % 256, silent), second, strict=True)]
    seen, alone = gradients(made, [pack(tuple(joined))])[1], gradients(made, [pack(second)])[1]
    assert distance(seen, kept[1]) > 0.01  # what a leak would look like
    assert distance(kept[1], alone) < EXACT  # packed is alone


def test_each_document_stands_alone_in_every_family(folder: Path) -> None:
    first, second = ready.documents(2, seed=5)
    made = slow(engine(native.load, folder))
    _, packed = gradients(made, [pack(first, second)])
    labels = [label_count(first[1]), label_count(second[1])]
    alone = [gradients(made, [pack(document)])[1] for document in (first, second)]
    mean = {n: (alone[0][n] * labels[0] + alone[1][n] * labels[1]) / sum(labels) for n in packed}
    assert distance(packed, mean) < EXACT


def test_one_long_document(qwen35_folder: Path) -> None:
    ids = np.random.RandomState(0).randint(0, 256, 1500).astype(np.int32)
    long = pack((ids, np.arange(1500) % 3 == 0))
    truth_loss, truth = gradients(engine(reference.load, qwen35_folder), [long])
    loss, found = gradients(engine(native.load, qwen35_folder), [long])
    assert loss == pytest.approx(truth_loss, rel=1e-6)
    assert distance(found, truth) < EXACT


def test_packs_without_work_add_nothing(qwen35_folder: Path, mode: dict) -> None:
    made = engine(native.load, qwen35_folder, **mode)
    ids, trained = ready.documents(1)[0]
    silent, first = np.zeros_like(trained), np.zeros_like(trained)
    first[0] = True  # nothing stands before it
    for nothing in (Pack([], 0, 0), pack((ids, silent)), pack((ids, first))):
        assert float(made.micro_step(nothing, 1.0)) == float(made.eval_sum(nothing)) == 0
    assert all(parameter.grad is None for parameter in made.parameters().values())
    made.eval_sum(pack((ids, trained)))
    assert all(parameter.grad is None for parameter in made.parameters().values())


def test_a_rank_without_work_reads_its_masters_again(qwen35_folder: Path, mode: dict) -> None:
    ranks = [engine(native.load, qwen35_folder, **mode) for _ in range(2)]
    one, losses = pack(*ready.documents(3)), []
    before = [float(made.eval_sum(one)) for made in ranks]
    ranks[0].micro_step(one, 1.0)
    ranks[1].micro_step(Pack([], 0, 0), 1.0)
    for made in ranks:
        for name, parameter in made.parameters().items():
            parameter.grad = ranks[0].parameters()[name].grad.clone()
        torch.optim.AdamW(made.parameters().values(), lr=1e-2, fused=True).step()  # leaves no trace in a version
        losses.append(float(made.eval_sum(one)))
    assert losses[0] == losses[1] != before[0]


def test_two_micro_steps_add_up(qwen35_folder: Path, mode: dict) -> None:
    made, one = engine(native.load, qwen35_folder, **mode), pack(*ready.documents(3))
    _, once = gradients(made, [one])
    _, twice = gradients(made, [one, one])
    assert distance(twice, once) < EXACT
    for parameter in made.parameters().values():
        parameter.grad = None
    _, again = gradients(made, [one])
    assert all(torch.equal(again[n], once[n]) for n in once)


@pytest.mark.parametrize("given", ["zeros", "ones", "copies", "some"])
def test_whatever_gradients_are_there_are_added_to(qwen35_folder: Path, mode: dict, given: str) -> None:
    """Zeros of an optimiser that keeps its tensors, sums that another hand put there, nothing for every other one."""
    made, packs = engine(native.load, qwen35_folder, **mode), [pack(*ready.documents(3, seed=n)) for n in range(2)]
    _, once = gradients(made, packs[:1])
    parameters = made.parameters()
    for number, (name, parameter) in enumerate(parameters.items()):
        if given == "zeros":
            parameter.grad = torch.zeros_like(parameter) if number % 2 else parameter.grad.zero_()
        elif given == "some" and number % 2:
            parameter.grad = None
        else:
            parameter.grad = once[name].clone() if given == "copies" else torch.ones_like(parameter)
    before = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for _ in range(2):
        made.micro_step(packs[0], 1 / packs[0].labels)
    found = {name: parameter.grad for name, parameter in parameters.items()}
    assert distance(found, {name: before[name] + 2 * once[name] for name in once}) < EXACT


def test_a_gradient_that_was_kept_stays_as_it_was(qwen35_folder: Path, mode: dict) -> None:
    made, packs = engine(native.load, qwen35_folder, **mode), [pack(*ready.documents(3, seed=n)) for n in range(2)]
    _, first = gradients(made, packs[:1])
    kept = {name: parameter.grad for name, parameter in made.parameters().items()}
    gradients(made, packs[1:])
    assert all(torch.equal(kept[name], first[name]) for name in first)


def test_masters_are_read_again_after_a_step_whose_gradients_are_set_to_zero(qwen35_folder: Path, mode: dict) -> None:
    made, one = engine(native.load, qwen35_folder, **mode), pack(*ready.documents(3))
    adamw = torch.optim.AdamW(made.parameters().values(), lr=1e-2, fused=True)  # leaves no trace in a version
    for _ in range(2):
        loss = float(made.micro_step(one, 1 / one.labels))
        adamw.step()
        adamw.zero_grad(set_to_none=False)
    assert float(made.micro_step(one, 1 / one.labels)) == float(made.eval_sum(one)) < loss


def test_checkpointing_gives_the_same_bits(qwen35_folder: Path, mode: dict) -> None:
    packs = [pack(*ready.documents(3))]
    plain = gradients(engine(native.load, qwen35_folder, dtype=torch.bfloat16, **mode), packs)
    again = gradients(engine(native.load, qwen35_folder, dtype=torch.bfloat16, checkpointing=True, **mode), packs)
    assert plain[0] == again[0]
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


def test_bf16_is_at_most_twice_as_far_from_the_truth_as_the_reference(folder: Path, mode: dict) -> None:
    """Every tensor's gradient, over four packs: of a single one the ratio is mostly chance, its median 1.0."""
    made = [(reference.load, torch.float32), (reference.load, torch.bfloat16), (native.load, torch.bfloat16)]
    truth, theirs, ours = (engine(load, folder, dtype=dtype, std=0.05, **mode) for load, dtype in made)
    squares: dict[str, list[np.ndarray]] = {}
    for seed in range(4):
        packs = [pack(*ready.documents(6, longest=100, seed=seed))]
        true = gradients(truth, packs)[1]
        far = [distances(gradients(made, packs)[1], true) for made in (ours, theirs)]
        for name in true:
            squares.setdefault(name, []).append(np.square([found[name] for found in far]))
    ratios = {name: np.sqrt(np.divide(*np.sum(pairs, axis=0))) for name, pairs in squares.items()}
    assert max(ratios.values()) <= 2, max(ratios.items(), key=lambda item: item[1])  # observed: up to 1.52
    assert np.median(list(ratios.values())) < 1.1  # observed: 0.90 to 0.99
    assert max(pairs[0][0] for pairs in squares.values()) > 1e-8  # bf16 it is


def test_precision(qwen35_folder: Path) -> None:
    lora, full = (native.load(ready.plan(**changes), qwen35_folder, {}) for changes in ({}, {"mode": "full"}))
    assert all(p.dtype == torch.float32 for made in (lora, full) for p in made.parameters().values())
    for made, stream in ((lora, torch.bfloat16), (full, torch.float32)):
        model = made._model
        mixer, feed_forward = model.layers[0]
        assert {mixer.inputs.weight.dtype, feed_forward.down.weight.dtype, model.head.dtype} == {torch.bfloat16}
        assert mixer.rates[0].dtype == mixer.out_norm.weight.dtype == torch.float32  # published so
        inputs = model.inputs(pack(*ready.documents(2)))
        last, residual, _ = mixer.forward(model._embedded(inputs), None, inputs.place)
        assert (last.dtype, residual.dtype) == (torch.bfloat16, stream)


def test_frozen_weights_are_kept_once(qwen35_folder: Path) -> None:
    from sparkctl.model.load import load_text_model

    base = load_text_model(qwen35_folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    made = native.from_model(base, lora=ready.plan().lora, checkpointing=False)
    layers = zip(base.model.layers, made._model.layers, strict=True)
    for theirs, (_, ours) in layers:
        for linear in (theirs.mlp.gate_proj, theirs.mlp.up_proj):
            assert linear.weight.untyped_storage().data_ptr() == ours.gate_up.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "olmo2"}, "the model type `olmo2`"),
        ({"hidden_act": "gelu"}, "the activation `gelu`"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "`dynamic` rotary"),
    ],
)
def test_a_model_that_is_not_served_is_named(tmp_path: Path, change: dict, what: str) -> None:
    import json

    tiny.dense(tmp_path, "olmo2" if "model_type" in change else "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match="native engine has nothing for") as caught:
        native.load(ready.plan(), tmp_path, {}, name="runs/r1")
    assert what in caught.value.message
    assert caught.value.hint == "sparkctl recommend runs/r1 --engine reference"


def test_a_norm_may_add_nothing(tmp_path: Path) -> None:
    made = native.load(ready.plan(), tiny.dense(tmp_path, rms_norm_eps=0.0), {})
    assert made._model.final.eps == 0


def test_a_slow_fallback_is_refused_with_what_mends_it() -> None:
    slow = Choice(
        "gated_delta", "reference", "flash-linear-attention is not installed", slow=True, mend="pip install x"
    )
    native.refuse_slow([Choice("rms_norm", "triton", "fused")])
    with pytest.raises(SparkError, match=r"gated_delta would run on its slow reference: flash-linear") as caught:
        native.refuse_slow([Choice("rms_norm", "triton", "fused"), slow])
    assert caught.value.hint == "`pip install x`, or take the slow one with `--allow-slow`"


def test_what_runs_on_what_is_said_and_pinned(qwen35_folder: Path, llama_folder: Path) -> None:
    made = native.load(ready.plan(), qwen35_folder, {"threads": "1"})
    said = dict(made.describe())
    operators = {
        "rms_norm", "lora_linear", "silu_mul", "qk_norm_rope", "attention", "sigmoid_gate", "causal_conv",
        "gated_delta", "gated_norm", "linear_cross_entropy",
    }  # fmt: skip
    assert operators <= set(said)
    assert said["attention"] == "reference (plain torch on cpu)"
    pinned = made.choices()
    assert operators < set(pinned)
    assert pinned["threads"] == "1"
    assert "gated_delta" not in native.load(ready.plan(), llama_folder, {}).choices()

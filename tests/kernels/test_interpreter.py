"""Every Triton kernel in fp32 under Triton's interpreter, on a CPU: values, all gradients, planted errors, boundaries.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own: one test here
starts it, and reports what failed there. By hand: `TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from document_cases import attention_case, small
from interpreting import few_programs, pin_tiles
from kernel_cases import Case, Plant, Tensors, blank, distances, output_gradient, randn, run
from operators import LAYOUTS, LENGTHS, OPERATORS, PACKED, Layout, Operator, T, results, schemas
from sparkctl_kernels.attention import op as attention
from sparkctl_kernels.attention.kept import FlashKept, TritonKept
from sparkctl_kernels.causal_conv import op as causal_conv
from sparkctl_kernels.dispatch import interpreted
from sparkctl_kernels.documents import documents
from sparkctl_kernels.gated_delta import kernel as gates
from sparkctl_kernels.lora_linear.kernel import BLOCK
from sparkctl_kernels.lora_linear.layer import Copies
from sparkctl_kernels.matmul import op as matmul

from sparkctl.bench.kernels import WHERE

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
LIMIT = 5e-6  # relative, fp32; observed: up to 1.7e-6, mostly 2e-7
ROUNDING = 2e-7  # of one fp32 operation

inside = pytest.mark.skipif(not INTERPRETING, reason="in the process that test_in_a_process_of_its_own starts")
CASES = small()
FIRST = {case.name.partition("-")[0]: case for case in reversed(CASES)}.values()


@pytest.fixture(autouse=True)
def _through_kernels() -> Iterator[None]:
    if not INTERPRETING:
        yield
        return
    pin_tiles()
    few_programs()
    with interpreted():
        yield


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@inside
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case: Case) -> None:
    errors = compare(case)
    assert max(errors.values()) < LIMIT, errors


@inside
@pytest.mark.parametrize(
    ("case", "result"),
    [(case, result) for case in FIRST for result in case.plants],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_one_percent_in_the_operator_is_caught(case: Case, result: str) -> None:
    """The operator runs with the error in it, and the comparison above fails at that result."""
    with case.plants[result].planted():
        assert compare(case)[result] > LIMIT


def compare(case: Case) -> dict[str, float]:
    return distances(run(case, case.fused, torch.float32, CPU, 0), truth(case))


@cache
def truth(case: Case) -> Tensors:
    return run(case, case.reference, torch.float32, CPU, 0)


@inside
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_the_public_operators(name: str) -> None:
    torch.manual_seed(0)
    operator, tensors = OPERATORS[name], OPERATORS[name].inputs()
    equal(results(operator.call, tensors, operator.tables), truth_of(operator, tensors))


@inside
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_public_operators_take_any_strides(name: str, layout: str) -> None:
    """Of inputs, tables and what is given to backward; the reference has them contiguous."""
    torch.manual_seed(0)
    operator, tensors, lay = OPERATORS[name], OPERATORS[name].inputs(), LAYOUTS[layout]
    laid, tables = [lay(tensor) for tensor in tensors], tuple(lay(table) for table in operator.tables)
    equal(results(operator.call, laid, tables, lay), truth_of(operator, tensors))


@inside
@pytest.mark.parametrize("name", OPERATORS)
def test_public_operators_under_a_sum(name: str) -> None:
    """Backward is given one value in memory for all."""

    def ones(x: torch.Tensor) -> torch.Tensor:
        return x.new_ones(()).expand(x.shape)

    torch.manual_seed(0)
    operator, tensors = OPERATORS[name], OPERATORS[name].inputs()
    equal(results(operator.call, tensors, operator.tables, ones), truth_of(operator, tensors, ones))


def truth_of(operator: Operator, tensors: list[torch.Tensor], gradients: Layout = torch.clone) -> list[torch.Tensor]:
    return results(operator.reference, tensors, operator.tables, gradients)


def equal(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    assert all(error < LIMIT for error in errors), errors


# By operator, the inputs that may be parts of wider buffers
WIDER = {
    "rms_norm": (), "gated_norm": (1,), "sigmoid_gate": (1,), "qk_norm_rope": (0, 1), "causal_conv": (0,),
    "matmul": (0, 1), "linear_cross_entropy": (1,),
}  # fmt: skip


@inside
@pytest.mark.parametrize("name", WIDER)
def test_what_kernels_can_read_where_it_is_is_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"sparkctl_kernels.{name}.op")
    operator, forward, reached = OPERATORS[name], module.forward, set[int]()

    def heard(*arguments: Any, **named: Any) -> Any:
        reached.update(x.data_ptr() for x in arguments if isinstance(x, torch.Tensor))
        return forward(*arguments, **named)

    monkeypatch.setattr(module, "forward", heard)
    given = [*operator.inputs(), *operator.tables]
    for i in WIDER[name]:
        given[i] = torch.cat([given[i], given[i]], dim=1)[:, : given[i].shape[1]]
    operator.call(*given)
    assert {x.data_ptr() for x in given} <= reached


@inside
@pytest.mark.parametrize("bias", [-7.0, -10.0, -14.0, -20.0])
def test_a_slow_decay_and_its_gradients_are_no_further_from_fp64_than_twice_torch_s(bias: float) -> None:
    def sums(a: torch.Tensor, log_a: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
        decay = -log_a.exp() * F.softplus(a + dt_bias)
        return torch.cat([part.cumsum(0) for part in decay.split(LENGTHS)])

    torch.manual_seed(0)
    inputs = a, log_a, dt_bias = [randn(T, 3), randn(3), randn(3, std=0.1) + bias]
    truth, eager = (results(sums, [x.to(dtype) for x in inputs]) for dtype in (torch.float64, torch.float32))
    b = torch.zeros(T, 3)
    g, _ = gates.forward(a, b, log_a, dt_bias, PACKED)
    dg, da = output_gradient(g.shape, g), blank(g)
    dlog_a, dbias = gates.backward(dg, b, b, a, b, log_a, dt_bias, PACKED, da, blank(b), True)
    found = [g * math.log(2), da, dlog_a, dbias]
    errors, limits = ([float((x - y).norm() / y.norm()) for x, y in zip(r, truth, strict=True)] for r in (found, eager))
    assert all(error <= 2 * limit + ROUNDING for error, limit in zip(errors, limits, strict=True)), (errors, limits)


SMALL = 1e-3  # of a row: its mean square is the epsilon then


@inside
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rms_norm", {0: SMALL}), ("add_rms_norm", {0: SMALL, 1: SMALL}), ("gated_norm", {0: SMALL}),
        ("qk_norm_rope", {0: SMALL, 1: SMALL}), ("causal_conv", {0: SMALL}),
        ("gated_delta", {3: 30.0, 5: 0.0, 6: 0.0}),  # softplus is its argument there
    ],
)  # fmt: skip
def test_epsilons_and_large_rates_are_the_reference_s(name: str, changes: dict[int, float]) -> None:
    torch.manual_seed(0)
    operator = OPERATORS[name]
    tensors = [tensor * changes.get(i, 1.0) for i, tensor in enumerate(operator.inputs())]
    if name == "gated_delta":
        tensors[5] = tensors[5] - 4.0  # and its decay slow
    equal(results(operator.call, tensors, operator.tables), truth_of(operator, tensors))


@inside
@pytest.mark.parametrize(("name", "arguments"), schemas(), ids=lambda value: value if isinstance(value, str) else "")
def test_torch_s_own_check(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.sparkctl, name).default, arguments)


@inside
@pytest.mark.parametrize(("table", "window"), [("HOPPER", None), ("HOPPER", 30), ("SMALL", None), ("WINDOWED", 30)])
def test_attention_in_the_tiles_of_256_dims(table: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 dims in them. Hopper's: heads' parts of their keys' gradients are made apart and added up."""
    from sparkctl_kernels.attention import kernel

    monkeypatch.setattr(kernel, "tiles", lambda *_: getattr(kernel, table)[256])
    errors = compare(attention_case([5, 150, 63, 1], 4, 2, 64, window))
    assert max(errors.values()) < LIMIT, errors


@inside
@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("draft")], ids=lambda case: case.name)
def test_what_flash_keeps_is_its_own_in_backward_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's FlashAttention-2 is not, by this project's kernel in its place: with a natural log-sum-exp."""
    from sparkctl_kernels.attention import flash, kernel

    took: list[type] = []

    def forward(*arguments: Any) -> tuple[torch.Tensor, FlashKept]:
        o, kept = kernel.forward(*arguments)
        return o, FlashKept(*kept[:4], kept.log_sum_NT * math.log(2), o.new_empty(0), o.new_empty(0))

    def backward(do: torch.Tensor, saved: FlashKept, *arguments: Any) -> Any:
        took.append(type(saved))
        return kernel.backward(do, TritonKept(*saved[:4], saved.log_sum_NT / math.log(2)), *arguments)

    monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)
    monkeypatch.setattr(flash, "forward", forward)
    monkeypatch.setattr(flash, "backward", backward)
    errors = distances(run(case, case.fused, torch.float16, CPU, 0), truth(case))
    limits = distances(run(case, case.reference, torch.float16, CPU, 0), truth(case))
    assert took == [FlashKept]
    assert all(errors[name] <= 2 * limits[name] for name in errors), (errors, limits)


@inside
@pytest.mark.parametrize("first", [64, 63])
def test_a_gradient_of_columns_of_wider_buffers_over_a_pack_s_length(first: int) -> None:
    """As for k_proj's B: dyᵀ·u in fp32, both with neighbours on either side, which are NaN here."""
    torch.manual_seed(0)
    dy, u = torch.full((1344, 256), float("nan")), torch.full((1344, 192), float("nan"))
    a, b = dy[:, first : first + 128], u[:, first : first + 64]
    a.normal_()
    b.normal_()
    c = torch.full((128, 64), float("nan"))
    matmul.forward(a.T, b, c, 0.5)
    assert float((c - 0.5 * a.T @ b).norm()) < LIMIT * float(c.norm())


@inside
@pytest.mark.parametrize("width", [8, 5])
def test_all_compute_copies_in_one_launch(width: int) -> None:
    torch.manual_seed(0)
    weights, adapters = torch.full((900, 64 + 2 * width), float("nan")), torch.full((80, 64), float("nan"))
    masters = [torch.randn(900, width), torch.randn(900, width), torch.randn(80, 64)]
    assert all(master.numel() > BLOCK for master in masters)  # several programs each
    copies = [weights[:, 64 : 64 + width], weights[:, 64 + width :], adapters]
    factors = [2.0, 0.5, 1.0]
    Copies(list(zip(copies, masters, factors, strict=True))).round()
    assert all(torch.equal(copy, master * f) for copy, master, f in zip(copies, masters, factors, strict=True))
    assert weights[:, :64].isnan().all()


@inside
def test_documents_do_not_see_each_other() -> None:
    """Changing the first document leaves the second one's outputs and gradients the same to the bit."""
    packed, joined = documents([40, 33], CPU), documents([73], CPU)
    torch.manual_seed(0)
    first, second, weight = torch.randn(40, 64), torch.randn(33, 64), torch.randn(64, 4)

    def through(first: torch.Tensor, boundaries: object = packed) -> Tensors:
        x = torch.cat([first, second])
        q, k, v = causal_conv.forward(x, weight, boundaries.positions, 1, 16)
        o, saved = attention.forward(q, k, v.unflatten(1, (2, 16))[:, :1], boundaries)
        do = torch.cat([torch.zeros(40, 1, 16), torch.ones(33, 1, 16)])
        dq, dk = attention.backward(do, saved, boundaries, None, torch.empty_like(do))
        dx = torch.empty_like(x)
        causal_conv.backward(dq, dk, torch.zeros_like(v), x, weight, boundaries.positions, 1, dx)
        return dict(o=o[40:], dx=dx[40:], before=dx[:40])

    kept, changed = through(first), through(first + 1)
    assert torch.equal(kept["o"], changed["o"])
    assert torch.equal(kept["dx"], changed["dx"])
    assert not kept["before"].any()
    assert not torch.equal(through(first, joined)["o"], through(first + 1, joined)["o"])  # the test can fail


@inside
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_whole_engine_on_kernels(mode: str, tmp_path: Path) -> None:
    """Every kernel as the engine calls it, views and buffers and all: loss and gradients of the reference engine."""
    import ready
    import tiny

    from sparkctl.data.batches import Document, Pack
    from sparkctl.train.engines import reference
    from sparkctl.train.engines.native import engine as native

    folder = tiny.hybrid(tmp_path, num_hidden_layers=2, full_attention_interval=2, linear_key_head_dim=16)
    documents = [Document(i, *parts) for i, parts in enumerate(ready.documents(2, longest=20))]
    pack = Pack(documents, sum(len(d.ids) for d in documents), 1)
    found = []
    for load in (reference.load, native.load):
        made = load(ready.plan(mode=mode), folder, {}, torch.float32)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        loss = float(made.micro_step(pack, 0.1))
        found.append((loss, {name: parameter.grad for name, parameter in made.parameters().items()}))
    (truth, theirs), (loss, ours) = found
    assert loss == pytest.approx(truth, rel=1e-6)
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    assert max(errors.values()) < 1e-5, errors  # observed 2.4e-6


@inside
def test_the_mtp_head_on_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three draft steps, twice: loss and added-up gradients of plain torch, from the same states of the model."""
    import tiny
    from mtp_server import pack
    from sparkctl_kernels import dispatch

    from sparkctl.mtp.drafter import Drafter
    from sparkctl.mtp.engine import HeadEngine

    folder, packed = tiny.qwen35(tmp_path), pack()
    hidden = torch.randn(packed.tokens, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Drafter, "hidden", lambda self, pack: hidden)
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(dispatch, "_interpreting", kernels)
        made = HeadEngine(Drafter.load(folder, folder, dtype=torch.float32), steps=3, decay=0.6, loss="kl")
        loss = float(made.micro_step(packed, 0.1) + made.micro_step(packed, 0.2))
        found.append((loss, {name: parameter.grad for name, parameter in made.parameters().items()}))
    (truth, theirs), (loss, ours) = found
    assert loss == pytest.approx(truth, rel=1e-6)
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    assert len(errors) == 15
    assert max(errors.values()) < 1e-5, errors  # observed 5e-7


@inside
@pytest.mark.parametrize("name", WHERE)
def test_what_bench_times_is_the_operator(name: str) -> None:
    """`bench kernels` calls the kernels as the engine does, with the results of plain torch."""
    from sparkctl.bench.kernels import copied, distance
    from sparkctl.bench.subjects import Sizes
    from sparkctl.bench.workload import synthetic
    from sparkctl.demo.model import config

    work = synthetic(config(), "lora", 40, 3, rank=16)
    torch.manual_seed(0)
    subject = getattr(import_module(f"sparkctl.bench.{WHERE[name]}"), name)(Sizes.of(work, CPU))
    given = subject.inputs()
    truth, found = subject.eager(copied(given))(), subject.ours(copied(given))()
    errors = {result: distance(found[result], truth[result]) for result in truth}
    assert max(errors.values()) < LIMIT, errors


@inside
def test_a_plant_is_taken_out_again() -> None:
    with Plant("silu_mul.kernel", "forward", at=1).planted():
        pass
    case = next(case for case in CASES if case.name.startswith("silu_mul"))
    assert max(compare(case).values()) < LIMIT

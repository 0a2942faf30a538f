"""Matrix products that are not torch's: each way is right, what was measured is pinned, a wrong way is left out.

Products are sent through the dispatch on a CPU here; times come from a clock of the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import Wide, output_gradient, randn
from sparkctl_kernels import gemm, ways
from sparkctl_kernels.dispatch import interpreted
from sparkctl_kernels.gemm import Product

LIMIT = 2e-6  # relative, fp32; observed up to 3e-7
TORCHS = ("torch", "halves")  # the ways that a CPU has too; tests/kernels/test_gpu.py sees to the others


@pytest.fixture(autouse=True)
def _through_the_dispatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ways, "WAYS", {name: ways.WAYS[name] for name in TORCHS})
    with interpreted():
        yield
    ways.pin({})


def three(add: bool = True) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(result, truth) of the products of one layer, as `gemm` gives them."""
    torch.manual_seed(0)
    x, w, dy, total = randn(37, 200), randn(300, 200), randn(37, 300), randn(300, 200)
    y, dx, dw = Wide(37, 300, x), Wide(37, 200, x), total.clone()
    gemm.product(x, w.T, y.part)
    y.check()
    gemm.add_to(dx.of(x), dy, w)
    dx.check()
    gemm.add_product(dw, dy.T, x, 0.5, add=add)
    fresh = gemm.product(dy, w)
    return [
        (y.part, x @ w.T), (dx.part, x + dy @ w), (dw, (total if add else 0) + 0.5 * (dy.T @ x)), (fresh, dy @ w)
    ]  # fmt: skip


def errors(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    return [float((found - truth).norm() / truth.norm()) for found, truth in pairs]


def names_of() -> list[str]:
    """The products of `three`."""
    with ways.measuring(lambda work: 1.0) as found:
        three()
    return [str(key) for key in found]


def test_a_bias_is_added_whatever_computes_the_product() -> None:
    torch.manual_seed(0)
    x, w, bias = randn(37, 200), randn(300, 200), randn(300)
    with ways.measuring(lambda work: 1.0) as measured:
        by_torch = gemm.product(x, w.T, bias_N=bias)
    assert [str(key) for key in measured] == ["gemm nt 48x300x200"]
    ways.pin({"gemm nt 48x300x200": "halves"})
    by_halves = gemm.product(x, w.T, bias_N=bias)
    found = [by_torch, by_halves]
    for pinned in (True, False):
        ways.pin({"gemm nt 48x300x200": "halves"} if pinned else {})
        y = Wide(37, 300, x)
        assert gemm.product(x, w.T, y.part, bias) is y.part
        y.check()
        found.append(y.part)
    assert max(errors([(one, x @ w.T + bias) for one in found])) < LIMIT


def test_a_bias_and_its_product_are_rounded_once() -> None:
    """A large bias on a product that was rounded before would be 2.1e-3 off, one rounding of the sum 1.7e-3."""
    torch.manual_seed(0)
    x, w, bias = (randn(*shape).bfloat16() for shape in ((500, 256), (1000, 256), (1000,)))
    bias *= 16
    ways.pin({"gemm nt 512x1000x256": "halves"})
    assert ways.pinned()
    found, truth = gemm.product(x, w.T, bias_N=bias), x.float() @ w.float().T + bias.float()
    (once,), (ours,) = errors([(truth.bfloat16(), truth)]), errors([(found, truth)])
    assert ours < 1.02 * once


def test_products_have_names_with_tokens_rounded_up() -> None:
    assert names_of() == [
        "gemm nt 48x300x200", "gemm nn+ 48x200x300", "gemm tn 300x200x48", "gemm nn 48x200x300",
    ]  # fmt: skip
    assert all(str(Product.parse(name)) == name for name in names_of())
    assert [gemm.bucket(n) for n in (1, 2, 3, 5, 1283, 4096, 4097, 5376, 6145)] == [
        1, 2, 3, 6, 1536, 4096, 6144, 6144, 8192,
    ]  # fmt: skip


@pytest.mark.parametrize("way", TORCHS)
@pytest.mark.parametrize("add", [True, False])
def test_every_way_gives_the_product(way: str, add: bool) -> None:
    names = names_of()
    ways.pin(dict.fromkeys(names, way) | {"device": "x", "gemm nt 1x1x1": "of a later version"})
    assert ways.pinned() == (dict.fromkeys(names, way) if way != "torch" else {})
    assert max(errors(three(add))) < LIMIT


def test_an_fp32_total_of_bf16_products_is_halved_by_rows() -> None:
    torch.manual_seed(0)
    x, dy, total = randn(37, 64).bfloat16(), randn(37, 300).bfloat16(), randn(300, 64)
    ways.pin({"gemm tn 300x64x48": "halves"})
    found = total.clone()
    gemm.add_product(found, dy.T, x, 0.5)
    truth = total + 0.5 * (dy.float().T @ x.float())
    assert float((found - truth).norm() / truth.norm()) < LIMIT


def test_a_way_that_torch_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("not with these strides")

    monkeypatch.setitem(ways.WAYS, "refused", refused)
    with ways.measuring(lambda work: 1.0) as found:
        three()
    assert all(timed.wrong == {"refused": ways.ENDLESS} for timed in found.values())


def test_one_percent_in_a_way_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison above, and by the measurement, which leaves the way out."""

    def wrong(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
        ways.by_torch(a, b, c, 1.01 * scale, add)

    monkeypatch.setitem(ways.WAYS, "wrong", wrong)
    ways.pin(dict.fromkeys(names_of(), "wrong"))
    assert min(errors(three())) > LIMIT
    ways.pin({})
    with ways.measuring(lambda work: 1.0) as found:
        three()
    assert all(set(timed.wrong) == {"wrong"} and timed.wrong["wrong"] > 100 for timed in found.values())
    assert all(set(timed.seconds) == set(TORCHS) for timed in found.values())


def test_what_gives_no_number_is_wrong_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
        c.fill_(float("nan"))

    monkeypatch.setitem(ways.WAYS, "nothing", nothing)
    with ways.measuring(lambda work: 1.0) as found:
        three()
    assert all(timed.wrong == {"nothing": ways.ENDLESS} for timed in found.values())
    assert all(set(timed.errors) == set(TORCHS) for timed in found.values())


def test_the_faster_way_is_chosen_where_it_is_clearly_faster() -> None:
    def clock(times: dict[str, float]) -> Callable[[Callable[[], None]], float]:
        order = iter(4 * [times[name] for name in TORCHS])
        return lambda work: next(order)

    for times, best in (
        (dict(torch=1.0, halves=0.9), "halves"),
        (dict(torch=1.0, halves=0.98), "torch"),
    ):
        with ways.measuring(clock(times)) as found:
            three()
        assert {timed.best for timed in found.values()} == {best}


def test_measuring_changes_no_result_and_ends() -> None:
    plain = [found for found, _ in three()]
    with ways.measuring(lambda work: work() or 1.0):
        measured = [found for found, _ in three()]
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert gemm.watch is None


def test_what_is_pinned_for_one_length_leaves_others_alone() -> None:
    x, w = randn(100, 64), randn(32, 64)
    ways.pin({"gemm nt 48x32x64": "halves"})
    called: list[int] = []
    gemm.pinned[Product.parse("gemm nt 48x32x64")] = lambda a, b, c, scale, add: called.append(len(a))
    gemm.product(x, w.T)
    assert called == []
    gemm.product(x[:40], w.T, output_gradient((40, 32), x))
    assert called == [40]


def cut_off(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """One unbroken fp32 sum as a tensor core makes it: 16 products at a time, each sum cut off towards zero."""
    total = torch.zeros(c.shape, dtype=torch.float64)
    for k in range(0, a.shape[1], ways.STEP):
        exact = total + a[:, k : k + ways.STEP].double() @ b[k : k + ways.STEP].double()
        total = ((exact.view(torch.int64) >> 29) << 29).view(torch.float64)
    c.copy_(scale * total + (c if add else 0))


def through_bf16(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """Rounded before it is added, as eager's gradients are."""
    c.copy_((scale * (a.float() @ b.float())).bfloat16().float() + (c if add else 0))


def one_token_lost(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0, add: bool = False) -> None:
    """Of thousands."""
    ways.by_torch(a[:, :-1], b[:-1], c, scale, add)


@pytest.mark.parametrize("depth", [768, 5376])
def test_a_long_sum_in_one_piece_is_right_and_nothing_worse_is(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """k_proj's B has 512 x 128 sums of a pack's length, which cuBLAS splits; torch's sums are exact here."""
    for way in (cut_off, through_bf16, one_token_lost):
        monkeypatch.setitem(ways.WAYS, way.__name__, way)
    torch.manual_seed(0)
    dy, u, total = randn(depth, 640).bfloat16(), randn(depth, 384).bfloat16(), torch.zeros(512, 128)
    with ways.measuring(lambda work: 1.0) as found:
        gemm.add_product(total, dy[:, 64:576].T, u[:, 128:256], add=False)
    (timed,) = found.values()
    assert set(timed.seconds) == {*TORCHS, "cut_off"}
    assert set(timed.wrong) == {"through_bf16", "one_token_lost"}
    assert 2 * ways.SLACK * (depth > 4096) < timed.errors["cut_off"] < ways.rounding(depth) / 2  # 7.0e-6 seen at 5,376
    assert min(timed.wrong.values()) > 50  # 83 seen at 5,376, 582 at 768


def test_what_torch_itself_refuses_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(ways.WAYS, "torch", refused)
    with pytest.raises(torch.OutOfMemoryError), ways.measuring(lambda work: 1.0):
        three()

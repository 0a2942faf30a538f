"""The certificate of `sparkctl verify lossless` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from sparkctl.cli import console
from sparkctl.model.names import live_name

if TYPE_CHECKING:
    from sparkctl.steps.verify_lossless import Result
    from sparkctl.verify.certificate import Certificate

WHO = ("truth", "reference", "engine")
SHOWN = 8  # tensors, the worst; steps, evenly chosen


def certificate(made: Result) -> Group:
    """A certificate: its verdict, the worst tensors, the course."""
    table, found = made.table, made.certificate
    title = f"{'lossless' if table.passed else 'NOT lossless'}: {table.engine}, {table.mode}, on {table.device}"
    formula = found.worst_formula
    head = console.rows(
        title,
        ("data", table.packs),
        ("gradients", f"{found.worst.ratio:.2f} times the reference's error at worst, "
         f"{table.median_gradient_ratio:.2f} in the median"),
        ("in fp32", f"at most {formula.formula:.1e} from the truth" if formula else table.fp32_skipped),
        ("loss", f"{table.document_loss_ratio:.2f} times the reference's error, over single documents"),
        ("course", f"{table.steps} steps: loss {_pair(table.course_loss, table.course_loss_reference)}, "
         f"gradient norm {_pair(table.course_norm, table.course_norm_reference)}"),
    )  # fmt: skip
    return Group(head, "", _tensors(found), "", _course(found))


def _pair(ours: float, theirs: float) -> str:
    return f"{ours:.1e} from fp32 (reference {theirs:.1e})"


def _tensors(found: Certificate) -> Table:
    table = columns("gradient of", right=("engine", "reference", "ratio", "in fp32"))
    for row in found.tensors[:SHOWN]:
        name = live_name(row.name).removeprefix("model.").removesuffix(".weight")
        name += f" ({row.tensors})" if row.tensors > 1 else ""
        formula = "" if row.formula is None else f"{row.formula:.1e}"
        table.add_row(escape(name), f"{row.ours:.2%}", f"{row.theirs:.2%}", f"{row.ratio:.2f}", formula)
    if len(found.tensors) > SHOWN:
        table.add_row(f"… and {len(found.tensors) - SHOWN} more, each nearer")
    return table


def _course(found: Certificate) -> Table:
    """Loss and gradient norm, the truth's and how far the others are from it."""
    table = columns("step", right=("loss", "reference", "engine", "norm", "reference", "engine"))
    last = len(found.steps) - 1
    for i in sorted({round(last * k / (SHOWN - 1)) for k in range(SHOWN)}) if found.steps else ():
        truth, *others = found.steps[i]
        losses, norms = (
            [f"{getattr(o, what) - getattr(truth, what):+.1e}" for o in others] for what in ("loss", "norm")
        )
        table.add_row(str(i + 1), f"{truth.loss:.4f}", *losses, f"{truth.norm:.4f}", *norms)
    return table


def columns(*left: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table with these columns."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table

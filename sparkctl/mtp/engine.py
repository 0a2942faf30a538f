"""The MTP head behind the training loop's interface: held against the frozen model's own distribution.

For every trained token t_{j+1} the model's state h_j is the teacher, and step k's state at row j - k the student:

    loss = Σ_k w_k Σ_j KL(softmax(lm_head h_j) ‖ softmax(lm_head s_{k, j-k})),   w_k = DECAY^(k-1) / Σ

or cross-entropy against t_{j+1} in place of KL. All draft states are made first; then one chunk of targets at a time
has its teacher made once and held against each student. Gradients reach the head's tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sparkctl_kernels.distillation import op as distillation
from sparkctl_kernels.documents import upload
from sparkctl_kernels.linear_cross_entropy import op as linear_cross_entropy

from sparkctl.data.batches import Pack
from sparkctl.manifest.table import HeadLoss
from sparkctl.mtp.drafter import Drafter, Tensor
from sparkctl.train.engines.native.engine import describe_ways, has_labels, pin_kernels, pinned
from sparkctl.train.engines.native.model import label_rows
from sparkctl.train.engines.native.projections import Left

if TYPE_CHECKING:
    from torch.nn import Parameter

# T tokens · M rows that draft · N target tokens · D hidden · V vocabulary


class Places(NamedTuple):
    """rows: those of the pack whose draft states are wanted, int64 [M], each once. teachers: those where the model's
    state is a teacher, int64 [N].

    Of each step: students, where among `rows` the state stands that guesses each target; given, what is known of it,
    int32 like students: the token, or for KL the bits of an fp32, 1 or 0 where a target stands too near its document's
    begin for the step (any row may be named there; cross-entropy leaves such targets out).
    """

    rows: Tensor
    teachers: Tensor
    students: list[Tensor]
    given: list[Tensor]


class HeadEngine:
    """Trains the drafter's head over `steps` draft steps; `decay` is the weight of a step beside the one before."""

    name = "mtp"

    def __init__(self, drafter: Drafter, *, steps: int, decay: float, loss: HeadLoss) -> None:
        self.drafter, self.loss, self.device = drafter, loss, drafter.device
        self.weights = step_weights(steps, decay)
        self._trained = drafter.head.published()
        self._stale = True  # an optimiser may have written to the masters since they were rounded
        self._left = Left()

    def parameters(self) -> dict[str, Parameter]:
        """The 15 masters by their published names."""
        return self._trained

    def micro_step(self, pack: Pack, scale: float) -> Tensor:
        """Loss of the pack, its gradient times `scale` added to each `.grad`."""
        if not has_labels(pack):
            self._stale = True  # the other ranks' gradients move this one's masters too
            return self._nothing()
        one = next(iter(self._trained.values()))
        if not self._left.untouched(one.grad):  # else an optimiser is still waited for
            self._refresh()
        self._stale = True
        hidden, at = self.drafter.hidden(pack), self._places(pack)
        with torch.enable_grad():
            states = self.drafter.states(pack, hidden, len(self.weights), at.rows)
        gradients = [torch.zeros_like(state) for state in states]
        loss = self._losses(at, hidden, [state.detach() for state in states], gradients, scale)
        torch.autograd.backward(states, gradients)
        self._left.note(one.grad)
        return loss

    @torch.no_grad()
    def eval_sum(self, pack: Pack) -> Tensor:
        """Loss of the pack."""
        if not has_labels(pack):
            return self._nothing()
        self._refresh()
        hidden, at = self.drafter.hidden(pack), self._places(pack)
        states = self.drafter.states(pack, hidden, len(self.weights), at.rows)
        return self._losses(at, hidden, states, [None] * len(states), 1.0)

    def describe(self) -> list[tuple[str, str]]:
        """Which operator runs on which kernel."""
        against = "the model's own distribution (KL)" if self.loss == "kl" else "the text (cross-entropy)"
        return [
            ("head", f"{len(self.weights)} draft steps against {against}; the model is frozen"),
            *((part.operator, f"{part.kernel} ({part.reason})") for part in self.drafter.parts),
            *describe_ways(),
            ("lm_head", "on label tokens, a teacher's chunk against every step's"),
        ]

    def choices(self) -> dict[str, str]:
        """What decides the bits: the device, on a CPU its threads, on a GPU the kernels, their tiles, the products that
        are not torch's."""
        return pinned(self.device, self.drafter.parts)

    def pin(self, choices: dict[str, str]) -> None:
        """Take the tiles that the first rank's tuner found, and the products as it computes them."""
        pin_kernels(choices)

    def _refresh(self) -> None:
        if self._stale:
            self.drafter.head.refresh()
            self._stale = False

    def _losses(
        self, at: Places, hidden_TD: Tensor, states: Sequence[Tensor], gradients: Sequence[Tensor | None], scale: float
    ) -> Tensor:
        """Σ w_k of the steps' losses; adds scale times the gradients of their states [M, D]."""
        head, steps = (
            self.drafter.model.head,
            list(zip(at.students, at.given, states, gradients, self.weights, strict=True)),
        )
        if self.loss == "kl":
            students = [
                distillation.Student(state, rows, given.view(torch.float32), weight, gradient)
                for rows, given, state, gradient, weight in steps
            ]
            losses = distillation.forward(hidden_TD[at.teachers], head, students, scale).unbind()
        else:
            losses = tuple(
                _cross_entropy(state, rows, given.long(), head, scale * weight, gradient)
                for rows, given, state, gradient, weight in steps
            )
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum()

    def _places(self, pack: Pack) -> Places:
        """Where the draft steps' states are wanted, and which of them guesses what."""
        rows, labels, inside = targets(pack)
        there = [inside >= step for step in range(1, len(self.weights) + 1)]
        behind = [rows - step for step in range(1, len(self.weights) + 1)]
        drafting = np.unique(np.concatenate([rows[:1], *(row[here] for row, here in zip(behind, there, strict=True))]))
        if self.loss == "kl":
            students = [
                np.searchsorted(drafting, np.where(here, row, drafting[0]))
                for row, here in zip(behind, there, strict=True)
            ]
            given = [here.astype(np.float32).view(np.int32) for here in there]
        else:
            students = [np.searchsorted(drafting, row[here]) for row, here in zip(behind, there, strict=True)]
            given = [labels[here] for here in there]
        drafts, teachers, *each = upload([drafting, rows, *students, *given], self.device)
        return Places(drafts.long(), teachers.long(), [row.long() for row in each[: len(there)]], each[len(there) :])

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=self.device)


def step_weights(steps: int, decay: float) -> list[float]:
    """What each draft step's loss weighs; together 1."""
    shares = [decay**step for step in range(steps)]
    return [share / sum(shares) for share in shares]


def targets(pack: Pack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every trained token, [N]: the row before it, where the model's state is the teacher; the token; the row's
    place in its document.
    """
    rows, labels = label_rows(pack)
    places = np.concatenate([np.arange(len(document.ids)) for document in pack.documents])
    return rows, labels, places[rows]


def _cross_entropy(
    states_MD: Tensor, rows_N: Tensor, labels_N: Tensor, head_VD: Tensor, scale: float, gradient_MD: Tensor | None
) -> Tensor:
    """Σ of a step's losses against the text; writes the gradient."""
    some_ND = states_MD[rows_N]
    made = None if gradient_MD is None else torch.empty_like(some_ND)
    loss = linear_cross_entropy.forward(some_ND, head_VD, labels_N, scale, dhidden_ND=made)
    if gradient_MD is not None and made is not None:
        gradient_MD.index_copy_(0, rows_N, made)
    return loss

"""How many tokens a server should have the MTP head draft, and the command that serves with so many.

A round of drafting costs one step of the model, which checks N drafts at once, and N steps of the head; it gives
1 + accepted(N) tokens. Decoding one sequence is bound by reading weights, so a step costs what it reads. With c the
head's bytes over the model's, N drafts are worth (1 + accepted(N)) / (1 + N·c) of decoding without.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from sparkctl.merge.serve import serve_model
from sparkctl.model import mtp
from sparkctl.model.inspect import ModelInfo, text_part
from sparkctl.words import counted

TYPICAL = (0.93, 0.89, 0.84)  # conditional acceptance of a trained head, published for GSM8K


@dataclass(frozen=True)
class Cost:
    """Parameters that a decoding step reads. Both count lm_head, the head's own as well: it is the model's."""

    model: int
    head: int
    lm_head: int

    @property
    def ratio(self) -> float:
        """c: the head's bytes beside the model's, both in the same dtype."""
        return self.head / self.model


@dataclass(frozen=True)
class DraftLength:
    """`tokens` to draft, 0 where it does not pay; `gain` times as fast as without; `reason` for a person."""

    tokens: int
    gain: float
    reason: str


def cost(info: ModelInfo) -> Cost:
    """Of a Qwen3.5: all layers and lm_head, and the head's 15 tensors and lm_head again.

    Left out are what a text step does not read (the vision tower, the embedding but for one row) and the KV cache.
    """
    text = text_part(info.config)
    lm_head = info.vocab_size * int(text["hidden_size"])
    unread = 0 if text.get("tie_word_embeddings") else lm_head  # the embedding, where it is not lm_head too
    own = sum(math.prod(shape) for shape in mtp.shapes(text).values())
    return Cost(info.text_parameters - unread, own + lm_head, lm_head)


def choose(cost: Cost, accepted: Sequence[float] | None, measure: str) -> DraftLength:
    """The number of drafts that pays most.

    accepted: tokens accepted a round where 1, 2, … are drafted; None takes what is typical. measure: the command that
    measures it.
    """
    rates = accepted if accepted is not None else list(accumulate(accumulate(TYPICAL, mul)))
    gains = [1.0, *((1 + rate) / (1 + n * cost.ratio) for n, rate in enumerate(rates, 1))]
    best = max(range(len(gains)), key=gains.__getitem__)
    reason = f"{_why(best, gains, rates, cost)}; {_basis(accepted is not None, measure)}"
    if accepted and best == len(accepted):
        reason += f"; `{measure} --draft-length {best + 2}` tries longer ones"
    return DraftLength(best, gains[best], reason)


def _why(best: int, gains: Sequence[float], rates: Sequence[float], cost: Cost) -> str:
    read = (
        f"a step of the head reads {cost.ratio:.2f} of what one of the model does "
        f"({_parameters(cost.head)} of {_parameters(cost.model)} parameters, lm_head in both)"
    )
    if best == 0:
        return f"no drafts: {gains[1]:.2f} times as fast at best, since {read}"
    others = ", ".join(f"{n}: {gain:.2f}" for n, gain in enumerate(gains) if 0 < n != best)
    return (
        f"{counted(best, 'draft')}: {1 + rates[best - 1]:.2f} tokens a round, {gains[best]:.2f} times as fast as none "
        f"({others}); {read}"
    )


def _parameters(count: int) -> str:
    unit, name = next((unit, name) for unit, name in ((1e9, "B"), (1e6, "M"), (1, "")) if count >= unit)
    return f"{count / unit:.3g} {name}" if name else f"{count:,}"


def _basis(measured: bool, measure: str) -> str:
    if measured:
        return "acceptance as measured"
    typical = "/".join(f"{rate:.2f}".lstrip("0") for rate in TYPICAL)
    return f"acceptance is assumed ({typical}, each of those accepted before): `{measure}` measures it"


def serve_drafting(folder: str, name: str, length: int, drafts: int) -> str:
    """vLLM on a folder with a head; without drafts where there are to be none."""
    command = serve_model(folder, name, length)
    if drafts == 0:
        return command
    config = json.dumps({"method": "mtp", "num_speculative_tokens": drafts}, separators=(",", ":"))
    return f"{command} --speculative-config {shlex.quote(config)}"

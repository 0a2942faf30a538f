"""What a plan does as it was told and a person may not have meant: said beside the reason, never refused."""

from __future__ import annotations

from collections.abc import Iterator

from sparkctl.plan import rules
from sparkctl.plan.estimates import Documents
from sparkctl.plan.resolve import Decisions

STEEP = 10.0  # times the usual rate


def doubts(
    made: Decisions, documents: Documents, parameters: int, steps: int, epoch_steps: int
) -> Iterator[tuple[str, str]]:
    """(name of the choice, what is odd about it). steps: those of the run; epoch_steps: those of one epoch."""
    values = made.values
    usual = rules.learning_rate(values["mode"], parameters).value
    if values["learning_rate"] > STEEP * usual:
        yield "learning_rate", f"{values['learning_rate'] / usual:,.0f} times the usual {usual:g}: training may diverge"
    if made.given("tokens_per_step") and values["tokens_per_step"] < documents.longest:
        yield (
            "tokens_per_step",
            f"fewer than the longest document has, {documents.longest:,}: no document is cut, so a step sees "
            f"packs of up to {values['pack_length']:,} all the same",
        )
    most = values.get("max_steps")
    if most and most > steps:
        yield "max_steps", f"the run ends after {steps:,} steps: raise the epochs to train longer"
    elif most and most < epoch_steps and made.origin["max_steps"] != "flag":
        unseen = "a part of the data goes unseen"
        yield "max_steps", f"of an epoch's {epoch_steps:,} steps, so {unseen}: `--max-steps {epoch_steps}` is all of it"
    if not len(documents.held_out_lengths):
        yield "keep", "nothing is held out, so no loss tells which checkpoint is the best: the last one counts as it"

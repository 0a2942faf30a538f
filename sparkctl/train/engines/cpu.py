"""How an engine computes on a CPU: with the same bits at each run, on as many threads as help."""

from __future__ import annotations

NARROW = 512  # hidden width up to which threads mostly wait for each other, and for any other program on the machine


def settle(hidden: int, choices: dict[str, str]) -> None:
    """Deterministic functions; the threads of an earlier start, else one for a narrow model and torch's own for others.

    The demo's model (192 wide) takes 0.5 s a step on one thread of two cores; on two threads 0.3 s where nothing else
    runs, and up to 12 s where something does.
    """
    import torch

    torch.set_deterministic_debug_mode("error")
    # the determinism costs nothing; filling every new tensor with NaN would
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # untyped module
    usual = 1 if hidden <= NARROW else torch.get_num_threads()
    torch.set_num_threads(int(choices.get("threads", usual)))

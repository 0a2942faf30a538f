"""How an engine computes on a CPU: with the same bits at each run, on as many threads as help, in little memory."""

from __future__ import annotations

from sparkctl import env

NARROW = 512  # hidden width up to which threads mostly wait for each other, and for any other program on the machine


def settle(hidden: int, choices: dict[str, str]) -> None:
    """Deterministic functions; few compiled products kept; the threads of an earlier start, else one for a narrow
    model and torch's own for others.

    The demo's model (192 wide) takes 0.5 s a step on one thread of two cores; on two threads 0.3 s where nothing else
    runs, and up to 12 s where something does.

    Every pack has lengths of its own, for each of which oneDNN compiles its products anew. Kept by the thousand they
    took 1 GB within 30 packs of two layers of 64 features (peak 1,656 MB after 59 steps), and were never used again:
    with 64 the peak is 684 MB, at the same rate and with the same bits.
    """
    env.keep_few_products()
    import torch

    torch.set_deterministic_debug_mode("error")
    # the determinism costs nothing; filling every new tensor with NaN would
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # untyped module
    usual = 1 if hidden <= NARROW else torch.get_num_threads()
    torch.set_num_threads(int(choices.get("threads", usual)))

"""What the training loop asks of an engine, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

    from sparkctl.data.batches import Pack


class Engine(Protocol):
    """Computes a pack's loss and gradients. The loop owns steps, scaling, optimiser, checkpoints and ranks.

    Losses come back as tensors, 0-dim fp32 on the engine's device, which the loop reads once an optimiser step: a GPU
    is never made to wait between two packs. A pack without documents gives zero and adds nothing.
    """

    name: str
    device: torch.device

    def parameters(self) -> dict[str, Parameter]:
        """What is trained, fp32 masters by checkpoint or adapter name, always in the same order."""
        ...

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """Sum of the label tokens' losses, unscaled; adds `scale` times its gradient to each fp32 `.grad`."""
        ...

    def eval_sum(self, pack: Pack) -> torch.Tensor:
        """Sum of the label tokens' losses, without gradients."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """Which part runs on what, for a person."""
        ...

    def choices(self) -> dict[str, str]:
        """What a run is pinned to so that a resumed one repeats it bit for bit."""
        ...

    def pin(self, choices: dict[str, str]) -> None:
        """Take what the first rank's tuner found, whose choices these are: kernels are tuned by time, on each rank."""
        ...

"""What every Python of the server's environment does first, through PYTHONPATH: make torchvision importable.

torchvision's wheel on PyPI is built against torch with CUDA; beside torch's CPU build its library of operators cannot
be loaded. torchvision goes on without it until it registers what two of them do on tensors without data, and that fails
("operator torchvision::nms does not exist"), and with it transformers' image processors and vLLM's Qwen3.5. So the two
are declared here, the moment torchvision is looked for. They are never called: nothing detects objects here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing: it only hears that torchvision is wanted, once."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Declare the operators where torchvision itself is looked for; the next finder goes on."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare()


def declare() -> None:
    """Names and arguments without a body. torchvision takes them for its own library's, as they would be there."""
    import torch

    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", SIGNATURE)


sys.meta_path.insert(0, BeforeTorchvision())

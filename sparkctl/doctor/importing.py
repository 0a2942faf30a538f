"""One library imported in a process of its own: `python -m sparkctl.doctor.importing NAME`; its facts as JSON.

An import may crash, hang or raise; here that is an answer. What a library prints on the way goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any


def main(name: str) -> None:
    """Import it and print what it says of itself."""
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # not sys.stdout alone: compiled code writes there too, and handlers at the end of the process
        module = import_module(name)
        facts = {"version": getattr(module, "__version__", None), **(torch_facts(module) if name == "torch" else {})}
        print(json.dumps(facts), file=answer)


def torch_facts(torch: Any) -> dict[str, Any]:
    """CUDA that it was built for, architectures of its kernels, whether it finds the GPU."""
    built = getattr(getattr(torch, "version", None), "cuda", None)
    if built is None:
        return {"cuda": None, "architectures": [], "available": False}
    flags = torch._C._cuda_getArchFlags() or ""
    return {"cuda": built, "architectures": flags.split(), "available": torch.cuda.is_available()}


if __name__ == "__main__":
    main(sys.argv[1])

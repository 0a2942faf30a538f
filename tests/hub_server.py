"""A hub on 127.0.0.1 that serves folders as models, by the routes that huggingface_hub uses, with faults to order."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

# what huggingface_hub reads of the environment, beside HF_ENDPOINT and HF_HOME
SETTINGS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)  # fmt: skip
SHARD_BYTES = 400_000  # several chunks of a connection that breaks
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = {
    "config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model",
    "model.safetensors.index.json",
}  # fmt: skip


def repository(made: Path) -> Path:
    """A folder with everything that a repository may hold: `SMALL` and `SHARDS` are what training reads of it."""
    (made / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "onnx/config.json"):
        (made / name).write_text(f'{{"of": "{name}"}}')
    for name in ("chat_template.jinja", "merges.txt", "tokenizer.model", "README.md", "pytorch_model.bin", "code.py"):
        (made / name).write_text(name)
    for shard in SHARDS:
        (made / shard).write_bytes(os.urandom(SHARD_BYTES))
    (made / "consolidated.safetensors").write_bytes(os.urandom(10))  # the same weights once more, in another format
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


@dataclass
class Fault:
    """What happens to requests whose line ("GET /org/name/…") holds `where`, `times` times.

    status: the answer, with `headers` and the hub's `code` (X-Error-Code). cut: bytes of the body after which the
    connection breaks. body: of a refusal. page: a web page in place of the answer. whole: the file, whatever Range was
    asked for. said: a Content-Range of other numbers. damaged: the last byte is another. surplus: bytes of the body
    beyond what it should be (fewer where negative), and a length to match.
    """

    where: str
    status: int = 0
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int | None = None
    page: bool = False
    whole: bool = False
    said: str = ""
    surplus: int = 0
    damaged: bool = False
    times: int = 10**9


@dataclass
class HubServer:
    """`url` is what HF_ENDPOINT has to say; `token`, where set, what a client has to show; `requests` were made.

    weights_at, small_at: the host that a request for weights, or for any other file, is sent on to.
    """

    url: str = ""
    token: str | None = None
    weights_at: str | None = None
    small_at: str | None = None
    lists_digests: bool = False  # of the weights, as the hub does of large files
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0  # bytes of bodies
    parts: list[tuple[str, int, int]] = field(default_factory=list)  # (file, start, stop) sent of those asked by Range
    tokens: set[str | None] = field(default_factory=set)  # what clients showed
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)  # model: commit: folder, the newest last

    def publish(self, model: str, folder: Path) -> str:
        """Serve `folder` as the newest commit of `model`, and return that."""
        digest = hashlib.sha1(model.encode())
        for path in sorted(folder.rglob("*")):
            digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
        self.commits.setdefault(model, {})[digest.hexdigest()] = folder
        return digest.hexdigest()

    def fail(self, where: str, **how: Any) -> None:
        """Add a fault."""
        self.faults.append(Fault(where, **how))

    def fault(self, line: str) -> Fault | None:
        """The fault of a request."""
        for fault in self.faults:
            if fault.where in line and fault.times > 0:
                fault.times -= 1
                return fault
        return None


@contextmanager
def hub() -> Iterator[HubServer]:
    """A running server."""
    served = HubServer()

    class Handler(_Handler):
        hub = served

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        shown = self.headers.get("Authorization")
        self.hub.tokens.add(shown)
        fault = self.hub.fault(line)
        if fault and fault.page:
            return self._send(200, b"<html>a web page</html>", {"Content-Type": "text/html"})
        if fault and fault.status:
            return self._refuse(fault.status, fault.code, fault.headers, fault.body)
        if self.hub.token and shown != f"Bearer {self.hub.token}":
            return self._refuse(401, "" if shown else "RepoNotFound")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"]:
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), fault or Fault(""))
        return self._refuse(404, "")

    def _api(self, model: str, rest: list[str]) -> None:
        """/api/models/ORG/NAME, …/revision/REV and …/tree/COMMIT."""
        found = self._commit(model, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return
        commit, folder = found
        files: list[dict[str, Any]] = [
            {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": _etag(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        ]
        for file in files if self.hub.lists_digests else ():
            if file["path"].endswith(".safetensors"):
                digest = hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest()
                file["lfs"] = {"oid": digest, "size": file["size"], "pointerSize": 134}
        siblings = [{"rfilename": file["path"]} for file in files]
        answer = files if rest[:1] == ["tree"] else {"id": model, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, model: str, revision: str, name: str, fault: Fault) -> None:
        """/ORG/NAME/resolve/REV/FILE, a part of it where the client asks for a Range."""
        found = self._commit(model, revision)
        if found is None:
            return
        commit, folder = found
        if not (folder / name).is_file():
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        body, status = (folder / name).read_bytes(), 200
        headers = {"ETag": f'"{_etag(folder / name)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if elsewhere := self.hub.weights_at if name.endswith(".safetensors") else self.hub.small_at:
            linked = {"Location": elsewhere + self.path, "X-Linked-ETag": headers["ETag"]}
            linked["X-Linked-Size"] = str(len(body))
            return self._send(302, b"", linked | {"X-Repo-Commit": commit})
        if fault.damaged:
            body = body[:-1] + bytes([body[-1] ^ 1])
        wanted = self.headers.get("Range")
        if wanted and not fault.whole:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(body) - 1) + 1, len(body))
            if start >= len(body):
                return self._refuse(416, "")
            headers["Content-Range"] = f"bytes {fault.said or f'{start}-{stop - 1}/{len(body)}'}"
            body, status = body[start:stop], 206
            self.hub.parts.append((name, start, start + min(len(body), len(body) if fault.cut is None else fault.cut)))
        body = body[: fault.surplus] if fault.surplus < 0 else body + bytes(fault.surplus)
        self._send(status, body, headers, fault.cut)

    def _commit(self, model: str, revision: str) -> tuple[str, Path] | None:
        """(commit, folder), or None after a refusal."""
        commits = self.hub.commits.get(model)
        if commits is None:
            return self._refuse(404, "RepoNotFound")
        commit = next(reversed(commits)) if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else self._refuse(404, "RevisionNotFound")

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None, body: bytes = b"{}") -> None:
        self._send(status, body, {"X-Error-Code": code, **(headers or {})} if code else headers or {})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.hub.sent += self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()

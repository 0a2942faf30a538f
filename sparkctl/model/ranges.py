"""Parts of a hub model's file by HTTP Range: the bytes of some tensors, not the gigabytes around them."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sparkctl.errors import SparkError
from sparkctl.model.download import Hub, asked_to_wait, sentence
from sparkctl.progress import Progress, silent

if TYPE_CHECKING:
    import httpx

TRIES = 5  # in a row without a byte, then it is given up
PATIENCE = 300  # seconds that a server may ask us to wait: the hub counts requests in windows of so many
CONNECT, READ = 10.0, 20.0  # seconds without an answer
BUSY = {408, 429, 500, 502, 503, 504}
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RangesIgnored(Exception):
    """The server answers with the whole file whatever part is asked for."""


class RemoteFile:
    """One file of a commit. `size` (bytes) and `etag` are known once something was read; from then on they must not
    change.

    progress: hears of each time that a request is made again.
    """

    def __init__(self, hub: Hub, commit: str, name: str, progress: Progress = silent) -> None:
        self._hub, self._commit, self.name, self._progress = hub, commit, name, progress
        self.etag = ""
        self.size = hub.sizes(commit).get(name)  # the list of a commit's files says it, where the hub has one

    @property
    def shown(self) -> PurePosixPath:
        """Its name in messages."""
        return PurePosixPath(self._hub.id) / self.name

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        return b"".join(self.pieces(start, stop))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) as they arrive; where the connection breaks, the rest is asked for again.

        Raises RangesIgnored; SparkError where the hub refuses, breaks off for good, or sends other bytes.
        """
        with closing(self._persistent(start, stop)) as source:
            while True:
                with self._hub.explained(self._commit, self.name):
                    piece = next(source, None)
                if piece is None:
                    return
                yield piece

    def _persistent(self, start: int, stop: int) -> Generator[bytes]:
        """The bytes over as many requests as it takes. Raises what the last of `TRIES` raised, or one before it that
        asks for more than our patience.
        """
        import httpx

        failures = 0
        while start < stop:
            broken: Exception = httpx.RemoteProtocolError("the connection closed half way")
            try:
                for piece in self._request(start, stop):
                    start, failures = start + len(piece), 0
                    yield piece
            except (httpx.TransportError, _Busy) as error:
                broken = error
            if start < stop:
                failures += 1
                wait = broken.wait if isinstance(broken, _Busy) else 0
                if failures == TRIES or wait > PATIENCE:
                    raise broken.cause if isinstance(broken, _Busy) else broken
                said = f"HTTP {broken.status}" if isinstance(broken, _Busy) else sentence(broken)
                then = f" in {wait} s, as it asks" if wait else ""
                self._progress.say(f"`{self.shown}`: {said}; asking again{then}")
                time.sleep(max(2.0 ** (failures - 1), wait))

    def _request(self, start: int, stop: int) -> Iterator[bytes]:
        import httpx
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        url = hf_hub_url(self._hub.id, self.name, revision=self._commit, endpoint=self._hub.endpoint)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = httpx.Timeout(READ, connect=CONNECT)
        with get_session().stream("GET", url, headers=build_hf_headers(headers=wanted), timeout=timeout) as answer:
            self._check(answer, start, stop)
            left = stop - start
            for piece in answer.iter_raw():  # as it comes: what waited in a buffer would be lost with the connection
                left -= len(piece)
                if left < 0:
                    raise self._strange(f"more bytes than the {stop - start:,} asked for")
                yield piece

    def _check(self, answer: httpx.Response, start: int, stop: int) -> None:
        """Whether the answer is that part of the file, and the file the one of before."""
        if answer.status_code >= 400:
            self._refuse(answer, start, stop)
        found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or not found or answer.headers.get("Content-Encoding", "identity") != "identity":
            raise RangesIgnored
        first, last, size = map(int, found.groups())
        if (first, last) != (start, stop - 1):
            raise self._strange(f"bytes {first:,} to {last:,}, and {start:,} to {stop - 1:,} were asked for")
        if self.size is not None and size != self.size:
            raise self._strange(f"a file of {size:,} bytes, and it has {self.size:,}")
        commit, etag = (_said(answer, name) for name in ("X-Repo-Commit", "X-Linked-ETag"))
        if commit not in ("", self._commit):
            raise self._strange(f"a file of another commit, {commit}")
        etag = etag or answer.headers.get("ETag", "")
        if self.etag and etag != self.etag:
            raise self._strange("another file than before: it was replaced meanwhile")
        self.size, self.etag = size, etag

    def _refuse(self, answer: httpx.Response, start: int, stop: int) -> None:
        """Raise what a status from 400 on means."""
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import hf_raise_for_status

        answer.read()
        if answer.status_code == 416:
            raise self._strange(f"HTTP 416: it has no bytes {start:,} to {stop - 1:,}")
        try:
            hf_raise_for_status(answer)
        except (HfHubHTTPError, UnicodeDecodeError) as error:  # the latter at a page that is not in UTF-8
            if answer.status_code in BUSY:
                raise _Busy(error, answer.status_code, asked_to_wait(answer)) from error
            raise

    def _strange(self, what: str) -> SparkError:
        return SparkError(
            f"the hub answers for `{self.shown}` with {what}",
            "run the same command again; if it stays so, download the model and name its folder",
        )


def _said(answer: httpx.Response, header: str) -> str:
    """A header of the answer or, where it came by a redirect, of the hub's own answer before it."""
    return next((said.headers[header] for said in (*answer.history, answer) if header in said.headers), "")


class _Busy(Exception):
    """A refusal that passes. wait: seconds that it asks for."""

    def __init__(self, cause: Exception, status: int, wait: int) -> None:
        super().__init__()
        self.cause, self.status, self.wait = cause, status, wait

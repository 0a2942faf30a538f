"""Files of a hub model through huggingface_hub: its cache, its locks, its continuation of a broken connection.

What goes wrong is said in this program's words; huggingface_hub's own bars and warnings stay silent, and no message
holds a token or a password. The token is shown to the hub alone: see `model.token`.
"""

from __future__ import annotations

import errno
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sparkctl.errors import SparkError, UsageError
from sparkctl.files import sha256_file
from sparkctl.model.token import keep_token
from sparkctl.progress import Progress, Task

if TYPE_CHECKING:
    import httpx

SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]  # config, tokenizer, templates, the index of the weights
NESTED = ["*/*"]  # other formats of the model lie in subfolders
MB = 10**6
TOO_MANY = 429
ADDRESS = re.compile(r"'?\w+://\S+")
AGAIN = "run the same command again: files that are complete are kept"


class Hub:
    """One model of the hub at `endpoint`; with `offline` its files in `cache`, huggingface_hub's folder, are all."""

    def __init__(self, id: str, endpoint: str, cache: Path, *, offline: bool) -> None:
        self.id, self.endpoint, self.cache, self.offline = id, endpoint, cache, offline
        self._common: dict[str, Any] = dict(endpoint=endpoint, cache_dir=cache, local_files_only=offline)

    def small_files(self, revision: str | None, patterns: Sequence[str] = SMALL) -> Path:
        """The folder of the commit that `revision` is (None: the newest), everything but weights in it, or what fits
        one of `patterns`; it is named after the commit. A commit that is there is not asked for again.
        """
        from huggingface_hub import snapshot_download

        with self.explained(revision):
            folder = snapshot_download(
                self.id, revision=revision, allow_patterns=list(patterns), ignore_patterns=NESTED,
                tqdm_class=_quiet_bar(), **self._common,
            )  # fmt: skip
        return Path(folder)

    def weights(self, commit: str, names: list[str], progress: Progress) -> None:
        """Download these files, one after the other so that Ctrl-C stops at once. Raises SparkError where one has not
        the sha256 that the hub lists for it; it is not kept.
        """
        from huggingface_hub import hf_hub_download

        if not names:
            return
        sizes = self.sizes(commit)
        digests = {} if self.offline else self._digests(commit)
        total = sum(sizes[name] for name in names) if sizes.keys() >= set(names) else None
        if total and not self.offline:
            self._require_space(total)
        with progress.task(f"downloading {self.id}", total, "B") as task:
            for name in names:
                with self.explained(commit, name):
                    path = hf_hub_download(self.id, name, revision=commit, tqdm_class=_bar(task), **self._common)
                self._check(Path(path), name, digests.get(name))

    def sizes(self, commit: str) -> dict[str, int]:
        """Bytes of each file of a commit, where the cache has the list."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            files = get_cached_repo_tree(self.id, revision=commit, cache_dir=self.cache)
        except CachedRepoTreeNotFoundError:
            return {}
        return {file.path: file.lfs.size if file.lfs else file.size for file in files}

    def _digests(self, commit: str) -> dict[str, str]:
        """The sha256 of each large file of a commit, asked of the hub: the list in the cache is read without it."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self.explained(commit):
            files = list(HfApi(endpoint=self.endpoint).list_repo_tree(self.id, revision=commit))
        return {file.path: file.lfs.sha256 for file in files if isinstance(file, RepoFile) and file.lfs}

    def _check(self, path: Path, name: str, digest: str | None) -> None:
        if digest and sha256_file(path) != digest:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise SparkError(f"`{self.id}/{name}` came with other bytes than the hub lists: its sha256 differs", AGAIN)

    def _require_space(self, size: int) -> None:
        free = shutil.disk_usage(self.cache).free
        if size > free:
            raise SparkError(
                f"the weights of `{self.id}` take {size / MB:,.1f} MB, and `{self.cache}` has {free / MB:,.1f} MB free",
                "free some space there, or set HF_HUB_CACHE to a folder on a larger disk",
            )

    @contextmanager
    def explained(self, revision: str | None, file: str | None = None) -> Iterator[None]:
        """Quiet in this block, the token for the hub alone; an error that a user can mend becomes a SparkError."""
        keep_token(self.endpoint)
        with _quiet():
            try:
                yield
            except Exception as error:
                said = self._explain(error, revision, file)
                if said is None:
                    raise
                raise said from None

    def _explain(self, error: BaseException, revision: str | None, file: str | None) -> SparkError | None:
        """What `error` means to the user; None: a bug of ours."""
        import httpx
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            return self._explain(error.__cause__, revision, file)
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return SparkError(
                f"`{self.id}` is not in `{self.cache}` as a whole, and HF_HUB_OFFLINE forbids to download it",
                "check the path, or unset HF_HUB_OFFLINE, and run the same command again",
            )
        if isinstance(error, errors.HfHubHTTPError):
            return self._refused(error, revision, file)
        if isinstance(error, UnicodeEncodeError | httpx.LocalProtocolError):  # their text may hold the token
            return UsageError("the token for the hub has characters that no token has", "set HF_TOKEN anew")
        if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return UsageError(f"HF_ENDPOINT is no address: `{self.shown}`", "it begins with https://")
        if isinstance(error, httpx.ConnectError | httpx.TimeoutException | httpx.ProxyError):
            return SparkError(
                f"`{self.id}` is no folder here, and cannot reach `{self.shown}`: {sentence(error)}",
                "check the path, the network, HF_ENDPOINT; with HF_HUB_OFFLINE=1 what was downloaded before is used",
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return SparkError(
                f"no space left in `{self.cache}` for `{self.id}`",
                "free some space there, or set HF_HUB_CACHE to a folder on a larger disk, and run it again",
            )
        if isinstance(error, errors.FileMetadataError | JSONDecodeError | UnicodeDecodeError):
            return SparkError(f"`{self.shown}` does not answer as a hub does", "check HF_ENDPOINT")
        if isinstance(error, OSError) and error.filename is not None:
            return None  # the command line names the place
        if isinstance(error, httpx.HTTPError | OSError | RuntimeError | errors.XetDownloadError):
            return SparkError(f"the download of `{self.id}` broke off: {sentence(error)}", AGAIN)
        return None

    def _refused(self, error: Any, revision: str | None, file: str | None) -> SparkError:
        """What the hub's answer means."""
        from huggingface_hub import errors

        status = error.response.status_code
        if isinstance(error, errors.GatedRepoError):
            return SparkError(
                f"`{self.id}` is gated: its owner has to let you in",
                f"accept its terms at {self.shown}/{self.id} and set HF_TOKEN to a token of that account",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UsageError(f"`{self.id}` has no revision `{revision}`", "its owner may have removed it")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            what = f"`{file}`" if file else "one of the files that it lists"
            return SparkError(f"`{self.id}` has no {what}", "only safetensors are read: take a model that has them")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return UsageError(
                f"no model `{self.id}`, neither as a folder nor on `{self.shown}`",
                "check the spelling; where it is private, set HF_TOKEN to a token that may read it",
            )
        if status in (401, 403):
            return SparkError(
                f"`{self.shown}` refuses access to `{self.id}` (HTTP {status})",
                "set HF_TOKEN to a token that may read it",
            )
        wait = asked_to_wait(error.response)
        asks = f" and asks to wait {wait:,} s" if wait else ""
        message = f"`{self.shown}` answered HTTP {status} for `{self.id}`{asks}"
        return SparkError(message, f"wait {f'{wait:,} s' if wait else 'a little'}, then {AGAIN}")

    @property
    def shown(self) -> str:
        """The endpoint without a password."""
        parts = urlsplit(self.endpoint)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def asked_to_wait(answer: httpx.Response) -> int:
    """Seconds that a refusal asks for before the next request, by the standard's header or the hub's own; else 0."""
    from huggingface_hub.utils import parse_ratelimit_headers

    said = answer.headers.get("Retry-After", "").strip()
    try:
        return int(said) if said.isdecimal() else max(0, ceil(parsedate_to_datetime(said).timestamp() - time.time()))
    except (ValueError, OverflowError):
        limit = parse_ratelimit_headers(answer.headers) if answer.status_code == TOO_MANY else None
        return limit.reset_in_seconds if limit else 0


def sentence(error: BaseException) -> str:
    """The first line of an error's text, without addresses: they may hold a password or be signed."""
    text = str(error).strip().splitlines()
    line = ADDRESS.sub("…", text[0]) if text else type(error).__name__
    line = re.sub(r"^\[Errno -?\d+\] ", "", line).rstrip(".")
    return line[:1].lower() + line[1:]


@contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub and its workers say nothing."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _quiet_bar() -> Any:
    """A tqdm class that draws nothing."""
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})

    return Quiet


def _bar(task: Task) -> Any:
    """A class with as much of tqdm as huggingface_hub uses for one file; its bytes go to `task`."""

    class Bar:
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            task.advance(initial)

        def update(self, amount: float | None = 1) -> None:
            task.advance(amount or 0)

        def update_transfer(self, amount: float | None = 1) -> None:
            """Bytes on the wire: counted when they are on the disk."""

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        set_transfer_postfix_str = refresh = close = set_postfix_str

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    return Bar

"""The token is shown to the hub alone: where it sends a request on to another address, huggingface_hub would take the
token along to any port of the same host, and httpx to the https of it.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

AUTHORIZATION = "Authorization"
_LOCK = Lock()
_kept_for: str | None = None  # the endpoint of the client that is in use: a new one would end what runs
_usual: list[Callable[..., Any]] | None = None  # what huggingface_hub does at each request: nothing while offline


def keep_token(endpoint: str) -> None:
    """Let all that huggingface_hub asks in this process show the token to `endpoint` and to no other address."""
    from huggingface_hub import get_session, set_client_factory

    global _kept_for, _usual
    with _LOCK:
        usual = _usual = list(get_session().event_hooks["request"]) if _usual is None else _usual
        if _kept_for != endpoint:
            set_client_factory(lambda: client(endpoint, usual))
            _kept_for = endpoint


def client(endpoint: str, usual: list[Callable[..., Any]]) -> httpx.Client:
    """One as huggingface_hub makes it: it follows, each call says how long it waits, `usual` is done at each."""
    import httpx

    def drop(request: httpx.Request) -> None:
        if not same_address(request.url, endpoint):
            request.headers.pop(AUTHORIZATION, None)

    return httpx.Client(event_hooks={"request": [*usual, drop]}, follow_redirects=True, timeout=None)


def same_address(url: httpx.URL, endpoint: str) -> bool:
    """Whether scheme, host and port are the endpoint's; False where that is no address."""
    import httpx

    try:
        own = httpx.URL(endpoint)
    except httpx.InvalidURL:
        return False
    return (url.scheme, url.host, _port(url)) == (own.scheme, own.host, _port(own))


def _port(url: httpx.URL) -> int | None:
    return url.port or {"http": 80, "https": 443}.get(url.scheme)

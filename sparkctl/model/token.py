"""The token is shown to the hub alone: where it sends a request on to another address, huggingface_hub would take the
token along to any port of the same host, and httpx to the https of it.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

AUTHORIZATION = "Authorization"
_LOCK = Lock()
_kept_for: str | None = None  # the endpoint of the client that is in use: a new one would end what runs


def keep_token(endpoint: str) -> None:
    """Let all that huggingface_hub asks in this process show the token to `endpoint` and to no other address."""
    from huggingface_hub import set_client_factory

    global _kept_for
    with _LOCK:
        if _kept_for != endpoint:
            set_client_factory(lambda: client(endpoint))
            _kept_for = endpoint


def client(endpoint: str) -> httpx.Client:
    """One as huggingface_hub makes it: it follows, and each call says how long it waits."""
    import httpx

    def drop(request: httpx.Request) -> None:
        if not same_address(request.url, endpoint):
            request.headers.pop(AUTHORIZATION, None)

    return httpx.Client(event_hooks={"request": [drop]}, follow_redirects=True, timeout=None)


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

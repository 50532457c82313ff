"""What every request passes: it is counted, and checked for a name of this server and for the key."""

import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.server.connection import HAS_LEFT
from moe_jax.server.counters import Counters
from moe_jax.server.requests import RequestError

OPEN = ("/", "/healthz")
"""Paths that need no key."""
PATHS = (*OPEN, "/metrics", "/v1/models", "/v1/completions")


class Count:
    """Counts each request by its endpoint and the status of its answer."""

    def __init__(self, app: ASGIApp, counters: Counters):
        self._app, self._counters = app, counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message.get("body") and not message.get("more_body", False):
                # The end by itself: it is sent once the rest was taken, so that a client that was cut is known.
                await send({**message, "more_body": True})
                message = {"type": message["type"], "body": b"", "more_body": False}
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        finally:
            has_left = scope["state"].get(HAS_LEFT, False)
            self._counters.requests.labels(_endpoint(scope["path"]), 499 if has_left else status).inc()


def _endpoint(path: str) -> str:
    """One of a few names: clients may ask for any number of paths."""
    if path in PATHS:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class Guard:
    """RequestError for a request that calls the server by a name not among ``names`` (None: any), or lacks the key.

    Starlette's TrustedHostMiddleware answers in plain text, without the remedy.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None, api_key: bytes | None):
        self._app, self._api_key = app, api_key
        self._names = names and {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        name = re.sub(r":\d*\Z", "", headers.get("host", ""))
        if self._names and name.lower() not in self._names:
            remedy = "use the address that it printed at its start"
            raise RequestError(f"this server is not called {name[:80]!r}; {remedy}")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._api_key is not None and scope["path"] not in OPEN:
            # In constant time: how long it takes says nothing of how much of the key was right.
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._api_key)
            if scheme.lower() != "bearer" or not is_right:
                message = "this server asks for its key, as the header Authorization: Bearer KEY"
                bearer = {"WWW-Authenticate": "Bearer"}
                raise RequestError(message, status=401, code="invalid_api_key", headers=bearer)
        await self._app(scope, receive, send)

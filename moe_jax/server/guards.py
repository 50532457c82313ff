"""What every request passes: it is counted, and asked for a name of this server and for the key."""

import hmac
import re
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.server.connection import HAS_LEFT
from moe_jax.server.metrics import Metrics
from moe_jax.server.responses import error_object, json_bytes

OPEN = ("/", "/healthz")
"""Paths that need no key."""
PATHS = (*OPEN, "/metrics", "/v1/models", "/v1/completions")


class Count:
    """Counts each request by its endpoint and the status of its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
            self._metrics.requests[_endpoint(scope["path"]), 499 if has_left else status] += 1


def _endpoint(path: str) -> str:
    """One of a few names: what clients ask for is without end."""
    if path in PATHS:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class AskForName:
    """Lets a request pass that calls the server by one of its names."""

    def __init__(self, app: ASGIApp, names: Sequence[str]):
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        name = re.sub(r":\d*\Z", "", given)
        if name.lower() in self._names:
            await self._app(scope, receive, send)
            return
        message = f"this server is not called {name[:80]!r}; use the address that it printed at its start"
        await _refuse(message, 400)(scope, receive, send)


class AskForKey:
    """Lets a request pass that has the key, or needs none."""

    def __init__(self, app: ASGIApp, api_key: bytes | None):
        self._app, self._api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api_key is None or scope["path"] in OPEN or self._is_known(scope, self._api_key):
            await self._app(scope, receive, send)
            return
        message = "this server asks for its key, as the header Authorization: Bearer KEY"
        refusal = _refuse(message, 401, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _is_known(self, scope: Scope, api_key: bytes) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                # In constant time: how long it takes tells nothing of how much of the key was right.
                return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), api_key)
        return False


def _refuse(message: str, status: int, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    content = json_bytes(error_object(message, status=status, code=code))
    return Response(content, status, headers, media_type="application/json")

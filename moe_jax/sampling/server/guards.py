"""What every request passes: it is counted, and asked for the key."""

import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.sampling.server.metrics import Metrics
from moe_jax.sampling.server.responses import error_object, json_bytes

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
        status, is_whole, has_left = 500, False, False

        async def noted_send(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def noted_receive() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or (message["type"] == "http.disconnect" and not is_whole)
            return message

        try:
            await self._app(scope, noted_receive, noted_send)
        finally:
            self._metrics.requests[_endpoint(scope["path"]), 499 if has_left else status] += 1


def _endpoint(path: str) -> str:
    """One of a few names: what clients ask for is without end."""
    if path in PATHS:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class AskForKey:
    """Lets a request pass that has the key, or needs none."""

    def __init__(self, app: ASGIApp, api_key: bytes | None):
        self._app, self._api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api_key is None or scope["path"] in OPEN or self._is_known(scope, self._api_key):
            await self._app(scope, receive, send)
            return
        message = "this server asks for its key, as the header Authorization: Bearer KEY"
        content = error_object(message, status=401, code="invalid_api_key")
        headers = {"WWW-Authenticate": "Bearer"}
        await Response(json_bytes(content), 401, headers, media_type="application/json")(scope, receive, send)

    def _is_known(self, scope: Scope, api_key: bytes) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                # In constant time: how long it takes tells nothing of how much of the key was right.
                return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), api_key)
        return False

"""The routes: completions, models, health, metrics and a page to try prompts."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moe_jax.config import SampleConfig
from moe_jax.errors import UserError
from moe_jax.sampling.engine import Engine
from moe_jax.sampling.text import Text
from moe_jax.server import page
from moe_jax.server.guards import AskForKey, AskForName, Count
from moe_jax.server.metrics import Metrics
from moe_jax.server.requests import (
    CompletionRequest,
    Limits,
    RequestError,
    check_model,
    parse_completion,
)
from moe_jax.server.responses import (
    DONE,
    Completion,
    Spellings,
    error_object,
    event,
    json_bytes,
    model_object,
)
from moe_jax.server.worker import Call, QueueFull, Worker, WorkerDied

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""What a program on this machine calls it. Another name is a web page's, which had it resolved to this machine."""


@dataclass
class Service:
    """What the routes work with."""

    generator: Engine
    worker: Worker
    limits: Limits
    max_body_bytes: int
    api_key: bytes | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    is_stopping: bool = False
    """Set at the first signal."""

    def __post_init__(self) -> None:
        self.spellings = Spellings(self.generator.tokenizer)


def build_app(service: Service, allowed_hosts: Sequence[str] | None) -> Starlette:
    """The application; ``allowed_hosts`` are the names that it may be called by, None: any."""
    service.metrics.queue_length = lambda: service.worker.queue_length
    service.metrics.num_running = lambda: service.worker.num_running
    routes = _Routes(service)
    names = [Middleware(AskForName, names=allowed_hosts)] if allowed_hosts is not None else []
    return Starlette(
        routes=[
            Route("/", page.show),
            Route("/healthz", routes.healthz),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", routes.completions, methods=["POST"]),
        ],
        middleware=[
            Middleware(Count, metrics=service.metrics),
            *names,
            Middleware(AskForKey, api_key=service.api_key),
        ],
        exception_handlers={RequestError: _tell, HTTPException: _tell_http, Exception: _tell_fault},
    )


class _Routes:
    def __init__(self, service: Service):
        self._service = service
        # What begin puts before every prompt: the start of a document, or nothing. A context of 1 has no room for it.
        has_room = service.generator.config.context_length > 1
        self._num_added = len(service.generator.begin([0], SampleConfig()).prompt_ids) - 1 if has_room else 0

    async def healthz(self, request: Request) -> Response:
        if self._service.is_stopping:
            return PlainTextResponse("shutting down\n", 503)
        if not self._service.worker.is_ready:
            return PlainTextResponse("the worker has died\n", 503)
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._service.limits)
        return _json(self._model())

    def _model(self) -> dict:
        service = self._service
        return model_object(service.limits.model, service.created, service.generator.config.context_length)

    async def completions(self, request: Request) -> Response:
        service, arrived = self._service, time.monotonic()
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # Also what a page of another site may send without being asked for leave.
            raise RequestError(f"the Content-Type must be application/json, got {kind[:80]!r}; set it", status=415)
        wanted = parse_completion(await _read_body(request, service.max_body_bytes), service.limits)
        with _full_or_dead():
            service.worker.check_room(len(wanted.prompts) * wanted.sample.num_samples)
        # A long prompt takes a while to tokenize, and the others' texts are to flow.
        call = Call(await run_in_threadpool(self._begin, wanted), service.metrics, arrived)
        with _full_or_dead():
            service.worker.submit(call)
        n = wanted.sample.num_samples
        service.metrics.prompt_tokens += sum(len(ticket.text.prompt_ids) for ticket in call.tickets[::n])
        answer = Completion(wanted, call, service.spellings, service.limits.model)
        if wanted.stream:
            return _Stream(service, call, answer)
        async with _attended(service, call, request.receive):
            while not call.is_done:
                await _change(call)
                if call.is_gone:
                    return Response(status_code=499)
                if call.has_failed:
                    raise _failure()
            # Many log-probabilities take a while to write down, and the others' texts are to flow.
            return await run_in_threadpool(lambda: _json(answer.whole()))

    def _begin(self, wanted: CompletionRequest) -> list[Text]:
        """A text for each prompt and sample. RequestError where a prompt cannot be continued."""
        generator, texts = self._service.generator, []
        limit = min(self._service.limits.max_prompt_tokens, generator.config.context_length)
        for prompt in wanted.prompts:
            ids = generator.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
            size = self._num_added + len(ids)
            if size > limit:
                message = f"the prompt may have {limit} tokens, got {size}; shorten it"
                raise RequestError(message, "prompt", code="context_length_exceeded")
            try:
                texts += [generator.begin(ids, wanted.sample, number) for number in range(wanted.sample.num_samples)]
            except UserError as error:
                raise RequestError(str(error)[:300], "prompt") from None
        return texts


class _Stream(Response):
    """Server-sent events, each as soon as there is text for it."""

    def __init__(self, service: Service, call: Call, answer: Completion):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._service, self._call, self._answer = service, call, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _attended(self._service, self._call, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._events():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        call = self._call
        while not call.is_gone:
            is_done = call.is_done
            gained = []
            for chunk in self._answer.chunks():
                gained.append(event(chunk))
                await asyncio.sleep(0)  # what a slow reader left is much to write down, and others are to be served
            if gained:
                yield b"".join(gained)
            if is_done:
                yield b"".join(map(event, self._answer.last_chunks())) + DONE
                return
            if call.has_failed:
                error = _failure()
                yield event(error_object(error.message, status=error.status))
                return
            await _change(call)


@contextlib.asynccontextmanager
async def _attended(service: Service, call: Call, receive: Receive) -> AsyncIterator[None]:
    """Within it ``call`` is told when its client leaves; at the end of it nothing more is made for the call."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        call.leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        service.worker.cancel(call)
        service.metrics.duration.observe(time.monotonic() - call.arrived)


async def _change(call: Call) -> None:
    await call.changed.wait()
    call.changed.clear()


async def _read_body(request: Request, limit: int) -> bytes:
    """RequestError where it has more than ``limit`` bytes; they are read to the end all the same.

    A client that is still sending would miss the answer.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
    except ClientDisconnect:
        raise RequestError("the client left", status=499) from None
    if size > limit:
        raise RequestError(f"the body may have {limit} bytes, got {size}; shorten it", status=413)
    return b"".join(parts)


@contextlib.contextmanager
def _full_or_dead() -> Iterator[None]:
    """What the worker refuses as an answer."""
    try:
        yield
    except QueueFull:
        raise RequestError(
            "too many requests wait already; try again later",
            status=429,
            code="rate_limit_exceeded",
            headers={"Retry-After": "1"},
        ) from None
    except WorkerDied:
        raise RequestError("the server cannot generate any more; it has to be started again", status=503) from None


def _failure() -> RequestError:
    return RequestError("the server failed while it generated this text", status=500)


def _json(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(content), status, headers, media_type="application/json")


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    content = error_object(error.message, error.param, status=error.status, code=error.code)
    return _json(content, error.status, error.headers)


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return _json(error_object(message, status=error.status_code), error.status_code, headers)


async def _tell_fault(request: Request, error: Exception) -> Response:
    """The traceback is in the log."""
    return _json(error_object("a fault of the server", status=500), 500)

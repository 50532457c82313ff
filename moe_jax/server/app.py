"""The routes: completions, models, health, metrics and a page to try prompts."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from moe_jax.config import SampleConfig
from moe_jax.errors import UserError
from moe_jax.sampling.engine import Engine
from moe_jax.sampling.text import Text
from moe_jax.server import page
from moe_jax.server.counters import Counters
from moe_jax.server.guards import Count, Guard
from moe_jax.server.requests import CompletionRequest, Limits, RequestError, check_model, parse_completion
from moe_jax.server.responses import DONE, Completion, Spellings, event
from moe_jax.server.worker import Call, Worker


@dataclass
class Service:
    """What the routes work with."""

    engine: Engine
    worker: Worker
    limits: Limits
    api_key: bytes | None = None
    counters: Counters = field(default_factory=Counters)
    is_stopping: bool = False
    """Set at the first signal."""


def build_app(service: Service, allowed_hosts: Sequence[str] | None) -> Starlette:
    """The application; ``allowed_hosts`` are the names that it may be called by, None: any."""
    service.counters.queue_length.set_function(lambda: service.worker.queue_length)
    service.counters.running.set_function(lambda: service.worker.num_running)
    routes = _Routes(service)
    guarded = [
        Route("/", page.show),
        Route("/healthz", routes.healthz),
        Route("/metrics", routes.metrics),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/v1/completions", routes.completions, methods=["POST"]),
    ]
    guard = Middleware(Guard, names=allowed_hosts, api_key=service.api_key)
    return Starlette(
        # The guard is inside of the error handlers, the count outside of them.
        routes=[Mount("/", routes=guarded, middleware=[guard])],
        middleware=[Middleware(Count, counters=service.counters)],
        exception_handlers=dict.fromkeys((RequestError, HTTPException, Exception), _answer_error),
    )


class _Routes:
    def __init__(self, service: Service):
        self._service = service
        self._spellings = Spellings(service.engine.tokenizer)
        self._model = {
            "id": service.limits.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "moe_jax",
            "max_model_len": service.engine.config.context_length,  # as other open servers name the context
        }
        # What begin puts before every prompt: the start of a document, or nothing. A context of 1 has no room for it.
        has_room = service.engine.config.context_length > 1
        self._num_added = len(service.engine.begin([0], SampleConfig()).prompt_ids) - 1 if has_room else 0

    async def healthz(self, request: Request) -> Response:
        if self._service.is_stopping:
            return PlainTextResponse("shutting down\n", 503)
        if not self._service.worker.is_ready:
            return PlainTextResponse("the worker has died\n", 503)
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.counters.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._service.limits)
        return _json(self._model)

    async def completions(self, request: Request) -> Response:
        service, arrived = self._service, time.monotonic()
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # Also what a page of another site may send without being asked for leave.
            raise RequestError(f"the Content-Type must be application/json, got {kind[:80]!r}; set it", status=415)
        wanted = parse_completion(await _read_body(request, service.limits.max_body_bytes), service.limits)
        n = wanted.sample.num_samples
        service.worker.check_room(len(wanted.prompts) * n)
        # A long prompt takes a while to tokenize, and the others' texts are to flow.
        call = Call(await run_in_threadpool(self._begin, wanted), service.counters, arrived)
        service.worker.submit(call)
        service.counters.prompt_tokens.inc(sum(len(ticket.text.prompt_ids) for ticket in call.tickets[::n]))
        answer = Completion(wanted, call, self._spellings, service.limits.model)
        if wanted.stream:
            return _Stream(service, call, answer)
        async with _attended(service, call, request.receive):
            while not call.is_done:
                await call.change()
                if call.is_gone:
                    return Response(status_code=499)
                if call.has_failed:
                    raise _failure()
            # Many log-probabilities take a while to write down, and the others' texts are to flow.
            return await run_in_threadpool(lambda: _json(answer.whole()))

    def _begin(self, wanted: CompletionRequest) -> list[Text]:
        """A text for each prompt and sample. RequestError where a prompt cannot be continued."""
        engine, texts = self._service.engine, []
        limit = min(self._service.limits.max_prompt_tokens, engine.config.context_length)
        for index, prompt in enumerate(wanted.prompts):
            ids = engine.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
            size = self._num_added + len(ids)
            if size > limit:
                message = f"the prompt may have {limit} tokens, got {size}; shorten it"
                raise RequestError(message, "prompt", code="context_length_exceeded")
            try:
                new = [engine.begin(ids, wanted.sample, number, index) for number in range(wanted.sample.num_samples)]
            except UserError as error:
                raise RequestError(str(error)[:300], "prompt") from None
            new[0].scores_prompt = wanted.echo and wanted.logprobs is not None
            for text in new[1:]:  # lists that are filled once for all samples of a prompt
                text.prompt_logprobs, text.prompt_top_logprobs = new[0].prompt_logprobs, new[0].prompt_top_logprobs
            texts += new
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
                yield event(_failure().content)
                return
            await call.change()


@contextlib.asynccontextmanager
async def _attended(service: Service, call: Call, receive: Receive) -> AsyncIterator[None]:
    """Within it ``call`` learns when its client leaves; at its end nothing more is made for the call."""

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
        service.counters.duration.observe(time.monotonic() - call.arrived)


async def _read_body(request: Request, limit: int) -> bytes:
    """RequestError where it has more than ``limit`` bytes; they are read to the end all the same.

    A client that is still sending would miss the answer, as it would that of Starlette's own limit.
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


def _failure() -> RequestError:
    return RequestError("the server failed while it generated this text", status=500)


def _json(content: dict, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path[:80]}: {error.detail}"
        error = RequestError(message, status=error.status_code, headers=error.headers)
    elif not isinstance(error, RequestError):
        error = RequestError("a fault of the server", status=500)  # the traceback is in the log
    answer = _json(error.content, error.status)
    answer.headers.update(error.headers or {})
    return answer

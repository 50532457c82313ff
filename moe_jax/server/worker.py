"""One thread that owns the model: requests queue for it, and their texts share a continuous batch."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence

from moe_jax.model.decoder import Variables
from moe_jax.sampling.batch import STREAM_STEPS, Batch
from moe_jax.sampling.engine import Engine
from moe_jax.sampling.text import Text
from moe_jax.server.counters import Counters
from moe_jax.server.requests import RequestError

NUM_TOP = 5
"""The most likely tokens that a program may ask to see of each token, as OpenAI has it."""


class Ticket:
    """One text on its way. The worker's thread alone touches ``text``; the rest is the event loop's."""

    def __init__(self, text: Text, call: "Call"):
        self.text, self.call = text, call
        self.pieces: list[str] = []
        """Text that has not been read yet. However slowly it is read, it is no longer than the limit on output."""
        self.num_tokens = 0
        """Tokens of the text that are there to be read; the worker may be adding others."""
        self.has_begun = False
        """Whether the prompt has been read."""
        self.finish_reason: str | None = None


class Call:
    """The texts of one request, as the event loop sees them."""

    def __init__(self, texts: Sequence[Text], counters: Counters, arrived: float):
        """``arrived`` is when the request came, by ``time.monotonic``. Belongs to the running event loop."""
        self.tickets = [Ticket(text, self) for text in texts]
        self.loop = asyncio.get_running_loop()
        self.has_failed = False
        self.is_gone = False
        """Whether the client has left."""
        self.arrived = arrived
        self._counters, self._has_begun = counters, False
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return all(ticket.finish_reason is not None for ticket in self.tickets)

    async def change(self) -> None:
        """Waits until there is something to read, the worker has died, or the client has left."""
        await self._changed.wait()
        self._changed.clear()

    def leave(self) -> None:
        """The client has left."""
        self.is_gone = True
        self._changed.set()

    def fail(self) -> None:
        """The worker has died."""
        self.has_failed = True
        self._changed.set()

    def receive(self, ticket: Ticket, piece: str, num_tokens: int, finish_reason: str | None) -> None:
        """What the worker has made of ``ticket`` since the last time."""
        self._counters.generated_tokens.inc(num_tokens - ticket.num_tokens)
        if piece:
            ticket.pieces.append(piece)
        ticket.num_tokens, ticket.finish_reason, ticket.has_begun = num_tokens, finish_reason, True
        if not self._has_begun:
            self._has_begun = True
            self._counters.first_token.observe(time.monotonic() - self.arrived)
        self._changed.set()


class Worker:
    """Runs ``Batch`` in a thread: a text joins when a row is free, and leaves when it ends or is not wanted."""

    def __init__(self, engine: Engine, variables: Variables, sizes: Sequence[int], max_queue: int):
        """``sizes`` are the batch sizes to compile; ``max_queue`` texts may wait for a row."""
        self._batch = Batch(engine.programs, variables, sizes, num_top=NUM_TOP)
        self._max_queue = max_queue
        self._condition = threading.Condition()
        # Shared between the threads, under the condition.
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Ticket, None] = {}
        self._leaving: list[Ticket] = []
        self._is_stopping = False
        self.is_ready = False
        """False before the start, and once no more texts are made."""
        self._thread = threading.Thread(target=self._live, name="worker", daemon=True)

    def start(self) -> None:
        """Compiles everything in the calling thread, then starts the worker's, which owns the batch from then on."""
        self._batch.warm_up()
        self.is_ready = True
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread once its texts are done."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        self._thread.join()

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check_room(self, num_texts: int) -> None:
        """RequestError where the worker has died, or ``num_texts`` more could not wait."""
        if not self.is_ready:
            raise RequestError("the server cannot generate any more; it has to be started again", status=503)
        if len(self._waiting) + num_texts > self._max_queue:
            message, later = "too many requests wait already; try again later", {"Retry-After": "1"}
            raise RequestError(message, status=429, code="rate_limit_exceeded", headers=later)

    def submit(self, call: Call) -> None:
        """Queues the texts of ``call``, all or none. Raises RequestError as ``check_room``."""
        with self._condition:
            self.check_room(len(call.tickets))
            self._waiting.extend(call.tickets)
            self._condition.notify()

    def cancel(self, call: Call) -> None:
        """Takes the texts of ``call`` out of the queue at once, and out of the batch after its next tokens."""
        with self._condition:
            for ticket in call.tickets:
                if ticket in self._running:
                    self._leaving.append(ticket)
                elif ticket.finish_reason is None and ticket in self._waiting:
                    self._waiting.remove(ticket)
            self._condition.notify()

    def _live(self) -> None:
        try:
            while self._take_turn(self._batch):
                continue
        finally:
            # Python prints the traceback of an exception; requests learn of it here, and /healthz.
            self._end()

    def _take_turn(self, batch: Batch) -> bool:
        """Lets texts join and leave, and each get some tokens; False once nothing is to come."""
        with self._condition:
            while not (self._waiting or self._running or self._is_stopping):
                self._condition.wait()
            leaving = [ticket for ticket in self._leaving if ticket in self._running]
            self._leaving.clear()
            for ticket in leaving:
                self._running.pop(ticket, None)
            places = batch.num_free + len(leaving)
            joining = [self._waiting.popleft() for _ in range(min(places, len(self._waiting)))]
            self._running |= dict.fromkeys(joining)
            running = list(self._running)
            if not running and not leaving:
                return not self._is_stopping
        for ticket in leaving:
            batch.remove(ticket.text)
        for ticket in joining:
            batch.admit([ticket.text])  # one at a time, as it was compiled
        if running:
            # A first token is a turn of its own, for a reader who waits for it.
            batch.advance(1 if joining else STREAM_STEPS)
            self._publish(running)
        return True

    def _publish(self, running: Sequence[Ticket]) -> None:
        """Hands what the texts have gained to the event loop, all of it in one call."""
        gains = [(each, each.text.take(), len(each.text.tokens), each.text.finish_reason) for each in running]
        with self._condition:
            for ticket, _, _, finish_reason in gains:
                if finish_reason is not None:
                    self._running.pop(ticket, None)

        def deliver() -> None:
            for ticket, piece, num_tokens, finish_reason in gains:
                ticket.call.receive(ticket, piece, num_tokens, finish_reason)

        running[0].call.loop.call_soon_threadsafe(deliver)

    def _end(self) -> None:
        """No more texts are made: fails those that are not done."""
        with self._condition:
            self.is_ready = False
            left = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for ticket in left:
            ticket.call.loop.call_soon_threadsafe(ticket.call.fail)

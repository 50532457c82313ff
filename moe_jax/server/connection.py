"""uvicorn's connection with two timeouts: for a request that does not become whole, and for an answer not read."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HAS_LEFT = "has_left"
"""Is true in the state of a request whose connection ended before its answer was whole."""
_LOOKS = 8
"""Checks in one patience whether the client has taken something."""


class Connection(H11Protocol):
    """Is cut ``patience`` seconds after a request began that is not whole, or in which nothing of an answer was taken.

    uvicorn has no such timeouts: it waits for either as long as the client likes, at a shutdown too. A client that
    opens a connection and sends nothing is cut as well. While nothing more can be sent, new text waits in its ticket.
    """

    patience = 30.0

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._request_timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle | None = None
        self._num_unread, self._last_taken = 0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that pause_writing comes for every answer that is not read
        self._request_timer = self.loop.call_later(self.patience, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_timer = _stop(self._request_timer)
        self._answer_timer = _stop(self._answer_timer)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.scope["state"][HAS_LEFT] = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._request_timer = _stop(self._request_timer)
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(self.patience, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._answer_timer is None:
            self._num_unread, self._last_taken = self.transport.get_write_buffer_size(), self.loop.time()
            self._answer_timer = self.loop.call_later(self.patience / _LOOKS, self._look)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answer_timer = _stop(self._answer_timer)

    def _look(self) -> None:
        """Cuts a client that has long taken nothing; one that takes a little has as much time again."""
        num_unread, now = self.transport.get_write_buffer_size(), self.loop.time()
        if num_unread < self._num_unread:
            self._last_taken = now
        self._num_unread = num_unread
        if now - self._last_taken >= self.patience:
            self.transport.abort()
        else:
            self._answer_timer = self.loop.call_later(self.patience / _LOOKS, self._look)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

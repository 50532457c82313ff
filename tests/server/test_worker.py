"""Many clients at once, and clients that leave, wait, do not read or never finish their request."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_jax.server.connection import Connection
from tests.server.harness import PacedBatch, events, message, read, serving, wait_until

LONG = {"prompt": "ab", "max_tokens": 2000, "stream": True}
BEGUN = b"data: "


def test_together_each_gets_what_it_gets_alone(server):
    asked = [{"prompt": "abc"[: index % 4], "max_tokens": 5 + 7 * index, "seed": index} for index in range(12)]
    alone = [server.complete(**fields)[1]["choices"] for fields in asked]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda fields: server.complete(**fields)[1]["choices"], asked)) == alone
    assert server.is_idle


def test_a_request_joins_the_batch_that_runs(server, pace):
    pace.delay = 0.01
    with server.open(LONG) as long:
        read(long, BEGUN)
        status, answer = server.complete(prompt="x", max_tokens=5, seed=1)
        assert (status, answer["usage"]["completion_tokens"] <= 5) == (200, True)
        assert server.num_texts == (1, 0)
    wait_until(lambda: server.is_idle)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_frees_its_place(server, pace, is_streamed):
    pace.delay = 0.005
    generated = server.metric("moe_jax_generated_tokens_total")
    left = server.count("/v1/completions", 499)
    connections = [server.open({**LONG, "stream": is_streamed, "seed": seed}) for seed in range(6)]
    wait_until(lambda: server.num_texts == (4, 2))
    for connection in connections:
        connection.close()
    wait_until(lambda: server.is_idle)
    assert server.metric("moe_jax_generated_tokens_total") - generated < 6 * 2000
    wait_until(lambda: server.count("/v1/completions", 499) == left + 6)


def test_a_client_that_leaves_before_the_first_token_or_while_it_waits(server, pace):
    pace.gate.clear()
    first = server.open({**LONG, "n": 4})
    wait_until(lambda: server.num_texts == (4, 0))
    waiting = [server.open({**LONG, "seed": seed}) for seed in range(5)]
    wait_until(lambda: server.num_texts == (4, 5))
    waiting[2].close()
    # At once, though the batch stands still.
    wait_until(lambda: server.num_texts == (4, 4))
    for connection in (first, *waiting):
        connection.close()
    wait_until(lambda: server.num_texts == (4, 0))
    pace.gate.set()
    wait_until(lambda: server.is_idle)


@contextlib.contextmanager
def asked_with_small_buffers(made, **fields):
    """(server, connection) on which a completion was asked for, and little fits on its way to the client."""
    with serving(made, send_buffer=4096) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(message(LONG | fields))
        yield server, connection


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 200, "stream": False}])
def test_a_client_that_does_not_read_is_cut(made, monkeypatch, fields):
    """What it does not take stays in the text's ticket, and is let go with the connection."""
    monkeypatch.setattr(Connection, "patience", 0.7)
    with asked_with_small_buffers(made, logprobs=5, n=4, **fields) as (server, _):
        wait_until(lambda: server.count("/v1/completions", 499) == 1)
        wait_until(lambda: server.is_idle and not server.server.server_state.tasks)
        assert server.count("/v1/completions", 200) == 0


def test_a_whole_answer_may_be_read_for_longer_than_the_patience(made, monkeypatch):
    monkeypatch.setattr(Connection, "patience", 0.5)
    fields = {"max_tokens": 150, "logprobs": 5, "n": 4, "seed": 1}
    with asked_with_small_buffers(made, stream=False, **fields) as (server, connection):
        received, begun = connection.recv(1), time.monotonic()
        while not received.endswith(b"}}"):
            time.sleep(0.02)
            part = connection.recv(1000)
            assert part, len(received)
            received += part
        assert time.monotonic() - begun > 2 * Connection.patience
        whole = json.loads(received.partition(b"\r\n\r\n")[2])
        assert whole["choices"] == server.complete(prompt="ab", **fields)[1]["choices"]
        assert server.count("/v1/completions", 499) == 0


def test_a_client_that_reads_slowly_gets_it_all(made):
    with asked_with_small_buffers(made, max_tokens=500, temperature=0) as (server, connection):
        received = b""
        while b"[DONE]" not in received:
            time.sleep(0.002)
            received += connection.recv(500)
        chunks, _ = events(received.partition(b"\r\n\r\n")[2])
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == server.complete(prompt="ab", max_tokens=500, temperature=0)[1]["choices"][0]["text"]


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: local",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
    ],
)
def test_a_request_that_never_gets_whole_is_cut(server, monkeypatch, half):
    monkeypatch.setattr(Connection, "patience", 0.3)
    with server.connect() as connection:
        connection.sendall(half)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    wait_until(lambda: not server.server.server_state.tasks)


def test_a_whole_request_is_waited_for_longer_than_half_a_one(server, monkeypatch, pace):
    monkeypatch.setattr(Connection, "patience", 0.2)
    pace.delay = 0.05
    with server.open({**LONG, "max_tokens": 100, "temperature": 0, "stream": False}) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_connections_that_come_while_the_server_ends_do_not_hold_it_up(made):
    def connect(server, held):
        with contextlib.suppress(OSError):  # when nothing listens any more
            while True:
                held.append(server.connect())

    for _ in range(5):
        held = []
        with serving(made) as server:
            clients = threading.Thread(target=connect, args=(server, held))
            clients.start()
            wait_until(lambda held=held: len(held) > 20)
            begun = time.monotonic()
        assert time.monotonic() - begun < 10, "a third of the patience with a request that does not get whole"
        clients.join()
        for connection in held:
            connection.close()


def test_a_client_that_leaves_while_the_server_ends(made, pace, monkeypatch):
    """What the worker makes in that time is nobody's, and the event loop that would hand it on is about to close."""
    faults = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    with serving(made) as server:
        pace.delay = 0.5
        with server.open(LONG) as connection:
            read(connection, BEGUN)
            server.server.should_exit = True
    assert faults == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_worker_dies_every_request_gets_an_error(made, pace, monkeypatch):
    with serving(made) as server:
        pace.gate.clear()
        connections = [server.open({**LONG, "seed": seed, "stream": seed % 2 == 0}) for seed in range(6)]
        wait_until(lambda: sum(server.num_texts) == 6)
        assert server.request("GET", "/healthz")[0] == 200

        def fall(self, steps):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(PacedBatch, "advance", fall)
        pace.gate.set()
        for seed, connection in enumerate(connections):
            received = read(connection, b"the server failed")
            assert received.startswith(b"HTTP/1.1 200" if seed % 2 == 0 else b"HTTP/1.1 500")
            assert b"[DONE]" not in received
            connection.close()
        assert server.request("GET", "/healthz")[::2] == (503, b"the worker has died\n")
        status, error = server.refusal("POST", "/v1/completions", {"model": "tiny"})
        assert (status, error["type"]) == (503, "server_error")

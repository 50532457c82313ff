"""Many clients at once, and clients that leave, wait, do not read or never finish what they say."""

import json
import socket
import threading
import time

import pytest

from moe_jax.server.connection import Connection
from tests.server.harness import PacedBatch, events, serving, wait_until

LONG = {"prompt": "ab", "max_tokens": 2000, "stream": True}


def read_some(connection):
    """Reads the head and the beginning of a stream."""
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    return received


def in_threads(functions):
    """What each of ``functions`` returns, called at the same time."""
    results = [None] * len(functions)

    def call(index):
        results[index] = functions[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_together_each_gets_what_it_gets_alone(server):
    asked = [{"prompt": "abc"[: index % 4], "max_tokens": 5 + 7 * index, "seed": index} for index in range(12)]
    alone = [server.complete(**fields)[1]["choices"] for fields in asked]
    together = in_threads([lambda fields=fields: server.complete(**fields)[1]["choices"] for fields in asked])
    assert together == alone
    assert server.is_idle


def test_a_request_joins_the_batch_that_runs(server, pace):
    pace.delay = 0.01
    with server.open(LONG) as long:
        read_some(long)
        status, answer = server.complete(prompt="x", max_tokens=5, seed=1)
        assert (status, answer["usage"]["completion_tokens"] <= 5) == (200, True)
        assert server.service.worker.num_running == 1
    wait_until(lambda: server.is_idle)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_frees_its_place(server, pace, is_streamed):
    pace.delay = 0.005
    generated = server.metric("moe_jax_generated_tokens_total")
    left = server.count("/v1/completions", 499)
    connections = [server.open({**LONG, "stream": is_streamed, "seed": seed}) for seed in range(6)]
    wait_until(lambda: server.service.worker.num_running == 4 and server.service.worker.queue_length == 2)
    for connection in connections:
        connection.close()
    wait_until(lambda: server.is_idle)
    assert server.metric("moe_jax_generated_tokens_total") - generated < 6 * 2000
    wait_until(lambda: server.count("/v1/completions", 499) == left + 6)


def test_a_client_that_leaves_before_the_first_token_or_while_it_waits(server, pace):
    pace.gate.clear()
    first = server.open({**LONG, "n": 4})
    wait_until(lambda: server.service.worker.num_running == 4)
    waiting = [server.open({**LONG, "seed": seed}) for seed in range(5)]
    wait_until(lambda: server.service.worker.queue_length == 5)
    waiting[2].close()
    # At once, though the batch stands still.
    wait_until(lambda: server.service.worker.queue_length == 4)
    for connection in (first, *waiting):
        connection.close()
    wait_until(lambda: server.service.worker.queue_length == 0)
    assert server.service.worker.num_running == 4
    pace.gate.set()
    wait_until(lambda: server.is_idle)


def test_a_full_queue_is_told(server, pace):
    pace.gate.clear()
    streams = [server.open({**LONG, "max_tokens": 20, "n": 4})]
    wait_until(lambda: server.service.worker.num_running == 4)
    streams.append(server.open({**LONG, "max_tokens": 20, "n": 32}))
    wait_until(lambda: server.service.worker.queue_length == 32)
    status, headers, body = server.request("POST", "/v1/completions", {"model": "tiny"})
    assert (status, headers["retry-after"]) == (429, "1")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert server.metric("moe_jax_queue_length") == 32
    pace.gate.set()
    for connection in streams:
        received = b""
        while b"[DONE]" not in received:
            part = connection.recv(2**16)
            assert part, received
            received += part
        connection.close()
    assert server.complete()[0] == 200
    wait_until(lambda: server.is_idle)


def test_a_client_that_does_not_read_is_cut(made, monkeypatch):
    """What it does not take stays in the text's ticket, and is let go with the connection."""
    monkeypatch.setattr(Connection, "patience", 1.0)
    with serving(made, send_buffer=4096) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        server.send(connection, {**LONG, "logprobs": 5, "n": 4})
        wait_until(lambda: not server.is_idle)
        wait_until(lambda: server.is_idle and not server.server.server_state.tasks)
        assert server.count("/v1/completions", 499) == 1


def test_a_whole_answer_that_is_not_read_counts_as_left(made, monkeypatch):
    monkeypatch.setattr(Connection, "patience", 0.5)
    with serving(made, send_buffer=4096) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        server.send(connection, {**LONG, "max_tokens": 200, "logprobs": 5, "n": 4, "stream": False})
        wait_until(lambda: server.count("/v1/completions", 499) == 1)
        assert server.count("/v1/completions", 200) == 0


def test_a_whole_answer_may_be_read_for_longer_than_the_patience(made, monkeypatch):
    monkeypatch.setattr(Connection, "patience", 0.5)
    with serving(made, send_buffer=4096) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        fields = {"max_tokens": 150, "logprobs": 5, "n": 4, "seed": 1}
        server.send(connection, {**LONG, **fields, "stream": False})
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
    with serving(made, send_buffer=4096) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        server.send(connection, {**LONG, "max_tokens": 500, "temperature": 0, "stop": None})
        received = b""
        while b"[DONE]" not in received:
            time.sleep(0.002)
            received += connection.recv(500)
        chunks, _ = events(received.partition(b"\r\n\r\n")[2])
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        _, whole = server.complete(prompt="ab", max_tokens=500, temperature=0)
        assert text == whole["choices"][0]["text"]


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
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(half)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            return
    wait_until(lambda: not server.server.server_state.tasks)


def test_a_whole_request_is_waited_for_longer_than_half_a_one(server, monkeypatch, pace):
    monkeypatch.setattr(Connection, "patience", 0.2)
    pace.delay = 0.05
    with server.open({**LONG, "max_tokens": 100, "temperature": 0, "stream": False}) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_many_connections_at_once(server):
    def ask(index):
        connections = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(20)]
        status = server.complete(prompt="a", max_tokens=3, seed=index)[0]
        for connection in connections:
            connection.close()
        return status

    assert in_threads([lambda index=index: ask(index) for index in range(20)]) == [200] * 20
    wait_until(lambda: not server.server.server_state.connections)


def test_a_shutdown_finishes_what_has_begun(made, pace):
    with serving(made) as server:
        pace.delay = 0.01
        asked = [{"prompt": "ab", "max_tokens": 80, "seed": seed, "stream": False} for seed in range(10)]
        connections = [server.open(fields) for fields in asked]
        wait_until(lambda: server.service.worker.num_running + server.service.worker.queue_length == 10)
        server.server.should_exit = True
        for connection in connections:
            received = b""
            while part := connection.recv(2**16):
                received += part
            connection.close()
            head, _, body = received.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert json.loads(body)["choices"][0]["finish_reason"] in ("length", "stop")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))


def test_connections_that_come_while_the_server_ends_do_not_hold_it_up(made):
    for _ in range(5):
        held, is_over = [], threading.Event()

        def connect(held, is_over, port):
            while not is_over.is_set():
                try:
                    held.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                except OSError:
                    return  # nothing listens any more

        with serving(made) as server:
            clients = threading.Thread(target=connect, args=(held, is_over, server.port))
            clients.start()
            wait_until(lambda held=held: len(held) > 20)
            begun = time.monotonic()
        assert time.monotonic() - begun < 10, "a third of the patience with a request that does not get whole"
        is_over.set()
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
            read_some(connection)
            server.server.should_exit = True
    assert faults == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_told_to_all(made, pace, monkeypatch):
    with serving(made) as server:
        pace.gate.clear()
        connections = [server.open({**LONG, "seed": seed, "stream": seed % 2 == 0}) for seed in range(6)]
        wait_until(lambda: server.service.worker.num_running + server.service.worker.queue_length == 6)
        assert server.request("GET", "/healthz")[0] == 200

        def fall(self, steps):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(PacedBatch, "advance", fall)
        pace.gate.set()
        for seed, connection in enumerate(connections):
            received = b""
            while b"the server failed" not in received:
                part = connection.recv(4096)
                assert part, received
                received += part
            assert received.startswith(b"HTTP/1.1 200" if seed % 2 == 0 else b"HTTP/1.1 500")
            assert b"[DONE]" not in received
            connection.close()
        assert server.request("GET", "/healthz")[::2] == (503, b"the worker has died\n")
        status, answer = server.complete()
        assert (status, answer["error"]["type"]) == (503, "server_error")

"""A server in a thread of this process, on a tiny model, and what tests send to it."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from unittest import mock

from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.sampling.batch import Batch
from moe_jax.server.app import Service
from moe_jax.server.requests import Limits
from moe_jax.server.serve import LOOPBACK, Server, listen
from moe_jax.server.worker import Worker
from tests.sampling.tiny import CONFIG, make

BYTES = ByteTokenizer("endoftext")
MODEL = dataclasses.replace(CONFIG, context_length=64, num_layers=1)
SIZES = (1, 4)


def make_endless():
    """(engine, variables) of a model of bytes that does not end a text by itself."""
    return make(MODEL, BYTES, end_token=-1)[:2]


class Pace:
    """What a batch waits for before each turn, so that a test sees a server at work."""

    gate = threading.Event()
    delay = 0.0


class PacedBatch(Batch):
    def advance(self, steps):
        Pace.gate.wait()
        time.sleep(Pace.delay)
        super().advance(steps)


def message(content, **headers):
    """The bytes of a request for a completion."""
    body = json.dumps({"model": "tiny"} | content).encode()
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body)} | headers
    lines = ["POST /v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Client:
    """Speaks to the server on ``port`` of this machine."""

    def __init__(self, port):
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def request(self, method, path, content=None, headers=None):
        """(status, headers, body) of one request on a connection of its own; ``content`` is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def refusal(self, *request, **options):
        """(status, error object) of a request."""
        status, _, body = self.request(*request, **options)
        return status, json.loads(body)["error"]

    def complete(self, **fields):
        """(status, object) of a completion."""
        status, _, body = self.request("POST", "/v1/completions", {"model": "tiny", **fields})
        return status, json.loads(body)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def open(self, content, **headers):
        """A socket on which a completion has been asked for."""
        connection = self.connect()
        connection.sendall(message(content, **headers))
        return connection

    def metric(self, name):
        """The value of the line ``name`` of /metrics; 0 where there is none yet."""
        lines = self.request("GET", "/metrics")[2].decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)

    def count(self, endpoint, status):
        """Requests of ``endpoint`` that were answered with ``status``."""
        return self.metric(f'moe_jax_requests_total{{endpoint="{endpoint}",status="{status}"}}')


class Running(Client):
    """A server in this process."""

    def __init__(self, service, port, server):
        super().__init__(port)
        self.service, self.server = service, server

    @property
    def num_generated(self):
        return self.service.counters.registry.get_sample_value("moe_jax_generated_tokens_total")

    @property
    def num_texts(self):
        return self.service.worker.num_running, self.service.worker.queue_length

    @property
    def is_idle(self):
        return self.num_texts == (0, 0) and not self.service.worker._leaving


def read(connection, until=None):
    """What comes on ``connection``, up to and with the bytes ``until``, or else to its end."""
    received = b""
    while until is None or until not in received:
        part = connection.recv(2**16)
        if not part:
            assert until is None, received
            break
        received += part
    return received


def events(body):
    """The objects of an event stream, and whether its last line is [DONE]."""
    # What came in several chunks of HTTP has their sizes in it.
    lines = [line for line in body.decode().replace("\r\n", "\n").split("\n") if line.startswith("data: ")]
    contents = [line.removeprefix("data: ") for line in lines]
    is_done = contents[-1] == "[DONE]"
    return [json.loads(content) for content in contents[: len(contents) - is_done]], is_done


def wait_until(is_true, seconds=20.0):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(made, *, sizes=SIZES, max_queue=32, api_key=None, send_buffer=None):
    """A ``Running`` server, which has ended after it; ``send_buffer`` is how many bytes the kernel keeps for it."""
    engine, variables = made
    Pace.gate.set()
    with mock.patch("moe_jax.server.worker.Batch", PacedBatch):
        worker = Worker(engine, variables, sizes, max_queue)
        worker.start()
    limits = Limits("tiny", engine.tokenizer.vocab_size, 64, 2000, max_queue, max_body_bytes=4096)
    service = Service(engine, worker, limits, api_key)
    server = Server(service, LOOPBACK)
    listener = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Running(service, port, server)
    finally:
        server.should_exit = True
        thread.join(30)
        worker.stop()
        assert not thread.is_alive(), vars(server.server_state)

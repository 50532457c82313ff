"""From the command's arguments to a server that runs until a signal ends it."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run
from moe_jax.sampling.api import load_engine
from moe_jax.server.app import LOOPBACK, Service, build_app
from moe_jax.server.arguments import ServerCommand
from moe_jax.server.connection import Connection
from moe_jax.server.requests import Limits
from moe_jax.server.worker import Worker
from moe_jax.sharding.startup import enable_compile_cache

KEY_VARIABLE = "MOE_JAX_API_KEY"
MAX_CONNECTIONS = 1000
"""More are answered with 503: each may hold a body in memory."""
_IDLE_SECONDS = 75
"""A program that sends requests now and then keeps its connection."""


def serve(run: RunDirectory, arguments: ServerCommand) -> None:
    """Answers requests until SIGTERM or SIGINT. Raises UserError or EnvironmentFault before the first."""
    api_key = read_key(arguments.api_key_file)
    listener = listen(arguments.host or "127.0.0.1", arguments.port)
    host, port = listener.getsockname()[:2]
    names = own_names(arguments.host, host)
    if api_key is None and names is None:
        what = f"anyone who reaches {host} may use this server"
        print(f"warning: {what}; give --api-key-file, or {KEY_VARIABLE} in the environment", file=sys.stderr)
    # There is nothing to finish yet, and a process that ends while it loads or compiles in other threads may crash.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    opened = open_run(run.path, arguments.checkpoint)
    if opened.config.train.compile_cache:
        enable_compile_cache()
    generator, variables = load_engine(opened, arguments.dtype)
    limits = Limits(
        model=arguments.name or run.path.resolve().name,
        vocab_size=generator.tokenizer.vocab_size,
        max_prompt_tokens=arguments.max_prompt_tokens or generator.config.context_length,
        max_output_tokens=arguments.max_output_tokens,
        max_texts=arguments.max_queue,
    )
    worker = Worker(generator, variables, batch_sizes(arguments.max_batch), arguments.max_queue)
    worker.start()
    service = Service(generator, worker, limits, arguments.max_body_bytes, api_key)
    shown = f"[{host}]" if ":" in host else host
    greeting = f"serving {run.path} as {limits.model} at http://{shown}:{port}"
    try:
        Server(service, names, greeting).run(sockets=[listener])
    finally:
        worker.stop()


class Server(uvicorn.Server):
    """uvicorn, which at the first signal accepts nothing more and finishes what it has begun; a second one kills.

    At its end the worker is stopped: it hands texts to the event loop, which is then closed.
    """

    def __init__(self, service: Service, allowed_hosts: tuple[str, ...] | None, greeting: str = ""):
        """``greeting`` is printed once connections are taken and signals heard."""
        config = uvicorn.Config(
            build_app(service, allowed_hosts),
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_SECONDS,
        )
        super().__init__(config)
        self._service, self._greeting = service, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            # Another server was bound to the port at the same time, and has begun to listen first.
            assert sockets is not None
            host, port = sockets[0].getsockname()[:2]
            raise _cannot_listen(host, port, error) from None
        if self._greeting:
            print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_idle())
        await super().shutdown(sockets)
        closing.cancel()
        await asyncio.to_thread(self._service.worker.stop)

    async def _close_idle(self) -> None:
        """Closes connections that wait for no answer; uvicorn does so once, and waits for those that come then."""
        while True:
            for connection in list(self.server_state.connections):
                if not connection.transport.is_closing():
                    connection.shutdown()
            await asyncio.sleep(0.1)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's, which sends the signal to itself again once all is done."""
        if threading.current_thread() is not threading.main_thread():
            yield  # as uvicorn: only the main thread may set handlers
            return
        before = {number: signal.signal(number, self._finish) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _finish(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._service.is_stopping = self.should_exit = True
        print("finishing what has begun; a second signal leaves at once", file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port``, which takes no connections yet. UserError or EnvironmentFault."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host must be a name or an address of this machine, got {host} ({error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host must be a name or an address of this machine, got {host}") from None
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> EnvironmentFault:
    remedy = "give another --port, or 0 for any that is free"
    # What asyncio raises names the address a second time.
    reason = os.strerror(error.errno) if error.errno else str(error)
    return EnvironmentFault(f"cannot listen at {host} port {port}: {reason}; {remedy}")


def own_names(host: str | None, address: str) -> tuple[str, ...] | None:
    """What a server on this machine alone may be called, ``host`` as the user gave it among them; None: anything.

    ``address`` is the one it is bound to. Others may reach a server at any but a loopback address, by names it does
    not know.
    """
    bound = ipaddress.ip_address(address.split("%")[0])
    if isinstance(bound, ipaddress.IPv6Address) and bound.ipv4_mapped is not None:
        bound = bound.ipv4_mapped
    if not bound.is_loopback:
        return None
    given = (f"[{name}]" if ":" in name else name for name in (host, address) if name is not None)
    return tuple(dict.fromkeys((*LOOPBACK, *given)))


def read_key(file: str | None) -> bytes | None:
    """The key of ``file``, or else of the environment; None where neither is given. Raises UserError."""
    source, text = f"the environment variable {KEY_VARIABLE}", os.environ.get(KEY_VARIABLE)
    if file is not None:
        source = f"--api-key-file {file}"
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise UserError(f"{source} does not exist; name the file that has the key") from None
        except (UnicodeDecodeError, IsADirectoryError):
            raise UserError(f"{source} must be a file with one line of text; name one") from None
    if text is None:
        return None
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        # What the key is stays untold.
        raise UserError(f"{source} must hold a key of printable ASCII characters without spaces; put one there")
    return text.encode()


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two up to ``largest``, and that."""
    return (*(1 << power for power in range((largest - 1).bit_length())), largest)

"""The server's life: its address and key, and uvicorn, which a signal ends once all that has begun is done."""

import asyncio
import errno
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.server.app import Service, build_app
from moe_jax.server.connection import Connection

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""What a program on this machine calls it. Another name is a web page's, which had it resolved to this machine."""
KEY_VARIABLE = "MOE_JAX_API_KEY"


class Server(uvicorn.Server):
    """uvicorn, which at the first signal accepts nothing more and finishes what has begun; a second one kills.

    At its end the worker is stopped: it hands texts to the event loop, which is then closed.
    """

    def __init__(self, service: Service, allowed_hosts: tuple[str, ...] | None, greeting: str = ""):
        """``greeting`` is printed once connections are accepted and signals handled."""
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
            limit_concurrency=1000,  # more connections are answered with 503: each may hold a body in memory
            timeout_keep_alive=75,  # a program that sends requests now and then keeps its connection
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
        """Closes connections that wait for no answer; uvicorn does so once, and waits for those that come later."""
        while True:
            for connection in list(self.server_state.connections):
                if not connection.transport.is_closing():
                    connection.shutdown()
            await asyncio.sleep(0.1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's, keeps no signal to raise again at the end: the process exits with 0."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._service.is_stopping = self.should_exit = True
        print("finishing what has begun; a second signal leaves at once", file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port``, which accepts nothing yet. Raises UserError or EnvironmentFault."""
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
    # asyncio's own message names the address a second time.
    reason = os.strerror(error.errno) if error.errno else str(error)
    return EnvironmentFault(f"cannot listen at {host} port {port}: {reason}; {remedy}")


def own_names(host: str | None, address: str) -> tuple[str, ...] | None:
    """The names by which a server on this machine alone may be called, the user's ``host`` among them; None: any.

    ``address`` is the one it is bound to. At other than loopback addresses it may have names unknown here.
    """
    bound = ipaddress.ip_address(address.split("%")[0])
    bound = getattr(bound, "ipv4_mapped", None) or bound
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
            text = Path(file).read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            raise UserError(f"{source} does not exist; name the file that has the key") from None
        except (UnicodeDecodeError, IsADirectoryError):
            raise UserError(f"{source} must be a file with one line of text; name one") from None
    if text is None:
        return None
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        # The key itself is not shown.
        raise UserError(f"{source} must hold a key of printable ASCII characters without spaces; put one there")
    return text.encode()

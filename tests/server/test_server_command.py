"""The command as a user runs it: a process that is started, spoken to and ended by a signal."""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from moe_jax.commands.server import batch_sizes, main
from moe_jax.config import Config
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.server.app import Service
from moe_jax.server.serve import LOOPBACK, Server, listen, own_names, read_key
from tests.compiling import quick_environment
from tests.sampling.tiny import CONFIG
from tests.server.harness import Client, events, read, wait_until
from tests.tiny import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run in runs/tiny."""
    folder = tmp_path_factory.mktemp("home")
    write_run(folder / "runs" / "tiny", Config(model=CONFIG))
    return folder


def run_server(home, *flags):
    """The process of a server, not yet ready."""
    arguments = [sys.executable, "-m", "moe_jax.server", *map(str, flags)]
    environment = quick_environment(home / "cache") | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=home, env=environment, stdout=pipe, stderr=pipe, text=True)


@contextlib.contextmanager
def started(home, *flags):
    """(process, client) of a server that is ready."""
    with run_server(home, *flags) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving \S*runs/tiny as (\w+) at http://\S+:(\d+)\n", line)
            assert found, (line, process.stderr.read())
            yield process, Client(int(found[2]))
        finally:
            process.kill()


def test_a_signal_ends_it_once_all_is_done(home):
    with started(home, "--workdir", "runs/tiny", "--port", 0, "--max-batch", 1) as (process, client):
        assert client.request("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 400
        # One place, so that nearly all of them wait.
        asked = {"prompt": "the", "n": 60, "max_tokens": 200}
        with client.open(asked | {"stream": True}) as stream, client.open(asked) as whole:
            first = read(stream, b"data: {")
            wait_until(lambda: client.metric("moe_jax_queue_length") >= 60)
            process.send_signal(signal.SIGTERM)
            chunks, is_done = events(first + read(stream))
            assert is_done
            whole.settimeout(120)  # of which nothing comes until its last text is done
            assert sum(each["finish_reason"] is not None for chunk in chunks for each in chunk["choices"]) == 60
            assert len(json.loads(read(whole).partition(b"\r\n\r\n")[2])["choices"]) == 60
        assert process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            client.connect()
        assert process.stderr.read() == "finishing what has begun; a second signal leaves at once\n"


def test_on_all_addresses_it_warns_and_a_second_signal_ends_it_at_once(home):
    flags = ("--host", "0.0.0.0", "--port", 0, "--max-batch", 1, "--name", "tiny")
    asked = {"prompt": "the", "n": 256, "max_tokens": 4096, "stream": True}
    with started(home, *flags) as (process, client), client.open(asked, Host="some.name") as stream:
        read(stream, b"data: {")
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "note: serving runs/tiny, the run that changed last\n"
        assert process.stderr.readline().startswith("warning: anyone who reaches 0.0.0.0 may use this server; give")
        assert process.stderr.readline().startswith("finishing what has begun")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_while_it_starts_ends_it_at_once(home, number):
    with run_server(home, "--port", 0) as process:
        assert process.stderr.readline() == "note: serving runs/tiny, the run that changed last\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)  # it loads or compiles
        process.send_signal(number)
        assert process.wait(20) == -number
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


RUN = ("--workdir", "runs/tiny")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((*RUN, "--port", 70000), 2, "error: --port must be in [0, 65535], got 70000\n"),
        pytest.param(
            *(("--workdir", "nothing"), 2, "error: nothing is not a run directory (it has no config.json); train one"),
            marks=pytest.mark.slow,  # tests/runs/test_opened.py has what no command can open
        ),
        (
            ("--workdir", "runs/tiny", "--port", None),
            1,
            "error: cannot listen at 127.0.0.1 port {port}: Address already in use; give another ",
        ),
    ],
)
def test_mistakes_are_one_line(home, flags, code, message):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        flags = [port if flag is None else flag for flag in flags]
        with run_server(home, *flags) as process:
            output, error = process.communicate(timeout=120)
    assert (output, process.returncode) == ("", code)
    assert error.startswith(message.format(port=port))
    assert error.count("\n") == 1


@pytest.mark.parametrize("host", ["no.such.name.invalid", "203.0.113.1"])
def test_a_host_that_is_not_of_this_machine(host):
    with pytest.raises(UserError, match=f"^--host must be a name or an address of this machine, got {host}"):
        listen(host, 0)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    monkeypatch.delenv("MOE_JAX_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("MOE_JAX_API_KEY", "from-environment")
    assert read_key(None) == b"from-environment"
    file.write_text("from-file\n")
    assert read_key(str(file)) == b"from-file"
    file.write_bytes(b"\xef\xbb\xbffrom-windows\r\n")
    assert read_key(str(file)) == b"from-windows"
    for content in (b"", b"\n", b"two words", b"a\nb", "schlüssel".encode(), b"\xff", b"\x00"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="must") as raised:
            read_key(str(file))
        assert "words" not in str(raised.value)
    with pytest.raises(UserError, match="api-key-file nothing does not exist; name the file that has the key"):
        read_key("nothing")
    monkeypatch.setenv("MOE_JAX_API_KEY", "")
    with pytest.raises(UserError, match="the environment variable MOE_JAX_API_KEY must hold a key"):
        read_key(None)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    monkeypatch.setattr(sys, "argv", ["server"])
    with pytest.raises(
        UserError, match=r"prometheus_client; pip install 'moe_jax\[server\]', or pip install starlette"
    ):
        main()


@pytest.mark.parametrize(
    ("host", "address", "names"),
    [
        (None, "127.0.0.1", LOOPBACK),
        ("127.0.0.1", "127.0.0.1", LOOPBACK),
        ("localhost", "127.0.0.1", LOOPBACK),
        ("::1", "::1", LOOPBACK),
        ("my.name", "127.0.1.1", (*LOOPBACK, "my.name", "127.0.1.1")),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", (*LOOPBACK, "[::ffff:127.0.0.1]")),
        ("0.0.0.0", "0.0.0.0", None),
        ("::", "::", None),
        ("my.name", "192.0.2.7", None),
        ("fe80::1%eth0", "fe80::1%eth0", None),
    ],
)
def test_a_server_on_this_machine_alone_has_names(host, address, names):
    assert own_names(host, address) == names


def test_a_port_that_another_server_takes_while_this_one_loads(made):
    with listen("127.0.0.1", 0) as listener, socket.socket() as other:
        port = listener.getsockname()[1]
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        service = Service(made[0], mock.Mock(), mock.Mock())
        with pytest.raises(EnvironmentFault) as raised:
            Server(service, None).run(sockets=[listener])
    remedy = "give another --port, or 0 for any that is free"
    assert str(raised.value) == f"cannot listen at 127.0.0.1 port {port}: Address already in use; {remedy}"


def test_batch_sizes():
    assert [batch_sizes(largest) for largest in (1, 2, 3, 16)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 16)]

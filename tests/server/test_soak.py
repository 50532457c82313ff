"""Many requests from clients that come and go: none is lost, nothing is left behind."""

import asyncio
import collections
import ctypes
import gc
import multiprocessing
import os
import random
import sys

import pytest

from moe_jax.sampling.text import Text
from moe_jax.server.worker import Call, Ticket
from tests.server.harness import make_endless, message, serving, wait_until

CLIENTS = 44


def resident_bytes():
    """Of this process, without what the C library keeps at hand."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left_over():
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Call, Ticket, Text)]


async def ask(port, chance, tally):
    """One request on a connection of its own, read to the end, or left early in one of several ways."""
    size, stream = chance.randrange(1, 240), chance.random() < 0.7
    content = {
        "prompt": "x" * chance.randrange(0, 60),
        "max_tokens": size,
        "temperature": chance.choice([0, 1]),
        "stream": stream,
        "n": chance.choice([1, 1, 2]),
        "logprobs": chance.choice([None, None, 5]),
        "stop": chance.choice([None, ["ab", "é"]]),
    }
    sent = message(content, Connection="close")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        leaves = chance.random() < 0.2
        if leaves:
            tally["left"] += 1
        if leaves and chance.random() < 0.2:
            writer.write(sent[: chance.randrange(len(sent))])
            await writer.drain()
            return
        writer.write(sent)
        await writer.drain()
        if leaves:
            if chance.random() < 0.5:
                await reader.read(100)
            else:
                await asyncio.sleep(chance.random() * 0.02)
            return
        answer = await reader.read()
        if answer.startswith(b"HTTP/1.1 429"):
            tally["refused"] += 1
            return
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert (b"data: [DONE]" in answer) == stream
        assert b'"finish_reason":"' in answer
        tally["answered"] += 1
    finally:
        writer.close()
        if not leaves:
            await writer.wait_closed()


async def soak(server, num_tokens, seed):
    """Asks until ``num_tokens`` more have been generated."""
    tally, end = collections.Counter(), server.num_generated + num_tokens

    async def client(number):
        chance = random.Random(seed * 1000 + number)
        while server.num_generated < end:
            await ask(server.port, chance, tally)

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))
    return tally


def run_soak(num_tokens):
    """(tally, bytes grown, tokens generated) of a server that lived through it, and kept nothing."""
    with serving(make_endless(), sizes=(4, 32), max_queue=30) as server:
        asyncio.run(soak(server, 5_000, 0))
        before = resident_bytes()
        tally = asyncio.run(soak(server, num_tokens, 1))
        wait_until(lambda: server.is_idle)
        state = server.server.server_state
        wait_until(lambda: not state.tasks and not state.connections)
        grown = resident_bytes() - before
        # A thread may hold the last one a moment longer, and a call and its tickets hold each other.
        wait_until(lambda: not left_over())
        assert server.request("GET", "/healthz")[0] == 200
        return tally, grown, server.num_generated


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("num_tokens", [6_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_soak_loses_no_request_and_no_memory(num_tokens):
    # In a process of its own, whose memory is the server's alone.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        tally, grown, generated = pool.apply(run_soak, (num_tokens,))
    assert grown < 20e6
    assert tally["answered"] > num_tokens / 300
    assert tally["left"] > num_tokens / 750
    assert generated >= num_tokens

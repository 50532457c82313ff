"""A signal may come at any moment, in the middle of a print too."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_jax.training.signals import catch_signals

ROOT = Path(__file__).parents[2]


def test_the_first_signal_is_noted_and_told(capfd):
    with catch_signals() as request:
        assert request.exit_code is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.exit_code == 143
    assert "stopping after this step" in capfd.readouterr().err


def test_a_schedulers_signal_and_the_end_of_the_time_ask_for_a_pause(capfd):
    with catch_signals(seconds=math.inf) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)  # the scheduler's last word, and the first that is an order
        assert request.exit_code == 143
    with catch_signals(seconds=-1.0) as request:  # spent before it began
        wait_for(lambda: request.exit_code == 0)
    with catch_signals(seconds=60.0) as request:
        assert request.exit_code is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert capfd.readouterr().err.count("stopping after this step") == 3


def wait_for(condition):
    latest = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.01)


def test_what_several_processes_agree_on_is_the_largest():
    with catch_signals(seconds=math.inf, is_shared=True) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.exit_code, request.own_code) == (None, 1)
        request.hear(0)
        assert request.exit_code is None
        request.hear(144)  # another was terminated
        assert request.exit_code == 143


def test_a_signal_within_a_print_does_no_harm():
    # A reader that is slow keeps the process in the write of a print, where the signal then finds it.
    program = (
        "from moe_jax.training.signals import catch_signals\n"
        "with catch_signals() as request:\n"
        "    print('ready', flush=True)\n"
        "    while request.exit_code is None: print('x' * 200_000, flush=True)\n"
        "print('exit', request.exit_code)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.read(100) == "x" * 100
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate()
    assert (process.returncode, rest.splitlines()[-1]) == (0, "exit 130"), error
    assert error.startswith("stopping after this step")

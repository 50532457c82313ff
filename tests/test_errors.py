"""Exit codes and the one line that goes with them."""

import errno
import os
import platform
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import errors
from moe_jax.commands.startup import check_limits, use_huge_pages
from moe_jax.files import cache_folder

ROOT = Path(__file__).parents[1]


def run(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.run(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (errors.UserError("a rule,\n got 'a  value'\n"), 2, "error: a rule, got 'a  value'\n"),
        (
            MemoryError("no 8 GiB"),
            1,
            "error: memory has run out: no 8 GiB; free some, or raise the limit (ulimit -v)\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "f"),
            1,
            "error: No space left on device: f; free some space and run the same command again\n",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "d"),
            1,
            "error: File exists: d; it is in the place of a folder: move it away\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "d"), 1, "error: Permission denied: d\n"),
        (KeyboardInterrupt(), 130, "error: interrupted before there was anything to save\n"),
        (errors.Interrupted(143), 143, ""),
    ],
)
def test_each_end_has_its_exit_code_and_one_line(error, code, line, capsys):
    assert run(error, capsys) == (code, line)


def test_our_own_faults_keep_their_traceback():
    def main():
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        errors.run(main)


def test_native_windows_is_pointed_to_wsl_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    code, line = run(AssertionError("main was called"), capsys)
    assert (code, line.count("\n")) == (1, 1)
    assert line.startswith("error: moe_jax does not run on native Windows; run the same command in WSL")


@pytest.mark.parametrize(
    "module", ["train", "sample", "moe_jax.evaluate", "moe_jax.prepare", "moe_jax.report", "moe_jax.server"]
)
def test_no_command_imports_what_windows_lacks_before_that(module):
    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    program = f"import sys, {name}; assert not {{'fcntl', 'moe_jax.files'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.", "Out of memory allocating 2,048 MiB"),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.\n  more",
            "Out of memory while trying to ",
        ),
        (
            "XLA:TPU: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.10G of 15.48G hbm.",
            "Used 17.1",
        ),
    ],
)
def test_a_device_without_memory_is_one_line_with_the_size_and_what_helps(text, asked):
    with pytest.raises(errors.EnvironmentFault) as caught, errors.naming_what_helps("lower it"):
        raise RuntimeError(text)
    line = str(caught.value)
    assert line.startswith("a device has too little memory: ")
    assert asked in line
    assert line.endswith("; lower it")
    assert "\n" not in line
    with pytest.raises(RuntimeError, match="INTERNAL"), errors.naming_what_helps("lower it"):
        raise RuntimeError("INTERNAL: a fault of ours")


@pytest.fixture
def limits(monkeypatch):
    """The limits of this process, {"RLIMIT_NOFILE": [soft, hard], ...}, which a test may change."""
    found = {resource.RLIMIT_NOFILE: (1024, 4096), resource.RLIMIT_AS: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", lambda name: found[name])
    monkeypatch.setattr(resource, "setrlimit", lambda name, both: found.__setitem__(name, both))
    return found


def test_a_low_limit_of_open_files_is_raised_where_that_is_allowed(limits):
    check_limits()
    assert limits[resource.RLIMIT_NOFILE] == (1024, 4096)
    for hard in (4096, -1):
        limits[resource.RLIMIT_NOFILE] = (24, hard)
        check_limits()
        assert limits[resource.RLIMIT_NOFILE] == (128, hard)


@pytest.mark.parametrize(
    ("name", "limit", "line"),
    [
        ("RLIMIT_NOFILE", 24, "a process may open 24 files here, and needs 128; raise the limit (ulimit -n 1024)"),
        (
            "RLIMIT_AS",
            500 << 20,
            "a process may have 500 MiB of addresses here, and jax needs more than 1024; raise the",
        ),
    ],
)
def test_a_limit_that_rules_out_jax_is_told_before_it_is_loaded(limits, name, limit, line):
    limits[getattr(resource, name)] = (limit, limit)
    with pytest.raises(errors.EnvironmentFault) as caught:
        check_limits()
    assert str(caught.value).startswith(line)


def test_success_returns():
    calls = []
    errors.run(lambda: calls.append("main"))
    assert calls == ["main"]


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("data") == tmp_path / "moe_jax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder("data")) == "/home/someone/.cache/moe_jax/data"


PRINTS = r"""
import io, os, sys
from moe_jax.errors import run, show

def main():
    if "display" in sys.argv: show("stdout")
    opened = os.open(os.devnull, os.O_RDONLY)
    print("f\xfcr \u2192 \udcff", "prompt" + sys.stdin.read(), flush="late" not in sys.argv)
    print("note \u2192", opened, file=sys.stderr)

run(main)
"""


def streams(shell, *arguments, **environment):
    """(exit code, standard output, standard error) of a program that prints to both, started as in ``shell``."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {shell} "$@"', sys.executable, PRINTS, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize(
    ("encoding", "out"), [("latin-1", "f\xfcr \\u2192 \\udcff"), ("ascii", "f\\xfcr \\u2192 \\udcff")]
)
def test_what_the_console_cannot_show_is_escaped(encoding, out):
    assert streams("", PYTHONIOENCODING=encoding) == (0, out + " prompt\n", "note \\u2192 3\n")


@pytest.mark.parametrize(
    ("closed", "has_out", "has_err"),
    [("<&-", True, True), (">&-", False, True), ("2>&-", True, False), ("<&- >&- 2>&-", False, False)],
)
def test_no_file_that_is_opened_takes_the_place_of_a_closed_stream(closed, has_out, has_err):
    out, err = "f\\xfcr \\u2192 \\udcff prompt\n" * has_out, "note \\u2192 3\n" * has_err
    assert streams(closed, PYTHONIOENCODING="ascii") == (0, out, err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("when", ["at once", "late"])
def test_a_result_that_cannot_be_printed_is_reported_and_a_display_ends_nothing(when):
    code, _, err = streams(">/dev/full", when, PYTHONUTF8="1")
    line = "error: No space left on device; free some space and run the same command again\n"
    assert (code, err.removeprefix("note \xe2\x86\x92 3\n")) == (1, line)
    assert streams(">/dev/full 2>/dev/full", when, "display")[0] == 0


def test_a_terminal_that_is_gone_ends_no_display(monkeypatch):
    ours, theirs = pty.openpty()
    with errors._Display(theirs, "w") as screen:
        assert screen.write(b"seen") == 4
        assert os.read(ours, 4) == b"seen"
        os.close(ours)
        with pytest.raises(OSError):
            os.write(theirs, b"lost")
        assert screen.write(memoryview(b"lost")) == 4


@pytest.fixture
def restarts(monkeypatch):
    """What use_huge_pages restarts this process with, on a machine that has huge pages."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: calls.append((program, arguments)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--config", "a recipe.py"])
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: "always [madvise] never")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    return calls


def test_huge_pages_are_asked_for_by_one_restart_with_the_same_arguments(restarts):
    use_huge_pages()
    assert restarts == [(sys.executable, [sys.executable, "train.py", "--config", "a recipe.py"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    use_huge_pages()
    assert len(restarts) == 1


@pytest.mark.parametrize(
    "why_not",
    [
        lambda patch: patch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1"),
        lambda patch: patch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31")),
        lambda patch: patch.setattr(platform, "libc_ver", lambda: ("", "")),
        lambda patch: patch.setattr(Path, "read_text", lambda self: "always madvise [never]"),
    ],
    ids=["set by the user", "old glibc", "another libc", "switched off"],
)
def test_huge_pages_are_left_alone_where_they_are_unavailable(restarts, monkeypatch, why_not):
    why_not(monkeypatch)
    use_huge_pages()
    assert restarts == []

"""Exit codes and the one line that goes with them."""

import errno

import pytest

from moe_jax import command


def run(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (command.UserError("a rule,\n got a value"), 2, "error: a rule, got a value\n"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 1, "error: No space left on device: f\n"),
        (PermissionError(errno.EACCES, "Permission denied", "d"), 1, "error: Permission denied: d\n"),
        (KeyboardInterrupt(), 130, "error: interrupted before there was anything to save\n"),
        (command.Interrupted(143), 143, ""),
    ],
)
def test_each_end_has_its_exit_code_and_one_line(error, code, line, capsys):
    assert run(error, capsys) == (code, line)


def test_our_own_faults_keep_their_traceback():
    def main():
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        command.run(main)


def test_success_returns():
    command.run(lambda: None)


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.cache_folder("data") == tmp_path / "moe_jax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(command.cache_folder("data")) == "/home/someone/.cache/moe_jax/data"

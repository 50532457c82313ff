"""Starting jax: its devices, and the cache of compiled programs."""

import os
import re
import warnings

import jax
import pytest
from jax._src import compilation_cache

from moe_jax.errors import EnvironmentFault
from moe_jax.files import cache_folder
from moe_jax.sharding.startup import start_jax
from tests.end_to_end.faulty import no_file_over

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of compiled programs; jax has its own settings, and warnings are shown, until the end of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "zstandard", compilation_cache.zstandard)
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield cache_folder("compiled")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def result(number):
    """Of a program that is compiled, or read from the cache, at each call."""

    def tripled(x):
        return 3 * x + 0.125

    compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return float(jax.jit(tripled)(number))


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:100], lambda content: b""])
def test_a_damaged_program_is_told_once_removed_and_kept_anew(cache, caplog, damage):
    start_jax(compile_cache=True)
    assert result(1.0) == 3.125
    (entry,) = cache.glob("jit_tripled-*")
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert result(2.0) == 6.125
    (told,) = caplog.messages
    reason = r"\(.*decompressing.*\); such entries are removed, and compiled again"
    assert re.fullmatch(f"warning: reading jit_tripled in {cache} failed {reason}", told)
    assert result(3.0) == 9.125
    assert caplog.messages == [told], "what is kept now is sound"
    entry.write_bytes(damage(sound))
    assert result(3.0) == 9.125
    assert len(entry.read_bytes()) > 1000
    assert caplog.messages == [told], "once, however many there are"


def test_what_a_full_disk_leaves_of_a_program_is_removed(cache, caplog):
    start_jax(compile_cache=True)
    with no_file_over(100):
        assert result(1.0) == 3.125
    (told,) = caplog.messages
    assert told.startswith(f"warning: writing jit_tripled in {cache} failed (OSError: [Errno 27] File too large)")
    assert list(cache.iterdir()) == []
    with pytest.warns(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)


@pytest.mark.parametrize("home", ["a file", "~", "read-only"])
def test_without_a_place_for_it_there_is_no_cache(cache, caplog, monkeypatch, home):
    if home == "a file":
        cache.parent.write_text("in the way")
        reason = "Not a directory"
    elif home == "~":
        monkeypatch.setenv("XDG_CACHE_HOME", "~")  # as without HOME and a line in /etc/passwd
        reason = "this user has no home"
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
        reason = "Permission denied"
    start_jax(compile_cache=True)
    assert jax.config.jax_compilation_cache_dir is None
    (told,) = caplog.messages
    assert told.endswith(
        f"{cache_folder('compiled')} cannot be written ({reason}); set XDG_CACHE_HOME to a folder that can"
    )


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_devices_that_are_not_there_are_one_line_with_the_remedy(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(EnvironmentFault) as caught:
        start_jax(compile_cache=True)
    detail = f" ({error})" if str(error) else ""
    assert str(caught.value) == (
        f"jax cannot start its devices where JAX_PLATFORMS is cpu{detail}; install jax for them, as in pip install "
        "'jax[cuda12]', or set JAX_PLATFORMS=cpu"
    )

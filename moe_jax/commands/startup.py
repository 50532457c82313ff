"""The limits of this process and huge pages for XLA's scratch memory: set up before jax is loaded."""

import os
import platform
import sys
from pathlib import Path

from moe_jax.errors import EnvironmentFault

_OPEN_FILES = 128
"""A save of a small model takes some forty, and each connection of a server one."""
_ADDRESSES = 2**30
"""Bytes; with less XLA ends the process by a signal, before it could be told why."""


def check_limits() -> None:
    """Raises the limit of open files where it is low, as 256 on macOS. EnvironmentFault where one rules out jax."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _OPEN_FILES:  # infinity is -1
        if 0 <= hard < _OPEN_FILES:
            raise EnvironmentFault(
                f"a process may open {hard} files here, and needs {_OPEN_FILES}; raise the limit (ulimit -n 1024)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, hard))
    size = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= size < _ADDRESSES:
        raise EnvironmentFault(
            f"a process may have {size >> 20} MiB of addresses here, and jax needs more than {_ADDRESSES >> 20}; "
            "raise the limit (ulimit -v unlimited)"
        )


def use_huge_pages() -> None:
    """Restarts this process once so that glibc allocates huge pages; a no-op if they are unavailable.

    XLA allocates its scratch memory anew at every step on a CPU, and mapping it in pages of 4 kB took a quarter of the
    time of a training step. glibc reads the setting when a process starts. A GLIBC_TUNABLES that is already set, to
    anything, is left alone.
    """
    library, version = platform.libc_ver()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or library != "glibc" or not pages.exists() or "[never]" in pages.read_text():
        return
    if [int(part) for part in version.split(".")] >= [2, 35]:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

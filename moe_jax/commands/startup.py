"""What a command does before it loads jax."""

import os
import platform
import sys
from pathlib import Path


def use_huge_pages() -> None:
    """Restarts this process once with glibc asked for huge pages; does nothing where that is not to be had.

    XLA takes its scratch memory anew at every step on a CPU, and mapping it in pages of 4 kB cost a quarter of the
    time of a training step. The setting must be in the environment before a process starts. It is left alone where
    GLIBC_TUNABLES is set already, to anything.
    """
    library, version = platform.libc_ver()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or library != "glibc" or not pages.exists() or "[never]" in pages.read_text():
        return
    if [int(part) for part in version.split(".")] >= [2, 35]:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

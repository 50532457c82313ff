"""Process-wide settings of jax, made by a command before its first computation."""

import contextlib
import glob
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import EnvironmentFault
from moe_jax.files import cache_folder, make_writable

log = logging.getLogger("moe_jax")


def start_jax(*, compile_cache: bool) -> None:
    """Starts jax's devices. EnvironmentFault where there are none of the kind that JAX_PLATFORMS names.

    With ``compile_cache``, programs are kept in the user's cache folder: the next start skips most compilation.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda where its plugin is not installed
        asked = os.environ.get("JAX_PLATFORMS")
        where = f" where JAX_PLATFORMS is {asked}" if asked else ""
        reason = f" ({error})" if str(error) else ""
        raise EnvironmentFault(
            f"jax cannot start its devices{where}{reason}; install jax for them, as in pip install 'jax[cuda12]', or "
            "set JAX_PLATFORMS=cpu"
        ) from None
    if not compile_cache:
        return
    try:
        folder = make_writable(cache_folder("compiled"))
        str(folder).encode()  # as jax's cache needs it
    except (OSError, UnicodeEncodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name is no UTF-8"
        log.warning(
            f"warning: compiled programs are not kept for the next start: {cache_folder('compiled')} cannot be "
            f"written ({reason}); set XDG_CACHE_HOME to a folder that can"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default leaves out what compiles in under a second; a run here has a dozen of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # By zlib, whose checksum finds every flipped bit: as jax calls zstd, two of three would be run as programs.
    with contextlib.suppress(ImportError):  # not public: where it has moved, a flipped bit may go unseen
        from jax._src import compilation_cache

        compilation_cache.zstandard = None
    _remove_damaged_entries(folder)


def _remove_damaged_entries(folder: Path) -> None:
    """jax compiles again what it cannot read from its cache, and warns, but leaves it there for every start."""
    show, told = warnings.showwarning, set()

    def show_or_remove(message: Warning | str, *arguments: Any, **more: Any) -> None:
        pattern = r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)"
        found = re.match(pattern, str(message), re.DOTALL)
        if found is None:
            show(message, *arguments, **more)
            return
        what, program, reason = found.groups()
        for entry in folder.glob(f"{glob.escape(program)}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
        if what not in told:
            log.warning(
                f"warning: {what} {program} in {folder} failed ({reason}); such entries are removed, and "
                "compiled again"
            )
        told.add(what)

    warnings.showwarning = show_or_remove


def compiler_options(deterministic: bool) -> dict[str, bool] | None:
    """Options of ``jax.jit`` for the training programs: with ``deterministic``, no GPU kernel that varies by run.

    XLA then neither adds up in the order in which threads arrive nor picks kernels by timing them. Programs for CPUs
    and TPUs are deterministic anyway, and not changed by it.
    """
    return {"xla_gpu_deterministic_ops": True} if deterministic else None

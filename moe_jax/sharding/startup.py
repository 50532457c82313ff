"""Process-wide settings of jax, made by a command before its first computation."""

import jax

from moe_jax.files import cache_folder


def enable_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start skips most compilation."""
    folder = cache_folder("compiled")
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default leaves out what compiles in under a second; a run here has a dozen of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compiler_options(deterministic: bool) -> dict[str, bool] | None:
    """Options of ``jax.jit`` for the training programs: with ``deterministic``, no GPU kernel that varies by run.

    XLA then neither adds up in the order in which threads arrive nor picks kernels by timing them. Programs for CPUs
    and TPUs are deterministic anyway, and not changed by it.
    """
    return {"xla_gpu_deterministic_ops": True} if deterministic else None

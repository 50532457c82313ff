"""Process-wide settings of jax, made by a command before its first computation."""

import jax

from moe_jax.command import cache_folder


def enable_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start skips most compilation."""
    folder = cache_folder("compiled")
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default leaves out what compiles in under a second; a run here has a dozen of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

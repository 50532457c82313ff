"""How tests have their programs compiled: quickly, for the models are tiny and most of the time would go into it."""

import importlib.metadata
import os
from pathlib import Path

# A third of the time XLA needs goes into cutting small programs into parts.
XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
# Takes half of the time. Newer versions have no such flag, and XLA ends a process that sets one it does not know.
if importlib.metadata.version("jax").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"


def quick_environment(cache: Path) -> dict[str, str]:
    """Of a command that a test starts: on the CPU, compiled quickly, with its caches in the folder ``cache``."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": XLA_FLAGS,
        "XDG_CACHE_HOME": str(cache),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

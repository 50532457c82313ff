"""How tests have their programs compiled: quickly, for the models are tiny and most of the time would go into it."""

import importlib.metadata

# Takes half of the time. Newer versions have no such flag, and XLA ends a process that sets one it does not know.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jax").startswith("0.10.") else ""

QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": XLA_FLAGS}
"""Environment variables of a process that has not imported jax yet."""

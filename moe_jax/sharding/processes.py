"""Runs of several processes: which one writes, and what all of them agree on. Imports jax only when it is asked."""


def is_first_process() -> bool:
    """Whether this is the process that writes what a run has once: its log, its metrics, the names of checkpoints."""
    import jax

    return jax.process_index() == 0


def all_well(is_well: bool) -> bool:
    """Whether ``is_well`` holds in every process.

    Each process must call it at the same place of the program, for each waits for the others: it is a barrier too.
    """
    import jax

    if jax.process_count() == 1:
        return is_well
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(is_well)).all())

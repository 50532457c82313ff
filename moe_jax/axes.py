"""The legend of axis letters, and names for what flows through the package.

An array's name ends in its axes, in order: ``router_logits_TE`` is [tokens, experts].

    B  batch (sequences)            H  query heads
    L  query length                 J  key/value heads
    M  key (cache) length           A  head width
    G  groups of tokens             N  layers
    T  tokens of one group          V  vocabulary
    D  model width                  K  choices per token
    F  expert hidden width          R  routed rows of one group (T * K)
    E  experts                      C  capacity: rows that one expert accepts
    Q  shifts of a bias at which tokens are counted
"""

from typing import Any

import jax

Array = jax.Array
PyTree = Any

"""What a traced program consists of."""

from collections.abc import Iterator

import jax
from jax.extend.core import JaxprEqn


def equations_of(jaxpr) -> Iterator[JaxprEqn]:
    """Every equation of a jaxpr, those of its loops, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in calls_of(equation):
            yield from equations_of(inner)


def calls_of(equation: JaxprEqn) -> list:
    """The jaxprs that an equation calls."""
    parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr"))
    called = [getattr(parameter, "jaxpr", parameter) for parameter in parameters]
    return [each for each in called if hasattr(each, "eqns")]

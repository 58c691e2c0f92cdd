"""Counts the multiply-adds of a traced program."""

from __future__ import annotations

import math

import jax
import jax.extend.core  # of its own: `import jax` alone does not bring it


def product_flops(jaxpr) -> int:
    """2 per multiply-add of every matrix product that the program runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += repeats * sum(product_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total

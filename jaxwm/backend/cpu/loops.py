"""Loops as CPUs run them fast: little work in each step, and data that stays in the cache."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Slices of fewer numbers fit into the cache anyway.
_LARGE = 2**16


def scan(step: Callable[..., Any], params: Any, carry: Any, xs: Any) -> Any:
    """`jax.lax.scan` of `step(params, carry, x) -> carry, y`.

    What a step computes from the parameters alone, such as slices of kernels, is computed once
    before the loop. XLA leaves it inside on CPUs.
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    program, out = jax.make_jaxpr(step, return_shape=True)(params, carry, first)
    leaves = jax.tree.leaves(params)
    before, inside = _cut(program, len(leaves))
    known = before(*leaves)

    def body(carry: Any, x: Any) -> Any:
        outputs = inside(*known, *jax.tree.leaves((carry, x)))
        return jax.tree.unflatten(jax.tree.structure(out), outputs)

    return jax.lax.scan(body, carry, xs)


def _cut(
    program: core.ClosedJaxpr, count: int
) -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
    """Cuts a program in two: what depends only on its first `count` inputs, and the rest.

    The second function takes what the first returns, and then the other inputs.
    """
    jaxpr = program.jaxpr
    given = [*jaxpr.constvars, *jaxpr.invars[:count]]
    known, early, late = dict.fromkeys(given), [], []
    for equation in jaxpr.eqns:
        if not equation.effects and all(x in known for x in _variables(equation.invars)):
            early.append(equation)
            known |= dict.fromkeys(equation.outvars)
        else:
            late.append(equation)
    wanted = {x for equation in late for x in _variables(equation.invars)}
    wanted.update(_variables(jaxpr.outvars))
    handed = [x for x in known if x in wanted]
    first = jaxpr.replace(invars=jaxpr.invars[:count], outvars=handed, eqns=early)
    second = jaxpr.replace(constvars=[], invars=[*handed, *jaxpr.invars[count:]], eqns=late)
    return (
        core.jaxpr_as_fun(core.ClosedJaxpr(first, program.consts)),
        core.jaxpr_as_fun(core.ClosedJaxpr(second, [])),
    )


def _variables(atoms: list[Any]) -> list[Any]:
    return [x for x in atoms if not isinstance(x, core.Literal)]


def by_slices(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`, one entry of the first axis after the other where these are large.

    What lies in between stays in the cache. The gradient keeps products, sums and maxima and
    computes everything else again.
    """
    if max(x[0].size for x in jax.tree.leaves(arrays)) < _LARGE:
        return function(*arrays)

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in ("dot_general", "reduce_sum", "reduce_max")

    one = jax.checkpoint(lambda slices: function(*slices), policy=kept, prevent_cse=False)
    return jax.lax.map(one, arrays)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which under `jax.vmap` runs one member after the other.

    The function may hold no traced values and no collectives: it takes everything that differs
    between members as arguments.
    """
    return jax.custom_batching.sequential_vmap(function)

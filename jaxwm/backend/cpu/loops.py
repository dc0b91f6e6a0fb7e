"""Loops: scans with little work in each step's gradient, and slices one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxwm.backend.cpu.products import NAME, factors_of, product_in_loop

# Beyond so many numbers, slices computed together leave the cache.
LARGE = 2**16


def scan(step: Callable[..., Any], params: Any, carry: Any, xs: Any) -> Any:
    """`jax.lax.scan` of `step(params, carry, x) -> carry, y`, with a fast gradient to `params`.

    A gradient of a plain scan adds to the gradient of every kernel in every step, and so reads and
    writes more than it multiplies. Here a step stores the two factors of a kernel's gradient, and
    one product after the loop sums over all steps. What depends on `params` alone is computed
    before the loop.

    It reads the jaxpr of a step, and so finds only products that the step computes itself: those
    inside a nested transformation are computed as in a plain scan.
    """
    steps = len(jax.tree.leaves(xs)[0])
    first = jax.tree.map(lambda x: x[0], xs)
    closed, outputs = jax.make_jaxpr(step, return_shape=True)(params, carry, first)
    given = jax.tree.leaves(params)
    known = dict(zip(closed.jaxpr.invars, given, strict=False))  # the other inputs come in the loop
    inputs = closed.jaxpr.invars[len(given) :]
    inside = [eqn for eqn in closed.jaxpr.eqns if not _hoist(eqn, known)]

    products = [eqn for eqn in inside if _multiplies_kernel(eqn, known)]
    kernels = [known[eqn.invars[1]] for eqn in products]
    fixed = jax.lax.stop_gradient(kernels)
    # Without the barrier XLA moves the transposition into the loop.
    turned = jax.lax.optimization_barrier([jnp.swapaxes(kernel, -1, -2) for kernel in fixed])
    factors = [
        factors_of(kernel, *((steps, *var.aval.shape) for var in (eqn.invars[0], eqn.outvars[0])))
        for eqn, kernel in zip(products, kernels, strict=True)
    ]

    def body(carry: Any, inputs_of_step: Any) -> Any:
        x, factors = inputs_of_step
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)) | known
        values |= zip(inputs, jax.tree.leaves((carry, x)), strict=True)
        in_turn = zip(fixed, turned, factors, strict=True)
        for eqn in inside:
            if _multiplies_kernel(eqn, known):
                y = product_in_loop(_read(values, eqn.invars[0]), *next(in_turn))
                values[eqn.outvars[0]] = y
            else:
                _compute(eqn, values)
        flat = [_read(values, var) for var in closed.jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(outputs), flat)

    return jax.lax.scan(_keep_products(body), carry, (xs, factors))


def _hoist(eqn: Any, known: dict[Any, Any]) -> bool:
    """Computes an equation of known values, unless a result is large and larger than its inputs.

    A vector repeated for every row is usually small enough. Inside the loop, its gradient would be
    a sum over rows in every step; outside, it is one sum after the loop.
    """
    read = [var for var in eqn.invars if not isinstance(var, Literal)]
    if not read or eqn.effects or not all(var in known for var in read):
        return False
    most = max(LARGE, *(var.aval.size for var in read))
    if any(var.aval.size > most for var in eqn.outvars):
        return False
    _compute(eqn, known)
    return True


def _multiplies_kernel(eqn: Any, known: dict[Any, Any]) -> bool:
    """Whether an equation is a product of something with a known kernel."""
    if eqn.params.get("name") != NAME:
        return False
    x, kernel = eqn.invars
    return not isinstance(kernel, Literal) and kernel in known and x not in known


def _read(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else values[var]


def _compute(eqn: Any, values: dict[Any, Any]) -> None:
    """Adds the results of an equation to the values."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # depends on the release
    with eqn.ctx.manager:
        read = [_read(values, var) for var in eqn.invars]
        out = eqn.primitive.bind(*functions, *read, **params)
    values.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _keep_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose gradient keeps products, sums and maxima, and recomputes the rest.

    Writing the rest to memory costs a CPU more than computing it again. Sums and maxima take little
    memory and are slow.
    """

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in ("dot_general", "reduce_sum", "reduce_max")

    # `prevent_cse` would keep XLA from fusing what a loop computes again.
    return jax.checkpoint(function, policy=kept, prevent_cse=False)


def by_slices(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`, for large slices of the first axis one after the other.

    What the function computes in between then stays in the cache.
    """
    if max(x[0].size for x in jax.tree.leaves(arrays)) < LARGE:
        return function(*arrays)
    return jax.lax.map(_keep_products(lambda slices: function(*slices)), arrays)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `jax.vmap` runs for one member after the other.

    What a member computes in between then stays in the cache.
    """
    return jax.custom_batching.sequential_vmap(function)

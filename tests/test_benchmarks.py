"""What the roofline counts, on programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.roofline import carried_steps, count, demands, floor
from jaxwm import nets
from jaxwm.recipes import dreamer_v3


def cost_of(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_a_product():
    # 3 * 5 results of 4 multiplications and 4 additions; 12 + 20 + 15 numbers of 4 bytes.
    assert cost_of(jnp.matmul, (3, 4), (4, 5)) == (2 * 3 * 5 * 4, 0, 4 * (12 + 20 + 15))
    # Two of them side by side.
    both = cost_of(lambda a, b: jnp.einsum("gij,gjk->gik", a, b), (2, 3, 4), (2, 4, 5))
    assert both.products == 2 * 2 * 3 * 5 * 4


def test_scans_are_multiplied_out():
    def steps(x, kernel):
        step = lambda x, _: (x @ kernel, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(step, x, None, 3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, 7)[0]

    assert cost_of(steps, (2, 4), (4, 4)).products == 7 * 3 * (2 * 2 * 4 * 4)


def test_what_is_differentiated_or_wrapped_is_counted():
    loss = lambda kernel, x: jnp.sum(jax.jit(jnp.matmul)(x, kernel))  # noqa: E731
    # The product itself and the gradient of one factor.
    assert cost_of(jax.grad(loss), (4, 5), (3, 4)).products == 2 * (2 * 3 * 4 * 5)
    assert cost_of(jax.checkpoint(jnp.matmul), (3, 4), (4, 5)).products == 2 * 3 * 4 * 5


@pytest.mark.parametrize(("stride", "dilation", "side"), [(1, 1, 6), (2, 1, 3), (1, 2, 11)])
def test_a_convolution(stride, dilation, side):
    pads = ((1, 1), (1, 1))
    convolve = lambda x, k: nets.convolve(x, k, stride, pads, dilation)  # noqa: E731
    cost = cost_of(convolve, (2, 6, 6, 3), (3, 3, 3, 5))
    # Two maps of side * side * 5 results, each of 3 * 3 * 3 taps; of a map that is dilated by 2
    # three quarters are zeros.
    assert cost.convolutions == 2 * (2 * side * side * 5) * 27 / dilation**2
    assert cost.bytes == 4 * (2 * 36 * 3 + 9 * 15 + 2 * side * side * 5)


def test_dependent_steps():
    def total(x):
        carried = jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, 5)[0]
        return carried + jax.lax.map(jnp.sin, jnp.ones(9)).sum()

    forward = jax.make_jaxpr(total)(1.0).jaxpr
    assert carried_steps(forward, reverse=False) == 5
    backward = jax.make_jaxpr(jax.grad(total))(1.0).jaxpr
    assert carried_steps(backward, reverse=True) == 5


def test_demands_of_an_update():
    config = dreamer_v3.agent("debug")
    demand = demands(config, "vector", 2, 6)
    # Observing 6 rows and back, dreams of 5 steps.
    assert (demand["steps_forward"], demand["steps_backward"]) == (6 + 5, 6)
    assert demand["convolution_flops"] == 0 < demand["product_flops"]
    # Of each parameter itself and two statistics are read and written, four bytes each.
    assert demand["least_bytes"] > 2 * 3 * 4 * demand["parameters"]
    limits = {"flops_per_second": 1e9, "bytes_per_second": 1e12, "step_seconds": 1e-3}
    have = floor(demand, limits)["floor_seconds"]
    assert have == pytest.approx(demand["product_flops"] / 1e9 + 17e-3)

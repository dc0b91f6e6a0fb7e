"""Products against those of automatic differentiation, and what becomes of their factors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import compiler, products

needs_bfloat16 = pytest.mark.skipif(not compiler.has_bfloat16(), reason="no units for bfloat16")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 3), (3, 7)])
def test_the_gradients_of_a_product_are_those_of_a_matrix_product(rng, inputs, outputs):
    x, kernel = normal(rng, 2, 5, inputs), normal(rng, inputs, outputs)
    have, want = (
        jax.jit(jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1)))(x, kernel)
        for f in (products.product, jnp.matmul)
    )
    for have_one, want_one in zip(have, want, strict=True):
        np.testing.assert_allclose(have_one, want_one, rtol=1e-5, atol=1e-5)


def test_columns_have_the_gradients_of_a_product(rng):
    kernel, x, weight = normal(rng, 2, 5, 3), normal(rng, 2, 5, 7), normal(rng, 2, 3, 7)
    ours = lambda k, x: jnp.sum(weight * products.columns(products.kernel_of(k, "float32"), x))  # noqa: E731
    plain = lambda k, x: jnp.sum(weight * jnp.einsum("gio,gin->gon", k, x))  # noqa: E731
    have, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(kernel, x) for f in (ours, plain))
    for have_one, want_one in zip(*map(jax.tree.leaves, (have, want)), strict=True):
        np.testing.assert_allclose(have_one, want_one, rtol=1e-5, atol=1e-5)


# Few columns of kernels that are not the smallest are computed as rows.
@pytest.mark.parametrize(("size", "count"), [(3, 7), (8, 7), (8, 17)])
def test_sinks_give_the_gradients_that_steps_would_add_up(rng, size, count):
    kernel, start = normal(rng, 2, size, size), normal(rng, 2, size, count)
    inputs = normal(rng, 5, 2, size, count)

    def total(kernel, start, inputs, apart):
        laid_out = products.kernel_of(kernel, "float32")

        def step(x, given):
            own, sink = given
            used = products.with_sinks(laid_out, sink) if apart else laid_out
            return jnp.tanh(products.columns(used, x) + own), x

        each = (inputs, products.sinks(laid_out, 5, count) if apart else None)
        last, seen = jax.lax.scan(step, start, each)
        return jnp.sum(last**2) + jnp.sum(jnp.sin(seen))

    gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)), static_argnums=3)
    have, want = (gradients(kernel, start, inputs, apart) for apart in (True, False))
    for have_one, want_one in zip(*map(jax.tree.leaves, (have, want)), strict=True):
        np.testing.assert_allclose(have_one, want_one, rtol=1e-5, atol=1e-5)


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


@needs_bfloat16
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (16, 64)])
def test_products_of_bfloat16_sum_rounded_factors_in_float32(rng, inputs, outputs):
    x, kernel, grad = (
        normal(rng, 33, inputs),
        normal(rng, inputs, outputs),
        normal(rng, 33, outputs),
    )

    def with_gradients(x, kernel, grad):
        y, back = jax.vjp(products.product, x, kernel)
        return y, *back(grad)

    with jax.default_matmul_precision("bfloat16"):
        have = compiler.jit(with_gradients)(x, kernel, grad)
    x, kernel, grad = map(rounded, (x, kernel, grad))
    for have_one, want in zip(have, (x @ kernel, grad @ kernel.T, x.T @ grad), strict=True):
        assert have_one.dtype == jnp.float32
        np.testing.assert_allclose(have_one, want, rtol=1e-5, atol=1e-5)


@needs_bfloat16
def test_rounded_factors_are_the_nearest_and_are_multiplied_as_they_are(rng):
    x, kernel = map(jnp.asarray, (normal(rng, 33, 64), normal(rng, 64, 16)))
    # Bfloat16 has 8 binary digits: after 1 comes 1 + 2**-7, and after -2 comes -2 - 2**-6.
    given = [1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-9, -2 - 2**-7, 0.0, 3.4e38, np.inf, np.nan]
    nearest = [1, 1 + 2**-7, 1 + 2**-7, -2 - 2**-6, 0, np.inf, np.inf, np.nan]
    assert products.rounded(x) is x
    with jax.default_matmul_precision("bfloat16"):
        bits = products.rounded(jnp.asarray(given, jnp.float32))
        kept = products.rounded(x)
        assert products.rounded(kept) is kept
        learn = jax.value_and_grad(lambda kernel, x: products.product(x, kernel).sum())
        learn = compiler.jit(learn)
        (have, grad), (want, same) = learn(kernel, kept), learn(kernel, x)
    values = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(values, nearest)
    assert have == want
    np.testing.assert_array_equal(grad, same)


# As rows and as columns, of a population.
@needs_bfloat16
@pytest.mark.parametrize("count", [8, 17])
def test_no_product_of_a_loop_of_bfloat16_is_computed_in_float32(rng, count):
    kernel, start = normal(rng, 8, 8) / 3, normal(rng, 3, 8, count)
    inputs = normal(rng, 5, 8, count)

    def total(kernel, start):
        laid_out = products.kernel_of(kernel, "float32")

        def step(x, given):
            own, sink = given
            x = jnp.tanh(products.columns(products.with_sinks(laid_out, sink), x) + own)
            return x, products.product(x.T, kernel)

        last, seen = jax.lax.scan(step, start, (inputs, products.sinks(laid_out, 5, count)))
        return jnp.sum(last**2) + jnp.sum(jnp.sin(seen))

    def gradients():
        each = jax.vmap(jax.grad(lambda *x: total(*x), (0, 1)), (None, 0))
        return compiler.jit(each).lower(kernel, start).compile()

    want = gradients()(kernel, start)
    with jax.default_matmul_precision("bfloat16"):
        compiled = gradients()
        have = compiled(kernel, start)
    text = compiled.as_text()
    kinds = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    factors = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    assert len(factors) >= 5 and {kinds[x] for pair in factors for x in pair} == {"bf16"}
    for have_one, want_one in zip(have, want, strict=True):
        assert 0 < np.linalg.norm(have_one - want_one) < 0.02 * np.linalg.norm(want_one)

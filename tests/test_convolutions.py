"""Convolutions against those of automatic differentiation, and pools of numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import convolutions


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("stride", "dilation", "pads"), [(1, 1, (2, 2)), (2, 1, (1, 2)), (1, 2, (3, 2))]
)
def test_gradients_of_convolutions_are_those_of_automatic_differentiation(
    rng, stride, dilation, pads
):
    # More images than are taken at a time, and not a multiple of them.
    x, kernel = rng.normal(size=(20, 8, 6, 3)), rng.normal(size=(5, 5, 3, 4))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    pads = (pads, pads)

    def plain(x, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, pads, (dilation,) * 2, dimension_numbers=names
        )

    want, pull = jax.vjp(plain, x, kernel)
    got, own_pull = jax.vjp(
        lambda x, k: convolutions.convolve(x, k, stride, pads, dilation), x, kernel
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    for one, other in zip(own_pull(jnp.cos(want)), pull(jnp.cos(want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "inputs"), [("cpu", 2), ("cpu", 17), ("gpu", 2)])
@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_a_pooled_convolution_is_the_pool_of_a_convolution(
    rng, monkeypatch, kernel, backend, inputs
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # chooses the way, not the device
    # More images than are taken at a time. Of one that is empty all results are equal maxima.
    x = normal(rng, 19, 8, 6, inputs)
    x[3] = 0.0
    taps, weight = normal(rng, kernel, kernel, inputs, 4), normal(rng, 19, 4, 3, 4)
    pads = ((kernel - 1) // 2, kernel // 2)

    def pool_of_plain(x, taps):
        y = convolutions.convolve(x, taps, 1, (pads, pads))
        return y.reshape(19, 4, 2, 3, 2, 4).max((2, 4))

    got, want = (
        jax.value_and_grad(lambda *args, f=f: (f(*args) * weight).sum(), (0, 1))(
            jnp.asarray(x), jnp.asarray(taps)
        )
        for f in (convolutions.convolve_pooled, pool_of_plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_pooling_and_doubling_by_hand():
    x = jnp.array([[1.0, 2.0, 5.0, 0.0], [3.0, 4.0, -1.0, -2.0]])[None, :, :, None]
    np.testing.assert_array_equal(convolutions.max_pool(x)[0, :, :, 0], [[4, 5]])
    small = jnp.array([[1.0, 2.0]])[None, :, :, None]
    np.testing.assert_array_equal(
        convolutions.upsample(small)[0, :, :, 0], [[1, 1, 2, 2], [1, 1, 2, 2]]
    )

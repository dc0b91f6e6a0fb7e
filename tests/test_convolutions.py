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


def plain(x, kernel, stride, pads, dilation):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, pads, (dilation,) * 2, dimension_numbers=names
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("function", "sides", "channels", "size", "stride", "pads", "dilation"),
    [
        (convolutions.convolve, (8, 6), (3, 4), 5, 1, (2, 2), 1),
        (convolutions.convolve, (8, 6), (3, 4), 4, 1, (1, 2), 1),
        (convolutions.convolve, (7, 5), (3, 4), 5, 1, (2, 2), 1),
        (convolutions.convolve, (8, 6), (17, 17), 3, 1, (1, 1), 1),
        (convolutions.convolve_strided, (8, 6), (3, 4), 5, 2, (1, 2), 1),
        (convolutions.convolve_strided, (8, 6), (3, 4), 4, 2, (1, 1), 1),
        (convolutions.convolve_strided, (8, 6), (3, 4), 1, 2, (0, 0), 1),
        (convolutions.convolve_strided, (7, 5), (3, 4), 5, 2, (2, 2), 1),
        (convolutions.convolve_transposed, (8, 6), (3, 4), 5, 1, (3, 2), 2),
        (convolutions.convolve_transposed, (7, 5), (3, 4), 3, 1, (2, 1), 2),
    ],
)
def test_convolutions_and_gradients_are_those_of_automatic_differentiation(
    rng, monkeypatch, backend, function, sides, channels, size, stride, pads, dilation
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # chooses the way, not the device
    # More images than are taken at a time, and not a multiple of them.
    x = jnp.asarray(normal(rng, 20, *sides, channels[0]))
    kernel = jnp.asarray(normal(rng, size, size, *channels))
    want, pull = jax.vjp(lambda x, k: plain(x, k, stride, (pads, pads), dilation), x, kernel)
    got, own_pull = jax.vjp(function, x, kernel)
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
        y = plain(x, taps, 1, (pads, pads), 1)
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

"""The fast operations of CPUs against the plain ones, and these against numpy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import backend
from jaxwm.backend import cpu, plain
from jaxwm.types import JaxwmError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def agree(name, *inputs, rtol=1e-4, atol=1e-4):
    """An operation and its gradients are the same in both backends."""
    want, pull = jax.vjp(getattr(plain, name), *inputs)
    got, own_pull = jax.vjp(getattr(cpu, name), *inputs)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-5)
    for one, other in zip(own_pull(jnp.cos(want)), pull(jnp.cos(want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def test_both_backends_have_the_same_operations():
    names = {name for name in vars(cpu) if not name.startswith("_")}
    operations = {name for name in names if callable(getattr(cpu, name))} - {"compiler_options"}
    assert len(operations) > 10
    assert all(callable(getattr(plain, name)) for name in operations)
    assert all(callable(getattr(backend, name)) for name in operations)


def test_the_environment_chooses_the_plain_backend(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.current() is (cpu if jax.default_backend() == "cpu" else plain)
    monkeypatch.setenv(backend.VARIABLE, "plain")
    assert backend.current() is plain
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(JaxwmError, match='JAXWM_BACKEND is "fast"'):
        backend.current()


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [((7,), 3, 5), ((2, 4), 9, 4), ((1,), 1, 1)]
)
def test_products(rng, rows, inputs, outputs):
    x, kernel = normal(rng, *rows, inputs), normal(rng, inputs, outputs)
    np.testing.assert_allclose(plain.product(x, kernel), np.asarray(x) @ np.asarray(kernel), 1e-5)
    agree("product", x, kernel)


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_block_products(rng, rows):
    x, kernel = normal(rng, *rows, 6), normal(rng, 3, 2, 4)
    want = [np.asarray(x)[..., 2 * g : 2 * g + 2] @ np.asarray(kernel)[g] for g in range(3)]
    np.testing.assert_allclose(plain.block_product(x, kernel), np.concatenate(want, -1), 1e-5)
    agree("block_product", x, kernel)


@pytest.mark.parametrize(
    ("name", "sides", "channels", "size"),
    [
        ("convolve", (8, 6), (3, 4), 5),
        ("convolve", (8, 6), (3, 4), 4),
        ("convolve", (7, 5), (3, 4), 5),
        ("convolve", (8, 6), (17, 17), 3),
        ("convolve_strided", (8, 6), (3, 4), 5),
        ("convolve_strided", (8, 6), (3, 4), 4),
        ("convolve_strided", (8, 6), (3, 4), 1),
        ("convolve_strided", (7, 5), (3, 4), 5),
        ("convolve_transposed", (8, 6), (3, 4), 5),
        ("convolve_transposed", (7, 5), (3, 4), 3),
        ("convolve_doubled", (4, 3), (3, 4), 5),
        ("convolve_pooled", (8, 6), (2, 4), 3),
        ("convolve_pooled", (8, 6), (2, 4), 4),
        ("convolve_pooled", (8, 6), (17, 4), 5),
    ],
)
def test_convolutions(rng, name, sides, channels, size):
    # More images than are taken at a time, and not a multiple of them.
    x, kernel = normal(rng, 19, *sides, channels[0]), normal(rng, size, size, *channels)
    # All results of an empty image are equal maxima.
    agree(name, x.at[3].set(0.0), kernel)


def test_pooling_and_doubling_by_hand():
    one = jnp.ones((1, 1, 1, 1))
    x = jnp.array([[1.0, 2.0, 5.0, 0.0], [3.0, 4.0, -1.0, -2.0]])[None, :, :, None]
    small = jnp.array([[1.0, 2.0]])[None, :, :, None]
    for module in (plain, cpu):
        np.testing.assert_array_equal(module.convolve_pooled(x, one)[0, :, :, 0], [[4, 5]])
        doubled = module.convolve_doubled(small, one)[0, :, :, 0]
        np.testing.assert_array_equal(doubled, [[1, 1, 2, 2], [1, 1, 2, 2]])


def recurrence(params, carry, x):
    """A step with a product whose kernel is cut from a larger one, a flag and an unused input."""
    y, reset = x
    carry = jnp.where(reset[:, None], 0.0, carry)
    carry = jnp.tanh(carry @ params["kernel"][:3] + y + params["bias"][None])
    return carry, (carry**2, reset)


def test_scans(rng):
    params = {"kernel": normal(rng, 6, 3), "bias": normal(rng, 3), "unused": normal(rng, 2)}
    carry, reset = normal(rng, 2, 3), jnp.asarray(rng.random((5, 2)) < 0.3)
    xs = normal(rng, 5, 2, 3)

    def total(module, params, carry, xs):
        last, (ys, flags) = module.scan(recurrence, params, carry, (xs, reset))
        return jnp.sum(jnp.cos(last)) + jnp.sum(jnp.sin(ys)), flags

    def both(params, carry, xs):
        grads = [
            jax.value_and_grad(lambda *a, m=module: total(m, *a), (0, 1, 2), has_aux=True)
            for module in (plain, cpu)
        ]
        return [grad(params, carry, xs) for grad in grads]

    want, got = jax.jit(both)(params, carry, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    # Members that train side by side, each with parameters of its own.
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (params, carry, xs))
    want, got = jax.vmap(both)(*many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_a_scan_cuts_kernels_before_the_loop(rng):
    params = {"kernel": normal(rng, 6, 3), "bias": normal(rng, 3)}
    xs = normal(rng, 5, 2, 3), jnp.zeros((5, 2), bool)
    program = jax.make_jaxpr(lambda *args: cpu.scan(recurrence, *args))(params, xs[0][0], xs)
    (loop,) = [x for x in program.jaxpr.eqns if x.primitive.name == "scan"]
    assert "slice" in {x.primitive.name for x in program.jaxpr.eqns}
    assert "slice" not in {x.primitive.name for x in loop.params["jaxpr"].jaxpr.eqns}


@pytest.mark.parametrize("size", [10, 300])  # small slices at once, large ones one by one
def test_slices(rng, size):
    x, weight = normal(rng, 3, size, 256), normal(rng, 256, 2)

    def total(module, x, weight):
        y, most = module.by_slices(lambda x: (jnp.tanh(x @ weight), x.max(-1)), x)
        return jnp.sum(y**2) + jnp.sum(most)

    want, got = (
        jax.value_and_grad(lambda *a, m=module: total(m, *a), (0, 1))(x, weight)
        for module in (plain, cpu)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_members_one_by_one(rng):
    x = normal(rng, 4, 3)
    for module in (plain, cpu):
        got = jax.vmap(module.one_by_one(lambda x: jnp.sum(x**2)))(x)
        np.testing.assert_allclose(got, jnp.sum(x**2, -1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (7,), (20, 51)])
def test_percentiles(rng, shape):
    x = normal(rng, *shape)
    want = np.percentile(np.asarray(x), [5.0, 50.0, 95.0, 0.0, 100.0])
    for module in (plain, cpu):
        got = module.percentile(x, 5.0, 50.0, 95.0, 0.0, 100.0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert np.isnan(module.percentile(x.at[0].set(jnp.nan), 50.0)).all()


@pytest.mark.parametrize("size", [1, 33, 255])
def test_the_largest(rng, size):
    x = normal(rng, 4, size)
    for module in (plain, cpu):
        np.testing.assert_array_equal(module.largest(x), np.asarray(x).max(-1, keepdims=True))


def test_interpolation(rng):
    x, below, share = normal(rng, 3, 5), jnp.asarray([0, 3, 2]), jnp.asarray([0.25, 1.0, jnp.nan])
    for module in (plain, cpu):
        got, pull = jax.vjp(lambda x, m=module: m.interpolate(x, below, share), x)
        want = [0.75 * x[0, 0] + 0.25 * x[0, 1], x[1, 4]]
        np.testing.assert_allclose(got[:2], want, rtol=1e-6)
        assert np.isnan(got[2])
        (grad,) = pull(jnp.asarray([1.0, 2.0, 0.0]))
        np.testing.assert_allclose(grad[:2], [[0.75, 0.25, 0, 0, 0], [0, 0, 0, 0, 2]], rtol=1e-6)


def test_options_are_those_that_the_user_leaves_open(monkeypatch):
    known = cpu.compiler_options()
    assert known.items() <= cpu.compiler.OPTIONS.items()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    assert "xla_cpu_prefer_vector_width" not in cpu.compiler_options()
    monkeypatch.setitem(cpu.compiler.OPTIONS, "xla_cpu_no_such_option", "1")
    assert "xla_cpu_no_such_option" not in cpu.compiler_options()

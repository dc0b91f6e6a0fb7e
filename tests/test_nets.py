"""Layers against numpy loops and numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import backend, nets
from jaxwm.models.gru import BlockGRU, BlockGRUConfig


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def fill(module, rng, *args):
    """Parameters of a module, all of them random: biases and scales too."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *map(jnp.asarray, args)))
    return jax.tree.map(lambda x: normal(rng, *x.shape), shapes["params"])


def apply(module, params, *args, method="__call__"):
    """A method of a module, from numpy arrays to numpy arrays."""
    args = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args]
    output = nets.call(module, method)(jax.tree.map(jnp.asarray, params), *args)
    return jax.tree.map(np.asarray, output)


def test_initial_weights_have_the_promised_spread():
    draw = nets.truncated_normal_in(64, scale=0.5)(jax.random.key(0), (64, 2000))
    # Standard deviation 0.5 / sqrt(64) = 1/16, and no draw beyond two of the untruncated ones.
    np.testing.assert_allclose(draw.std(), 1 / 16, rtol=0.01)
    assert np.abs(draw).max() <= 2 * 1.1368 / 16 * 1.0001
    assert not nets.truncated_normal_in(64, 0.0)(jax.random.key(0), (64, 8)).any()


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    # mean(9, 16) = 12.5: 3 / 3.53555 and twice 4 / 3.53555; zeros stay zeros.
    scale = {"scale": jnp.array([1.0, 2.0])}
    y = nets.RMSNorm(2).apply({"params": scale}, x)
    np.testing.assert_allclose(y, [[0.848525, 2.262732], [0, 0]], rtol=1e-5)
    half = nets.RMSNorm(2).apply({"params": scale}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_linear_by_rows_is_linear(rng):
    module = nets.Linear(5, 3)
    x = normal(rng, 2, 4, 5)
    params = fill(module, rng, x)
    want = x @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(apply(module, params, x), want, atol=1e-6)
    parts = apply(module, params, x[..., :2], 0, method="rows")
    parts = parts + apply(module, params, x[..., 2:], 2, method="rows")
    np.testing.assert_allclose(apply(module, params, parts, method="add_bias"), want, atol=1e-6)


def test_block_linear_is_a_dense_layer_of_blocks(rng):
    module = nets.BlockLinear(6, 4, blocks=2)
    x = normal(rng, 7, 6)
    params = fill(module, rng, x)
    dense = np.zeros((6, 4), np.float32)
    dense[:3, :2], dense[3:, 2:] = params["kernel"]
    want = x @ dense + params["bias"]
    np.testing.assert_allclose(apply(module, params, x), want, atol=1e-6)
    # One input for all blocks: as if each block had it in its own rows, here the last two.
    shared = normal(rng, 7, 2)
    repeated = np.concatenate([shared, shared], -1)
    each = apply(module, params, repeated, 1, method="rows")
    have = apply(module, params, shared, 1, method="shared_rows")
    np.testing.assert_allclose(have, each, atol=1e-6)
    have = apply(module, params, each, method="add_bias")
    np.testing.assert_allclose(have, each + params["bias"], atol=1e-6)


def test_gradients_of_many_steps_add_up_in_full_precision():
    module, one = nets.Linear(1, 1, dtype="bfloat16"), jnp.ones((1, 1))
    apply = nets.call(module)

    def step(params, carry, x):
        return carry + apply(params, x).astype(jnp.float32), ()

    def total(kernel):
        params = {"kernel": kernel, "bias": jnp.zeros(1)}
        inputs = jnp.ones((1000, 1, 1), jnp.bfloat16)
        return backend.scan(step, params, jnp.zeros((1, 1)), inputs)[0][0, 0]

    # A thousand steps whose gradient is 1 each; in bfloat16, 256 + 1 is 256.
    assert jax.grad(total)(one) == 1000


def test_slices_change_neither_values_nor_gradients(rng):
    x = normal(rng, 3, 2, 2**17)

    def total(x):
        low, high = backend.by_slices(lambda x: (x.min(-1), jnp.sin(x).sum(-1)), x)
        return jnp.sum(low * high)

    whole = lambda x: jnp.sum(x.min(-1) * jnp.sin(x).sum(-1))  # noqa: E731
    have, want = (jax.jit(jax.value_and_grad(f))(x) for f in (total, whole))
    for have_one, want_one in zip(have, want, strict=True):
        np.testing.assert_allclose(have_one, want_one, rtol=1e-3, atol=1e-3)


def test_heads_share_a_trunk_and_start_at_zero_if_asked(rng):
    x = normal(rng, 3, 5)
    module = nets.Heads(5, 8, 2, {"a": 2, "b": 4}, scale=0.0)
    params = module.init(jax.random.key(0), jnp.asarray(x))["params"]
    assert set(params) == {"mlp", "a", "b"}
    out = apply(module, params, x)
    assert out["a"].shape == (3, 2) and out["b"].shape == (3, 4)
    assert not out["a"].any() and not out["b"].any()
    params = fill(module, rng, x)
    h = x
    for index in range(2):
        layer, norm = params["mlp"][f"linear{index}"], params["mlp"][f"norm{index}"]
        h = h @ layer["kernel"] + layer["bias"]
        h = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-4) * norm["scale"]
        h = h / (1 + np.exp(-h))
    want = h @ params["b"]["kernel"] + params["b"]["bias"]
    np.testing.assert_allclose(apply(module, params, x)["b"], want, atol=1e-4)


def convolved(x, kernel, bias, stride):
    """A convolution by loops: output pixel (i, j) is centred as SAME padding asks for."""
    n, h, w, _ = x.shape
    k = kernel.shape[0]
    out_h, out_w = -(-h // stride), -(-w // stride)
    total = max((out_h - 1) * stride + k - h, 0)
    low = total // 2
    padded = np.pad(x, ((0, 0), (low, k), (low, k), (0, 0)))
    out = np.zeros((n, out_h, out_w, kernel.shape[-1]))
    for i in range(out_h):
        for j in range(out_w):
            patch = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.einsum("nabc,abco->no", patch, kernel) + bias
    return out


@pytest.mark.parametrize("kernel", [3, 5])
def test_convolution_of_a_doubled_map(rng, kernel):
    x = normal(rng, 2, 4, 6, 3)
    module = nets.UpsampleConv(3, 2, kernel)
    params = fill(module, rng, x)
    doubled = x.repeat(2, 1).repeat(2, 2)
    want = convolved(doubled, params["kernel"], params["bias"], 1)
    np.testing.assert_allclose(apply(module, params, x), want, atol=1e-4)


@pytest.mark.parametrize(("kind", "stride"), [(nets.Conv, 1), (nets.StridedConv, 2)])
def test_convolution_by_loops(rng, kind, stride):
    x = normal(rng, 2, 6, 6, 3)
    module = kind(3, 4)
    params = fill(module, rng, x)
    want = convolved(x, params["kernel"], params["bias"], stride)
    np.testing.assert_allclose(apply(module, params, x), want, atol=1e-4)


def test_pooled_convolution_by_loops(rng):
    x = normal(rng, 2, 4, 6, 3)
    module = nets.PooledConv(3, 4)
    params = fill(module, rng, x)
    want = convolved(x, params["kernel"], params["bias"], 1)
    want = want.reshape(2, 2, 2, 3, 2, 4).max((2, 4))
    np.testing.assert_allclose(apply(module, params, x), want, atol=1e-4)


def test_transposed_convolution_is_a_convolution_of_a_sparse_map(rng):
    x = normal(rng, 2, 3, 4, 3)
    module = nets.ConvTranspose(3, 2)
    params = fill(module, rng, x)
    sparse = np.zeros((2, 6, 8, 3))
    sparse[:, 1::2, 1::2] = x
    want = convolved(sparse, params["kernel"], params["bias"], 1)
    np.testing.assert_allclose(apply(module, params, x), want, atol=1e-4)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-4) * scale


def test_the_recurrent_core_in_numpy(rng):
    """Each block in a loop."""
    config = BlockGRUConfig(deter=6, hidden=4, blocks=2)
    core = BlockGRU(config, stoch_size=5, action_size=2)
    h, z, a = normal(rng, 3, 6), normal(rng, 3, 5), 2 * normal(rng, 3, 2)
    params = fill(core, rng, h, z, a)

    def project(x, name):
        layer = params[f"in_{name}"]
        x = x @ layer["kernel"] + layer["bias"]
        return silu(norm(x, params[f"in_{name}_norm"]["scale"]))

    clipped = a / np.maximum(1, np.abs(a))
    shared = np.concatenate(
        [project(h, "deter"), project(z, "stoch"), project(clipped, "action")], -1
    )

    def blocks(layer, parts):
        out = [part @ kernel for part, kernel in zip(parts, layer["kernel"], strict=True)]
        return np.concatenate(out, -1) + layer["bias"]

    x = blocks(params["hidden"], [np.concatenate([p, shared], -1) for p in np.split(h, 2, -1)])
    x = silu(norm(x, params["hidden_norm"]["scale"]))
    gates = blocks(params["gates"], np.split(x, 2, -1)).reshape(3, 2, 3, 3)
    reset, candidate, update = (gates[:, :, i].reshape(3, 6) for i in range(3))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    update = sigmoid(update - 1)
    want = update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * h
    np.testing.assert_allclose(apply(core, params, h, z, a), want, atol=1e-4)


def test_actions_beyond_one_are_clipped_without_a_gradient():
    core = BlockGRU(BlockGRUConfig(4, 3, 2), stoch_size=2, action_size=2)
    args = (jnp.ones((1, 4)), jnp.ones((1, 2)))
    params = core.init(jax.random.key(0), *args, jnp.zeros((1, 2)))["params"]
    at = lambda x: nets.call(core)(params, *args, jnp.array([x]))  # noqa: E731
    np.testing.assert_allclose(at([5.0, -0.5]), at([1.0, -0.5]), rtol=1e-6)
    assert np.abs(at([0.5, -0.5]) - at([1.0, -0.5])).max() > 1e-6

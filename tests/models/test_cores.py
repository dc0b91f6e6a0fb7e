"""Conformance of every recurrent memory: sequences, resets, causality, seeds, initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import nets
from jaxwm.models import recurrent, running_mean
from jaxwm.types import JaxwmError

B, T, S, A = 3, 7, 5, 2
CORES = {
    "planet": (recurrent.core, recurrent.PlanetGRUConfig(deter=6, hidden=16)),
    "keras": (recurrent.core, recurrent.KerasGRUConfig(deter=6, hidden=4)),
    "layer_norm": (recurrent.core, recurrent.LayerNormGRUConfig(deter=6, hidden=4)),
    "layer_norm_input": (recurrent.core, recurrent.LayerNormGRUConfig(6, 4, norm="layer")),
    "running_mean": (running_mean.core, running_mean.RunningMeanConfig(deter=6)),
}


@pytest.fixture(params=CORES)
def core(request):
    constructor, config = CORES[request.param]
    return constructor(config, S, A, "float32")


@pytest.fixture
def rows():
    """Latents, actions and flags of windows that hold ends of episodes; masked as `step` asks."""
    key_stoch, key_action = jax.random.split(jax.random.key(1))
    is_first = jnp.zeros((T, B), bool).at[0, 0].set(True).at[3, 0].set(True).at[4, 1].set(True)
    keep = ~is_first[..., None]
    stoch = jax.random.normal(key_stoch, (T, B, S)) * keep
    action = jax.random.normal(key_action, (T, B, A)) * keep
    return stoch, action, is_first


def warm(core, params):
    """A carry in the middle of an episode."""
    stoch, action = jnp.ones((B, S)), jnp.ones((B, A))
    embedded = core.embed(params, action)
    return core.step(params, core.initial(B), stoch, embedded, jnp.zeros(B, bool))


def run(core, params, carry, stoch, action, is_first):
    return core.sequence(params, carry, stoch, core.embed(params, action), is_first)


def close(have, want, tolerance=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), have, want
    )


def test_a_sequence_is_its_steps(core, rows):
    params = core.init(jax.random.key(0))
    stoch, action, is_first = rows
    carry = warm(core, params)
    last, deter, carries = jax.jit(run, static_argnums=0)(core, params, carry, *rows)
    assert deter.shape == (T, B, 6)
    for t in range(T):
        embedded = core.embed(params, action[t])
        carry = core.step(params, carry, stoch[t], embedded, is_first[t])
        close(deter[t], core.deter(carry))
        close(jax.tree.map(lambda x, t=t: x[t], carries), carry)
    close(last, carry)


def test_gradients_of_a_sequence_are_those_of_its_steps(core, rows):
    params = core.init(jax.random.key(0))
    weights = jax.random.normal(jax.random.key(2), (T, B, 6))
    by_scan = recurrent.sequence_by_scan(core.step, core.deter)

    def loss(params, stoch, action, sequence):
        carry = warm(core, params)
        embedded = core.embed(params, action)
        return jnp.sum(weights * sequence(params, carry, stoch, embedded, rows[2])[1])

    grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    close(grad(params, *rows[:2], core.sequence), grad(params, *rows[:2], by_scan), 1e-5)


def test_a_first_row_is_a_fresh_start(core, rows):
    params = core.init(jax.random.key(0))
    stoch, action, is_first = rows
    _, deter, _ = run(core, params, warm(core, params), *rows)
    # Environment 0 starts an episode at rows 0 and 3, environment 1 at row 4.
    for env, start, stop in ((0, 0, 3), (0, 3, T), (1, 4, T)):
        span = slice(start, stop), slice(env, env + 1)
        _, alone, _ = run(
            core, params, core.initial(1), stoch[span], action[span], jnp.zeros_like(is_first[span])
        )
        np.testing.assert_allclose(deter[span], alone, rtol=1e-6, atol=1e-6)


def test_nothing_flows_backwards_in_time_or_across_episodes_and_rows(core, rows):
    params = core.init(jax.random.key(0))
    stoch, action, is_first = rows

    def deter(stoch, action):
        return run(core, params, warm(core, params), stoch, action, is_first)[1].sum(-1)

    # (T, B) outputs by (T, B, S) and (T, B, A) inputs.
    reach = [np.abs(jac).max(-1) for jac in jax.jacobian(deter, (0, 1))(stoch, action)]
    episode = np.cumsum(np.asarray(is_first), 0)
    for jac in reach:
        for t, b, s, c in np.ndindex(T, B, T, B):
            seen = b == c and s <= t and episode[t, b] == episode[s, c]
            if not seen:
                assert jac[t, b, s, c] == 0.0, (t, b, s, c)
            elif s == t and not is_first[t, b]:  # first rows are masked
                assert jac[t, b, s, c] > 0.0, (t, b, s, c)


def test_seeds_side_by_side_are_seeds_one_by_one(core, rows):
    keys = jax.random.split(jax.random.key(5), 3)

    def outcome(key):
        params = core.init(key)
        return run(core, params, warm(core, params), *rows)[1]

    together = jax.vmap(outcome)(keys)
    close(together, jnp.stack([outcome(key) for key in keys]))


def test_carries_and_outputs_have_the_compute_type(rows):
    for constructor, config in CORES.values():
        core = constructor(config, S, A, "bfloat16")
        params = core.init(jax.random.key(0))
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
        last, deter, carries = run(core, params, core.initial(B), *rows)
        same = jax.tree.map(lambda x: x.dtype, core.initial(B))
        assert jax.tree.map(lambda x: x.dtype, last) == same
        assert jax.tree.map(lambda x: x.dtype, carries) == same
        assert deter.dtype == "bfloat16"


def test_a_gru_that_keeps_or_replaces_its_state():
    """Gates driven to 0 or 1 by their biases leave the old state or the candidate, by hand."""
    planet, keras = nets.call(recurrent.PlanetGRU(3, 2)), nets.call(recurrent.KerasGRU(3, 2))
    h = jnp.array([[0.5, -0.25]])
    x = jnp.zeros((1, 3))
    big = jnp.array([50.0, 50.0])
    none = lambda rows, columns: jnp.zeros((rows, columns))  # noqa: E731
    keep = {
        "gates": {"kernel": none(5, 4), "bias": jnp.concatenate([big, big])},  # [r, u] = 1
        "candidate": {"kernel": none(5, 2), "bias": jnp.array([1.0, 2.0])},
    }
    np.testing.assert_allclose(planet(keep, x, h), h)
    new = keep | {"gates": {"kernel": none(5, 4), "bias": jnp.concatenate([big, -big])}}
    np.testing.assert_allclose(planet(new, x, h), np.tanh([[1.0, 2.0]]), 1e-6)
    # Keras: [z, r, c]; z keeps, r multiplies the recurrent share of the candidate.
    biases = {"kernel": none(3, 6), "bias": jnp.concatenate([-big, -big, jnp.array([1.0, 2.0])])}
    recurrent_share = {"kernel": none(2, 6), "bias": jnp.full(6, 3.0)}
    params = {"input": biases, "recurrent": recurrent_share}
    np.testing.assert_allclose(keras(params, x, h), np.tanh([[1.0, 2.0]]), 1e-6)


def test_initialisers():
    keys = jax.random.split(jax.random.key(3), 3)
    x, h = jnp.zeros((1, 40)), jnp.zeros((1, 30))
    planet = recurrent.PlanetGRU(40, 30).init(keys[0], x, h)["params"]
    np.testing.assert_array_equal(planet["gates"]["bias"], 1.0)
    np.testing.assert_array_equal(planet["candidate"]["bias"], 0.0)
    limit = np.sqrt(6 / (70 + 60))
    kernel = np.asarray(planet["gates"]["kernel"])
    assert 0.98 * limit < np.abs(kernel).max() <= limit
    assert abs(kernel.std() - limit / np.sqrt(3)) < 0.02 * limit
    rows = np.asarray(
        recurrent.KerasGRU(40, 30).init(keys[1], x, h)["params"]["recurrent"]["kernel"]
    )
    np.testing.assert_allclose(rows @ rows.T, np.eye(30), atol=1e-5)
    norm = recurrent.LayerNormGRU(40, 30).init(keys[2], x, h)["params"]["norm"]
    np.testing.assert_array_equal(norm["scale"], np.ones(90))


def test_sizes_below_one_are_refused():
    for config in (recurrent.PlanetGRUConfig, recurrent.LayerNormGRUConfig):
        with pytest.raises(JaxwmError, match="deter"):
            config(deter=0)
    with pytest.raises(JaxwmError, match="deter"):
        running_mean.RunningMeanConfig(deter=-1)

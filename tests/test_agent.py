"""One update of the whole agent, and acting."""

import dataclasses
import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import compiler, envs
from jaxwm.agent import LossWeights, compute_dtype, make_agent
from jaxwm.envs import wrappers
from jaxwm.evaluate.rollout import collect
from jaxwm.recipes import dreamer_v3
from jaxwm.types import Latent

T, B = 6, 2
CONFIG = dreamer_v3.agent("debug")
WEIGHTS = LossWeights(2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0)


@pytest.fixture(scope="module")
def env():
    return envs.make("toy/Memory")


@pytest.fixture(scope="module")
def agent(env):
    optim = dataclasses.replace(CONFIG.optim, warmup_steps=4)
    config = dataclasses.replace(CONFIG, optim=optim, weights=WEIGHTS, dtype="float32")
    made = make_agent(config, env.obs_space, env.action_space)
    return made._replace(
        init=jax.jit(made.init), act=jax.jit(made.act), update=jax.jit(made.update)
    )


@pytest.fixture(scope="module")
def start(agent):
    return agent.init(jax.random.key(0))


@pytest.fixture(scope="module")
def steps(agent, env, start):
    return jax.jit(lambda key: collect(agent, start.params, env, T, key, B))(jax.random.key(1))


@pytest.fixture(scope="module")
def updated(agent, start, steps):
    """The states after 0, 1, 2 and 3 updates on the same rows, and what was reported."""
    states, reports = [start], []
    for count in range(3):
        key = jax.random.fold_in(jax.random.key(2), count)
        state, latents, metrics = agent.update(states[-1], agent.initial(B), steps, key)
        states.append(state)
        reports.append((latents, metrics))
    return states, reports


def test_the_total_is_the_weighted_sum(updated):
    _, ((_, metrics), *_) = updated
    # rec 2, reward 3, continue 5, dyn 7, rep 11, policy 13, value 17, replay_value 19
    numbers = {"rec/cue": 2, "reward": 3, "continue": 5, "dyn": 7, "rep": 11}
    numbers |= {"policy": 13, "value": 17, "replay_value": 19}
    assert {name for name in metrics if name.startswith("loss/")} == {
        *(f"loss/{name}" for name in numbers),
        "loss/total",
    }
    total = sum(weight * float(metrics[f"loss/{name}"]) for name, weight in numbers.items())
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["grad_norm"] > 0


def test_unweighted_losses_start_where_knowing_nothing_starts(updated):
    _, ((_, metrics), *_) = updated
    # Critic and reward head are zero: 41 bins equally likely; the critic's loss counts its
    # target and its slow copy.
    np.testing.assert_allclose(metrics["loss/reward"], np.log(41), rtol=1e-5)
    assert metrics["loss/dyn"] >= 1 and metrics["loss/rep"] >= 1  # free nats
    assert metrics["dream/return_scale"] == 1


@pytest.mark.skipif(not compiler.has_bfloat16(), reason="no units for bfloat16")
def test_an_update_with_products_of_bfloat16_learns_nearly_the_same(agent, start, steps, updated):
    _, ((_, want), *_) = updated
    with jax.default_matmul_precision("bfloat16"):
        update = compiler.jit(lambda *given: agent.update(*given))
        key = jax.random.fold_in(jax.random.key(2), 0)
        _, _, have = update(start, agent.initial(B), steps, key)
    assert have["loss/total"] != want["loss/total"]
    for name in ("loss/total", "loss/rec/cue", "loss/policy", "loss/value", "grad_norm"):
        np.testing.assert_allclose(have[name], want[name], rtol=0.05, err_msg=name)


def test_the_first_update_has_no_step_and_the_others_move_everything(updated):
    states, _ = updated
    # Warmup: the first learning rate is 0.
    chex.assert_trees_all_equal(states[1].params, states[0].params)
    before, after = (jax.tree_util.tree_flatten_with_path(x.params)[0] for x in states[1::2])
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert (old != new).any(), jax.tree_util.keystr(path)
        assert new.dtype == jnp.float32


def test_the_slow_critic_follows_by_a_fiftieth(updated):
    states, _ = updated
    chex.assert_trees_all_equal(
        states[0].slow.params["value"], states[0].params["behavior"]["value"]
    )
    for old, new in itertools.pairwise(states):
        want = jax.tree.map(
            lambda slow, fast: 0.98 * slow + 0.02 * fast,
            old.slow.params["value"],
            new.params["behavior"]["value"],
        )
        chex.assert_trees_all_close(new.slow.params["value"], want, atol=1e-7, rtol=0)
    moved = jax.tree.map(
        lambda x, y: np.abs(x - y).max(), states[1].slow.params, states[3].slow.params
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_an_update_returns_the_latents_of_its_rows(agent, start, steps, updated):
    _, ((latents, _), *_) = updated
    noise = agent.noise(jax.random.fold_in(jax.random.key(2), 0), T, B)
    again, _ = agent.model.observe(start.params["model"], agent.initial(B), steps, noise.posterior)
    chex.assert_trees_all_close(latents, again, atol=1e-5, rtol=0)
    assert noise.prior.shape == (5, T * B, 4) and noise.action["action"].shape == (5, T * B, 2)


def test_acting_is_determined_by_its_key(agent, start, steps):
    row = jax.tree.map(lambda x: jnp.repeat(x[1], 50, axis=0), steps)
    carry = jax.tree.map(lambda x: x + 1, agent.initial(100))
    one = agent.act(start.params, carry, row, jax.random.key(3))
    chex.assert_trees_all_equal(one, agent.act(start.params, carry, row, jax.random.key(3)))
    other = agent.act(start.params, carry, row, jax.random.key(4))
    assert (one[1] != other[1]).any() and (one[0].stoch != other[0].stoch).any()
    assert one[1].shape == (100,) and one[1].dtype == jnp.int32
    assert set(np.unique(one[1])) == {0, 1}


def test_a_first_row_forgets(agent, start, steps):
    row = jax.tree.map(lambda x: jnp.repeat(x[1], 50, axis=0), steps)
    memories = [jax.tree.map(lambda x, n=n: x + n, agent.initial(100)) for n in (0, 1)]
    fresh = row._replace(is_first=jnp.ones((100,), bool))
    act = lambda carry, row: agent.act(start.params, carry, row, jax.random.key(3))  # noqa: E731
    one, two = (act(carry, fresh) for carry in memories)
    chex.assert_trees_all_equal(one, two)
    one, two = (act(carry, row) for carry in memories)
    assert (one[0].deter != two[0].deter).any()


def test_no_gradient_passes_the_start_of_an_episode(agent, start, steps):
    noise = agent.noise(jax.random.key(0), T, B)

    def loss(deter):
        carry = Latent(deter, agent.initial(B).stoch)
        losses, _, _ = agent.model.loss(start.params["model"], carry, steps, noise.posterior)
        return losses["rec/cue"].sum()

    assert steps.is_first[0].all()
    assert not jax.jit(jax.grad(loss))(jnp.ones((B, 16))).any()


@pytest.mark.no_cover
def test_what_is_computed_again_gives_the_same_gradient_with_less_memory():
    env = envs.make("toy/Pixels")
    found = []
    for recompute in (False, True):
        model = dataclasses.replace(CONFIG.model, recompute=recompute)
        config = dataclasses.replace(CONFIG, model=model, dtype="float32")
        agent = make_agent(config, env.obs_space, env.action_space)
        state = jax.jit(agent.init)(jax.random.key(0))
        many = jax.jit(
            lambda a=agent, s=state: collect(a, s.params, env, 8, jax.random.key(1), 4)
        )()
        draws = agent.noise(jax.random.key(2), 8, 4)
        given = (state.slow.params, state.behavior, agent.initial(4), many, draws)
        grad = jax.jit(jax.grad(agent.loss, has_aux=True))
        memory = grad.lower(state.params, *given).compile().memory_analysis().temp_size_in_bytes
        found.append((grad(state.params, *given)[0], memory))
    (plain, most), (again, least) = found
    scaled = jax.tree.map(lambda x, y: (x - y) / (1e-6 + jnp.abs(x).max()), plain, again)
    chex.assert_trees_all_close(scaled, jax.tree.map(jnp.zeros_like, plain), atol=1e-4)
    assert least < 0.7 * most


def test_weights_by_name():
    assert [WEIGHTS.of(name) for name in ("rec/image", "continue", "replay_value")] == [2, 5, 19]


def test_the_compute_type_follows_the_device():
    assert compute_dtype("bfloat16") == "bfloat16" and compute_dtype("float32") == "float32"
    assert compute_dtype("auto") == ("float32" if jax.default_backend() == "cpu" else "bfloat16")


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
    ],
)
def test_the_compute_type_is_bfloat16_where_there_are_units_for_it(
    monkeypatch, platform, capability, dtype
):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert compute_dtype("auto") == dtype


def test_batched_rows_and_single_rows_are_acted_on_alike(agent, env, start):
    world = wrappers.batch(env, 3)
    _, row = jax.jit(world.reset)(jax.random.key(0))
    carry, action = agent.act(start.params, agent.initial(3), row, jax.random.key(1))
    assert carry.deter.shape == (3, 16) and action.shape == (3,)
    assert action.dtype == row.action.dtype

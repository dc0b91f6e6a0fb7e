"""One update of a whole agent, by `joint` and by `in_turn`, and acting."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxwm import envs
from jaxwm.agent import in_turn, weighted_sum
from jaxwm.envs import wrappers
from jaxwm.evaluate.rollout import collect
from jaxwm.models import rssm
from jaxwm.recipes import dreamer_v3
from jaxwm.recipes.dreamer_v3 import LossWeights
from jaxwm.types import Window

T, B = 6, 2
CONFIG = dreamer_v3.sized("debug")
WEIGHTS = LossWeights(2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0)


@pytest.fixture(scope="module")
def env():
    return envs.make("toy/Memory")


def jitted(made):
    return made._replace(
        init=jax.jit(made.init),
        act=jax.jit(made.act, static_argnames="mode"),
        update=jax.jit(made.update),
    )


@pytest.fixture(scope="module")
def agent(env):
    optim = dataclasses.replace(CONFIG.optim, warmup_steps=4)
    config = dataclasses.replace(CONFIG, optim=optim, weights=WEIGHTS, dtype="float32")
    return jitted(dreamer_v3.agent(config, env.obs_space, env.action_space))


@pytest.fixture(scope="module")
def start(agent):
    return agent.init(jax.random.key(0))


@pytest.fixture(scope="module")
def rows(agent, env, start):
    """T + 1 rows of two environments; a new episode begins at row 1."""

    def play(key):
        steps = collect(agent, start.params, env, T + 1, key, B)
        return steps._replace(is_first=steps.is_first.at[1].set(True))

    return jax.jit(play)(jax.random.key(1))


@pytest.fixture(scope="module")
def window(agent, start, rows):
    """The rows with what acting left beside row 0."""
    row = jax.tree.map(lambda x: x[0], rows)
    _, _, memo = agent.act(start.params, agent.initial(B), row, jax.random.key(7))
    index = jnp.broadcast_to(jnp.arange(T + 1)[:, None], (T + 1, B))
    return Window(memo, rows, jnp.arange(B), index)


@pytest.fixture(scope="module")
def updated(agent, start, window):
    """The states after 0, 1, 2 and 3 updates on the same rows, and what was reported."""
    states, reports = [start], []
    for count in range(3):
        key = jax.random.fold_in(jax.random.key(2), count)
        state, memo, metrics = agent.update(states[-1], window, key)
        states.append(state)
        reports.append((memo, metrics))
    return states, reports


NUMBERS = {"rec/cue": 2, "reward": 3, "continue": 5, "dyn": 7, "rep": 11}
NUMBERS |= {"policy": 13, "value": 17, "replay_value": 19}


def test_the_total_is_the_weighted_sum(updated):
    _, ((_, metrics), *_) = updated
    names = {name for name in metrics if name.startswith("loss/")}
    assert names == {*(f"loss/{name}" for name in NUMBERS), "loss/total"}
    total = sum(weight * float(metrics[f"loss/{name}"]) for name, weight in NUMBERS.items())
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["grad_norm"] > 0


def test_unweighted_losses_start_where_knowing_nothing_starts(updated):
    _, ((_, metrics), *_) = updated
    # Critic and reward head are zero: 41 bins equally likely; the critic's loss counts its
    # target and its slow copy.
    np.testing.assert_allclose(metrics["loss/reward"], np.log(41), rtol=1e-5)
    assert metrics["loss/dyn"] >= 1 and metrics["loss/rep"] >= 1  # free nats
    assert metrics["dream/return_scale"] == 1


def test_the_first_update_has_no_step_and_the_others_move_everything(updated):
    states, _ = updated
    # Warmup: the first learning rate is 0.
    chex.assert_trees_all_equal(states[1].params, states[0].params)
    before, after = (jax.tree_util.tree_flatten_with_path(x.params)[0] for x in states[1::2])
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert (old != new).any(), jax.tree_util.keystr(path)
        assert new.dtype == jnp.float32
    assert [int(state.rest.updates) for state in states] == [0, 1, 2, 3]


def test_the_slow_critic_follows_by_a_fiftieth(updated):
    states, _ = updated
    slow = [state.rest.behavior.slow.params for state in states]
    chex.assert_trees_all_equal(slow[0], states[0].params["behavior"]["value"])
    for index, (old, new) in enumerate(itertools.pairwise(slow)):
        want = jax.tree.map(
            lambda slow, fast: 0.98 * slow + 0.02 * fast,
            old,
            states[index + 1].params["behavior"]["value"],
        )
        chex.assert_trees_all_close(new, want, atol=1e-7, rtol=0)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), slow[1], slow[3])
    assert max(jax.tree.leaves(moved)) > 0


def test_an_update_returns_fresh_memos_of_its_rows(agent, start, window, updated):
    _, ((memo, _), *_) = updated
    key_model, _ = jax.random.split(jax.random.fold_in(jax.random.key(2), 0))
    model, steps = agent.model, jax.tree.map(lambda x: x[1:], window.steps)
    carry = model.unpack(window.memo, B)
    draws = model.draws(key_model, (T, B))
    again = jax.jit(model.observe)(start.params["model"], carry, steps, draws)
    chex.assert_trees_all_close(memo, model.pack(again.carries), atol=1e-5, rtol=0)


def test_acting_is_determined_by_its_key(agent, start, rows):
    row = jax.tree.map(lambda x: jnp.repeat(x[2], 50, axis=0), rows)
    carry = jax.tree.map(lambda x: x + 1, agent.initial(100))
    one = agent.act(start.params, carry, row, jax.random.key(3))
    chex.assert_trees_all_equal(one, agent.act(start.params, carry, row, jax.random.key(3)))
    other = agent.act(start.params, carry, row, jax.random.key(4))
    assert (one[1] != other[1]).any() and (one[0].model.stoch != other[0].model.stoch).any()
    assert one[1].shape == (100,) and one[1].dtype == jnp.int32
    assert set(np.unique(one[1])) == {0, 1}
    # The memo is what the model packs of its memory.
    chex.assert_trees_all_equal(one[2], agent.model.pack(one[0].model))
    # The greedy action depends on the latent alone.
    _, greedy, _ = agent.act(start.params, carry, row, jax.random.key(3), mode="greedy")
    dreams = one[0].model
    latent = jnp.concatenate([dreams.core, dreams.stoch], -1)
    same = (latent[:, None] == latent[None]).all(-1)
    assert (np.asarray(greedy)[:, None] == np.asarray(greedy)[None])[np.asarray(same)].all()


def test_a_first_row_forgets(agent, start, rows):
    row = jax.tree.map(lambda x: jnp.repeat(x[2], 50, axis=0), rows)
    memories = [jax.tree.map(lambda x, n=n: x + n, agent.initial(100)) for n in (0, 1)]
    fresh = row._replace(is_first=jnp.ones((100,), bool))
    act = lambda carry, row: agent.act(start.params, carry, row, jax.random.key(3))  # noqa: E731
    one, two = (act(carry, fresh) for carry in memories)
    chex.assert_trees_all_equal(one, two)
    one, two = (act(carry, row) for carry in memories)
    assert (one[0].model.core != two[0].model.core).any()


def test_no_gradient_passes_the_start_of_an_episode(agent, start, window):
    steps = jax.tree.map(lambda x: x[1:], window.steps)
    draws = agent.model.draws(jax.random.key(0), (T, B))

    def loss(memory):
        carry = rssm.Carry(memory, agent.initial(B).model.stoch)
        losses, _, _ = agent.model.loss(start.params["model"], carry, steps, draws)
        return losses["rec/cue"].sum()

    assert steps.is_first[0].all()
    assert not jax.jit(jax.grad(loss))(jnp.ones((B, 16))).any()


@pytest.mark.no_cover
def test_what_is_computed_again_gives_the_same_gradient_with_less_memory():
    env = envs.make("toy/Pixels")
    found = []
    for recompute in (False, True):
        config = dataclasses.replace(CONFIG.model, recompute=recompute)
        made = dreamer_v3.agent(CONFIG, env.obs_space, env.action_space)
        model = dreamer_v3.world_model(config, env.obs_space, env.action_space)
        params = jax.jit(made.init)(jax.random.key(0)).params
        play = jax.jit(lambda a=made, p=params: collect(a, p, env, 8, jax.random.key(1), 4))
        draws = model.draws(jax.random.key(2), (8, 4))

        def loss(params, steps, draws, model=model):
            losses, _, _ = model.loss(params, model.initial(4), steps, draws)
            return sum(x.mean() for x in losses.values())

        grad, given = jax.jit(jax.grad(loss)), (params["model"], play(), draws)
        memory = grad.lower(*given).compile().memory_analysis().temp_size_in_bytes
        found.append((grad(*given), memory))
    (plain, most), (again, least) = found
    scaled = jax.tree.map(lambda x, y: (x - y) / (1e-6 + jnp.abs(x).max()), plain, again)
    chex.assert_trees_all_close(scaled, jax.tree.map(jnp.zeros_like, plain), atol=1e-4)
    assert least < 0.7 * most


def test_weights_by_name():
    assert [WEIGHTS.of(name) for name in ("rec/image", "continue", "replay_value")] == [2, 5, 19]


def test_a_weighted_sum_by_hand():
    losses = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([[10.0]])}
    weight = lambda name, updates: {"a": 0.5, "b": 1.0}[name] * updates  # noqa: E731
    total, means = weighted_sum(losses, weight, jnp.float32(2))
    # 0.5 * 2 * mean(1, 3) + 1 * 2 * 10 = 2 + 20
    assert total == 22 and means == {"loss/a": 2.0, "loss/b": 10.0}
    assert weighted_sum({}, weight, jnp.float32(2))[0] == 0


def test_the_behaviour_dreams_in_the_model_that_has_just_learned(agent, start, window):
    """`in_turn`: the model's step is that of its loss alone, and the behaviour sees it."""
    weights = lambda name, updates: WEIGHTS.of(name)  # noqa: E731
    made = {}
    for rate in (0.0, 0.3):
        turns = in_turn(agent.model, agent.behavior, weights, optax.sgd(rate), optax.sgd(0.1))
        state = turns.init(jax.random.key(0))
        chex.assert_trees_all_close(state.params, start.params, atol=1e-6)
        state = state._replace(params=start.params)
        made[rate] = jax.jit(turns.update)(state, window, jax.random.key(2))
    (still, memo, calm), (moved, same_memo, metrics) = made[0.0], made[0.3]
    chex.assert_trees_all_equal(still.params["model"], start.params["model"])
    # Both observe with the model before its step, so the model's losses and memos are the same.
    for name in metrics:
        same = name.startswith(("loss/rec", "loss/dyn", "loss/reward", "latent", "loss/model"))
        if same:
            np.testing.assert_allclose(metrics[name], calm[name], rtol=1e-5, err_msg=name)
    chex.assert_trees_all_close(memo, same_memo, atol=1e-6)
    # The dreams differ.
    assert metrics["dream/continue"] != calm["dream/continue"]
    assert int(moved.rest.updates) == 1
    assert {"grad_norm/model", "grad_norm/behavior"} <= metrics.keys()
    total = sum(NUMBERS[x] * float(metrics[f"loss/{x}"]) for x in list(NUMBERS)[:5])
    np.testing.assert_allclose(metrics["loss/model"], total, rtol=1e-5)
    total = sum(NUMBERS[x] * float(metrics[f"loss/{x}"]) for x in list(NUMBERS)[5:])
    np.testing.assert_allclose(metrics["loss/behavior"], total, rtol=1e-5)

    # A step of the model is `params - rate * gradient` of its own weighted losses.
    def loss(params):
        steps = jax.tree.map(lambda x: x[1:], window.steps)
        draws = agent.model.draws(jax.random.split(jax.random.key(2))[0], (T, B))
        carry = agent.model.unpack(window.memo, B)
        losses, _, _ = agent.model.loss(params, carry, steps, draws)
        return sum(WEIGHTS.of(name) * x.mean() for name, x in losses.items())

    grads = jax.jit(jax.grad(loss))(start.params["model"])
    want = jax.tree.map(lambda x, g: x - 0.3 * g, start.params["model"], grads)
    chex.assert_trees_all_close(moved.params["model"], want, atol=1e-4, rtol=1e-4)


def test_batched_rows_and_single_rows_are_acted_on_alike(agent, env, start):
    world = wrappers.batch(env, 3)
    _, row = jax.jit(world.reset)(jax.random.key(0))
    carry, action, memo = agent.act(start.params, agent.initial(3), row, jax.random.key(1))
    assert carry.model.core.shape == (3, 16) and action.shape == (3,)
    assert action.dtype == row.action.dtype and memo.stoch.shape == (3, 4)

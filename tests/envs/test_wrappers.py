"""Wrappers on an environment that counts, whose rows are written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.envs import toy
from jaxwm.envs.wrappers import (
    action_repeat,
    batch,
    fault_message,
    guard,
    map_observation,
    normalize_action,
    scale_reward,
    sticky_actions,
    time_limit,
)
from jaxwm.types import Box, Discrete, Env, JaxwmError, first, transition

COUNT = {"count": Box((1,))}


def counter(low: int = 0, high: int = 1, end: int = 3) -> Env:
    """Counts up by one per step from a start drawn in low..high-1; reward is the count."""

    def look(count):
        return {"count": count.astype(jnp.float32)[None]}

    def reset(key):
        count = jax.random.randint(key, (), low, high)
        return count, first(Discrete(4), look(count))

    def step(count, action, key):
        count = count + 1
        return count, transition(action, look(count), count, count >= end)

    return Env("counter", COUNT, Discrete(4), reset, step)


def run(env: Env, actions: np.ndarray, seed: int = 0):
    """Rows (T + 1, ...) of an environment under given actions (T, ...)."""

    def whole(key, actions):
        key_reset, key_steps = jax.random.split(key)
        state, row = env.reset(key_reset)
        keys = jax.random.split(key_steps, len(actions))
        state, rows = jax.lax.scan(lambda s, x: env.step(s, *x), state, (actions, keys))
        rows = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), row, rows)
        return state, rows

    state, rows = jax.jit(whole)(jax.random.key(seed), jnp.asarray(actions))
    return state, jax.tree.map(np.asarray, rows)


def test_batch_keeps_the_last_row_and_then_starts_anew():
    _, rows = run(batch(counter(), 2), np.full((7, 2), 2))
    for b in range(2):
        #                                    start        end  start       end
        np.testing.assert_array_equal(rows.obs["count"][:, b, 0], [0, 1, 2, 3, 0, 1, 2, 3])
        np.testing.assert_array_equal(rows.reward[:, b], [0, 1, 2, 3, 0, 1, 2, 3])
        np.testing.assert_array_equal(rows.action[:, b], [0, 2, 2, 2, 0, 2, 2, 2])
        np.testing.assert_array_equal(rows.is_first[:, b], [1, 0, 0, 0, 1, 0, 0, 0])
        np.testing.assert_array_equal(rows.is_last[:, b], [0, 0, 0, 1, 0, 0, 0, 1])
        np.testing.assert_array_equal(rows.is_terminal[:, b], rows.is_last[:, b])


@pytest.mark.parametrize("pool", [1, 2, 5])
def test_the_pool_changes_nothing_but_speed(pool):
    count, steps = 5, 12
    _, rows = run(batch(counter(0, 3), count, pool), np.zeros((steps, count), int))

    # Oracle: a plain loop; environment b resets at step t with key b of that step.
    with jax.debug_key_reuse(False):
        start = jax.vmap(lambda k: jax.random.randint(k, (), 0, 3))
        key_reset, key_steps = jax.random.split(jax.random.key(0))
        value = np.array(start(jax.random.split(key_reset, count)))
        expected = [value.copy()]
        for key in jax.random.split(key_steps, steps):
            fresh = np.asarray(start(jax.random.split(jax.random.split(key)[1], count)))
            value = np.where(value >= 3, fresh, value + 1)
            expected.append(value.copy())
    np.testing.assert_array_equal(rows.obs["count"][..., 0], expected)
    assert (rows.is_first.sum(axis=1) > 2).any()  # more ended at once than pools of 1 or 2 hold


def test_batch_refuses_bad_sizes():
    with pytest.raises(JaxwmError, match="at least one environment, but count is 0"):
        batch(counter(), 0)
    with pytest.raises(JaxwmError, match=r"pool must lie in 1\.\.4 \(count\), but it is 5"):
        batch(counter(), 4, pool=5)


def equations(jaxpr, name):
    """All equations of a primitive, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, name)


def test_resets_stay_behind_a_cond_under_vmap():
    env = batch(counter(0, 3), 4)
    keys = jax.random.split(jax.random.key(0), 6).reshape(2, 3)
    states = jax.eval_shape(jax.vmap(jax.vmap(lambda k: env.reset(k)[0])), keys)
    actions = jnp.zeros((2, 3, 4), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(env.step)))(states, actions, keys).jaxpr
    conds, loops = list(equations(jaxpr, "cond")), list(equations(jaxpr, "while"))
    assert [eqn.invars[0].aval.shape for eqn in conds] == [()]
    assert any(len(eqn.params["cond_jaxpr"].jaxpr.eqns) == 1 for eqn in loops)
    for eqn in loops:
        assert eqn.params["cond_jaxpr"].jaxpr.outvars[0].aval.shape == ()


def test_seeds_under_vmap_equal_a_loop():
    env = batch(counter(0, 3), 4, pool=2)

    def rows(key):
        key_reset, key_steps = jax.random.split(key)
        state, _ = env.reset(key_reset)
        actions = jnp.zeros((6, 4), jnp.int32)
        keys = jax.random.split(key_steps, 6)
        return jax.lax.scan(lambda s, x: env.step(s, *x), state, (actions, keys))[1]

    with jax.debug_key_reuse(False):  # its check does not understand a scan under vmap
        keys = jax.random.split(jax.random.key(1), 3)
        many = jax.jit(jax.vmap(rows))(keys)
        one = jax.jit(rows)
        loop = jax.tree.map(lambda *x: jnp.stack(x), *(one(key) for key in keys))
    jax.tree.map(np.testing.assert_array_equal, many, loop)
    # The seeds need different numbers of resets, so some rounds serve only some of them.
    assert not (many.is_first.sum(axis=2) == many.is_first.sum(axis=2)[:1]).all()


def test_one_trace_and_gradients_through_the_batched_step():
    # Reach from the origin: reward = -|a / 4 - g| with |g| = 1, so the gradient at a = 0 is g / 4.
    env = batch(toy.reach(), 3)
    state, row = jax.jit(env.reset)(jax.random.key(0))

    @jax.jit
    def gradient(state, key):
        def total(action):
            state_next, row = env.step(state, action, key)
            return row.reward.sum(), state_next

        return jax.grad(total, has_aux=True)(jnp.zeros((3, 2)))

    slope, state = gradient(state, jax.random.key(1))
    np.testing.assert_allclose(slope, row.obs["target"] / 4, atol=1e-6)
    gradient(state, jax.random.key(2))
    assert gradient._cache_size() == 1


def test_time_limit_cuts_without_a_terminal():
    # From 0 the limit of 2 comes first; from 2 the end at 3 does; from 1 both come together.
    for start, last, terminal in ((0, [0, 0, 1], [0, 0, 0]), (2, [0, 1], [0, 1])):
        env = time_limit(counter(start, start + 1), 2)
        _, rows = run(env, np.zeros(len(last) - 1, int))
        np.testing.assert_array_equal(rows.is_last, last)
        np.testing.assert_array_equal(rows.is_terminal, terminal)
    _, rows = run(batch(time_limit(counter(1, 2), 2), 1), np.zeros((6, 1), int))
    np.testing.assert_array_equal(rows.is_terminal[:, 0], [0, 0, 1, 0, 0, 1, 0])
    with pytest.raises(JaxwmError, match="at least one step, but it is 0"):
        time_limit(counter(), 0)


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    # Two at a time from 0 with the end at 3: rewards 1 + 2, then 3 alone; the state stays at 3.
    state, rows = run(action_repeat(counter(), 2), np.array([3, 1]))
    np.testing.assert_array_equal(rows.reward, [0, 3, 3])
    np.testing.assert_array_equal(rows.obs["count"][:, 0], [0, 2, 3])
    np.testing.assert_array_equal(rows.is_last, [0, 0, 1])
    np.testing.assert_array_equal(rows.action, [0, 3, 1])
    assert int(state) == 3
    with pytest.raises(JaxwmError, match="taken at least once, but times is 0"):
        action_repeat(counter(), 0)


def test_limits_count_what_is_inside_them():
    # Three frames per action: a limit outside counts actions, inside frames.
    _, outside = run(time_limit(action_repeat(counter(end=99), 3), 2), np.zeros(2, int))
    np.testing.assert_array_equal(outside.obs["count"][:, 0], [0, 3, 6])
    np.testing.assert_array_equal(outside.is_last, [False, False, True])
    _, inside = run(action_repeat(time_limit(counter(end=99), 2), 3), np.zeros(2, int))
    np.testing.assert_array_equal(inside.obs["count"][:2, 0], [0, 2])
    np.testing.assert_array_equal(inside.is_last[:2], [False, True])


def test_scaled_rewards():
    _, rows = run(scale_reward(counter(), 0.5), np.zeros(3, int))
    np.testing.assert_array_equal(rows.reward, [0.0, 0.5, 1.0, 1.5])
    with pytest.raises(JaxwmError, match="but 0, not by 0"):
        scale_reward(counter(), 0)


def adder() -> Env:
    """Adds up the actions it really takes."""

    def reset(key):
        return jnp.zeros(()), first(Discrete(2), {"count": jnp.zeros(1)})

    def step(total, action, key):
        total = total + action
        return total, transition(action, {"count": total[None]}, 0.0, False)

    return Env("adder", COUNT, Discrete(2), reset, step)


def test_sticky_actions_repeat_what_was_done():
    ones = np.ones(400, int)
    for probability, least, most in ((0.0, 400, 400), (1.0, 0, 0)):
        _, rows = run(sticky_actions(adder(), probability), ones)
        assert least <= rows.obs["count"][-1, 0] <= most
    # Alternating actions differ from the one before, which comes again in a quarter of the steps:
    # each step taken moves the sum only if its action is 1. The rows keep the choices.
    actions = np.arange(400) % 2
    _, rows = run(sticky_actions(adder(), 0.25), actions)
    taken = np.diff(rows.obs["count"][:, 0])
    np.testing.assert_array_equal(rows.action[1:], actions)
    assert 0.15 < np.mean(taken != actions) < 0.35
    # What is repeated is what was done, even if that was itself a repetition.
    stuck = taken != actions
    np.testing.assert_array_equal(taken[1:][stuck[1:]], taken[:-1][stuck[1:]])
    with pytest.raises(JaxwmError, match="lies in 0 to 1, but sticky actions got 2"):
        sticky_actions(counter(), 2)


def test_the_order_of_sticky_and_repeated_actions():
    actions = np.ones(200, int)
    # Outside, one coin decides for all three frames: sums move by 0 or 3 and soon only by 3.
    _, outside = run(sticky_actions(action_repeat(adder(), 3), 0.9), actions)
    assert set(np.diff(outside.obs["count"][:, 0])) <= {0.0, 3.0}
    # Inside, each frame has its own: some action is taken up between two frames.
    found = set()
    for seed in range(20):
        _, inside = run(action_repeat(sticky_actions(adder(), 0.9), 3), actions[:20], seed)
        found |= set(np.diff(inside.obs["count"][:, 0]))
    assert found & {1.0, 2.0}


def test_an_observation_is_replaced_and_renamed():
    env = map_observation(counter(), "count", Box((2,)), lambda x: jnp.tile(2 * x, 2), "double")
    _, rows = run(env, np.zeros(2, int))
    assert env.obs_space == {"double": Box((2,))}
    np.testing.assert_array_equal(rows.obs["double"], [[0, 0], [2, 2], [4, 4]])
    with pytest.raises(JaxwmError, match="no observation of counter called 'cuont'"):
        map_observation(counter(), "cuont", Box(), lambda x: x)


def echo(space) -> Env:
    """Shows the action it received, as a number to look at."""

    def flat(action):
        return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(action)])

    width = sum(
        int(np.prod(s.shape)) for s in (space.values() if isinstance(space, dict) else [space])
    )
    blank = {"seen": jnp.zeros(width)}
    return Env(
        "echo",
        {"seen": Box((width,))},
        space,
        lambda key: ((), first(space, blank)),
        lambda state, action, key: (state, transition(action, {"seen": flat(action)}, 0.0, False)),
    )


def test_normalize_action_scales_clips_and_keeps_the_agents_action():
    box = Box((2,), "float32", (-2.0, 0.0), (2.0, 10.0))
    env = normalize_action(echo({"box": box, "choice": Discrete(3)}))
    assert env.action_space == {"box": Box((2,), "float32", -1.0, 1.0), "choice": Discrete(3)}
    given = {"box": jnp.array([0.5, 3.0]), "choice": jnp.array(2)}
    _, row = env.step((), given, jax.random.key(0))
    # 0.5 -> -2 + 1.5 / 2 * 4 = 1; 3 is clipped to 1 -> 10; the choice passes.
    np.testing.assert_allclose(row.obs["seen"], [1.0, 10.0, 2.0], atol=1e-6)
    np.testing.assert_array_equal(row.action["box"], [0.5, 3.0])
    assert env.reset(jax.random.key(0))[1].action["box"].dtype == jnp.float32


def test_normalize_action_refuses_infinite_bounds():
    with pytest.raises(JaxwmError, match=r"'force' of echo has an infinite bound .* finite bounds"):
        normalize_action(echo({"force": Box((1,), "float32", 0.0)}))


def broken() -> Env:
    """Counts like `counter`, with NaN in "count" at 2 where the action is 1, and infinities."""
    env = counter(end=9)
    space = {"a": Box((2,), missing=True), "count": Box((1,)), "id": Discrete(2)}

    def spoil(row, nan, reward):
        count = jnp.where(nan, jnp.nan, row.obs["count"])
        absent = jnp.full(2, -jnp.inf)
        obs = {"a": absent, "count": count, "id": jnp.zeros((), jnp.int32)}
        return row._replace(obs=obs, reward=reward)

    def reset(key):
        state, row = env.reset(key)
        return state, spoil(row, False, row.reward)

    def step(state, action, key):
        state, row = env.step(state, action, key)
        reward = jnp.where((action == 2) & (state == 2), jnp.inf, row.reward)
        return state, spoil(row, (action == 1) & (state == 2), reward)

    return Env("broken", space, Discrete(3), reset, step)


def test_guard_keeps_nan_out_of_the_rows_and_remembers_the_first():
    env = guard(batch(broken(), 3))
    # Environment 1 breaks in its reward at its step 2 and environment 2 in "count".
    state, rows = run(env, np.array([[0, 2, 1]] * 4))
    assert np.isfinite(rows.reward).all() and np.isfinite(rows.obs["count"]).all()
    assert np.isneginf(rows.obs["a"]).all()  # marked as missing: a value
    np.testing.assert_array_equal(
        rows.obs["count"][..., 0].T, [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]
    )
    np.testing.assert_array_equal(
        rows.reward.T, [[0, 1, 2, 3, 4], [0, 1, 0, 0, 1], [0, 1, 2, 0, 1]]
    )
    np.testing.assert_array_equal(rows.is_last.T, [[0] * 5, [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(rows.is_first.T[1:], [[1, 0, 0, 1, 0]] * 2)
    assert not rows.is_terminal.any()
    # Keys are a, count, id, reward: the first bad row is environment 1's, in the reward.
    assert tuple(map(int, state.fault)) == (2, 3, 1)
    message = fault_message(env, state.fault)
    assert "in the reward of environment 1, 2 bad rows" in message
    assert "observation 'count'" in fault_message(env, state.fault._replace(key_index=1))
    assert fault_message(env, state.fault._replace(count=0)) is None

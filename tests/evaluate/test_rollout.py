"""Episodes, recordings and dreams, with agents and models that can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import envs
from jaxwm.envs import wrappers
from jaxwm.evaluate.rollout import collect, evaluate, open_loop
from jaxwm.recipes import dreamer_v3
from jaxwm.types import Agent, Box, Discrete, Env, JaxwmError, Observed, Step, first, transition


def scripted(choose) -> Agent:
    """An agent that remembers the first cue of each episode and acts by `choose`."""

    def act(params, carry, row, key, mode):
        assert mode == "sample"  # the default of evaluations
        cue = row.obs["cue"].astype(jnp.float32) if "cue" in row.obs else row.reward
        seen = jnp.where(row.is_first, cue, carry)
        return seen, choose(params, seen, row).astype(jnp.int32), ()

    def never(*args):
        raise AssertionError("nothing learns here")

    return Agent(never, lambda batch: jnp.zeros((batch,)), act, never)


@pytest.fixture(scope="module")
def memory():
    return envs.make("toy/Memory")


def test_an_agent_that_remembers_earns_the_optimum(memory):
    env = memory
    agent = scripted(lambda params, seen, row: params[0] * seen + params[1])
    run = jax.jit(lambda params, key: evaluate(agent, params, env, 16, key))

    def play(params, seed):
        return run(jnp.array(params, jnp.float32), jax.random.key(seed)).tolist()

    # The cue is 1 + the bit asked for: naming it earns 1, the other bit -1.
    assert play([1, -1], 0) == [1.0] * 16
    assert play([-1, 2], 0) == [-1.0] * 16
    # One fixed answer is right where the other is wrong, and the key decides where.
    ones = play([0, 1], 0)
    assert ones == [-x for x in play([0, 0], 0)]
    assert set(ones) == {-1.0, 1.0}
    assert play([0, 1], 1) != ones


def test_only_the_first_episode_counts_and_long_ones_are_cut():
    agent = scripted(lambda params, seen, row: jnp.zeros(seen.shape))
    env = envs.make("toy/Prediction")  # 8 steps of reward 1
    assert evaluate(agent, None, env, 3, jax.random.key(0)).tolist() == [8.0] * 3
    assert evaluate(agent, None, env, 3, jax.random.key(0), limit=5).tolist() == [5.0] * 3


def counting(rewards: list[float]) -> Env:
    """One episode of given rewards, as long as there are rewards."""

    def reset(key):
        return jnp.zeros((), jnp.int32), first(Discrete(2), {"n": jnp.zeros((1,))})

    def step(state, action, key):
        reward = jnp.asarray(rewards)[state]
        obs = {"n": jnp.ones((1,)) * state}
        return state + 1, transition(action, obs, reward, state + 1 == len(rewards))

    return Env("test/Counting", {"n": Box((1,))}, Discrete(2), reset, step)


def test_a_broken_environment_has_no_return():
    agent = scripted(lambda params, seen, row: jnp.zeros(seen.shape))
    env = counting([1.0, float("inf"), 1.0])
    assert np.isnan(evaluate(agent, None, env, 2, jax.random.key(0))).all()


def test_a_recording_follows_the_time_table(memory):
    env = memory
    # Acts by the clock it can see: 1 where the cue is 0, which is inside an episode of 5 rows.
    agent = scripted(lambda params, seen, row: row.obs["cue"] == 0)
    steps = collect(agent, None, env, 12, jax.random.key(3), count=2)
    np.testing.assert_array_equal(steps.is_first[:, 0], np.arange(12) % 5 == 0)
    np.testing.assert_array_equal(steps.is_last[:, 1], np.arange(12) % 5 == 4)
    cue = np.asarray(steps.obs["cue"])
    assert cue[1:5, 0].tolist() == [0, 0, 3, 0]
    # An action stands in the row it led to, zero where an episode starts.
    chosen = (cue == 0).astype(int)
    expected = np.where(steps.is_first[1:], 0, chosen[:-1])
    np.testing.assert_array_equal(steps.action[1:], expected)
    np.testing.assert_array_equal(steps.action[0], 0)


class Known:
    """A distribution with one value."""

    def __init__(self, value):
        self.mode = lambda: value


def adder(keys=("sum",)):
    """A model that is known: it sees the sum of all actions, and dreams by adding."""
    model = dreamer_v3.agent(dreamer_v3.sized("debug"), {"sum": Box((1,))}, Discrete(2)).model

    def observe(params, carry, steps, draws):
        sums = steps.obs["sum"]
        return Observed(sums[-1], sums, None)

    def step(params, carry, action, draws):
        return carry + action, carry + action

    return model._replace(
        initial=lambda batch: jnp.zeros((batch, 1)),
        draws=lambda key, lead: jnp.zeros(lead),
        observe=observe,
        step=step,
        features=lambda latent: latent,
        predict=lambda params, latents, wanted: {x: Known(latents) for x in keys if x in wanted},
    )


def test_a_dream_takes_each_action_into_its_own_row():
    actions = jnp.array([0.0, 1.0, 2.0, 4.0, 8.0])[:, None, None]
    sums = jnp.cumsum(actions, 0)  # 0 1 3 7 15: an action is part of the row it led to
    flags = jnp.zeros((5, 1), bool)
    obs = {"sum": sums, "other": sums}
    steps = Step(actions, obs, jnp.zeros((5, 1)), flags, flags, flags)
    for context in (1, 3, 5):
        dream = open_loop(adder(), None, steps, context, jax.random.key(0))
        assert list(dream) == ["sum"]  # what the model cannot predict is absent
        np.testing.assert_array_equal(dream["sum"], sums)
    assert open_loop(adder(keys=()), None, steps, 2, jax.random.key(0)) == {}


def test_a_dream_sees_only_its_context():
    env = envs.make("toy/Observe")
    agent = dreamer_v3.agent(dreamer_v3.sized("debug"), env.obs_space, env.action_space)
    params = jax.jit(agent.init)(jax.random.key(0)).params["model"]
    world = wrappers.batch(env, 2)
    row = jax.jit(world.reset)(jax.random.key(1))[1]
    steps = jax.tree.map(lambda x: jnp.stack([x] * 4), row)
    dream = jax.jit(lambda steps, key: open_loop(agent.model, params, steps, 2, key))
    before = dream(steps, jax.random.key(2))
    for name, x in steps.obs.items():
        assert before[name].shape == x.shape and before[name].dtype == x.dtype

    def changed(at):
        flipped = {name: x.at[at].set(1 - x[at]) for name, x in steps.obs.items()}
        return dream(steps._replace(obs=flipped), jax.random.key(2))

    after = changed(jnp.array([2, 3]))
    for name in env.obs_space:
        np.testing.assert_array_equal(before[name], after[name])
    after = changed(jnp.array([1, 1]))
    assert any((before[name][2:] != after[name][2:]).any() for name in env.obs_space)


def test_numbers_out_of_range_are_told(memory):
    env, key, agent = memory, jax.random.key(0), scripted(lambda params, seen, row: seen)
    steps = jax.eval_shape(lambda: collect(agent, None, env, 3, key))
    for call, words in [
        (lambda: evaluate(agent, None, env, 0, key), "at least one episode, not 0"),
        (lambda: evaluate(agent, None, env, 1, key, limit=0), "at least one step, not 0"),
        (lambda: collect(agent, None, env, 0, key), "at least one row, not 0"),
        (lambda: open_loop(adder(), None, steps, 0, key), "0 rows; it must be 1 to 3"),
        (lambda: open_loop(adder(), None, steps, 4, key), "4 rows; it must be 1 to 3"),
    ]:
        with pytest.raises(JaxwmError, match=words):
            call()

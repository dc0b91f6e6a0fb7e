"""Members of a sweep: what the words mean, and that each trains as it would alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import train
from jaxwm.agent import make_agent
from jaxwm.config import flatten
from jaxwm.recipes import RunConfig, dreamer_v3, sweep
from jaxwm.replay.device import ReplayConfig
from jaxwm.types import Box, Discrete, JaxwmError, Step, zeros

WORDS = ("learning_rate=1e-3,1e-2", "behavior.entropy=0.1")
RATE, ENTROPY = "agent.optim.learning_rate", "agent.behavior.entropy"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    agent = dreamer_v3.agent("debug")
    agent = dataclasses.replace(agent, optim=dataclasses.replace(agent.optim, warmup_steps=20))
    memory = ReplayConfig(capacity=400, batch_size=2, batch_length=6, train_ratio=3.0)
    return RunConfig(env="toy/Memory", size="debug", agent=agent, envs=4, replay=memory)


def test_every_combination_is_a_setting_with_all_seeds(config):
    run = dataclasses.replace(config, sweep=(WORDS[0], "entropy=0,0.5"), seeds=2, seed=7)
    assert sweep.settings(run) == [
        {RATE: 1e-3, ENTROPY: 0.0},
        {RATE: 1e-3, ENTROPY: 0.5},
        {RATE: 1e-2, ENTROPY: 0.0},
        {RATE: 1e-2, ENTROPY: 0.5},
    ]
    assert run.members == 8
    assert sweep.columns(run)[ENTROPY] == [0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5]
    assert sweep.labels(run)[3] == "learning_rate=0.001 entropy=0.5"
    alone = sweep.member(run, 5)  # third setting, second seed
    assert (alone.seed, alone.seeds, alone.sweep) == (8, 1, ())
    assert alone.agent.optim.learning_rate == 1e-2 and alone.agent.behavior.entropy == 0.0
    assert sweep.settings(config) == [{}] and sweep.labels(config) == [""]
    both = ("latent.unimix=0.1", "behavior.unimix=0.2", "rep=1")
    run = dataclasses.replace(config, sweep=both)
    assert sweep.labels(run) == ["latent.unimix=0.1 behavior.unimix=0.2 rep=1.0"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("learning_rat=1", "no entry to sweep called 'learning_rat'. Did you mean learning_rate"),
        ("unimix=0,1", "may be agent.model.latent.unimix or agent.behavior.unimix. Give more"),
        ("imagine=5,10", "no entry to sweep called 'imagine'"),  # the form of the program
        ("learning_rate=", "should be numbers with commas between them, such as learning_rate="),
        ("learning_rate=1e-3,fast", "should be numbers"),
        ("learning_rate=1e-3,nan", "should be numbers"),
        ("learning_rate=1,1.0", "names a value twice: 1,1.0"),
        ("entropy=0.1,0.10000000001", "names a value twice"),  # in float32
        ("learning_rate=1e-3,1e39", "should be numbers"),
        ("learning_rate=1e-3,1e-50", "learning_rate is 0.0; it must be positive"),
        ("beta2=0.9999999999", "beta2 is 1.0; it must lie in 0 to below 1"),
        ("learning_rate=1e-3,-1", "learning_rate is -1.0; it must be positive"),
        ("slow_rate=2", "slow_rate is 2.0; it must lie in 0 to 1"),
    ],
)
def test_senseless_words_are_told(config, word, told):
    with pytest.raises(JaxwmError, match="(?s)" + told.replace(".", r"\.")):
        dataclasses.replace(config, sweep=(word,))


def test_an_entry_named_twice_is_told(config):
    with pytest.raises(JaxwmError, match=r"names agent\.optim\.learning_rate twice"):
        dataclasses.replace(config, sweep=("learning_rate=1", "optim.learning_rate=2"))


def test_every_number_of_an_agent_can_be_swept(config):
    """Acting and an update can be traced with all of them unknown."""
    obs_space = {"vector": Box((3,)), "image": Box((32, 32, 1), "uint8")}
    action_space = {"a": Discrete(3), "b": Box((2,))}
    run = dataclasses.replace(config, sweep=())
    paths = [f"agent.{x}" for x, v in flatten(run.agent).items() if isinstance(v, float)]
    assert len(paths) > 20 and {RATE, ENTROPY} < set(paths)

    def update(values, key):
        agent = make_agent(sweep.put(run, values).agent, obs_space, action_space)
        state = agent.init(key)
        no = jnp.zeros((6, 2), bool)
        obs, action = zeros(obs_space, (6, 2)), zeros(action_space, (6, 2))
        steps = Step(action, obs, jnp.zeros((6, 2)), no, no, no)
        agent.act(state.params, agent.initial(2), jax.tree.map(lambda x: x[0], steps), key)
        return agent.update(state, agent.initial(2), steps, key)[0]

    with jax.debug_key_reuse(False):
        jax.eval_shape(update, dict.fromkeys(paths, jnp.float32(0.5)), jax.random.key(0))
    assert sweep.parse(tuple(f"{x}=0.5" for x in paths), run).keys() == set(paths)


@pytest.mark.no_cover
def test_members_train_as_if_alone_even_beside_one_that_diverges(config):
    """Parameters, statistics and metrics are those of single runs; what diverges stays finite."""
    run = dataclasses.replace(config, sweep=("learning_rate=1e-3,1e30,1e-2", *WORDS[1:]))
    program = train.build(run, iterations=28)
    single = train.build(sweep.member(run, 2), iterations=28)
    with jax.debug_key_reuse(False):
        state, metrics = program.chunk(program.init())
        alone, told = single.chunk(single.init())
    assert int(alone.clock.updates) == 20 == int(state.clock.updates)
    mine = jax.tree.map(lambda x: x[2], state._replace(clock=None))
    chex.assert_trees_all_close(mine.agent.params, alone.agent.params, atol=1e-4, rtol=0)
    chex.assert_trees_all_close(mine.agent.slow, alone.agent.slow, atol=1e-4, rtol=0)
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name][2], value, rtol=1e-3, atol=1e-4)
    kernel = state.agent.params["model"]["core"]["in_deter"]["kernel"]
    assert np.abs(kernel[0] - kernel[2]).max() > 1e-3
    refused = np.asarray(state.health.refused)
    assert refused[1] == 1 and refused[0] == refused[2] == 0
    assert 1 < state.health.first[1] <= 20
    for leaf in jax.tree.leaves((state.agent, state.carry, state.buffer, state.account)):
        assert np.isfinite(leaf).all()

"""Members of a sweep: what the words mean, and that each trains as it would alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import train
from jaxwm.config import flatten
from jaxwm.optim import Schedule
from jaxwm.recipes import RunConfig, agent_of, dreamer_v3, sweep
from jaxwm.replay.device import ReplayConfig
from jaxwm.types import Box, Discrete, JaxwmError, Step, Window, zeros

WORDS = ("learning_rate=1e-3,1e-2", "behavior.entropy=0.1")
RATE, ENTROPY = "agent.optim.learning_rate", "agent.behavior.entropy"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    agent = dreamer_v3.sized("debug")
    agent = dataclasses.replace(agent, optim=dataclasses.replace(agent.optim, warmup_steps=20))
    memory = ReplayConfig(capacity=400, batch_size=2, batch_length=6, train_ratio=3.0)
    base = dreamer_v3.config("toy/Memory", "debug")
    return dataclasses.replace(base, agent=agent, envs=4, replay=memory)


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


def scheduled(config: RunConfig, start: float = 1e-3, end: float = 1e-4) -> RunConfig:
    """The run with a schedule as learning rate."""
    optim = dataclasses.replace(config.agent.optim, learning_rate=Schedule(start, end))
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, optim=optim))


def test_a_schedule_is_swept_as_a_whole_or_by_its_parts(config):
    run = dataclasses.replace(scheduled(config), sweep=("learning_rate=1e-2,1e-3",))
    rates = [sweep.member(run, i).agent.optim.learning_rate for i in range(2)]
    assert rates == [Schedule(1e-2, 1e-3), Schedule(1e-3, 1e-4)]  # the end is a tenth, as before
    assert sweep.labels(run)[0] == "learning_rate=0.01"
    run = dataclasses.replace(
        scheduled(config), sweep=("learning_rate.start=1e-2", "learning_rate.end=0,1e-3")
    )
    assert sweep.settings(run)[1] == {f"{RATE}.start": 1e-2, f"{RATE}.end": 1e-3}
    assert sweep.member(run, 0).agent.optim.learning_rate == Schedule(1e-2, 0.0)
    assert sweep.labels(run)[1] == "learning_rate.start=0.01 learning_rate.end=0.001"


def test_what_cannot_be_swept_of_a_schedule_is_told(config):
    with pytest.raises(JaxwmError, match=r"learning_rate and .*start. Sweep the schedule or its"):
        dataclasses.replace(
            scheduled(config), sweep=("learning_rate=1e-3", "learning_rate.start=1e-4")
        )
    with pytest.raises(JaxwmError, match=r"learning_rate cannot be swept: .* starts at 0"):
        dataclasses.replace(scheduled(config, 0.0, 1e-3), sweep=("learning_rate=1e-3",))
    with pytest.raises(JaxwmError, match=r"Did you mean learning_rate or"):
        sweep.parse(("learning_rate.updates=5",), scheduled(config))


@dataclasses.dataclass(frozen=True)
class Planner:
    """The configuration of an agent, one of whose numbers decides a shape."""

    elites: float = dataclasses.field(default=0.1, metadata=sweep.fixed("it decides a shape"))
    noise: float | None = None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of that agent."""

    agent: Planner = Planner()


def test_a_number_that_decides_a_shape_says_so():
    with pytest.raises(JaxwmError, match=r"agent\.elites cannot be swept: it decides a shape\."):
        sweep.parse(("elites=0.1,0.2",), Planned())
    with pytest.raises(JaxwmError, match=r"agent\.noise cannot be swept: it is None\."):
        sweep.parse(("noise=0.1,0.2",), Planned())
    assert sweep.parse(("noise=0.1",), Planned(Planner(noise=0.5))) == {"agent.noise": (0.1,)}


def test_every_number_of_an_agent_can_be_swept(config):
    """Acting and an update can be traced with all of them unknown, schedules included."""
    obs_space = {"vector": Box((3,)), "image": Box((32, 32, 1), "uint8")}
    action_space = {"a": Discrete(3), "b": Box((2,))}
    weights = dataclasses.replace(config.agent.weights, rep=Schedule(0.0, 0.1, "cosine", 2, 10))
    run = scheduled(dataclasses.replace(config, sweep=()))
    run = dataclasses.replace(run, agent=dataclasses.replace(run.agent, weights=weights))
    paths = [f"agent.{x}" for x, v in flatten(run.agent).items() if isinstance(v, float)]
    paths += [f"{x}.{end}" for x in (RATE, "agent.weights.rep") for end in ("start", "end")]
    assert len(paths) > 20 and ENTROPY in paths

    def update(values, key):
        agent = agent_of(sweep.put(run, values), obs_space, action_space)
        state = agent.init(key)
        no = jnp.zeros((7, 2), bool)
        obs, action = zeros(obs_space, (7, 2)), zeros(action_space, (7, 2))
        steps = Step(action, obs, jnp.zeros((7, 2)), no, no, no)
        row = jax.tree.map(lambda x: x[0], steps)
        memo = agent.act(state.params, agent.initial(2), row, key)[2]
        window = Window(memo, steps, jnp.arange(2), jnp.zeros((7, 2), jnp.int32))
        return agent.update(state, window, key)[0]

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
    chex.assert_trees_all_close(mine.agent.rest, alone.agent.rest, atol=1e-4, rtol=0)
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name][2], value, rtol=1e-3, atol=1e-4)
    kernel = state.agent.params["model"]["core"]["in_deter"]["kernel"]
    assert np.abs(kernel[0] - kernel[2]).max() > 1e-3
    refused = np.asarray(state.health.refused)
    assert refused[1] == 1 and refused[0] == refused[2] == 0
    assert 1 < state.health.first[1] <= 20
    for leaf in jax.tree.leaves((state.agent, state.carry, state.buffer, state.account)):
        assert np.isfinite(leaf).all()

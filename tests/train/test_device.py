"""One compiled program: seeds, traces, memory, transfers, the train ratio and the statistics."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted

from jaxwm import envs, train
from jaxwm.agent import Agent, AgentState
from jaxwm.envs import wrappers
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.device import ReplayConfig
from jaxwm.train import mesh
from jaxwm.types import Box, Env, Latent, first, transition

# 200 000 rows of 83 bytes: far more than all else in the program together.
BIG = ReplayConfig(capacity=200_000, batch_size=2, batch_length=6, train_ratio=3.0)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    agent = dreamer_v3.agent("debug")
    # A short warmup, so that 20 updates move the parameters visibly.
    optim = dataclasses.replace(agent.optim, warmup_steps=20)
    agent = dataclasses.replace(agent, optim=optim)
    return RunConfig(env="toy/Memory", size="debug", agent=agent, envs=4, replay=BIG)


@pytest.fixture(scope="module")
def single(config):
    """The program of one seed, and its chunk compiled."""
    program = train.build(config, iterations=7)
    return program, program.compile()


@pytest.fixture(scope="module")
def quad(config):
    """The program of four seeds, and its chunk compiled."""
    with jax.debug_key_reuse(False):
        program = train.build(dataclasses.replace(config, seeds=4), iterations=7)
        return program, program.compile()


def run(chunk, state, times, *how):
    for _ in range(times):
        state, metrics = chunk(state, *how)
    return state, metrics


@pytest.mark.no_cover
def test_four_seeds_in_one_program_follow_four_single_runs(config, single, quad):
    with jax.debug_key_reuse(False):
        together, metrics = run(quad[1], quad[0].init(), 4)
    # A batch of 2 x 6 rows is there after 9 rows of 4 environments; 4 x 3 rows are earned by
    # each of the iterations 9 to 28, which pays for one update.
    assert int(together.clock.updates) == 20
    others = []
    for index in range(4):
        own = train.build(dataclasses.replace(config, seed=index), iterations=7)
        begin = own.init()
        before = jax.device_get(begin.agent.params)
        alone, alone_metrics = run(single[1], begin, 4)
        one = jax.tree.map(lambda x, i=index: x[i], together._replace(clock=None))
        chex.assert_trees_all_close(one.agent.params, alone.agent.params, atol=1e-4, rtol=0)
        chex.assert_trees_all_equal(one.row, alone.row)
        chex.assert_trees_all_equal(together.clock, alone.clock)
        for name, value in alone_metrics.items():
            np.testing.assert_allclose(metrics[name][index], value, rtol=1e-3, atol=1e-4)
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, alone.agent.params)
        assert np.median(jax.tree.leaves(moved)) > 5e-3
        others.append(alone.agent.params["model"]["core"]["in_deter"]["kernel"])
    assert min(np.abs(others[0] - x).max() for x in others[1:]) > 0.1


def test_how_a_run_is_cut_into_chunks_changes_nothing(single):
    """28 iterations as 4 x 7 or in other pieces: every bit of the state and of the metrics."""
    program, chunk = single
    state, metrics = run(chunk, program.init(), 4)
    other = program.init()
    for count, fresh in [(5, True), (2, False), (7, True), (1, True), (6, False), (7, True)]:
        other, told = chunk(other, count, fresh)
    chex.assert_trees_all_equal(*map(plain, (state, other)))
    chex.assert_trees_all_equal(metrics, told)


def plain(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key), env=()))


def test_a_program_is_traced_once(config, monkeypatch):
    traces = []
    act = train._act
    monkeypatch.setattr(train, "_act", lambda *args: traces.append(0) or act(*args))
    program = still(config, monkeypatch, iterations=7)
    state, _ = run(program.chunk, program.init(), 1)
    once = len(traces)
    run(program.chunk, state, 3)
    assert len(traces) == once
    assert program.chunk.function._cache_size() == 1


@pytest.mark.parametrize("name", ["single", "quad"])
def test_the_replay_is_never_copied(request, name):
    program, compiled = request.getfixturevalue(name)
    memory = compiled.function.memory_analysis()
    size = program.replay.nbytes * program.layout.members
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < size / 2


def test_a_chunk_stays_on_the_device(single):
    program, compiled = single
    state = jax.block_until_ready(program.init())
    number, truth = jnp.int32(7), jnp.bool_(True)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(run(compiled.function, state, 2, number, truth))
    text = compiled.function.as_text()
    assert "fusion" in text
    for word in ("callback", "infeed", "outfeed", "send(", "recv("):
        assert word not in text


def test_updates_that_are_not_finite_are_watched_as_by_hand():
    nan, zero = jnp.nan, jnp.int32(0)
    good = {"loss/a": 1.0, "loss/b": 2.0, "loss/total": 3.0, "grad_norm": 4.0, "other": nan}
    good = jax.tree.map(jnp.float32, good)
    bad = good | {"loss/b": jnp.float32(jnp.inf), "grad_norm": jnp.float32(nan)}
    account = train.Account(jnp.float32(2), {**good, "other": jnp.float32(0)})
    health = train.Health(zero, zero, zero)
    # The seventh update is bad: of a, b and grad_norm the second is its first bad term.
    taken, after, health = train.watch(bad, account, health, jnp.int32(6), "abort")
    assert not taken and health == (1, 7, 1)
    chex.assert_trees_all_equal(after, account)
    # A good one after it is taken only by who goes on.
    taken, after, same = train.watch(good, account, health, jnp.int32(7), "abort")
    assert not taken and same == health and after.taken == 2
    taken, after, same = train.watch(good, account, health, jnp.int32(7), "skip")
    assert taken and same == health and after.taken == 3 and after.sums["loss/b"] == 4
    taken, _, health = train.watch(bad, account, health, jnp.int32(8), "skip")
    assert not taken and health == (2, 7, 1)


def clerk(config, obs_space, action_space, shards) -> Agent:
    """An agent without networks: it counts updates, and the rows of each episode.

    Its action is odd on odd rows, its latent is the number of the row.
    """

    def act(params, carry, row, key):
        count = jnp.where(row.is_first[:, None], 0.0, carry.deter + 1)
        return Latent(count, carry.stoch), (count[:, 0] % 2).astype(jnp.int32)

    def initial(batch):
        return Latent(jnp.zeros((batch, 1)), jnp.zeros((batch, 1, 2)))

    def update(state, carry, steps, key):
        # Rows of a window carry on counting from its context, through the ends of episodes.
        after = carry.deter[None] + 1 + jnp.arange(len(steps.reward))[:, None, None]
        latents = Latent(after % 5, jnp.zeros((*steps.reward.shape, 1, 2)))
        made = state.params + 1
        fine = {"loss/total": jnp.zeros(()), "grad_norm": jnp.zeros(())}
        return state._replace(params=made), latents, {"made": made} | fine

    def init(key):
        return AgentState(*(jnp.zeros(()) for _ in range(4)))

    return Agent(None, None, init, initial, act, None, None, update)


def still(config, monkeypatch, iterations):
    """A program whose agent is the clerk: it compiles in no time."""
    monkeypatch.setattr(train, "make_agent", clerk)
    return train.build(config, iterations=iterations)


@pytest.mark.parametrize(
    ("ratio", "updates"),
    [
        # 4 environments, updates of 2 x 6 = 12 rows; rows 9 to 40 are trained from: 32
        # iterations earn 32 x 4 x ratio rows.
        (0.375, 4),  # 48 / 12
        (1.5, 16),  # 192 / 12
        (64.0, 682),  # 8192 / 12 = 682.67
        (1024.0, 10922),  # 131072 / 12 = 10922.67
    ],
)
def test_the_train_ratio_is_kept_exactly(config, monkeypatch, ratio, updates):
    memory = dataclasses.replace(config.replay, train_ratio=ratio, capacity=400)
    program = still(dataclasses.replace(config, replay=memory), monkeypatch, iterations=8)
    state = program.init()
    made = []
    for chunk in range(1, 6):
        state, metrics = program.chunk(state)
        made.append(int(state.clock.updates))
        assert made[-1] == max(0, chunk * 8 - 8) * 4 * ratio // 12
        assert float(state.agent.params) == made[-1]
    assert made[-1] == updates and int(state.clock.iteration) == 40
    # Metrics are means over the updates of the chunk: the numbers of the first to the last.
    np.testing.assert_allclose(metrics["made"], (made[-2] + 1 + made[-1]) / 2, rtol=1e-4)


def test_a_chunk_without_updates_has_nothing_to_report(config, monkeypatch):
    program = still(config, monkeypatch, iterations=3)
    _, metrics = program.chunk(program.init())
    assert np.isnan(metrics["made"]) and np.isnan(metrics["episode/return"])
    assert metrics["episode/count"] == 0


def test_episodes_are_counted_as_by_hand(config, monkeypatch):
    # Reward 1 per step, cut after 5: rows 0..5 are an episode, 6..11 the next one.
    config = dataclasses.replace(config, env="toy/Prediction", time_limit=5)
    program = still(config, monkeypatch, iterations=20)
    state, metrics = program.chunk(program.init())
    # Iteration i reaches row i + 1: the ends in rows 1..20 are 5, 11 and 17, in 4 environments.
    assert metrics["episode/count"] == 12
    assert metrics["episode/return"] == 5 and metrics["episode/length"] == 5
    # The episode of rows 18..23 began in the chunk before: 23, 29, 35.
    state, metrics = program.chunk(state)
    assert metrics["episode/count"] == 12
    assert metrics["episode/return"] == 5 and metrics["episode/length"] == 5


def test_repeated_actions_make_shorter_episodes(config, monkeypatch):
    # 8 steps of reward 1, three at a time: 3 + 3 + 2, and rows 0..3 are an episode.
    config = dataclasses.replace(config, env="toy/Prediction", action_repeat=3)
    _, metrics = (program := still(config, monkeypatch, iterations=12)).chunk(program.init())
    assert metrics["episode/count"] == 12  # rows 3, 7 and 11 of 4 environments
    assert metrics["episode/return"] == 8 and metrics["episode/length"] == 3


def test_rows_lie_in_the_replay_by_the_time_table(config, monkeypatch):
    program = still(config, monkeypatch, iterations=12)
    state, _ = program.chunk(program.init())
    number = np.arange(12) % 5  # episodes of toy/Memory have 5 rows
    stored = jax.tree.map(lambda x: np.asarray(x[:, :12]), state.buffer)
    np.testing.assert_array_equal(stored.rows.is_first, np.broadcast_to(number == 0, (4, 12)))
    np.testing.assert_array_equal(stored.rows.is_last, np.broadcast_to(number == 4, (4, 12)))
    # Each row holds the action that led to it and what the agent knew on seeing it.
    led = np.where(number == 0, 0, (number - 1) % 2)
    np.testing.assert_array_equal(stored.rows.action, np.broadcast_to(led, (4, 12)))
    np.testing.assert_array_equal(stored.deter[..., 0], np.broadcast_to(number, (4, 12)))
    cue = stored.rows.obs["cue"]
    np.testing.assert_array_equal(cue[:, 1:5], np.broadcast_to([0, 0, 3, 0], (4, 4)))
    # Row 12 is the one to act on next, and is not stored yet.
    assert not state.row.is_first.any() and int(state.clock.cursor.written) == 12
    assert not np.asarray(state.buffer.deter[:, 12:]).any()


@pytest.mark.parametrize("option", ["jax_enable_x64", "jax_debug_nans"])
def test_options_of_jax_under_which_nothing_runs_are_told(config, option):
    jax.config.update(option, True)
    try:
        with pytest.raises(ValueError, match=f"Unset (it|{option.upper()})"):
            train.build(config)
    finally:
        jax.config.update(option, False)


def test_an_environment_by_another_name_is_told():
    with pytest.raises(ValueError, match="Did you mean Memory"):
        train.make_env(RunConfig(env="toy/Memori"))
    assert train.make_env(RunConfig(env="toy/Memory")).name == envs.make("toy/Memory").name


def test_boxes_of_any_bounds_are_taken_in_minus_one_to_one(monkeypatch):
    def make(low, high):
        space = Box((2,), low=low, high=high)
        env = Env(
            "test/Echo",
            {"seen": Box((2,))},
            space,
            lambda key: ((), first(space, {"seen": jnp.zeros(2)})),
            lambda state, action, key: ((), transition(action, {"seen": action}, 0.0, False)),
        )
        monkeypatch.setattr(envs, "make", lambda name: env)
        return train.make_env(RunConfig(env=env.name))

    for low, high, seen in [(-10.0, 10.0, (5.0, 10.0)), (-1.0, 1.0, (0.5, 1.0))]:
        env = make(low, high)
        assert env.action_space == Box((2,), "float32", -1.0, 1.0)
        _, row = env.step((), jnp.array([0.5, 1.5]), jax.random.key(0))
        np.testing.assert_allclose(row.obs["seen"], seen)
        np.testing.assert_array_equal(row.action, [0.5, 1.5])
    # Without bounds the environment sees what was drawn.
    assert make(-math.inf, math.inf).action_space == Box((2,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": 0}, "shards is 0; it must be at least 1"),
        (
            {"shards": 3},
            "envs is 4, which cannot be divided into 3 equal shards",
        ),
        ({"shards": 4}, "replay.batch_size is 2, which cannot be divided into 4"),
        ({"shard_params": True}, "there is one shard. Raise --shards"),
    ],
)
def test_what_cannot_be_divided_is_told(config, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **changes)


def test_simulators_on_the_host_are_not_divided(config):
    with pytest.raises(ValueError, match="Only what runs on the device can be divided"):
        train.build(dataclasses.replace(config, shards=2), single=scripted.chain())


def test_two_shards_on_one_device_keep_their_experience_apart(config, monkeypatch):
    monkeypatch.setattr(train, "make_agent", clerk)
    program = train.build(dataclasses.replace(config, shards=2), iterations=12)
    state, metrics = program.chunk(program.init())
    # 4 environments and 200,000 rows in two halves; they see different cues.
    assert state.row.reward.shape == (2, 2) and state.buffer.stoch.shape[:3] == (2, 2, 50_000)
    cue = np.asarray(state.buffer.rows.obs["cue"][:, :, :12])
    assert not (cue[0] == cue[1]).all()
    # Episodes of all: rows 4 and 9 of 4 environments. Updates as if there were one shard.
    assert metrics["episode/count"] == 8
    assert int(state.clock.updates) == 4


def test_the_first_fault_of_the_shards_is_told():
    count, key, env = [[0, 2], [3, 0]], [[-1, 1], [0, -1]], [[-1, 0], [1, -1]]  # shard by seed
    fault = wrappers.Fault(np.array(count), np.array(key), np.array(env))
    found = wrappers.first_fault(fault, 4)
    # The first seed's fault is in environment 1 of the second shard, the other's in the first.
    assert [x.tolist() for x in found] == [[3, 2], [0, 1], [5, 0]]


def test_the_gradients_of_all_two_hot_bins_are_known_by_name(config):
    """Those of the reward and of the value, kernel and bias; nothing else has bins."""
    env = train.make_env(config)
    params = jax.eval_shape(train.agents(config, env)({}).init, jax.random.key(0)).params
    bins = config.agent.behavior.bins
    assert bins == config.agent.model.bins
    found = mesh._at_bins(lambda x: "bins", params)
    assert jax.tree.map(lambda x: "bins" if x.shape[-1] == bins else x, params) == found
    assert jax.tree.leaves(found).count("bins") == 4

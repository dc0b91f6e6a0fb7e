"""One compiled program: seeds, traces, memory, transfers, the rhythm and the statistics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import train
from jaxwm.train import device
from jaxwm.train.act import random_action
from jaxwm.types import Discrete
from tests.train.fake import FakeConfig, newest, run_config

# Far more rows than all else in the program together.
BIG = 200_000


@pytest.fixture(scope="module")
def single():
    """The program of one seed, and its chunk compiled."""
    program = train.build(run_config(capacity=BIG), iterations=7)
    return program, program.compile()


@pytest.fixture(scope="module")
def quad():
    """The program of four seeds, and its chunk compiled."""
    with jax.debug_key_reuse(False):
        program = train.build(run_config(capacity=BIG, seeds=4), iterations=7)
        return program, program.compile()


def run(chunk, state, times, *how):
    for _ in range(times):
        state, metrics = chunk(state, *how)
    return state, metrics


def plain(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key), env=()))


def test_four_seeds_in_one_program_follow_four_single_runs(single, quad):
    with jax.debug_key_reuse(False):
        together, metrics = run(quad[1], quad[0].init(), 4)
    # A batch of 2 x 6 rows is there after 9 rows of 4 environments; 4 x 3 rows are earned by
    # each of the iterations 9 to 28, which pays for one update.
    assert int(together.clock.updates) == 20
    others = []
    for index in range(4):
        own = train.build(run_config(capacity=BIG, seed=index), iterations=7)
        alone, alone_metrics = run(single[1], own.init(), 4)
        one = jax.tree.map(lambda x, i=index: x[i], together._replace(clock=None))
        chex.assert_trees_all_close(one.agent, alone.agent, atol=1e-5, rtol=0)
        chex.assert_trees_all_equal(one.row, alone.row)
        chex.assert_trees_all_equal(one.buffer.rows, alone.buffer.rows)
        chex.assert_trees_all_equal(together.clock, alone.clock)
        for name, value in alone_metrics.items():
            np.testing.assert_allclose(metrics[name][index], value, rtol=1e-4, atol=1e-5)
        others.append(alone.agent.params["mean"])
    assert min(np.abs(others[0] - x).max() for x in others[1:]) > 1e-4


def test_swept_settings_follow_single_runs(single):
    with jax.debug_key_reuse(False):
        program = train.build(run_config(sweep=("rate=0.25,0.5", "noise=0.0,0.1")), iterations=28)
        together, _ = program.chunk(program.init())
    for index, (rate, noise) in enumerate([(0.25, 0.0), (0.25, 0.1), (0.5, 0.0), (0.5, 0.1)]):
        own = train.build(run_config(agent=FakeConfig(rate=rate, noise=noise)), iterations=28)
        alone, _ = own.chunk(own.init())
        one = jax.tree.map(lambda x, i=index: x[i], together.agent)
        chex.assert_trees_all_close(one, alone.agent, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"prefill": 37, "pretrain": 3, "train_every": 20, "context_every": 2}]
)
def test_how_a_run_is_cut_into_chunks_changes_nothing(changes):
    """28 iterations as 4 x 7 or in other pieces: every bit of the state and of the metrics."""
    program = train.build(run_config(**changes), iterations=7)
    chunk = program.compile()
    state, metrics = run(chunk, program.init(), 4)
    other = program.init()
    for count, fresh in [(5, True), (2, False), (7, True), (1, True), (6, False), (7, True)]:
        other, told = chunk(other, count, fresh)
    chex.assert_trees_all_equal(*map(plain, (state, other)))
    chex.assert_trees_all_equal(metrics, told)


def test_a_program_is_traced_once(monkeypatch):
    traces = []
    collect = device.collect
    monkeypatch.setattr(device, "collect", lambda *args: traces.append(0) or collect(*args))
    program = train.build(run_config(), iterations=7)
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
def test_the_train_ratio_is_kept_exactly(ratio, updates):
    program = train.build(run_config(train_ratio=ratio), iterations=8)
    state = program.init()
    made = []
    for chunk in range(1, 6):
        state, metrics = program.chunk(state)
        made.append(int(state.clock.updates))
        assert made[-1] == max(0, chunk * 8 - 8) * 4 * ratio // 12
        assert int(state.agent.rest["made"]) == made[-1]
    assert made[-1] == updates and int(state.clock.iteration) == 40
    # Metrics are means over the updates of the chunk: the numbers of the first to the last.
    np.testing.assert_allclose(metrics["made"], (made[-2] + 1 + made[-1]) / 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        # Each iteration earns one update from the ninth on.
        ({}, {9: 1, 10: 1, 11: 1, 12: 1, 13: 1, 14: 1, 15: 1, 16: 1}),
        # 50 steps of 4 environments are 13 iterations.
        ({"prefill": 50}, {13: 1, 14: 1, 15: 1, 16: 1}),
        # Blocks every 12 steps, 3 iterations; the first holds what one iteration earned.
        ({"train_every": 12}, {9: 1, 12: 3, 15: 3}),
        ({"train_every": 10, "pretrain": 20, "prefill": 40}, {10: 21, 13: 3, 16: 3}),
        ({"pretrain": 5, "train_ratio": 1.0}, {9: 5, 11: 1, 14: 1}),
    ],
)
def test_updates_come_when_they_are_due(changes, made):
    program = train.build(run_config(**changes), iterations=1)
    state, found, before = program.init(), {}, 0
    for iteration in range(1, 17):
        state, _ = program.chunk(state)
        if int(state.clock.updates) > before:
            found[iteration] = int(state.clock.updates) - before
            before = int(state.clock.updates)
    assert found == made
    assert program.rhythm.first_update == min(made)


def test_random_actions_fill_the_replay_before_anything_is_learned():
    program = train.build(run_config(prefill=29), iterations=20)
    state = program.init()
    key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.key)))
    state, _ = program.chunk(state)
    rows = jax.device_get(state.buffer.rows)
    count = jax.device_get(state.buffer.memo["count"])
    for iteration in range(8):  # 29 steps of 4 environments
        key_act, _ = jax.random.split(jax.random.fold_in(key, 2 * iteration))
        drawn = random_action(Discrete(2), jax.random.split(key_act)[1], (4,))
        led = np.where(rows.is_first[:, iteration + 1], 0, drawn)
        np.testing.assert_array_equal(rows.action[:, iteration + 1], led)
    # Memos are those of the agent, which saw every row.
    np.testing.assert_array_equal(count[:, :8], np.broadcast_to(np.arange(8) % 5, (4, 8)))
    # The agent's own actions would have been others.
    plain = train.build(run_config(), iterations=20)
    theirs = jax.device_get(plain.chunk(plain.init())[0].buffer.rows)
    assert (theirs.action[:, 1:8] != rows.action[:, 1:8]).any()


def test_the_newest_rows_are_learned_from_as_a_plain_loop_would():
    """Every window against rows recorded one by one, and the parameters against numpy."""
    agent = FakeConfig(data="newest", noise=0.0)
    program = train.build(newest("toy/Prediction", agent=agent, time_limit=4), iterations=1)
    act, state, history = jax.jit(program.agent.act), program.init(), []
    params = jax.tree.map(np.array, state.agent.params)
    slow = np.array(state.agent.rest["slow"]["copy"])
    key = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.key)))
    made = 0
    for iteration in range(40):
        with jax.debug_key_reuse(False):
            key_act, _ = jax.random.split(jax.random.fold_in(key, 2 * iteration))
            memo = act(state.agent.params, state.carry, state.row, key_act)[2]
        history.append(jax.device_get((state.row, memo)))
        state, metrics = program.chunk(state)
        if iteration < 6 or iteration % 6:
            assert int(state.clock.updates) == made and np.isnan(metrics["loss/level"])
            continue
        made += 1
        rows, memos = jax.tree.map(lambda *x: np.stack(x), *history[-7:])
        level = sum(x[1:].astype(np.float32).mean() for x in jax.tree.leaves(rows.obs))
        level += rows.reward[1:].mean() + 0.1 * slow.mean() + 0.1 * memos["seen"].mean()
        np.testing.assert_allclose(metrics["loss/level"], level, rtol=1e-5)
        params["mean"] -= 0.5 * (params["mean"] - level)
        params["bias"] = params["bias"] - 0.5 * (params["bias"] - level / 2)
        slow = 0.9 * slow + 0.1 * level
        chex.assert_trees_all_close(state.agent.params, params, rtol=1e-4)
        assert int(state.clock.updates) == made
    assert made == 6


def test_memos_are_refreshed_unless_the_agent_has_none():
    program = train.build(run_config(), iterations=30)
    state, _ = program.chunk(program.init())
    seen = np.asarray(state.buffer.memo["seen"][:, :30])
    refreshed = seen[..., 1] == -seen[..., 0]  # the mark of fresh memos
    assert refreshed[:, 1:-8].mean() > 0.9 and not refreshed[:, 0].any()
    np.testing.assert_array_equal(
        seen[..., 0][refreshed], state.buffer.memo["count"][:, :30][refreshed]
    )
    plain = train.build(run_config(agent=FakeConfig(memos=False)), iterations=30)
    state, metrics = plain.chunk(plain.init())
    assert state.buffer.memo == () and np.isfinite(metrics["loss/level"])


def test_a_chunk_without_updates_has_nothing_to_report():
    program = train.build(run_config(), iterations=3)
    _, metrics = program.chunk(program.init())
    assert np.isnan(metrics["made"]) and np.isnan(metrics["episode/return"])
    assert metrics["episode/count"] == 0


def test_episodes_are_counted_as_by_hand():
    # Reward 1 per step, cut after 5: rows 0..5 are an episode, 6..11 the next one.
    program = train.build(run_config("toy/Prediction", time_limit=5), iterations=20)
    state, metrics = program.chunk(program.init())
    # Iteration i reaches row i + 1: the ends in rows 1..20 are 5, 11 and 17, in 4 environments.
    assert metrics["episode/count"] == 12
    assert metrics["episode/return"] == 5 and metrics["episode/length"] == 5
    # The episode of rows 18..23 began in the chunk before: 23, 29, 35.
    state, metrics = program.chunk(state)
    assert metrics["episode/count"] == 12
    assert metrics["episode/return"] == 5 and metrics["episode/length"] == 5


def test_repeated_actions_make_shorter_episodes():
    # 8 steps of reward 1, three at a time: 3 + 3 + 2, and rows 0..3 are an episode.
    program = train.build(run_config("toy/Prediction", action_repeat=3), iterations=12)
    _, metrics = program.chunk(program.init())
    assert metrics["episode/count"] == 12  # rows 3, 7 and 11 of 4 environments
    assert metrics["episode/return"] == 8 and metrics["episode/length"] == 3


def test_rows_lie_in_the_replay_by_the_time_table():
    program = train.build(run_config(train_ratio=0.0), iterations=12)
    state, _ = program.chunk(program.init())
    number = np.arange(12) % 5  # episodes of toy/Memory have 5 rows
    rows, memo = jax.tree.map(lambda x: np.asarray(x[:, :12]), state.buffer)
    np.testing.assert_array_equal(rows.is_first, np.broadcast_to(number == 0, (4, 12)))
    np.testing.assert_array_equal(rows.is_last, np.broadcast_to(number == 4, (4, 12)))
    # Each row holds the action that led to it, and its memo what the agent made of it.
    assert not rows.action[rows.is_first].any() and rows.action.any()
    np.testing.assert_array_equal(memo["count"], np.broadcast_to(number, (4, 12)))
    cue = rows.obs["cue"]
    np.testing.assert_array_equal(cue[:, 1:5], np.broadcast_to([0, 0, 3, 0], (4, 4)))
    # Row 12 is the one to act on next, and is not stored yet.
    assert not state.row.is_first.any() and int(state.clock.cursor.written) == 12
    assert not np.asarray(state.buffer.memo["count"][:, 12:]).any()


def broken(config, obs_space, action_space, shards):
    """The fake agent, whose seventh update is NaN in the model's gradient."""
    from tests.train.fake import fake

    agent = fake(config, obs_space, action_space, shards)

    def update(state, window, key):
        after, memo, metrics = agent.update(state, window, key)
        metrics["grad_norm/model"] = jnp.where(after.rest["made"] == 7, jnp.nan, 1.0)
        return after, memo, metrics

    return agent._replace(update=update)


@pytest.mark.parametrize(("policy", "refused", "made"), [("abort", 1, 6), ("skip", 9, 6)])
def test_an_update_that_is_not_finite_is_refused(monkeypatch, policy, refused, made):
    from jaxwm.recipes import RECIPES

    monkeypatch.setitem(RECIPES, "fake", RECIPES["fake"]._replace(agent=broken))
    program = train.build(run_config(on_divergence=policy), iterations=23)
    state, metrics = program.chunk(program.init())
    # Of 15 updates the seventh, and in "skip" all after it, as the count stands still.
    assert int(state.clock.updates) == 15 and int(state.agent.rest["made"]) == made
    assert state.health.refused == refused and state.health.first == 7
    assert train.learn.watched(metrics)[int(state.health.term)] == "grad_norm/model"
    assert np.isfinite(jax.tree.leaves(jax.tree.map(np.sum, state.agent.params))).all()


def test_two_shards_on_one_device_keep_their_experience_apart():
    program = train.build(run_config(shards=2, capacity=BIG), iterations=12)
    state, metrics = program.chunk(program.init())
    # 4 environments and 200,000 rows in two halves; they see different cues.
    assert state.row.reward.shape == (2, 2)
    assert state.buffer.memo["seen"].shape == (2, 2, 50_000, 2)
    cue = np.asarray(state.buffer.rows.obs["cue"][:, :, :12])
    assert not (cue[0] == cue[1]).all()
    # Episodes of all: rows 4 and 9 of 4 environments. Updates as if there were one shard.
    assert metrics["episode/count"] == 8
    assert int(state.clock.updates) == 4


def test_the_rhythm_of_a_run_does_not_depend_on_its_shards():
    changes = {"prefill": 41, "pretrain": 2, "train_every": 10}
    programs = [train.build(run_config(shards=n, **changes)) for n in (1, 2)]
    assert programs[0].rhythm == programs[1].rhythm
    assert programs[0].rhythm._replace(begins=0, earned=0, price=0) == (11, 0, 3, 2, 0, 0)
    assert programs[1].layout.shards == 2 and programs[1].replay.warmup == 9

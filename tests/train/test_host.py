"""The driver for simulators on the host: the same run as on the device, whatever their speed."""

import dataclasses
import gc
from fractions import Fraction

import jax
import numpy as np
import pytest
import scripted

from jaxwm import train
from jaxwm.envs.host import HostConfig
from jaxwm.replay.device import close_abandoned
from jaxwm.types import JaxwmError
from tests.train import fake
from tests.train.fake import FakeConfig

ITERATIONS = 10
HOST = HostConfig(workers=1, timeout=20.0)


def run_config(**changes):
    """A run that earns 4 * 3 / 12 = 1 update an iteration, unless it says otherwise."""
    return fake.run_config("chain:chain", host=HOST, **changes)


def newest(**changes):
    return fake.newest("chain:chain", host=HOST, **changes)


BLOCKS = {"prefill": 50, "pretrain": 4, "train_every": 20, "train_ratio": 7.0}


def played(config, env, chunks):
    """The state after some chunks, on the host, and the metrics of the last one."""
    program = train.build(config, ITERATIONS, env)
    state = program.init()
    for _ in range(chunks):
        state, metrics = program.chunk(state)
    program.close()
    return jax.device_get(state), metrics


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def raw(state):
    return state._replace(key=jax.random.key_data(state.key))


def close(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.allclose(x, y, rtol=0, atol=1e-6) for x, y in pairs)


def test_both_drivers_are_the_same_run_until_acting_lags():
    device, _ = played(run_config(), scripted.device_chain(), 4)
    host, metrics = played(run_config(), scripted.chain(), 4)
    assert int(host.clock.updates) == 32 and equal(device.clock, host.clock)
    assert np.isfinite(metrics["loss/level"])
    # Both act alike until the first update, which only the device's next action knows of.
    same = train.build(run_config(), ITERATIONS, scripted.chain()).replay.warmup + 1
    ours, theirs = (jax.tree.map(lambda x: x[:, :same], x.buffer.rows) for x in (device, host))
    assert same == 10 and equal(ours, theirs)
    assert host.buffer.rows.is_last.sum() > 8


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize(
    ("make", "changes"),
    [(newest, {}), (run_config, BLOCKS), (run_config, {**BLOCKS, "context_every": 3})],
    ids=["newest", "blocks", "contexts"],
)
def test_both_drivers_are_the_same_run_if_acting_waits(make, changes, place):
    """Updates in blocks and agents of the newest rows: every row, memo and parameter."""
    config = make(**changes)
    device, told = played(config, scripted.device_chain(), 4)
    replay = dataclasses.replace(config.replay, place=place)
    host, metrics = played(dataclasses.replace(config, replay=replay), scripted.chain(), 4)
    assert int(host.clock.updates) >= 6 and equal(device.clock, host.clock)
    assert equal(device.buffer.rows, host.buffer.rows) and equal(device.row, host.row)
    assert close(device.agent, host.agent) and close(device.buffer.memo, host.buffer.memo)
    assert equal(host.env.acting, host.agent.params)
    assert metrics["episode/count"] == told["episode/count"] > 0
    assert np.isclose(metrics["loss/level"], told["loss/level"], atol=1e-5)


def test_the_train_ratio_is_exact():
    state, _ = played(run_config(train_ratio=0.7), scripted.chain(), 4)
    # 9 rows of each make the windows of a batch; every row from then on earns its share.
    earned = Fraction("0.7") * 4 * (40 - 8) / (2 * 6)
    assert int(state.clock.updates) == int(earned)


@pytest.mark.parametrize("changes", [{}, BLOCKS])
def test_the_speed_of_the_simulators_changes_nothing(changes):
    quick, metrics = played(run_config(**changes), scripted.chain(), 4)
    slow, slow_metrics = played(run_config(**changes), scripted.chain(nap=0.01), 4)
    assert int(quick.clock.updates) > 10
    assert equal(raw(quick), raw(slow))
    assert metrics["loss/total"] == slow_metrics["loss/total"]
    assert slow_metrics["host/waiting"] > 0 and slow_metrics["host/faults"] == 0


def test_acting_parameters_lag_by_one_round():
    program = train.build(run_config(train_ratio=2.0), 1, scripted.chain())
    state, before = program.init(), None
    for _ in range(20):
        known = jax.device_get((state.agent.params, state.env.acting))
        updates = int(state.clock.updates)
        state, _ = program.chunk(state)
        if int(state.clock.updates) > updates:
            # The parameters from before this round act; those before them are gone.
            assert equal(state.env.acting, known[0])
            assert not equal(state.agent.params, known[0])
            before = known
        else:
            assert equal(state.env.acting, known[1])
    program.close()
    assert before is not None


def test_acting_waits_for_pretraining():
    config = run_config(pretrain=7, train_ratio=2.0)
    program = train.build(config, 1, scripted.chain())
    state, found = program.init(), []
    for _ in range(12):
        state, _ = program.chunk(state)
        found.append((int(state.clock.updates), equal(state.env.acting, state.agent.params)))
    program.close()
    # Two thirds of an update are earned from the ninth on: the tenth and eleventh make one each,
    # after which acting lags again.
    assert found[8:] == [(7, True), (8, False), (9, False), (9, False)]


@pytest.fixture
def reuse_unchecked():
    """The checker takes the keys of several seeds for one; in all threads."""
    jax.config.update("jax_debug_key_reuse", False)
    yield
    jax.config.update("jax_debug_key_reuse", True)


@pytest.mark.parametrize("make", [run_config, newest])
def test_seeds_side_by_side(make, reuse_unchecked):
    state, metrics = played(make(seeds=2), scripted.chain(), 4)
    assert state.row.reward.shape == (2, 4) and metrics["loss/total"].shape == (2,)
    assert int(state.clock.updates) >= 6
    one, two = (jax.tree.map(lambda x, i=i: x[i], state.agent.params) for i in range(2))
    assert not equal(one, two)
    assert np.isfinite(metrics["loss/total"]).all() and (metrics["episode/count"] > 0).all()


def test_compiled_once_before_the_run():
    program = train.build(run_config(), ITERATIONS, scripted.chain())
    chunk, state = program.compile(), program.init()
    for _ in range(3):
        state, _ = chunk(state)
    program.close()
    other, _ = played(run_config(), scripted.chain(), 3)
    assert equal(raw(jax.device_get(state)), raw(other))


def test_the_replay_does_not_bridge_a_fault():
    state, metrics = played(run_config(), scripted.chain(fails_at=17), 4)
    # Each of the four simulators, and each one made in its place, fails at its 17th step.
    assert metrics["host/faults"] == 8
    rows = jax.tree.map(lambda x: x[:, :40], state.buffer.rows)
    begun, ended = rows.is_first[:, 1:], rows.is_last[:, :-1]
    assert (begun & ~ended).sum() >= 4 and not (ended & ~begun).any()
    # From row to row of an episode the place moves by one step of its action.
    place = rows.obs["vector"].argmax(-1)
    moved = np.maximum(place[:, :-1] + 2 * rows.action[:, 1:] - 1, 0)
    assert (place[:, 1:] == np.where(begun, 0, moved)).all()
    closed = close_abandoned(jax.tree.map(lambda x: np.swapaxes(x, 0, 1), rows))
    assert (np.asarray(closed.is_last)[:-1] == np.swapaxes(begun, 0, 1)).all()


def test_too_many_faults_end_a_chunk_early_with_all_it_has():
    config = run_config()
    config = dataclasses.replace(config, host=dataclasses.replace(HOST, max_faults=5))
    program = train.build(config, ITERATIONS, scripted.chain(fails_at=17))
    state = program.init()
    while program.fault(state) is None:
        state, _ = program.chunk(state)
    assert "raised 6 times" in program.fault(state)
    # The rows of the iteration in which it gave up are stored, those after it never came.
    done = int(state.clock.iteration)
    assert done % ITERATIONS and int(state.clock.cursor.written) == done
    assert int(state.clock.updates) == done - 8
    program.close()


def test_a_failing_update_ends_the_run(monkeypatch):
    program = train.build(run_config(), ITERATIONS, scripted.chain())
    state = program.init()
    monkeypatch.setattr(
        train.host.Learner, "_improve", lambda self, due: (_ for _ in ()).throw(OSError("broke"))
    )
    with pytest.raises(OSError, match="broke"):
        program.chunk(state)
    program.close()


def resumed(config):
    """Two chunks, and two more after fresh episodes: the program, states, and metrics."""
    program = train.build(config, ITERATIONS, scripted.chain())
    state = program.init()
    for _ in range(2):
        state, before = program.chunk(state)
    saved = jax.device_get(raw(state))
    saved = saved._replace(buffer=jax.tree.map(np.copy, saved.buffer))
    state = program.resume(state)
    for _ in range(2):
        state, after = program.chunk(state)
    program.close()
    varying = {"host/waiting", "memory/simulators"}
    metrics = [{k: x for k, x in y.items() if k not in varying} for y in (before, after)]
    return program, (saved, state), metrics


def learned(state):
    """All of a state but the account of metrics: the compiler chooses the order of their sums."""
    return raw(state)._replace(account=state.account.taken)


def on_device(shape):
    gc.collect()
    return sum(x.shape[: len(shape)] == shape for x in jax.live_arrays())


CASES = {
    "round": ({"train_ratio": 9.0}, 3 * (40 - 8)),  # 4 * 9 / 12 = 3 updates a round
    "blocks": (BLOCKS, None),
    "pretrain": ({"pretrain": 7}, 7 + 40 - 8),  # more than a round usually has
    "contexts": ({"context_every": 3}, 40 - 8),
    "empty": ({"agent": FakeConfig(memos=False)}, 40 - 8),
}


@pytest.mark.parametrize("case", CASES)
def test_a_replay_in_host_memory_is_the_same_run(case, caplog):
    changes, updates = CASES[case]
    _, states, metrics = resumed(run_config(**changes))
    states = [jax.device_get(raw(x)) for x in states]
    before = on_device((4, 100)), on_device((4, 99))
    program, found, found_metrics = resumed(run_config(place="host", **changes))
    assert equal([learned(x) for x in found], [learned(x) for x in states])
    for ours, theirs in zip(found_metrics, metrics, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.isclose(ours[x], theirs[x], rtol=1e-5, equal_nan=True) for x in ours)
    assert updates is None or int(states[1].clock.updates) == updates
    # Its rings lie in the host's memory, and all else on the device, as donation needs it.
    state = found[1]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(state.buffer))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((state.agent, state.clock)))
    assert (on_device((4, 100)), on_device((4, 99))) == before

    # Compiled once, and never again.
    chunk, state = program.compile(), program.resume(found[1])
    for number in range(3):
        with jax.log_compiles(number > 0):
            caplog.clear()
            state, _ = chunk(state)
    program.close()
    assert not [x for x in caplog.records if "ompil" in x.getMessage()]
    assert int(state.clock.iteration) == 70


@pytest.mark.parametrize(("make", "changes"), [(run_config, {"context_every": 3}), (newest, {})])
def test_a_replay_in_host_memory_for_seeds_side_by_side(make, changes, reuse_unchecked):
    config = make(seeds=2, **changes)
    _, states, _ = resumed(config)
    host = dataclasses.replace(config.replay, place="host")
    _, found, _ = resumed(dataclasses.replace(config, replay=host))
    assert found[1].buffer.memo["seen"].shape[:2] == (2, 4)
    assert int(found[1].clock.updates) >= 6
    assert equal([x.buffer.rows for x in found], [x.buffer.rows for x in states])
    assert close([learned(x) for x in found], [learned(x) for x in states])


def test_modules_named_in_a_file_are_not_imported():
    with pytest.raises(JaxwmError, match="would import the module chain"):
        train.make_env(run_config())

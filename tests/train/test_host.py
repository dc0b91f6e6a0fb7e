"""The driver for simulators on the host: the same run as on the device, whatever their speed."""

import dataclasses
from fractions import Fraction

import jax
import numpy as np
import pytest
import scripted

from jaxwm import envs, train
from jaxwm.envs.host import HostConfig
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay import device as replay
from jaxwm.replay.device import ReplayConfig, close_abandoned
from jaxwm.run import checkpoint
from jaxwm.run.log import read_metrics
from jaxwm.run.loop import _headline, evaluate_run, resume, run
from jaxwm.types import JaxwmError

ITERATIONS = 10


@pytest.fixture(scope="module")
def config():
    return RunConfig(
        env="chain:chain",
        size="debug",
        agent=dreamer_v3.agent("debug"),
        steps=240,
        envs=4,
        replay=ReplayConfig(capacity=400, batch_size=2, batch_length=6, train_ratio=2.0),
        host=HostConfig(workers=1, timeout=20.0),
        eval_episodes=3,
        log_every=40,
        save_every=120,
    )


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


@pytest.mark.no_cover
def test_both_drivers_are_the_same_run(config):
    device, _ = played(config, scripted.device_chain(), 4)
    host, metrics = played(config, scripted.chain(), 4)
    assert int(host.clock.updates) > 10 and equal(device.clock, host.clock)
    assert np.isfinite(metrics["loss/total"])
    # Both act alike until the first update, which only the device's next action knows of.
    same = train.build(config, ITERATIONS, scripted.chain()).replay.warmup + 1
    ours, theirs = (jax.tree.map(lambda x: x[:, :same], x.buffer) for x in (device, host))
    assert same > 8 and equal(ours.rows, theirs.rows)
    assert np.isfinite(host.buffer.deter).all() and host.buffer.rows.is_last.sum() > 8


def test_the_train_ratio_is_exact(config):
    replay = dataclasses.replace(config.replay, train_ratio=0.7)
    state, _ = played(dataclasses.replace(config, replay=replay), scripted.chain(), 4)
    # 9 rows of each make the windows of a batch; every row from then on earns its share.
    earned = Fraction("0.7") * 4 * (40 - 8) / (2 * 6)
    assert int(state.clock.updates) == int(earned)


def test_the_speed_of_the_simulators_changes_nothing(config):
    quick, metrics = played(config, scripted.chain(), 4)
    slow, slow_metrics = played(config, scripted.chain(nap=0.01), 4)
    assert int(quick.clock.updates) > 10
    assert equal(raw(quick), raw(slow))
    assert metrics["loss/total"] == slow_metrics["loss/total"]
    assert slow_metrics["host/waiting"] > 0 and slow_metrics["host/faults"] == 0


def test_acting_parameters_lag_by_one_round(config):
    program = train.build(config, 1, scripted.chain())
    state, before = program.init(), None
    for _ in range(20):
        known = jax.device_get((state.agent.params, state.env.acting))
        updates = int(state.clock.updates)
        state, _ = program.chunk(state)
        if int(state.clock.updates) > max(updates, 1):  # the first one's rate is 0
            # The parameters from before this round act; those before them are gone.
            assert equal(state.env.acting, known[0])
            assert not equal(state.agent.params, known[0])
            before = known
        elif not int(state.clock.updates) > updates:
            assert equal(state.env.acting, known[1])
    program.close()
    assert before is not None


@pytest.fixture
def reuse_unchecked():
    """The checker takes the keys of several seeds for one; in all threads."""
    jax.config.update("jax_debug_key_reuse", False)
    yield
    jax.config.update("jax_debug_key_reuse", True)


@pytest.mark.no_cover
def test_seeds_side_by_side(config, reuse_unchecked):
    state, metrics = played(dataclasses.replace(config, seeds=2), scripted.chain(), 4)
    assert state.row.reward.shape == (2, 4) and metrics["loss/total"].shape == (2,)
    assert int(state.clock.updates) > 10
    one, two = (jax.tree.map(lambda x, i=i: x[i], state.agent.params) for i in range(2))
    assert not equal(one, two)
    assert np.isfinite(metrics["loss/total"]).all() and (metrics["episode/count"] > 0).all()


def test_compiled_once_before_the_run(config):
    program = train.build(config, ITERATIONS, scripted.chain())
    chunk, state = program.compile(), program.init()
    for _ in range(3):
        state, _ = chunk(state)
    program.close()
    other, _ = played(config, scripted.chain(), 3)
    assert equal(raw(jax.device_get(state)), raw(other))


def test_the_replay_does_not_bridge_a_fault(config):
    state, metrics = played(config, scripted.chain(fails_at=17), 4)
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


@pytest.fixture
def own(monkeypatch):
    """Lets a configuration name an environment of this test's."""

    def give(env):
        monkeypatch.setitem(envs.OWN, "chain:chain", env)

    return give


def test_a_run_from_start_to_end(config, own, tmp_path):
    own(scripted.chain())
    summary = run(config, tmp_path / "run", quiet=True)
    assert summary.returns.shape == (1, 3) and set(summary.returns[0]) <= {0.0, 1.0}
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [40, 80, 120, 160, 200, 240]
    assert {"host/waiting", "host/faults", "loss/total"} <= set(lines[-1])
    # jax alone takes a hundred megabytes; a worker with numpy in it some twenty.
    assert lines[-1]["memory/process"] > 5e7 > lines[-1]["memory/simulators"] > 5e6
    assert {x.name for x in (tmp_path / "run").iterdir()} >= {"curve.png", "dream.png"}
    again = resume(tmp_path / "run", 320, quiet=True)
    assert again.steps == 320 and again.updates > summary.updates
    assert evaluate_run(tmp_path / "run", 2).shape == (1, 2)


def test_too_many_faults_save_and_stop_the_run(config, own, tmp_path):
    own(scripted.chain(fails_at=17))
    host = dataclasses.replace(config.host, max_faults=5)
    with pytest.raises(JaxwmError, match=r"(?s)stopped before step.*raised 6 times.*chain broke"):
        run(dataclasses.replace(config, host=host), tmp_path / "run", quiet=True)
    assert 4 * 34 <= checkpoint.latest(tmp_path / "run") < 240
    own(scripted.chain())
    assert resume(tmp_path / "run", 240, quiet=True).steps >= 240


def test_modules_named_in_a_file_are_not_imported(config):
    with pytest.raises(JaxwmError, match="would import the module chain"):
        train.make_env(config)


def placed(config, place, **changes):
    where = dataclasses.replace(config.replay, place=place, **changes)
    return dataclasses.replace(config, replay=where)


def played_and_resumed(config, folder):
    """Two chunks, a checkpoint, and two more from it: the program, states, and metrics."""
    program = train.build(config, ITERATIONS, scripted.chain())
    state = program.init()
    for _ in range(2):
        state, before = program.chunk(state)
    with checkpoint.Saver(folder, config, pytest.fail) as saver:
        saver.save(1, state)
    saved = jax.device_get(raw(state))
    saved = saved._replace(buffer=jax.tree.map(np.copy, saved.buffer))
    state = checkpoint.restore(folder, program.shapes(), config)
    assert equal(raw(state), saved)
    state = program.resume(state)
    for _ in range(2):
        state, after = program.chunk(state)
    program.close()
    varying = {"host/waiting", "memory/simulators"}
    metrics = [{k: x for k, x in y.items() if k not in varying} for y in (before, after)]
    return program, (saved, state), metrics


def learned(state):
    """All of a state but the account of metrics: the total of the losses is summed in an order that
    the compiler chooses."""
    return raw(state)._replace(account=state.account.taken)


def on_device(shape):
    return sum(x.shape[: len(shape)] == shape for x in jax.live_arrays())


@pytest.mark.no_cover
def test_a_replay_in_host_memory_is_the_same_run(config, tmp_path, caplog):
    # 4 * 9 / 12 = 3 updates a round.
    device, host = (placed(config, place, train_ratio=9.0) for place in ("device", "host"))
    _, states, metrics = played_and_resumed(device, tmp_path / "device")
    states = [jax.device_get(raw(x)) for x in states]
    before = on_device((4, 100))
    program, found, found_metrics = played_and_resumed(host, tmp_path / "host")
    assert equal([learned(x) for x in found], [learned(x) for x in states])
    told = [y | {"loss/total": round(float(y["loss/total"]), 4)} for y in found_metrics]
    assert equal(told, [y | {"loss/total": round(float(y["loss/total"]), 4)} for y in metrics])
    assert int(states[1].clock.updates) == 3 * (40 - 8)
    # Its rings lie in the host's memory, and all else on the device, as donation needs it.
    state = found[1]
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(state.buffer))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((state.agent, state.clock)))
    assert on_device((4, 100)) == before
    assert "bytes in the memory of the host" in _headline(host, program, tmp_path)

    # Compiled once, and never again.
    chunk, state = program.compile(), program.resume(found[1])
    for number in range(3):
        with jax.log_compiles(number > 0):
            caplog.clear()
            state, _ = chunk(state)
    program.close()
    assert not [x for x in caplog.records if "ompil" in x.getMessage()]
    assert int(state.clock.updates) == 3 * (70 - 8) and on_device((4, 100)) == before

    # The place belongs to the run.
    with pytest.raises(JaxwmError, match=r"replay.place: 'host' here, 'device' there"):
        checkpoint.restore(tmp_path / "device", program.shapes(), host)


@pytest.mark.no_cover
def test_a_replay_in_host_memory_for_seeds_side_by_side(config, reuse_unchecked, tmp_path):
    config = dataclasses.replace(config, seeds=2)
    device, host = (placed(config, place, context_every=3) for place in ("device", "host"))
    _, states, _ = played_and_resumed(device, tmp_path / "device")
    _, found, _ = played_and_resumed(host, tmp_path / "host")
    assert int(found[1].clock.updates) > 10 and found[1].buffer.deter.shape == (2, 4, 33, 16)
    assert equal([learned(x) for x in found], [learned(x) for x in states])


def test_a_replay_that_cannot_lie_in_host_memory_is_told(config, monkeypatch):
    config = placed(config, "host")
    with pytest.raises(JaxwmError, match=r"needs simulators on the host, and chain runs on the de"):
        train.build(config, single=scripted.device_chain())
    # The host's memory counts, not the device's.
    monkeypatch.setattr(replay, "_host_bytes", lambda: 1000)
    with pytest.raises(JaxwmError, match=r"this host has 0.0 GiB. Lower --replay.capacity"):
        train.build(config, single=scripted.chain())

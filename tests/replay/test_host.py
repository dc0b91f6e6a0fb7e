"""The rings in the host's memory are those on the device, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.replay import device, host
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import JaxwmError
from tests.replay.common import BATCH, CAPACITY, LENGTH, D, N, bits, compiled, make, memo_of, rows


def noise(random, lead):
    """Fresh memos (*lead,)."""
    memo = memo_of(random.integers(0, 3000, lead).astype(np.int32))
    return {**memo, "deter": random.normal(size=(*lead, D)).astype(np.float32)}


@pytest.mark.parametrize("every", [1, 2])
def test_both_rings_are_the_same_past_their_end(every):
    memory, fill = make(True, every=every)
    buffer, cursor = memory.init()
    ours = host.empty(memory.shapes)
    choose, write_back = jax.jit(memory.choose), jax.jit(memory.write_back)
    random, twice, written = np.random.default_rng(0), 0, 0
    for number in range(25):
        more = int(random.integers(LENGTH + 2 if number == 0 else 0, 6 + LENGTH))
        buffer, cursor = fill(buffer, cursor, written, written + more)
        for time in range(written, written + more):
            host.add(ours, time, *jax.device_get(rows(time)))
        written += more

        env, start, _ = jax.device_get(choose(cursor, jax.random.key(number)))
        window, cursor = memory.sample(buffer, cursor, jax.random.key(number))
        steps = device.close_abandoned(host.read(ours, env, start, LENGTH))
        memo = host.memos(ours, env, start, LENGTH)
        assert bits((memo, steps)) == bits((window.memo, window.steps))

        trained = np.asarray(window.index)[1:]
        places = set(zip(np.tile(env, LENGTH), trained.ravel(), strict=True))
        twice += len(places) < LENGTH * BATCH
        fresh, taken = noise(random, (LENGTH, BATCH)), number % 4 > 0
        buffer = write_back(buffer, window, fresh, taken)
        host.write_back(ours, env, start, LENGTH, fresh, np.asarray(taken))
    assert written > 4 * CAPACITY and twice > 5  # a row in two windows: the later one counts
    assert bits(ours) == bits(buffer) and ours.memo["deter"].shape == (N, CAPACITY // every, D)


def test_the_newest_rows_are_the_same():
    config = ReplayConfig(N * (LENGTH + 1), N, LENGTH, train_ratio=1.0)
    memory, fill = compiled(device.replay(config, *rows(0), data="newest"))
    buffer, cursor = fill(*memory.init(), 0, 13)
    ours = host.empty(memory.shapes)
    for time in range(13):
        host.add(ours, time, *jax.device_get(rows(time)))
    window, _ = memory.sample(buffer, cursor, jax.random.key(0))
    env, start, _ = jax.device_get(memory.choose(cursor, jax.random.key(0)))
    steps = device.close_abandoned(host.read(ours, env, start, LENGTH))
    memo = host.memos(ours, env, start, LENGTH, every_row=True)
    assert memo["deter"].shape == (LENGTH + 1, N, D)
    assert bits((memo, steps)) == bits((window.memo, window.steps))


@pytest.mark.parametrize("every", [1, 2])
def test_seeds_are_rings_side_by_side(every):
    shapes = make(True, every=every)[0].shapes
    many = host.empty(shapes, (2,))
    apart = [host.empty(shapes) for _ in range(2)]
    random = np.random.default_rng(1)

    def both(x, y):
        return jax.tree.map(lambda *leaves: np.stack(leaves), x, y)

    for time in range(CAPACITY + 7):
        new = [jax.device_get(x) for x in (rows(time), rows(time + 500))]
        for ring, (step, memo) in zip(apart, new, strict=True):
            host.add(ring, time, step, memo)
        host.add(many, time, *both(*new))
    env = random.integers(0, N, (2, BATCH))
    start = random.integers(4, (CAPACITY + 7 - LENGTH) // every, (2, BATCH)) * every
    fresh, taken = noise(random, (2, LENGTH, BATCH)), np.array([True, False])
    host.write_back(many, env, start, LENGTH, fresh, taken)
    host.write_back(apart[0], env[0], start[0], LENGTH, jax.tree.map(lambda x: x[0], fresh))
    assert bits(many) == bits(both(*apart))
    windows = [host.read(r, env[i], start[i], LENGTH) for i, r in enumerate(apart)]
    assert bits(host.read(many, env, start, LENGTH)) == bits(both(*windows))
    memos = [host.memos(r, env[i], start[i], LENGTH) for i, r in enumerate(apart)]
    assert bits(host.memos(many, env, start, LENGTH)) == bits(both(*memos))


def test_empty_memos_take_no_rings():
    memory, _ = make(True, memos=False)
    ours = host.empty(memory.shapes, (2,))
    assert ours.memo == () and ours.rows.reward.shape == (2, N, CAPACITY)
    env, start = np.zeros((2, BATCH), int), np.zeros((2, BATCH), int)
    both = jax.tree.map(lambda x: np.stack([x, x]), jax.device_get(rows(0)[0]))
    host.add(ours, 0, both, ())
    assert host.memos(ours, env, start, LENGTH) == ()
    before = bits(ours)
    host.write_back(ours, env, start, LENGTH, (), np.ones(2, bool))
    host.write_back(ours, env, start, LENGTH, None)
    assert bits(ours) == before


def test_an_outline_takes_no_memory():
    shapes = make(True)[0].shapes
    outline, empty = (f(shapes, (2,)) for f in (host.outline, host.empty))
    assert bits(outline) == bits(empty) and outline.memo["deter"].shape == (2, N, CAPACITY, D)
    assert all(set(x.strides) == {0} for x in jax.tree.leaves(outline))


def test_memos_keep_their_type():
    shapes = make(True)[0].shapes
    half = jax.ShapeDtypeStruct((N, CAPACITY, D), jnp.bfloat16)
    ours = host.empty(shapes._replace(memo=half))
    value = jnp.arange(N * D, dtype=jnp.bfloat16).reshape(N, D)
    host.add(ours, 3, jax.device_get(rows(3)[0]), jax.device_get(value))
    assert ours.memo.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.memo[:, 3], value)


def test_more_than_the_host_has_is_refused(monkeypatch):
    with pytest.raises(JaxwmError, match=r"The replay needs 1048576.0 GiB and this host has"):
        device.check_fits(2**50, place="host")
    monkeypatch.setattr(device, "_host_bytes", lambda: 3 * 2**30)
    with pytest.raises(JaxwmError, match=r"needs 4.0 GiB and this host has 3.0 GiB. Lower --repl"):
        device.check_fits(4 * 2**30, place="host")
    device.check_fits(2 * 2**30, place="host")

"""The replay against a list of all rows ever added."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.replay.device import (
    ReplayConfig,
    Window,
    check_fits,
    close_abandoned,
    is_last_copy,
    places,
    replay,
)
from jaxwm.types import JaxwmError, Latent, Step

N, D, S, K = 3, 4, 2, 5
CAPACITY, LENGTH, BATCH = 20, 4, 6


def rows(time):
    """Row `time` of all environments: every number says where it belongs."""
    tag = jnp.arange(N) * 1000 + time
    flags = jnp.zeros(N, bool)
    image = jnp.broadcast_to((tag % 251).astype(jnp.uint8)[:, None, None, None], (N, 2, 2, 3))
    obs = {"tag": tag, "image": image}
    step = Step(tag % 7, obs, tag.astype(jnp.float32), flags.at[:].set(time % 5 == 0), flags, flags)
    stoch = jax.nn.one_hot((tag[:, None] + jnp.arange(S)[None]) % K, K)
    return step, Latent(jnp.broadcast_to(tag[:, None].astype(jnp.float32), (N, D)), stoch)


@functools.cache
def make(online, capacity=CAPACITY, batch=BATCH, every=1):
    """A replay and its functions, compiled."""
    config = ReplayConfig(capacity * N, batch, LENGTH, online=online, context_every=every)
    memory = replay(config, *jax.eval_shape(lambda: rows(0)))

    @jax.jit
    def fill(buffer, cursor, start, stop):
        return jax.lax.fori_loop(
            start, stop, lambda t, c: memory.add(*c, *rows(t)), (buffer, cursor)
        )

    return memory._replace(sample=jax.jit(memory.sample)), fill


def filled(count, online=False, **sizes):
    memory, fill = make(online, **sizes)
    return memory, *fill(*memory.init(), 0, count)


def times(window):
    """When the rows (T, B) of a window were added, and by which environment."""
    tag = np.asarray(window.steps.obs["tag"])
    return tag % 1000, tag // 1000


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 20, 21, 53])
def test_the_ring_holds_the_last_rows(count, every):
    _memory, buffer, cursor = filled(count, every=every)
    assert buffer.deter.shape[1] == buffer.stoch.shape[1] == CAPACITY // every
    assert int(cursor.written) == count
    for time in range(max(0, count - CAPACITY), count):
        step, latent = rows(time)
        kept = jax.tree.map(lambda x, at=time % CAPACITY: x[:, at], buffer.rows)
        jax.tree.map(np.testing.assert_array_equal, kept, step)
        if time % every == 0:
            at = time % CAPACITY // every
            np.testing.assert_array_equal(buffer.deter[:, at], latent.deter)
            np.testing.assert_array_equal(buffer.stoch[:, at], latent.stoch.argmax(-1))
    unused = np.asarray(buffer.rows.obs["tag"][:, count:])
    assert not unused.any()


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("count", [5, 9, 20, 21, 33, 40])
def test_windows_are_consecutive_rows_that_are_still_there(count, online, every):
    memory, buffer, cursor = filled(count, online, every=every)
    for seed in range(8):
        window, cursor = memory.sample(buffer, cursor, jax.random.key(seed))
        time, env = times(window)
        assert time.shape == (LENGTH, BATCH)
        np.testing.assert_array_equal(time, time[:1] + np.arange(LENGTH)[:, None])
        np.testing.assert_array_equal(env, np.broadcast_to(window.env, env.shape))
        np.testing.assert_array_equal(window.index, time % CAPACITY)
        assert ((time[0] - 1) % every == 0).all()
        # The context is the row before; a window never straddles the write cursor.
        assert time[0].min() - 1 >= max(0, count - CAPACITY) and time[-1].max() < count
        tag = env[0] * 1000 + time[0] - 1
        np.testing.assert_array_equal(
            window.context.deter, np.broadcast_to(tag[:, None], (BATCH, D))
        )
        classes = (tag[:, None] + np.arange(S)) % K
        np.testing.assert_array_equal(window.context.stoch, np.eye(K)[classes])
        np.testing.assert_array_equal(window.steps.reward, window.steps.obs["tag"])
        np.testing.assert_array_equal(
            window.steps.obs["image"][..., 0, 0, 0], np.asarray(window.steps.obs["tag"]) % 251
        )


@pytest.mark.parametrize(("every", "limit"), [(1, 87), (2, 53)])
def test_uniform_windows_begin_everywhere_equally_often(every, limit):
    memory, buffer, cursor = filled(33, every=every)
    draw = jax.jit(jax.vmap(lambda key: memory.sample(buffer, cursor, key)[0].steps.obs["tag"][0]))
    tag = np.asarray(draw(jax.random.split(jax.random.key(0), 800))).ravel()
    # 20 rows are there, and a window takes 5: starts 13..28, first trained rows 14..29; if only
    # even rows have latents starts 14..28, first trained rows 15..29.
    first = {1: 14, 2: 15}[every]
    expected = {env * 1000 + time for env in range(N) for time in range(first, 30, every)}
    found, counts = np.unique(tag, return_counts=True)
    assert set(found) == expected
    mean = tag.size / len(expected)  # 4800 / 48 = 100
    # 47 degrees of freedom: beyond 87 once in 3000; 23: beyond 53 as often.
    assert (np.square(counts - mean) / mean).sum() < limit


def test_queued_windows_come_once_and_in_order_then_uniform_ones():
    memory, fill = make(True)
    buffer, cursor = fill(*memory.init(), 0, 13)
    # 13 rows of 3 environments hold two windows of 5 rows each, 6 in all: one batch.
    window, cursor = memory.sample(buffer, cursor, jax.random.key(0))
    time, env = times(window)
    np.testing.assert_array_equal(time[0] - 1, [0, 0, 0, 5, 5, 5])
    np.testing.assert_array_equal(env[0], [0, 1, 2, 0, 1, 2])
    assert int(cursor.online) == 6
    # The queue is empty: uniform windows, and the queue stays where it is.
    starts = []
    for seed in range(10):
        window, cursor = memory.sample(buffer, cursor, jax.random.key(seed))
        starts += list(times(window)[0][0] - 1)
    assert int(cursor.online) == 6 and set(starts) == set(range(9))
    # Two more rows complete the third windows; three places of the batch are left.
    buffer, cursor = fill(buffer, cursor, 13, 15)
    window, cursor = memory.sample(buffer, cursor, jax.random.key(99))
    time, env = times(window)
    np.testing.assert_array_equal(time[0, :3] - 1, [10, 10, 10])
    np.testing.assert_array_equal(env[0, :3], [0, 1, 2])
    assert int(cursor.online) == 9


@pytest.mark.parametrize(("every", "stride"), [(1, 5), (2, 4)])
def test_every_queued_window_is_trained_on_once(every, stride):
    """Where latents are few, windows share a row, the context of one and the last of another."""
    memory, fill = make(True, batch=2, every=every)
    buffer, cursor = memory.init()
    seen = []
    for time in range(0, 60, 2):
        buffer, cursor = fill(buffer, cursor, time, time + 2)
        if int(cursor.written) < LENGTH + 2:
            continue
        before = int(cursor.online)
        window, cursor = memory.sample(buffer, cursor, jax.random.key(time))
        time_, env = times(window)
        seen += [(int(t) - 1, int(e)) for t, e in zip(time_[0], env[0], strict=False)][
            : int(cursor.online) - before
        ]
    assert seen == [(stride * i, env) for i in range(14) for env in range(N)][: len(seen)]
    assert len(seen) >= 33


def test_windows_overwritten_while_they_waited_are_skipped():
    memory, fill = make(True)
    buffer, cursor = fill(*memory.init(), 0, 33)
    # Rows 13..32 are left. The window of rows 10..14 is gone, the first whole one is 15..19.
    window, cursor = memory.sample(buffer, cursor, jax.random.key(0))
    np.testing.assert_array_equal(times(window)[0][0] - 1, [15, 15, 15, 20, 20, 20])
    # Windows 0..8 were skipped, 9..14 taken; 15..17 wait.
    assert int(cursor.online) == 15
    window, cursor = memory.sample(buffer, cursor, jax.random.key(1))
    np.testing.assert_array_equal((times(window)[0][0] - 1)[:3], [25, 25, 25])
    assert int(cursor.online) == 18


@pytest.mark.parametrize("every", [1, 2, 4])
def test_fresh_latents_go_to_the_rows_they_belong_to(every):
    memory, buffer, cursor = filled(33, every=every)
    window, cursor = memory.sample(buffer, cursor, jax.random.key(0))
    fresh = Latent(
        -jnp.broadcast_to(window.steps.reward[..., None], (LENGTH, BATCH, D)),
        jax.nn.one_hot(jnp.full((LENGTH, BATCH, S), 3), K),
    )
    after = jax.jit(memory.write_back)(buffer, window, fresh)
    time, env = times(window)
    places = (time % CAPACITY).ravel().tolist()
    touched = {
        (e, place // every)
        for e, place in zip(env.ravel().tolist(), places, strict=True)
        if place % every == 0
    }
    assert touched
    for env_ in range(N):
        for place in range(CAPACITY // every):
            old, new = buffer.deter[env_, place], after.deter[env_, place]
            if (env_, place) in touched:
                np.testing.assert_array_equal(new, -old)
                np.testing.assert_array_equal(after.stoch[env_, place], [3, 3])
            else:
                np.testing.assert_array_equal(new, old)
                np.testing.assert_array_equal(after.stoch[env_, place], buffer.stoch[env_, place])
    jax.tree.map(np.testing.assert_array_equal, after.rows, buffer.rows)


def test_rows_are_stored_compactly_and_counted():
    step, latent = rows(0)
    latent = Latent(latent.deter.astype(jnp.bfloat16), latent.stoch.astype(jnp.bfloat16))
    memory = replay(ReplayConfig(60, 2, 4), step, latent)
    buffer, _ = memory.init()
    assert buffer.rows.obs["image"].dtype == jnp.uint8 and buffer.stoch.dtype == jnp.uint8
    assert buffer.deter.dtype == jnp.bfloat16 and buffer.stoch.shape == (N, 20, S)
    assert memory.nbytes == sum(x.nbytes for x in jax.tree.leaves(buffer))
    # Per row: action 4, tag 4, image 12, reward 4, three flags, deter 4 x 2, stoch 2 x 1.
    assert memory.nbytes == 60 * (4 + 4 + 12 + 4 + 3 + 8 + 2)
    # 257 classes do not fit into a byte.
    wide = Latent(latent.deter, jnp.zeros((N, S, 257)))
    assert replay(ReplayConfig(60, 2, 4), step, wide).init()[0].stoch.dtype == jnp.int32


@pytest.mark.parametrize(
    ("capacity", "batch", "first_ready"),
    [
        (CAPACITY, 1, 6),  # 4 rows of a batch, 2 windows for each of 3 environments: 4 + 2 rows
        (CAPACITY, 6, 12),  # 24 rows, 8 windows each
        (CAPACITY, 60, 20),  # 240 rows, but there are never more than 16 windows each
    ],
)
def test_training_waits_for_as_many_windows_as_a_batch_has_rows(capacity, batch, first_ready):
    memory, _fill = make(True, capacity=capacity, batch=batch)
    assert memory.warmup == first_ready


def test_abandoned_episodes_are_closed():
    is_first = jnp.array([[True], [False], [True], [False]])
    is_last = jnp.array([[False], [False], [False], [False]])
    steps = Step(jnp.zeros((4, 1)), {}, jnp.zeros((4, 1)), is_first, is_last, is_last)
    closed = close_abandoned(steps)
    assert closed.is_last[:, 0].tolist() == [False, True, False, False]
    assert not closed.is_terminal.any()


@pytest.mark.parametrize(("capacity", "length"), [(12, 4), (9, 8), (40, 5)])
def test_of_a_row_in_several_windows_the_last_latent_stays(capacity, length):
    rng = np.random.default_rng(0)
    for _ in range(20):
        env, start = rng.integers(2, size=6), rng.integers(100, size=6)
        index = places(start, length, capacity, np)[1:]
        window = Window(None, None, jnp.asarray(env), jnp.asarray(index))
        found = is_last_copy(window, capacity)
        last = {}
        for time, i in np.ndindex(length, 6):
            last[env[i], index[time, i]] = time, i
        wanted = np.zeros((length, 6), bool)
        wanted[tuple(np.transpose(list(last.values())))] = True
        np.testing.assert_array_equal(found, wanted)


def test_few_latents_take_little_memory():
    step, latent = rows(0)
    memory = replay(ReplayConfig(66, 2, 4, context_every=4), step, latent)
    # 22 rows for each of 3 environments, in fours 20: of 27 bytes, and 5 latents of 4 x 4 + 2.
    assert memory.nbytes == 3 * (20 * (4 + 4 + 12 + 4 + 3) + 5 * (16 + 2))
    with pytest.raises(JaxwmError, match="context_every is 3, which does not divide its batch_len"):
        ReplayConfig(66, 2, 4, context_every=3)
    with pytest.raises(JaxwmError, match="context_every is 0; it must be positive"):
        ReplayConfig(66, 2, 4, context_every=0)


def test_what_cannot_be_held_is_told():
    with pytest.raises(JaxwmError, match=r"gives each of 3 environments 4, fewer than the 5 rows"):
        replay(ReplayConfig(14, 2, 4), *rows(0))
    with pytest.raises(JaxwmError, match=r"The dream needs 1048576.0 GiB and the device \("):
        check_fits(2**50, "The dream")
    check_fits(2**20)


def test_updates_per_iteration_are_an_exact_fraction():
    # 16 environments earn 16 * 0.3 = 4.8 rows; an update takes 16 * 64 = 1024.
    config = ReplayConfig(train_ratio=0.3)
    assert config.updates_per_iteration(16).as_integer_ratio() == (3, 640)
    assert ReplayConfig(train_ratio=1024.0).updates_per_iteration(1) == 1
    assert ReplayConfig(train_ratio=0).updates_per_iteration(1) == 0
    for ratio in (4e-4, -1.0, 2e6, math.nan):
        with pytest.raises(JaxwmError, match=r"train_ratio is .* at (least 0\.001|most 1e6)"):
            ReplayConfig(train_ratio=ratio)

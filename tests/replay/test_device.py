"""The replay against a list of all rows ever added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.replay.config import ReplayConfig
from jaxwm.replay.device import (
    check_fits,
    close_abandoned,
    is_last_copy,
    places,
    replay,
)
from jaxwm.types import JaxwmError, Step, Window
from tests.replay.common import (
    BATCH,
    CAPACITY,
    LENGTH,
    N,
    bits,
    compiled,
    filled,
    given,
    make,
    memo_of,
    rows,
    times,
)


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 20, 21, 53])
def test_the_ring_holds_the_last_rows(count, every):
    _memory, buffer, cursor = filled(count, every=every)
    assert {x.shape[1] for x in jax.tree.leaves(buffer.memo)} == {CAPACITY // every}
    assert int(cursor.written) == count
    for time in range(max(0, count - CAPACITY), count):
        step, memo = rows(time)
        same(jax.tree.map(lambda x, at=time % CAPACITY: x[:, at], buffer.rows), step)
        if time % every == 0:
            at = time % CAPACITY // every
            same(jax.tree.map(lambda x, at=at: x[:, at], buffer.memo), memo)
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
        assert time.shape == (LENGTH + 1, BATCH)
        np.testing.assert_array_equal(time, time[:1] + np.arange(LENGTH + 1)[:, None])
        np.testing.assert_array_equal(env, np.broadcast_to(window.env, env.shape))
        np.testing.assert_array_equal(window.index, time % CAPACITY)
        assert (time[0] % every == 0).all()
        # Row 0 is the context; a window never straddles the write cursor.
        assert time[0].min() >= max(0, count - CAPACITY) and time[-1].max() < count
        same(window.memo, memo_of(env[0] * 1000 + time[0]))
        np.testing.assert_array_equal(window.steps.reward, window.steps.obs["tag"])
        np.testing.assert_array_equal(
            window.steps.obs["image"][..., 0, 0, 0], np.asarray(window.steps.obs["tag"]) % 251
        )


def test_an_empty_memo_leaves_windows_as_they_are():
    with_memos, without = (filled(33, True, memos=memos, every=2) for memos in (True, False))
    assert jax.tree.leaves(without[1].memo) == [] and without[0].nbytes < with_memos[0].nbytes
    windows = [
        memory.sample(*state, jax.random.key(1))[0] for memory, *state in (with_memos, without)
    ]
    assert windows[1].memo == ()
    assert bits(windows[0]._replace(memo=())) == bits(windows[1])
    after = without[0].write_back(without[1], windows[1], ())
    assert bits(after) == bits(without[1])


@pytest.mark.parametrize(("every", "limit"), [(1, 87), (2, 53)])
def test_uniform_windows_begin_everywhere_equally_often(every, limit):
    memory, buffer, cursor = filled(33, every=every)
    draw = jax.jit(jax.vmap(lambda key: memory.sample(buffer, cursor, key)[0].steps.obs["tag"][0]))
    tag = np.asarray(draw(jax.random.split(jax.random.key(0), 800))).ravel()
    # 20 rows are there, and a window takes 5: starts 13..28; if only even rows have memos 14..28.
    first = {1: 13, 2: 14}[every]
    expected = {env * 1000 + time for env in range(N) for time in range(first, 29, every)}
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
    np.testing.assert_array_equal(time[0], [0, 0, 0, 5, 5, 5])
    np.testing.assert_array_equal(env[0], [0, 1, 2, 0, 1, 2])
    assert int(cursor.online) == 6
    # The queue is empty: uniform windows, and the queue stays where it is.
    starts = []
    for seed in range(10):
        window, cursor = memory.sample(buffer, cursor, jax.random.key(seed))
        starts += list(times(window)[0][0])
    assert int(cursor.online) == 6 and set(starts) == set(range(9))
    # Two more rows complete the third windows; three places of the batch are left.
    buffer, cursor = fill(buffer, cursor, 13, 15)
    window, cursor = memory.sample(buffer, cursor, jax.random.key(99))
    time, env = times(window)
    np.testing.assert_array_equal(time[0, :3], [10, 10, 10])
    np.testing.assert_array_equal(env[0, :3], [0, 1, 2])
    assert int(cursor.online) == 9


@pytest.mark.parametrize(("every", "stride"), [(1, 5), (2, 4)])
def test_every_queued_window_is_trained_on_once(every, stride):
    """Where memos are few, windows share a row, the context of one and the last of another."""
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
        seen += [(int(t), int(e)) for t, e in zip(time_[0], env[0], strict=True)][
            : int(cursor.online) - before
        ]
    assert seen == [(stride * i, env) for i in range(14) for env in range(N)][: len(seen)]
    assert len(seen) >= 33


def test_windows_overwritten_while_they_waited_are_skipped():
    memory, fill = make(True)
    buffer, cursor = fill(*memory.init(), 0, 33)
    # Rows 13..32 are left. The window of rows 10..14 is gone, the first whole one is 15..19.
    window, cursor = memory.sample(buffer, cursor, jax.random.key(0))
    np.testing.assert_array_equal(times(window)[0][0], [15, 15, 15, 20, 20, 20])
    # Windows 0..8 were skipped, 9..14 taken; 15..17 wait.
    assert int(cursor.online) == 15
    window, cursor = memory.sample(buffer, cursor, jax.random.key(1))
    np.testing.assert_array_equal((times(window)[0][0])[:3], [25, 25, 25])
    assert int(cursor.online) == 18


@pytest.mark.parametrize("every", [1, 2, 4])
def test_fresh_memos_go_to_the_rows_they_belong_to(every):
    memory, buffer, cursor = filled(33, every=every)
    window, cursor = memory.sample(buffer, cursor, jax.random.key(0))
    time, env = times(window)
    fresh = memo_of(jnp.asarray(500 + env[1:] * 1000 + time[1:]), jnp)
    after = jax.jit(memory.write_back)(buffer, window, fresh)
    wanted = jax.tree.map(lambda x: np.array(x), buffer.memo)
    touched = 0
    for t, e in zip(time[1:].ravel(), env[1:].ravel(), strict=True):
        if t % every == 0:
            number = memo_of(np.asarray(500 + e * 1000 + t))
            jax.tree.map(
                lambda ring, x, at=(e, t % CAPACITY // every): ring.__setitem__(at, x),
                wanted,
                number,
            )
            touched += 1
    assert touched and bits(after.memo) != bits(buffer.memo)
    assert bits(after.memo) == bits(wanted)
    assert bits(after.rows) == bits(buffer.rows)
    # Updates that were refused, or refresh nothing, leave the rings as they are.
    assert bits(memory.write_back(buffer, window, fresh, jnp.zeros((), bool))) == bits(buffer)
    assert memory.write_back(buffer, window, None) is buffer


def test_rows_are_stored_compactly_and_counted():
    step, _ = rows(0)
    memo = (jnp.zeros((N, 4), jnp.bfloat16), jnp.zeros((N, 2), jnp.uint8))
    memory = replay(ReplayConfig(60, 2, 4), step, memo)
    buffer, _ = memory.init()
    assert buffer.rows.obs["image"].dtype == jnp.uint8 and buffer.memo[1].dtype == jnp.uint8
    assert buffer.memo[0].dtype == jnp.bfloat16 and buffer.memo[1].shape == (N, 20, 2)
    assert memory.nbytes == sum(x.nbytes for x in jax.tree.leaves(buffer))
    # Per row: action 4, tag 4, image 12, reward 4, three flags, memo 4 x 2 + 2 x 1.
    assert memory.nbytes == 60 * (4 + 4 + 12 + 4 + 3 + 8 + 2)


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
def test_if_windows_share_a_row_the_last_memo_stays(capacity, length):
    rng = np.random.default_rng(0)
    for _ in range(20):
        env, start = rng.integers(2, size=6), rng.integers(100, size=6)
        index = places(start, length, capacity, np)
        window = Window((), None, jnp.asarray(env), jnp.asarray(index))
        found = is_last_copy(window, capacity)
        last = {}
        for time, i in np.ndindex(length, 6):
            last[env[i], index[1 + time, i]] = time, i
        wanted = np.zeros((length, 6), bool)
        wanted[tuple(np.transpose(list(last.values())))] = True
        np.testing.assert_array_equal(found, wanted)


def test_few_memos_take_little_memory():
    step, _ = rows(0)
    memo = (jnp.zeros((N, 4)), jnp.zeros((N, 2), jnp.uint8))
    memory = replay(ReplayConfig(66, 2, 4, context_every=4), step, memo)
    # 22 rows for each of 3 environments, in fours 20: of 27 bytes, and 5 memos of 4 x 4 + 2.
    assert memory.nbytes == 3 * (20 * (4 + 4 + 12 + 4 + 3) + 5 * (16 + 2))


@pytest.mark.parametrize("memos", [True, False])
def test_the_newest_rows_are_the_last_ones_in_order_with_their_memos(memos):
    config = ReplayConfig(N * (LENGTH + 1), N, LENGTH, train_ratio=1.0)
    memory = replay(config, *jax.eval_shape(lambda: given(0, memos)), data="newest")
    memory, fill = compiled(memory, memos)
    buffer, cursor = memory.init()
    assert memory.warmup == 2 and buffer.rows.reward.shape == (N, LENGTH + 1)
    history = []
    for time in range(14):
        history.append(jax.device_get(rows(time)))
        buffer, cursor = fill(buffer, cursor, time, time + 1)
        if time < LENGTH:
            continue
        window, cursor = memory.sample(buffer, cursor, jax.random.key(time))
        newest = jax.tree.map(lambda *x: np.stack(x), *history[-LENGTH - 1 :])
        same(window.steps, close_abandoned(newest[0]))
        same(window.memo, newest[1] if memos else ())
        np.testing.assert_array_equal(window.env, np.arange(N))
        wanted = np.arange(time - LENGTH, time + 1) % (LENGTH + 1)
        np.testing.assert_array_equal(window.index, np.tile(wanted[:, None], N))
        assert memory.write_back(buffer, window, None) is buffer
    # A larger capacity stays unused.
    assert replay(ReplayConfig(99, N, LENGTH, 1.0), *rows(0), data="newest").nbytes < 99 * 60


def test_a_replay_that_does_not_fit_is_refused():
    with pytest.raises(JaxwmError, match=r"gives each of 3 environments 4, fewer than the 5 rows"):
        replay(ReplayConfig(14, 2, 4), *rows(0))
    with pytest.raises(
        JaxwmError, match=r"batch_size is 2, but .* Set batch_size to 3, the number"
    ):
        replay(ReplayConfig(15, 2, 4, train_ratio=1.0), *rows(0), data="newest")
    with pytest.raises(JaxwmError, match=r"The dream needs 1048576.0 GiB and the device \("):
        check_fits(2**50, "The dream")
    check_fits(2**20)

"""When a run learns: exact accounts of whole numbers, and settings that are refused."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.replay.config import ReplayConfig, Rhythm
from jaxwm.types import JaxwmError


def test_updates_per_iteration_are_an_exact_fraction():
    # 16 environments earn 16 * 0.3 = 4.8 rows; an update takes 16 * 64 = 1024.
    config = ReplayConfig(train_ratio=0.3)
    assert config.updates_per_iteration(16).as_integer_ratio() == (3, 640)
    assert ReplayConfig(train_ratio=1024.0).updates_per_iteration(1) == 1
    assert ReplayConfig(train_ratio=0).updates_per_iteration(1) == 0
    for ratio in (4e-4, -1.0, 2e6, math.nan):
        with pytest.raises(JaxwmError, match=r"train_ratio is .* at (least 0\.001|most 1e6)"):
            ReplayConfig(train_ratio=ratio)


def played(rhythm: Rhythm, iterations: int) -> list[int]:
    """The updates due after each iteration, with Python's numbers."""
    made, credit = [], 0
    for written in range(1, iterations + 1):
        due, credit = rhythm.due(written, credit)
        made.append(due)
    return made


def by_hand(config: ReplayConfig, envs: int, warmup: int, iterations: int) -> list[int]:
    """The same from fractions: updates made in all are those earned in all, block by block."""
    each = config.updates_per_iteration(envs)
    begins = max(warmup, math.ceil(config.prefill / envs))
    every = max(1, math.ceil(config.train_every / envs))
    made, earned, done = [], Fraction(0), 0
    for written in range(1, iterations + 1):
        now = 0
        if written >= begins:
            earned += each
            if (written - begins) % every == 0:
                now = math.floor(earned) - done
                done += now
            if written == begins and each:
                now += config.pretrain
        made.append(now)
    return made


CASES = [
    {},
    {"train_ratio": 0.3},
    {"train_ratio": 7.0},
    {"train_ratio": 0.0, "pretrain": 5},
    {"prefill": 41},
    {"prefill": 40, "pretrain": 100},
    {"prefill": 10, "train_every": 22, "train_ratio": 1.7},
    {"train_every": 3, "pretrain": 1, "train_ratio": 50.0},
]


@pytest.mark.parametrize("changes", CASES)
def test_updates_are_due_as_counted_by_hand(changes):
    config = ReplayConfig(100, 2, 6, **{"train_ratio": 1.5, **changes})
    rhythm = config.rhythm(4, warmup=9)
    made = played(rhythm, 200)
    assert made == by_hand(config, 4, 9, 200)
    assert max(made) - rhythm.pretrain <= rhythm.most
    first = next((i + 1 for i, due in enumerate(made) if due), None)
    assert rhythm.first_update == first
    assert rhythm.random == math.ceil(config.prefill / 4)

    def step(credit, written):
        due, credit = rhythm.due(written, credit)
        return credit, due

    traced = jax.jit(lambda: jax.lax.scan(step, jnp.int32(0), jnp.arange(1, 201)))
    credit, due = traced()
    assert due.dtype == credit.dtype == jnp.int32
    np.testing.assert_array_equal(due, made)


def test_a_block_is_as_large_as_it_can_be():
    # 4 environments of ratio 3 earn one update of 12 rows an iteration.
    rhythm = ReplayConfig(100, 2, 6, 3.0, train_every=40, pretrain=7).rhythm(4, 9)
    assert rhythm == Rhythm(0, 9, 10, 7, 1, 1)
    assert [x for x in played(rhythm, 40) if x] == [8, 10, 10, 10] and rhythm.most == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_every": 3}, "context_every is 3, which does not divide its batch_length of 4"),
        ({"context_every": 0}, "context_every is 0; it must be positive"),
        ({"batch_length": 1}, "must be at least 2, for in a window of one row"),
        ({"prefill": -1}, "prefill is -1; it must be at least 0"),
        ({"train_every": -5}, "train_every is -5; it must be at least 0"),
        ({"pretrain": -2}, "pretrain is -2; it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(JaxwmError, match=words):
        dataclasses.replace(ReplayConfig(66, 2, 4), **changes)


def test_accounts_beyond_32_bits_are_refused():
    config = ReplayConfig(train_ratio=999.999, train_every=2**31 - 1)
    with pytest.raises(JaxwmError, match="its train_every 2147483647; with 16 environments the up"):
        config.rhythm(16, 65)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 4}, r"batch_size is 4, but .* 11 rows of all 8 .* Set batch_size to 8"),
        ({"train_ratio": 2.0}, "train_ratio is 2.0, .* Set train_ratio to 1, as each row is"),
        ({"context_every": 2}, "context_every is 2, .* Set context_every to 1"),
        ({"prefill": 8}, "prefill is 8, .* Set prefill to 0"),
        ({"pretrain": 1}, "pretrain is 1, .* Set pretrain to 0"),
        ({"train_every": 9}, "train_every is 9, .* Set train_every to 0"),
        ({"capacity": 87}, r"capacity is 87, .* Set capacity to 88\."),
    ],
)
def test_settings_that_do_not_fit_the_newest_rows_are_refused(changes, words):
    fitting = ReplayConfig(88, 8, 10, train_ratio=1.0)
    fitting.check_newest(8)
    with pytest.raises(JaxwmError, match=words):
        dataclasses.replace(fitting, **changes).check_newest(8)


def test_the_newest_rows_are_trained_on_once():
    # The first 11 rows are there after iteration 11; row 11 is the next window's context.
    made = played(ReplayConfig(88, 8, 10, train_ratio=1.0).rhythm(8, warmup=2), 60)
    assert [i + 1 for i, due in enumerate(made) if due] == [11, 21, 31, 41, 51]
    assert set(made) == {0, 1}

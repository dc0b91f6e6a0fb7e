import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import returns
from jaxwm.types import JaxwmError

LAMBDA_RETURN = jax.jit(returns.lambda_return, static_argnames="lambda_")
REPLAY_RETURN = jax.jit(returns.replay_lambda_return, static_argnames=("discount", "lambda_"))


def _loop(reward, discount, value, lambda_):
    """The definition, one step at a time; float64 for numpy inputs."""
    result, following = [], value[-1]
    for r, d, v in zip(reward[::-1], discount[::-1], value[::-1], strict=True):
        following = r + d * ((1 - lambda_) * v + lambda_ * following)
        result.append(following)
    return result[::-1]


def _random(length: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=length), rng.uniform(0, 1, length), 10 * rng.normal(size=length)


def _device(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_lambda_return_worked_by_hand():
    reward, discount, value = _device([1, 2, 3], [0.5, 0.5, 0.5], [10, 20, 30])
    # G_2 = 3 + 0.5 * 30 = 18
    # G_1 = 2 + 0.5 * (0.5 * 20 + 0.5 * 18) = 11.5
    # G_0 = 1 + 0.5 * (0.5 * 10 + 0.5 * 11.5) = 6.375
    got = LAMBDA_RETURN(reward, discount, value, lambda_=0.5)
    np.testing.assert_allclose(got, [6.375, 11.5, 18], rtol=1e-6)


def test_lambda_zero_looks_one_step_ahead_and_one_to_the_end():
    reward, discount, value = _device([1, 2, 3], [0.5, 0.5, 0.5], [10, 20, 30])
    one_step = LAMBDA_RETURN(reward, discount, value, lambda_=0.0)
    np.testing.assert_allclose(one_step, [6, 12, 18], rtol=1e-6)
    # 1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 30)) = 6.5
    to_the_end = LAMBDA_RETURN(reward, discount, value, lambda_=1.0)
    np.testing.assert_allclose(to_the_end, [6.5, 11, 18], rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 15, 64])
def test_lambda_return_equals_a_loop(length):
    data = _random(length)
    got = LAMBDA_RETURN(*_device(*data))
    np.testing.assert_allclose(got, _loop(*data, 0.95), rtol=1e-6, atol=1e-5)


def test_nothing_behind_a_terminal_state_matters():
    reward, discount, value = _device(*_random(6))
    discount = discount.at[2].set(0.0)
    first_three = jax.jit(jax.grad(lambda *x: returns.lambda_return(*x)[:3].sum(), (0, 1, 2)))
    gradients = first_three(reward, discount, value)
    np.testing.assert_array_equal(gradients[0][3:], 0.0)
    np.testing.assert_array_equal(gradients[1][3:], 0.0)
    np.testing.assert_array_equal(gradients[2][2:], 0.0)
    assert np.all(np.asarray(gradients[0][:3]) > 0)


def test_gradients_are_those_of_the_definition():
    data = _device(*_random(5))
    weights = jnp.arange(1.0, 6.0)

    def looped(*data):
        return weights @ jnp.stack(_loop(*data, 0.95))

    def ours(*data):
        return weights @ returns.lambda_return(*data)

    slopes, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*data) for f in (ours, looped))
    for got, want in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_vmap_equals_a_loop_over_trajectories():
    keys = jax.random.split(jax.random.key(0), 3)
    reward, discount, value = (jax.random.uniform(key, (7, 3)) for key in keys)
    mapped = jax.jit(jax.vmap(returns.lambda_return, in_axes=1, out_axes=1))
    batched = mapped(reward, discount, value)
    assert batched.shape == (7, 3)
    for i in range(3):
        alone = LAMBDA_RETURN(reward[:, i], discount[:, i], value[:, i])
        np.testing.assert_allclose(batched[:, i], alone, rtol=1e-6)


def test_replay_return_worked_by_hand():
    reward, bootstrap = _device([7, 1, 2, 3], [9, 10, 20, 30])
    no = jnp.zeros(4, bool)
    # One episode throughout: the imagined form on rows 1..3.
    # G_2 = 18, G_1 = 11.5, G_0 = 6.375 as above; the reward of row 0 is never used.
    got = REPLAY_RETURN(reward, no, no, bootstrap, discount=0.5, lambda_=0.5)
    np.testing.assert_allclose(got, [6.375, 11.5, 18], rtol=1e-6)
    # Row 2 ends an episode cut short: G_1 = 2 + 0.5 * 20 = 12, G_0 = 1 + 0.5 * (5 + 6) = 6.5.
    cut = no.at[2].set(True)
    got = REPLAY_RETURN(reward, cut, no, bootstrap, discount=0.5, lambda_=0.5)
    np.testing.assert_allclose(got, [6.5, 12, 18], rtol=1e-6)
    # Row 2 is terminal: G_1 = 2, G_0 = 1 + 0.5 * (5 + 1) = 4.
    got = REPLAY_RETURN(reward, cut, cut, bootstrap, discount=0.5, lambda_=0.5)
    np.testing.assert_allclose(got, [4, 2, 18], rtol=1e-6)


def test_replay_return_without_ends_is_the_lambda_return():
    reward, _, bootstrap = _device(*_random(10))
    no = jnp.zeros(10, bool)
    discount = jnp.full((9,), 1 - 1 / 333)
    np.testing.assert_allclose(
        REPLAY_RETURN(reward, no, no, bootstrap),
        LAMBDA_RETURN(reward[1:], discount, bootstrap[1:]),
        rtol=1e-5,
    )


def test_replay_return_does_not_look_into_the_next_episode():
    reward, _, bootstrap = _device(*_random(8))
    last = jnp.zeros(8, bool).at[3].set(True)

    def before_the_end(reward, bootstrap):
        return returns.replay_lambda_return(reward, last, jnp.zeros(8, bool), bootstrap)[:3].sum()

    by_reward, by_bootstrap = jax.jit(jax.grad(before_the_end, (0, 1)))(reward, bootstrap)
    np.testing.assert_array_equal(by_reward[4:], 0.0)
    np.testing.assert_array_equal(by_bootstrap[4:], 0.0)
    assert by_bootstrap[3] > 0


ADVANTAGE = jax.jit(
    returns.generalized_advantage, static_argnames=("discount", "lambda_", "truncation")
)


def _rows(*ends: int, length: int, terminal: tuple[int, ...] = ()):
    """Flags of rows: episodes end at `ends`, for good at `terminal`; the first row begins one."""
    first, last, over = np.zeros((3, length), bool)
    last[list(ends)], over[list(terminal)] = True, True
    first[[0, *(end + 1 for end in ends if end + 1 < length)]] = True
    return jnp.asarray(first), jnp.asarray(last), jnp.asarray(over)


def test_advantage_worked_by_hand():
    reward, value = _device([7, 1, 2, 3], [10, 20, 30, 40])
    halves = {"discount": 0.5, "lambda_": 0.5}
    # One episode throughout: errors 1 + 20/2 - 10 = 1, 2 + 30/2 - 20 = -3, 3 + 40/2 - 30 = -7.
    # A_2 = -7, A_1 = -3 - 7/4 = -4.75, A_0 = 1 - 4.75/4 = -0.1875. The reward of row 0 is not used.
    got, weight = ADVANTAGE(reward, *_rows(length=4), value, **halves)
    np.testing.assert_allclose(got, [-0.1875, -4.75, -7], rtol=1e-6)
    np.testing.assert_array_equal(weight, 1.0)
    # The episode is cut at row 1: A_0 = 1, with the value of row 1 for what nobody saw. From row 1
    # to row 2 nobody chose anything.
    cut, over = _rows(1, length=4), _rows(1, length=4, terminal=(1,))
    got, weight = ADVANTAGE(reward, *cut, value, **halves)
    np.testing.assert_allclose(got, [1, 0, -7], rtol=1e-6)
    np.testing.assert_array_equal(weight, [1, 0, 1])
    # It ends for good at row 1: A_0 = 1 - 10.
    got, weight = ADVANTAGE(reward, *over, value, **halves)
    np.testing.assert_allclose(got, [-9, 0, -7], rtol=1e-6)
    np.testing.assert_array_equal(weight, [1, 0, 1])
    # A cut that counts as an end.
    got, _ = ADVANTAGE(reward, *cut, value, **halves, truncation="terminal")
    np.testing.assert_allclose(got, [-9, 0, -7], rtol=1e-6)


def test_advantage_at_both_ends_of_lambda():
    reward, value = _device([7, 1, 2, 3], [10, 20, 30, 40])
    flags = _rows(length=4)
    got, _ = ADVANTAGE(reward, *flags, value, discount=0.5, lambda_=0.0)
    np.testing.assert_allclose(got, [1, -3, -7], rtol=1e-6)
    # 1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 40)) - 10 = -2.25
    got, _ = ADVANTAGE(reward, *flags, value, discount=0.5, lambda_=1.0)
    np.testing.assert_allclose(got, [-2.25, -6.5, -7], rtol=1e-6)


@pytest.mark.parametrize("truncation", ["bootstrap", "terminal"])
def test_advantage_equals_a_loop(truncation):
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=30), 10 * rng.normal(size=30)
    # Two episodes follow each other at once, and the last row of all ends one.
    first, last, over = _rows(4, 5, 12, 20, 29, length=30, terminal=(5, 20))
    want, later = np.zeros(29), 0.0
    for t in reversed(range(29)):
        dead = over[t + 1] if truncation == "bootstrap" else last[t + 1]
        error = reward[t + 1] + 0.9 * (not dead) * value[t + 1] - value[t]
        later = 0.0 if last[t] else error + 0.9 * 0.8 * (not last[t + 1]) * later
        want[t] = later
    rows = _device(reward)[0], first, last, over, _device(value)[0]
    got, weight = ADVANTAGE(*rows, discount=0.9, lambda_=0.8, truncation=truncation)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weight, ~np.asarray(last[:-1]))


def test_advantages_stay_within_their_episode():
    reward, _, value = _device(*_random(8))
    flags = _rows(3, length=8)

    def before_the_end(reward, value):
        return returns.generalized_advantage(reward, *flags, value)[0][:3].sum()

    def behind_it(reward, value):
        return returns.generalized_advantage(reward, *flags, value)[0][3:].sum()

    by_reward, by_value = jax.jit(jax.grad(before_the_end, (0, 1)))(reward, value)
    np.testing.assert_array_equal(by_reward[4:], 0.0)
    np.testing.assert_array_equal(by_value[4:], 0.0)
    assert by_value[3] > 0
    # The reward of the first row of an episode, which led to nothing, is never used.
    by_reward, by_value = jax.jit(jax.grad(behind_it, (0, 1)))(reward, value)
    np.testing.assert_array_equal(by_reward[:5], 0.0)
    np.testing.assert_array_equal(by_value[:4], 0.0)


def test_an_abandoned_episode_counts_as_one_cut_short():
    reward, _, value = _device(*_random(8))
    first, last, over = _rows(3, length=8)
    told = ADVANTAGE(reward, first, last, over, value)
    untold = ADVANTAGE(reward, first, jnp.zeros_like(last), over, value)
    jax.tree.map(np.testing.assert_array_equal, told, untold)


def test_advantage_and_lambda_return_agree():
    reward, _, value = _device(*_random(10))
    got, _ = ADVANTAGE(reward, *_rows(length=10), value, discount=0.9, lambda_=0.8)
    discount = jnp.full((9,), 0.9)
    want = LAMBDA_RETURN(reward[1:], discount, value[1:], lambda_=0.8) - value[:-1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_errors_name_the_shapes_and_the_way_out():
    # Below the shape checks of the test run, which users do not have.
    plain = inspect.unwrap(returns.lambda_return)
    batch = jnp.zeros((3, 2))
    with pytest.raises(JaxwmError, match=r"reward_t \(3, 2\).*1-D.*jax.vmap"):
        plain(batch, batch, batch)
    with pytest.raises(JaxwmError, match=r"value_t \(4,\).*one length"):
        plain(jnp.zeros(3), jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(JaxwmError, match="at least 1"):
        returns.lambda_return(jnp.zeros(0), jnp.zeros(0), jnp.zeros(0))
    one = jnp.zeros(1, bool)
    with pytest.raises(JaxwmError, match=r"replay_lambda_return.*at least 2"):
        returns.replay_lambda_return(jnp.zeros(1), one, one, jnp.zeros(1))
    with pytest.raises(JaxwmError, match=r"generalized_advantage.*at least 2"):
        returns.generalized_advantage(jnp.zeros(1), one, one, one, jnp.zeros(1))

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.behaviors import explore


def test_normal_noise_is_clipped():
    action, noise = jnp.asarray([0.5, -0.9, 0.0]), jnp.asarray([1.0, -1.0, 2.0])
    np.testing.assert_allclose(explore.add_normal(action, noise, 0.4), [0.9, -1, 0.8], rtol=1e-6)


def test_epsilon_greedy_replaces_choices_below_epsilon():
    action, other = jnp.eye(3)[jnp.asarray([0, 1])], jnp.asarray([[0.0, 2.0, 1.0]] * 2)
    got = explore.epsilon_greedy(action, jnp.asarray([0.39, 0.4]), other, 0.4)
    np.testing.assert_array_equal(got, jnp.eye(3)[jnp.asarray([1, 1])])
    kept = explore.epsilon_greedy(action[:1], jnp.asarray([0.4]), other[:1], 0.4)
    np.testing.assert_array_equal(kept, action[:1])


def test_both_kinds_of_random_choices_have_the_same_odds():
    # 0.3 / 3 of every class, and the rest of the one that was chosen.
    count = 20_000
    key_1, key_2, key_3 = jax.random.split(jax.random.key(0), 3)
    action = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0]), (count, 3))
    gumbel = jax.random.gumbel(key_1, (count, 3))
    mixed = explore.mix_uniform(action, gumbel, 0.3)
    other = jax.random.gumbel(key_2, (count, 3))
    greedy = explore.epsilon_greedy(action, jax.random.uniform(key_3, (count,)), other, 0.3)
    for got in (mixed, greedy):
        np.testing.assert_array_equal(got.sum(-1), 1)
        allowed = 5 * 0.5 / np.sqrt(count)
        np.testing.assert_allclose(got.mean(0), [0.1, 0.8, 0.1], atol=allowed)


def test_classes_that_do_not_exist_are_never_chosen():
    action = jnp.asarray([[1.0, 0.0, 0.0]])
    gumbel = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    np.testing.assert_array_equal(explore.mix_uniform(action, gumbel, 1.0), [[0, 1, 0]])
    np.testing.assert_array_equal(
        explore.epsilon_greedy(action, jnp.zeros(1), gumbel, 1.0), [[0, 1, 0]]
    )

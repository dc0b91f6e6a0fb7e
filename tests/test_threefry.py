"""Draws beside those of `jax.random`, and the generator beside its published answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import threefry

DRAWS = ("uniform", "gumbel", "normal")


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_rounds_give_the_answers_of_their_authors(key, counter, answer):
    words = threefry._rounds(jnp.array(key, jnp.uint32), *map(jnp.uint32, counter))
    assert tuple(map(int, words)) == answer


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", [(), (3, 4, 5), (5000,), (700, 6), (15, 60, 6), (9, 10, 8, 7)])
def test_draws_are_those_of_jax(name, shape):
    ours, theirs = getattr(threefry, name), getattr(jax.random, name)
    for seed in (0, 7, 2**32 - 1):
        np.testing.assert_array_equal(
            ours(jax.random.key(seed), shape), theirs(jax.random.key(seed), shape)
        )
    keys = lambda: jax.random.split(jax.random.key(1), 3)  # noqa: E731
    mapped = jax.jit(jax.vmap(lambda key: ours(key, shape)))(keys())
    expected = jax.jit(jax.vmap(lambda key: theirs(key, shape)))(keys())
    np.testing.assert_array_equal(mapped, expected)


@pytest.mark.parametrize("name", DRAWS)
def test_keys_of_other_generators_draw_as_in_jax(name):
    ours, theirs = getattr(threefry, name), getattr(jax.random, name)
    key = lambda: jax.random.key(0, impl="rbg")  # noqa: E731
    np.testing.assert_array_equal(ours(key(), (5, 300, 6)), theirs(key(), (5, 300, 6)))

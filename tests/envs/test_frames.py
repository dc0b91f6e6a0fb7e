"""Wrappers of images, on an environment whose pictures are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_wrappers import run

from jaxwm.envs import validate
from jaxwm.envs.frames import CELL, COLORS, draw_grid, grayscale, one_hot_grid, resize, stack
from jaxwm.types import Box, Discrete, Env, JaxwmError, first, transition

BLANK = np.zeros((3, 2), int)


def film(shape=(8, 4, 3)) -> Env:
    """Frame t is t everywhere, but for the first row of pixels, which is 10 t."""
    space, actions = {"image": Box(shape, "uint8", 0.0, 255.0)}, Discrete(2)

    def look(count):
        rows = jnp.where(jnp.arange(shape[0]) == 0, 10 * count, count)
        image = jnp.broadcast_to(rows[:, None, None], shape)
        return {"image": image.astype(jnp.uint8)}

    def reset(key):
        count = jnp.ones((), jnp.int32)
        return count, first(actions, look(count))

    def step(count, action, key):
        return count + 1, transition(action, look(count + 1), 0.0, False)

    return Env("film", space, actions, reset, step)


def frames(env: Env, steps: int = 3) -> np.ndarray:
    validate(env)
    _, rows = run(env, np.zeros(steps, int))
    assert rows.obs["image"].shape[1:] == env.obs_space["image"].shape
    return rows.obs["image"]


def test_stack_shows_the_newest_last_and_repeats_the_first():
    seen = frames(stack(film(), 3))
    np.testing.assert_array_equal(seen[:, 5, 0, ::3], [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4]])


def test_resize_averages_where_it_shrinks():
    seen = frames(resize(film(), 4, 2))
    # An antialiased half-size row weighs four rows 1/8, 3/8, 3/8, 1/8; at the border the first of
    # them is missing: (3 * 10 + 3 * 1 + 1 * 1) / 7 = 4.86 of the first frame.
    np.testing.assert_array_equal(seen[0, :, 0, 0], [5, 1, 1, 1])
    np.testing.assert_array_equal(frames(resize(film(), 8, 4)), frames(film()))
    assert frames(resize(film(), 16)).shape[1:] == (16, 16, 3)


def test_gray_is_the_weighted_sum_of_colours():
    def tinted(image):
        return (image * jnp.array([[[1, 10, 20]]])).astype(jnp.uint8)

    env = film()
    inner = env.reset

    def reset(key):
        state, row = inner(key)
        return state, row._replace(obs={"image": tinted(row.obs["image"])})

    seen = frames(grayscale(env._replace(reset=reset)))
    # 0.299 * 1 + 0.587 * 10 + 0.114 * 20 = 8.449
    assert seen[0, 5, 0, 0] == 8
    np.testing.assert_array_equal(seen[1:], frames(film())[1:, ..., :1])


def test_orders_agree_but_for_rounding():
    one, other = grayscale(resize(film(), 4, 2)), resize(grayscale(film()), 4, 2)
    np.testing.assert_allclose(frames(one).astype(int), frames(other).astype(int), atol=1)
    seen = frames(stack(grayscale(resize(film(), 4, 2)), 4))
    assert seen.shape == (4, 4, 2, 4)
    with pytest.raises(JaxwmError, match=r"images of 6 channels .* Stack frames after that"):
        grayscale(stack(film(), 2))


def grid(space, value) -> Env:
    row = first(Discrete(2), {"grid": jnp.asarray(value)})
    after = transition(jnp.zeros((), jnp.int32), row.obs, 0.0, False)
    return Env(
        "grid",
        {"grid": space},
        Discrete(2),
        lambda key: (jnp.zeros(()), row),
        lambda state, action, key: (state, after._replace(action=action)),
    )


def test_grids_of_classes_become_one_hot():
    env = one_hot_grid(grid(Discrete(4, (3, 2)), BLANK.astype(np.int32) + 2), "grid")
    _, row = jax.jit(env.reset)(jax.random.key(0))
    validate(env)
    np.testing.assert_array_equal(row.obs["grid"], np.tile([0, 0, 1, 0], (3, 2, 1)))
    with pytest.raises(JaxwmError, match=r"observes 'image' as Box.* a grid of classes"):
        one_hot_grid(film(), "image")


def test_grids_are_drawn():
    cells = np.zeros((3, 2, 4), np.float32)
    cells[1, 1, 2] = 1
    env = draw_grid(grid(Box((3, 2, 4)), cells), "grid")
    validate(env)
    _, row = jax.jit(env.reset)(jax.random.key(0))
    assert list(env.obs_space) == ["image"]
    np.testing.assert_array_equal(row.obs["image"][CELL, CELL], COLORS[2])
    with pytest.raises(JaxwmError, match="cannot be drawn as an image"):
        draw_grid(film(), "image")


def test_errors_name_the_images_there_are():
    with pytest.raises(JaxwmError, match=r"no image called 'view'; its images are \['image'\]"):
        resize(film(), 8, name="view")
    with pytest.raises(JaxwmError, match="resized to 0x8"):
        resize(film(), 0, 8)
    with pytest.raises(JaxwmError, match="At least one frame"):
        stack(film(), 0)

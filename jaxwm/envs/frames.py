"""Wrappers of image observations: pure functions from a single environment to another.

They are applied from the inside out, the cheapest first: `stack(grayscale(resize(env, 64)), 4)`.
Images stay uint8 of (height, width, channels), as the replay keeps them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from jaxwm.envs.wrappers import map_observation
from jaxwm.types import Box, Discrete, Env, JaxwmError, is_image

CELL = 8  # pixels per side of a drawn cell: 10 cells give 80, which halves four times to 5
COLORS = np.array(
    [
        [80, 200, 255],
        [255, 220, 60],
        [150, 130, 60],
        [235, 85, 85],
        [120, 230, 120],
        [200, 120, 255],
        [255, 150, 60],
        [240, 240, 240],
        [60, 160, 140],
        [255, 130, 190],
    ],
    np.uint8,
)


class StackState(NamedTuple):
    """A state and the newest frames, the last of them the present one."""

    env: PyTree
    frames: UInt8[Array, "h w channels"]


def resize(env: Env, height: int, width: int | None = None, name: str = "image") -> Env:
    """Scales images, averaging where they shrink.

    Args:
      env: a single environment.
      height: new height in pixels.
      width: new width; `height` by default.
      name: the observation.

    Raises:
      JaxwmError: if there is no such image, or a size is below 1.
    """
    width = height if width is None else width
    if min(height, width) < 1:
        raise JaxwmError(f"Images cannot be resized to {height}x{width} pixels.")
    shape = (height, width, _image(env, name).shape[2])

    def scale(image):
        wide = jax.image.resize(image.astype(jnp.float32), shape, "linear")
        return jnp.round(wide).astype(jnp.uint8)

    return map_observation(env, name, Box(shape, "uint8", 0.0, 255.0), scale)


def grayscale(env: Env, name: str = "image") -> Env:
    """Colours to brightness: 0.299 red + 0.587 green + 0.114 blue, one channel.

    Raises:
      JaxwmError: if there is no such image, or it has not three channels.

    Source: ITU-R recommendation BT.601.
    """
    h, w, channels = _image(env, name).shape
    if channels != 3:
        raise JaxwmError(
            f"{env.name} observes images of {channels} channels as {name!r}; only red, green and "
            "blue can be made grey. Stack frames after that, not before."
        )
    weights = jnp.array([[[0.299, 0.587, 0.114]]])

    def gray(image):
        bright = jnp.sum(image.astype(jnp.float32) * weights, -1, keepdims=True)
        return jnp.round(bright).astype(jnp.uint8)

    return map_observation(env, name, Box((h, w, 1), "uint8", 0.0, 255.0), gray)


def stack(env: Env, count: int, name: str = "image") -> Env:
    """Shows the last `count` images at once, on the channels, the newest last.

    An episode starts with its first image repeated.

    Args:
      env: a single environment.
      count: images to show, at least 1.
      name: the observation.

    Raises:
      JaxwmError: if there is no such image, or `count` is below 1.
    """
    if count < 1:
        raise JaxwmError(f"At least one frame must be shown, but the count is {count}.")
    h, w, channels = _image(env, name).shape
    space = Box((h, w, count * channels), "uint8", 0.0, 255.0)

    def show(row, frames):
        return row._replace(obs=row.obs | {name: frames})

    def reset(key):
        state, row = env.reset(key)
        frames = jnp.tile(row.obs[name], (1, 1, count))
        return StackState(state, frames), show(row, frames)

    def step(state, action, key):
        inner, row = env.step(state.env, action, key)
        frames = jnp.concatenate([state.frames[..., channels:], row.obs[name]], -1)
        return StackState(inner, frames), show(row, frames)

    return env._replace(obs_space=env.obs_space | {name: space}, reset=reset, step=step)


def one_hot_grid(env: Env, name: str) -> Env:
    """A grid (h, w) of classes as a grid (h, w, classes) of zeros and ones.

    Raises:
      JaxwmError: if there is no such observation, or it is not a grid of classes.
    """
    space = env.obs_space.get(name)
    if not isinstance(space, Discrete) or len(space.shape) != 2:
        raise JaxwmError(
            f"{env.name} observes {name!r} as {space}, but a grid of classes is expected: "
            "Discrete of shape (height, width)."
        )
    grid = Box((*space.shape, space.width), "float32", 0.0, 1.0)
    return map_observation(env, name, grid, lambda cells: jax.nn.one_hot(cells, space.width))


def draw_grid(env: Env, name: str) -> Env:
    """Replaces a grid (h, w, channels) of zeros and ones by the picture "image" of it.

    Raises:
      JaxwmError: if there is no such observation, or it is not a grid of at most 10 channels.
    """
    space = env.obs_space.get(name)
    shape = getattr(space, "shape", ())
    if space is None or is_image(space) or len(shape) != 3 or shape[2] > len(COLORS):
        raise JaxwmError(
            f"{env.name} observes {name!r} as {space}, which cannot be drawn as an image: a Box "
            f"(height, width, channels) of numbers is expected, with at most {len(COLORS)} "
            "channels."
        )
    picture = Box((shape[0] * CELL, shape[1] * CELL, 3), "uint8", 0.0, 255.0)
    return map_observation(env, name, picture, draw, rename="image")


def draw(grid: Float[Array, "h w channels"]) -> UInt8[Array, "height width 3"]:
    """A grid of 0/1 channels as an image; where several are on, their colours mix.

    Args:
      grid: up to 10 channels of 0 or 1.

    Returns:
      An image with `CELL` pixels per cell, dark where no channel is on.
    """
    colors = jnp.asarray(COLORS[: grid.shape[-1]], jnp.float32)
    on = grid.sum(axis=-1, keepdims=True)
    image = jnp.where(
        on > 0, grid @ colors / jnp.maximum(on, 1.0), jnp.array([[[20.0, 20.0, 30.0]]])
    )
    return jnp.repeat(jnp.repeat(image.astype(jnp.uint8), CELL, axis=0), CELL, axis=1)


def _image(env: Env, name: str) -> Box:
    space = env.obs_space.get(name)
    if not (isinstance(space, Box) and is_image(space)):
        images = [key for key, part in env.obs_space.items() if is_image(part)]
        raise JaxwmError(
            f"{env.name} observes no image called {name!r}; its images are {images or 'none'}."
        )
    return space

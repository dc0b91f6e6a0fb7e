"""Toy environments whose optimal value is known: a few steps long, learnt in seconds.

Each asks one question of an agent. Under the best policy the expected reward of every step
depends on nothing but the number of the step, so one table holds all optima: `REWARDS`, its
sums `OPTIMUM`, and its discounted sums `optimal_value`. All episodes have a fixed length and
end by `is_terminal`, so no value lies beyond them. Most observe a "clock", the elapsed
fraction of the episode, without which the time left (and so the value) could not be known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt8

from jaxwm.envs.wrappers import normalize_action
from jaxwm.types import ActionSpace, Box, Discrete, Env, ObsSpace, first, nearest, transition

SIZE = 8  # cells per side of the pixel grids
CELL = 8  # pixels per side of a cell
CLOCK = Box((1,), "float32", 0.0, 1.0)

REWARDS: dict[str, tuple[float, ...]] = {
    "toy/Prediction": (1.0,) * 8,
    "toy/Discount": (0.0,) * 4 + (1.0,),
    "toy/Observe": (1.0,) * 4,
    "toy/Memory": (0.0,) * 3 + (1.0,),
    "toy/Credit": (0.0,) * 5 + (1.0,),
    "toy/Reach": (-0.75, -0.5, -0.25) + (0.0,) * 5,
    "toy/Pixels": (0.0,) * 6 + (1.0,),
    "toy/Dials": (5.0,) * 3,
    "toy/Mixed": (1.0,) * 4,
}
OPTIMUM: dict[str, float] = {name: sum(rewards) for name, rewards in REWARDS.items()}


def optimal_value(name: str, elapsed: int, discount: float) -> float:
    """The optimal value after `elapsed` steps of the optimal policy.

    `sum_i discount^i r_{elapsed + 1 + i}` over the optimal expected rewards `r_1, r_2, ...`.

    Args:
      name: "toy/..."; the environment with its default sizes.
      elapsed: steps since the start, 0 at the first row.
      discount: in [0, 1].

    Returns:
      The discounted sum, in units of reward; 0 at the end.
    """
    return sum(discount**i * reward for i, reward in enumerate(REWARDS[name][elapsed:]))


class ToyState(NamedTuple):
    """What one toy keeps, and the steps since its episode began."""

    inner: PyTree
    elapsed: Int[Array, ""]


def _image(cell: int) -> Box:
    return Box((SIZE * cell, SIZE * cell, 3), "uint8", 0.0, 255.0)


def _toy(
    name: str,
    length: int,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    start: Callable[..., Any],
    move: Callable[..., Any],
    show: Callable[..., Any],
) -> Env:
    """An environment of `length` steps.

    `start(key) -> inner`; `move(inner, action, elapsed, key) -> inner, reward` where `elapsed`
    counts the steps before this one; `show(inner, elapsed) -> obs`.
    """

    def look(inner, elapsed):
        obs = show(inner, elapsed)
        if "clock" in obs_space:
            obs["clock"] = (elapsed / length).astype(jnp.float32)[None]
        return obs

    def reset(key):
        inner, elapsed = start(key), jnp.zeros((), jnp.int32)
        return ToyState(inner, elapsed), first(action_space, look(inner, elapsed))

    def step(state, action, key):
        inner, reward = move(state.inner, action, state.elapsed, key)
        elapsed = state.elapsed + 1
        row = transition(action, look(inner, elapsed), reward, elapsed >= length)
        return ToyState(inner, elapsed), row

    return Env(name, obs_space, action_space, reset, step)


def _coin(key):
    return jax.random.bernoulli(key).astype(jnp.int32)


def prediction() -> Env:
    """Can it predict? Reward 1 in each of 8 steps, whatever the action.

    Optimum: 8, the only return there is; the value with n steps left is
    `(1 - discount^n) / (1 - discount)`.
    """
    return _toy(
        "toy/Prediction",
        8,
        {"clock": CLOCK},
        Discrete(2),
        start=lambda key: (),
        move=lambda inner, action, elapsed, key: (inner, 1.0),
        show=lambda inner, elapsed: {},
    )


def discount(delay: int = 5) -> Env:
    """Does it discount? Reward 1 at step `delay`, the last, whatever the action.

    Optimum: 1; the value with n steps left is `discount^(n - 1)`.

    Args:
      delay: length of the episode in steps.

    Returns:
      A single environment; its row of `REWARDS` holds for the default `delay`.
    """
    return _toy(
        "toy/Discount",
        delay,
        {"clock": CLOCK},
        Discrete(2),
        start=lambda key: (),
        move=lambda inner, action, elapsed, key: (inner, elapsed + 1 == delay),
        show=lambda inner, elapsed: {},
    )


def observe() -> Env:
    """Does it look? Each row shows a fair bit; naming it earns 1, for 4 steps.

    Optimum: 4, by repeating what is shown. Any policy that does not look earns 1/2 per step.
    """
    return _toy(
        "toy/Observe",
        4,
        {"bit": Discrete(2), "clock": CLOCK},
        Discrete(2),
        start=_coin,
        move=lambda bit, action, elapsed, key: (_coin(key), action == bit),
        show=lambda bit, elapsed: {"bit": bit},
    )


def memory(delay: int = 3) -> Env:
    """Does it remember? The first row shows a cue, named `delay` steps later for +1, else -1.

    "cue" is 1 or 2 on the first row, 0 in between, and 3 where the answer is asked for.
    Optimum: 1. The cue is fair, so a policy without memory earns 0.

    Args:
      delay: rows between the cue and the question, at least 1.

    Returns:
      A single environment of `delay + 1` steps.
    """

    def show(bit, elapsed):
        later = jnp.where(elapsed == delay, 3, 0)
        return {"cue": jnp.where(elapsed == 0, 1 + bit, later).astype(jnp.int32)}

    def move(bit, action, elapsed, key):
        return bit, jnp.where(elapsed == delay, jnp.where(action == bit, 1.0, -1.0), 0.0)

    obs_space: ObsSpace = {"cue": Discrete(4)}
    return _toy("toy/Memory", delay + 1, obs_space, Discrete(2), _coin, move, show)


def credit(length: int = 6) -> Env:
    """Does it assign credit? Action 1 at the first step earns 1 at the last; the rest is idle.

    Optimum: 1, by any policy whose first action is 1. The choice is never shown again, so a
    world model has to carry it.

    Args:
      length: steps of an episode, at least 2.

    Returns:
      A single environment.
    """

    def move(choice, action, elapsed, key):
        choice = jnp.where(elapsed == 0, action, choice).astype(jnp.int32)
        return choice, jnp.where(elapsed + 1 == length, choice, 0)

    return _toy(
        "toy/Credit",
        length,
        {"clock": CLOCK},
        Discrete(2),
        start=lambda key: jnp.zeros((), jnp.int32),
        move=move,
        show=lambda choice, elapsed: {},
    )


def reach() -> Env:
    """Can it steer? A point in the plane moves to a target at distance 1, for 8 steps.

    The action, cut to length 1, moves the point by a quarter of itself; the reward is minus the
    distance to the target afterwards. Optimum: the distance can shrink by 1/4 per step at most
    and the straight way does so, hence 3/4, 1/2, 1/4, 0, ..., a return of -1.5.
    """
    plane = Box((2,), "float32", -3.0, 3.0)

    def start(key):
        angle = jax.random.uniform(key, (), maxval=2.0 * jnp.pi)
        return jnp.zeros(2), jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    def move(inner, action, elapsed, key):
        position, target = inner
        square = jnp.square(action).sum()
        # The square root is kept away from 0, where its gradient is infinite.
        position = position + 0.25 * action / jnp.sqrt(jnp.maximum(square, 1.0))
        gap = jnp.square(position - target).sum()
        distance = jnp.where(gap > 0, jnp.sqrt(jnp.where(gap > 0, gap, 1.0)), 0.0)
        return (position, target), -distance

    return _toy(
        "toy/Reach",
        8,
        {"clock": CLOCK, "position": plane, "target": plane},
        Box((2,), "float32", -1.0, 1.0),
        start,
        move,
        show=lambda inner, elapsed: {"position": inner[0], "target": inner[1]},
    )


def pixels(cell: int = CELL) -> Env:
    """Can it see? A ball falls for 7 steps in a 64x64 picture; +1 for catching it, else -1.

    Actions: left, stay, right, one cell of 8 pixels each. Optimum: 1. The paddle starts in
    column 4 of 0..7 and has 7 moves, more than the 4 that the farthest column needs.

    Args:
      cell: pixels per side of a cell; the picture has 8 cells a side.
    """

    def start(key):
        return jax.random.randint(key, (), 0, SIZE), jnp.full((), SIZE // 2, jnp.int32)

    def move(inner, action, elapsed, key):
        ball, paddle = inner
        paddle = jnp.clip(paddle + action - 1, 0, SIZE - 1)
        caught = jnp.where(ball == paddle, 1.0, -1.0)
        return (ball, paddle), jnp.where(elapsed + 2 == SIZE, caught, 0.0)

    return _toy(
        "toy/Pixels",
        SIZE - 1,
        {"image": _image(cell)},
        Discrete(3),
        start,
        move,
        show=lambda inner, elapsed: {"image": _catch(elapsed, inner[0], inner[1], cell)},
    )


def _catch(
    row: Int[Array, ""], ball: Int[Array, ""], paddle: Int[Array, ""], size: int
) -> UInt8[Array, "h w 3"]:
    """The picture of a ball with a fading trail, above a paddle, under an evening sky."""
    y, x = np.mgrid[: SIZE * size, : SIZE * size].astype(np.float32)
    sky = y[..., None] / (SIZE * size) * np.array([70, 30, 60]) + np.array([15, 18, 50])
    middle = (size - 1) / 2

    def disc(cell, radius):
        distance = jnp.hypot(y - (cell * size + middle), x - (ball * size + middle))
        return jnp.clip(radius + 0.5 - distance, 0.0, 1.0)

    def paint(image, cover, color):
        return image + cover[..., None] * (jnp.array([[color]], jnp.float32) - image)

    image = jnp.asarray(sky, jnp.float32)
    for back, strength in ((2, 0.2), (1, 0.45)):
        image = paint(image, strength * disc(row - back, middle - back * size / 8), [255, 150, 60])
    board = (y >= (SIZE - 1) * size + size // 2) & (
        jnp.abs(x - (paddle * size + middle)) < size / 2
    )
    image = paint(image, board.astype(jnp.float32), [90, 220, 250])
    return paint(image, disc(row, middle), [255, 215, 120]).astype(jnp.uint8)


def dials() -> Env:
    """Can it do several things at once? A switch, three dials and a slider match shown targets.

    Each of the five earns at most 1: the switch and each dial if it is right, the slider, whose
    targets are its two ends, one minus half its distance. New targets each row, 3 steps.
    Optimum: 5 per step, 15 in all, by copying the targets.
    """
    space = {
        "dials": Discrete((2, 3, 4), (3,)),
        "slider": Box((1,), "float32", -1.0, 1.0),
        "switch": Discrete(3),
    }

    def draw(key):
        key_dials, key_slider, key_switch = jax.random.split(key, 3)
        return {
            "dials": jax.random.randint(key_dials, (3,), 0, jnp.array([2, 3, 4])),
            "slider": jax.random.rademacher(key_slider, (1,), jnp.float32),
            "switch": jax.random.randint(key_switch, (), 0, 3),
        }

    def move(target, action, elapsed, key):
        dials = (action["dials"] == target["dials"]).sum()
        slider = 1.0 - jnp.abs(action["slider"] - target["slider"]).sum() / 2
        return draw(key), dials + slider + (action["switch"] == target["switch"])

    return _toy("toy/Dials", 3, dict(space), space, draw, move, lambda target, elapsed: target)


def mixed(cell: int = CELL) -> Env:
    """Can it combine senses? A class says whether the picture or the vector tells the truth.

    "trust" 0 means the picture, whose bright half (left 0, right 1) is the bit to name; 1 means
    the vector, whose sign (negative 0, positive 1) is. Naming it earns 1, for 4 steps. Optimum:
    4. Without one of the three the best policy earns 3/4 per step.

    Args:
      cell: pixels per side of a cell; the picture has 8 cells a side.
    """

    def draw(key):
        bits = jax.random.bernoulli(key, shape=(3,)).astype(jnp.int32)
        return {"trust": bits[0], "picture": bits[1], "vector": bits[2]}

    def show(inner, elapsed):
        side = jnp.arange(SIZE * cell) * 2 // (SIZE * cell) == inner["picture"]
        image = jnp.where(side, 220, 30).astype(jnp.uint8)
        return {
            "image": jnp.broadcast_to(image[None, :, None], _image(cell).shape),
            "trust": inner["trust"],
            "vector": (2.0 * inner["vector"] - 1.0) * jnp.ones(2),
        }

    def move(inner, action, elapsed, key):
        truth = jnp.where(inner["trust"] == 0, inner["picture"], inner["vector"])
        return draw(key), action == truth

    obs_space = {
        "image": _image(cell),
        "trust": Discrete(2),
        "vector": Box((2,), "float32", -1.0, 1.0),
    }
    return _toy("toy/Mixed", 4, obs_space, Discrete(2), draw, move, show)


TOYS: dict[str, Callable[..., Env]] = {
    "Credit": credit,
    "Dials": dials,
    "Discount": discount,
    "Memory": memory,
    "Mixed": mixed,
    "Observe": observe,
    "Pixels": pixels,
    "Prediction": prediction,
    "Reach": reach,
}


def names() -> list[str]:
    """The toys."""
    return list(TOYS)


def make(name: str, **options: Any) -> Env:
    """A toy by name.

    Args:
      name: such as "Memory".
      options: arguments of its function, such as `delay=10`.

    Returns:
      A single environment with actions in [-1, 1].

    Raises:
      JaxwmError: if there is no such toy.
    """
    if name not in TOYS:
        raise nearest(name, TOYS, "toy environment")
    return normalize_action(TOYS[name](**options))

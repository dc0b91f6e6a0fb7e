"""Acting: the agent acts on the present rows, and the environments step.

`advance` does it for environments on the device, `rows_after` for simulators on the host. Training
and evaluation both use them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.types import (
    Action,
    ActionSpace,
    Agent,
    Array,
    Box,
    Env,
    Key,
    Params,
    PyTree,
    Space,
    Step,
    as_dict,
)


class Scene(NamedTuple):
    """Environments and the agent in them, at one moment.

    Attributes:
      env: the state of the environments.
      row: the present rows (B,).
      carry: the agent's memory (B,), which has not seen these rows.
    """

    env: Any
    row: Step
    carry: PyTree


def advance(
    act: Callable[[PyTree, Step, Key], tuple[PyTree, Action, PyTree]],
    env: Env,
    scene: Scene,
    key: Key,
) -> tuple[Scene, PyTree]:
    """Acts on the present rows and steps the environments.

    Args:
      act: `carry, row, key -> carry, action, memo`, an agent with its parameters.
      env: batched environments.
      scene: where they stand.
      key: determines actions and steps.

    Returns:
      The next scene, and the memo of the rows in `scene`.
    """
    key_act, key_env = jax.random.split(key)
    carry, action, memo = act(scene.carry, scene.row, key_act)
    state, row = env.step(scene.env, action, key_env)
    return Scene(state, row, carry), memo


def rows_after(
    act: Callable[[PyTree, Step, int], tuple[PyTree, Action, PyTree]],
    send: Callable[[Action], None],
    receive: Callable[[], Step],
    row: Step,
    carry: PyTree,
    meanwhile: Callable[[Step, PyTree], None] = lambda row, memo: None,
) -> Iterator[tuple[Step, PyTree]]:
    """The rows that follow `row` in simulators on the host, each with the carry before it.

    Args:
      act: `carry, row, time -> carry, action, memo`; time counts from 0.
      send: gives the simulators their actions, as `Pool.send`.
      receive: waits for their rows, as `Pool.receive`.
      row: the present rows (B,).
      carry: the agent's memory (B,).
      meanwhile: called with each row and its memo while the simulators step.
    """
    time = 0
    while True:
        carry, action, memo = act(carry, row, time)
        send(jax.device_get(action))
        meanwhile(row, memo)
        row, time = receive(), time + 1
        yield row, carry


def explorer(
    agent: Agent, action_space: ActionSpace, random: int = 0
) -> Callable[..., tuple[PyTree, Action, PyTree]]:
    """`params, carry, row (B,), key, iteration -> carry, action, memo`, as in training.

    Args:
      agent: the agent.
      action_space: its actions.
      random: the first iterations, which take random actions. Carry and memo are the agent's.
    """

    def act(
        params: Params, carry: PyTree, row: Step, key: Key, iteration: Array
    ) -> tuple[PyTree, Action, PyTree]:
        if not random:
            return agent.act(params, carry, row, key)
        key_act, key_random = jax.random.split(key)
        carry, action, memo = agent.act(params, carry, row, key_act)
        drawn = random_action(action_space, key_random, row.is_first.shape)
        action = jax.tree.map(lambda x, y: jnp.where(iteration < random, x, y), drawn, action)
        return carry, action, memo

    return act


def random_action(space: ActionSpace, key: Key, lead: tuple[int, ...] = ()) -> Action:
    """Uniform actions (*lead, ...): boxes in [-1, 1], discrete ones among the classes that exist.

    Args:
      space: one space or a dict of them.
      key: determines the actions.
      lead: leading axes.
    """
    parts = as_dict(space)
    keys = jax.random.split(key, len(parts))
    drawn = {name: _uniform(x, k, lead) for (name, x), k in zip(parts.items(), keys, strict=True)}
    return drawn if isinstance(space, dict) else drawn["action"]


def _uniform(space: Space, key: Key, lead: tuple[int, ...]) -> Array:
    shape = (*lead, *space.shape)
    if isinstance(space, Box):
        return jax.random.uniform(key, shape, space.dtype, minval=-1.0, maxval=1.0)
    classes = jnp.asarray(space.classes, jnp.int32)
    if classes.ndim:
        classes = jnp.broadcast_to(classes.reshape(space.shape), shape)
    return jax.random.randint(key, shape, 0, classes, space.dtype)

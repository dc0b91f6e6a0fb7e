"""Rows of experience, spaces, environments and world models: the nouns of the library.

One row (`Step`) holds everything about one moment: the action that led to it, what arrived,
and the flags. Nothing anywhere shifts actions in time. Over the end of an episode:

    row         t=7      t=8 (end)     t=9 (next episode)   t=10
    action      a_6      a_7           0                    a_9
    obs         o_7      o_8           o'_0                 o'_1
    reward      r_7      r_8           0                    r'_1
    is_first    False    False         True                 False
    is_last     False    True          False                False
    is_terminal False    True or not   False                False

`action` is the one that *led* to the row; `reward` was received on arriving. The row with
`is_last` is kept, so the final observation is never lost; the action chosen at it is ignored
and the next row of that environment starts a new episode (the NEXT_STEP convention of
Gymnasium). `is_terminal` is False when the episode was cut by a time limit: the future went
on, nobody looked.

Dimension letters: B batch or environments, T time, H horizon, N imagined trajectories,
D deterministic size, S stochastic groups, K classes, A action, F features, h w c image.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxwm.spaces import (
    ActionSpace,
    Box,
    Discrete,
    HostEnv,
    JaxwmError,
    ObsSpace,
    Simulator,
    Space,
    as_dict,
    is_image,
    nearest,
)

Key = PRNGKeyArray
Params = PyTree
Metrics = dict[str, Array]
Action = Array | dict[str, Array]


def zeros(space: Any, lead: tuple[int, ...] = ()) -> Any:
    """Zeros of a space, or of a dict of spaces, with leading axes `lead`."""
    if isinstance(space, Mapping):
        return {name: zeros(part, lead) for name, part in space.items()}
    return jnp.zeros((*lead, *space.shape), space.dtype)


class Step(NamedTuple):
    """One row of experience; leading axes (T, B) in a batch, (B,) from an environment."""

    action: Action
    obs: dict[str, Array]
    reward: Float[Array, "*lead"]
    is_first: Bool[Array, "*lead"]
    is_last: Bool[Array, "*lead"]
    is_terminal: Bool[Array, "*lead"]


def first(action_space: ActionSpace, obs: dict[str, Array]) -> Step:
    """The row that starts an episode: zero action, zero reward."""
    no = jnp.zeros((), bool)
    return Step(zeros(action_space), obs, jnp.zeros(()), ~no, no, no)


def transition(
    action: Action,
    obs: dict[str, Array],
    reward: Any,
    terminal: Any,
    cut: Any = False,
) -> Step:
    """The row reached by `action`; `terminal` ends the episode for good, `cut` at a limit."""
    terminal = jnp.asarray(terminal, bool)
    return Step(
        action=action,
        obs=obs,
        reward=jnp.asarray(reward, jnp.float32),
        is_first=jnp.zeros((), bool),
        is_last=terminal | jnp.asarray(cut, bool),
        is_terminal=terminal,
    )


class Env(NamedTuple):
    """Something to act in, as two pure functions.

    A single environment knows nothing of batches and never resets itself;
    `envs.wrappers.batch` makes the batched, self-resetting one (leading axis B) that the
    training loop steps. Agents act in [-1, 1]: a run scales that to the bounds of `Box` actions
    that have some (`envs.wrappers.normalize_action`).
    """

    name: str
    obs_space: ObsSpace
    action_space: ActionSpace
    reset: Callable[[Key], tuple[Any, Step]]
    step: Callable[[Any, Any, Key], tuple[Any, Step]]


class Latent(NamedTuple):
    """The state of a recurrent state-space model; leading axes (), (B,), (T, B) or (H+1, N)."""

    deter: Float[Array, "*lead D"]
    stoch: Float[Array, "*lead S K"]


class WorldModel(NamedTuple):
    """What is learned about the world, as pure functions of explicit parameters.

    Every random draw is an argument: `noise` gives what is drawn for some leading axes, all of it
    in one operation outside any scan.

    Attributes:
      init: `key -> params`.
      initial: `batch size -> carry`, the latent before anything was seen.
      noise: `key, lead -> noise` for the latents of shape `lead`.
      observe: `params, carry, steps (T, B), noise (T, B) -> latents (T, B), posterior logits`.
        Filters a real sequence; `is_first` rows forget the carry.
      imagine: `params, start (N,), policy, noise (H, N), policy noise (H, N) -> latents
        (H+1, N), actions (H, N), kept (H, N)` for a policy `features (N, F), noise -> action,
        kept`; row 0 is `start`, action i is drawn at latent i. The features are `products.rounded`.
      predict: `params, latents, keys=None -> {obs key | "reward" | "continue": distribution}`,
        of all or of `keys`.
      loss: `params, carry, steps, noise -> {name: loss (T, B)}, latents, metrics`.
      features: `latent -> (..., F)`, what heads read.
      split: `(..., F) -> latent`, the way back.
    """

    init: Callable[..., Params]
    initial: Callable[..., Latent]
    noise: Callable[..., Any]
    observe: Callable[..., Any]
    imagine: Callable[..., Any]
    predict: Callable[..., Any]
    loss: Callable[..., Any]
    features: Callable[[Latent], Array]
    split: Callable[[Array], Latent]


class Behavior(NamedTuple):
    """How to act with a world model, as pure functions.

    Attributes:
      init: `key -> params`.
      initial: `() -> state`, the running statistics it keeps.
      noise: `key, lead -> noise` for actions of shape `lead`.
      policy: `params, features (..., F) -> {action key: distribution}`.
      value: `params, features (..., F) -> distribution` of the return from there.
      act: `params, features (..., F), noise -> action`.
      loss: `params, slow, state, model params, latents (T, B), steps (T, B), noise (H, N), action
        noise (H, N) -> {name: loss (T, B)}, state, metrics`.
    """

    init: Callable[..., Params]
    initial: Callable[[], Any]
    noise: Callable[..., Any]
    policy: Callable[..., dict[str, Any]]
    value: Callable[..., Any]
    act: Callable[..., Action]
    loss: Callable[..., Any]


def _same(tree: Any) -> Any:
    return tree


class Shards(NamedTuple):
    """How the shards of a training meet: each acts and samples by itself, all learn the same.

    The defaults are those of a training that is not divided.

    Attributes:
      own: `key -> key`, a shard's own.
      mean: `tree -> tree`, the means over all shards; of tensors that devices hold a part of, a
        device's part.
      total: `tree -> tree`, the sums over all shards.
      all_gather: `array -> array`, those of all shards, with further leading axes.
      slice: `AgentState -> AgentState`, the part of what was learned that a device holds.
      gather_params: `parameters -> parameters`, whole, from the parts of all devices.
      gather_slow: the same for the slow critic.
      sum_parts: `numbers -> numbers`, one for each tensor of the parameters: from sums over the
        part that a device holds to sums over the whole tensor.
    """

    own: Callable[[Key], Key] = _same
    mean: Callable[[Any], Any] = _same
    total: Callable[[Any], Any] = _same
    all_gather: Callable[[Array], Array] = _same
    slice: Callable[[Any], Any] = _same
    gather_params: Callable[[Params], Params] = _same
    gather_slow: Callable[[Params], Params] = _same
    sum_parts: Callable[[Params], Params] = _same


ALONE = Shards()

__all__ = [
    "ALONE",
    "Action",
    "ActionSpace",
    "Array",
    "Behavior",
    "Bool",
    "Box",
    "Discrete",
    "Env",
    "Float",
    "HostEnv",
    "Int",
    "JaxwmError",
    "Key",
    "Latent",
    "Metrics",
    "ObsSpace",
    "Params",
    "PyTree",
    "Shards",
    "Simulator",
    "Space",
    "Step",
    "WorldModel",
    "as_dict",
    "first",
    "is_image",
    "nearest",
    "transition",
    "zeros",
]

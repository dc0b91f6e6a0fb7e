"""Rows of experience, environments, agents, world models and behaviours: the nouns of the library.

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
from typing import Any, Literal, NamedTuple

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


class Window(NamedTuple):
    """What the replay gives to `Agent.update`.

    Attributes:
      memo: what `Agent.act` left beside row 0 (B, ...); for `data="newest"` beside every row
        (T+1, B, ...).
      steps: rows (T+1, B). Row 0 is context, rows 1..T are trained.
      env: environment of each sequence.
      index: places of the rows in the rings.
    """

    memo: PyTree
    steps: Step
    env: Int[Array, " B"]
    index: Int[Array, "T1 B"]


class AgentState(NamedTuple):
    """What an agent has learned: one pytree.

    Attributes:
      params: all that acting needs.
      rest: optimiser, target networks, running statistics, counters.
    """

    params: Params
    rest: Any


# "explore" acts as in training, "sample" draws from the policy without added noise, "greedy" takes
# its mode.
Mode = Literal["explore", "sample", "greedy"]


class Agent(NamedTuple):
    """Something that acts and learns, as pure functions.

    Drivers, replay, checkpoints and evaluation know nothing else of an algorithm. Carry and memo
    are pytrees with a leading batch axis that only the agent looks inside.

    Attributes:
      init: `key -> AgentState`.
      initial: `batch size -> carry`, the memory at the start of an episode.
      act: `params, carry, row (B,), key, mode="explore" -> carry, action, memo (B,)`. The replay
        keeps the memo beside the row.
      update: `AgentState, Window, key -> AgentState, memo (T, B) | None, metrics`: fresh memos of
        rows 1..T, or None. Metrics are scalars; those named "loss/..." and "grad_norm..." must be
        finite, or the drivers refuse the update.
      data: what `update` learns from: sampled "windows" of the replay, or its "newest" rows.
      model: the world model, for pictures and evaluation; None if there is none.
      behavior: how the agent acts with its model; None if it has no such part.
    """

    init: Callable[[Key], AgentState]
    initial: Callable[[int], PyTree]
    act: Callable[..., tuple[PyTree, Action, PyTree]]
    update: Callable[..., tuple[AgentState, PyTree, Metrics]]
    data: Literal["windows", "newest"] = "windows"
    model: "WorldModel | None" = None
    behavior: "Behavior | None" = None


class Observed(NamedTuple):
    """A real sequence as a world model has filtered it.

    Attributes:
      carry: the memory after the last row (B, ...).
      latents: the latent of every row (T, B, ...).
      carries: the memory after every row (T, B, ...); None if the model does not give it.
    """

    carry: PyTree
    latents: PyTree
    carries: PyTree | None


class Start(NamedTuple):
    """Where dreams begin.

    Attributes:
      carry: the model's memory (N, ...).
      latent: the latents there (N, ...).
      index: the row of each, counted through the flattened (T * B) rows.
    """

    carry: PyTree
    latent: PyTree
    index: Int[Array, " N"]


class Imagined(NamedTuple):
    """A batch of dreams.

    Attributes:
      latents: where the actions were taken (H, N, ...); row 0 is the start.
      action: the actions (H, N, ...).
      last: the latents after the last action (N, ...).
    """

    latents: PyTree
    action: Any
    last: PyTree


class WorldModel(NamedTuple):
    """What is learned about the world, as pure functions of explicit parameters.

    Attributes:
      init: `key -> params`.
      initial: `batch size -> carry`, the memory before anything was seen.
      draws: `key, lead -> draws`, every random number for latents of shape `lead`, in one operation
        outside any scan.
      observe: `params, carry, steps (T, B), draws (T, B) -> Observed`. Filters a real sequence;
        `is_first` rows forget the carry.
      starts: `params, observed, key=None -> Start`, where dreams of that sequence begin.
      step: `params, carry (N,), action (N,), draws (N,) -> carry, latent`, one dreamed step.
        Discrete actions may be class indices, or one-hot vectors through which gradients flow.
      features: `latent -> (..., F)`, what heads and behaviours read: differentiable numbers.
      predict: `params, latents, keys=None -> {obs key | "reward" | "continue": distribution}` of
        `keys`, or of everything. A key that the model does not predict is absent.
      loss: `params, carry, steps (T, B), draws -> {name: losses}, Observed, metrics`.
      pack: `carry -> memo`, what the replay stores of it; `()` if nothing.
      unpack: `memo, batch size -> carry`; the initial carry if nothing was stored.
    """

    init: Callable[[Key], Params]
    initial: Callable[[int], PyTree]
    draws: Callable[..., PyTree]
    observe: Callable[..., Observed]
    starts: Callable[..., Start]
    step: Callable[..., tuple[PyTree, PyTree]]
    features: Callable[[PyTree], Array]
    predict: Callable[..., dict[str, Any]]
    loss: Callable[..., tuple[dict[str, Array], Observed, Metrics]]
    pack: Callable[[PyTree], PyTree]
    unpack: Callable[..., PyTree]


class Dreamer(NamedTuple):
    """A `WorldModel` with fixed parameters, to dream and plan in.

    Gradients flow through latents and actions, but not into the parameters.

    Attributes:
      draws: `key, lead -> draws`.
      starts: `observed, key=None -> Start`.
      step: `carry (N,), action (N,), draws (N,) -> carry, latent`.
      features: `latent -> (..., F)`.
      imagine: `start, policy, (model draws, policy draws) (H, N) -> Imagined` with a policy
        `features (N, F), draws (N, ...) -> action`: a scan of `step`.
      predict: `latents, keys=None -> {name: distribution}`.
    """

    draws: Callable[..., PyTree]
    starts: Callable[..., Start]
    step: Callable[..., tuple[PyTree, PyTree]]
    imagine: Callable[..., Imagined]
    features: Callable[[PyTree], Array]
    predict: Callable[..., dict[str, Any]]


class Net(NamedTuple):
    """A network as two pure functions.

    Attributes:
      init: `key -> params`.
      apply: `params, *inputs -> outputs`.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Any]


class Core(NamedTuple):
    """A recurrent memory, so that memories can be exchanged under one world model.

    `stoch` is the flat stochastic state (..., S). `embedded` is the action as the core reads it.
    It does not depend on the recurrence, so it is computed for all steps at once.

    Attributes:
      init: `key -> params`.
      initial: `batch size -> carry`.
      embed: `params, action (..., A) -> embedded (..., E)`, of actions as vectors.
      step: `params, carry (B,), stoch (B, S), embedded (B, E), is_first (B,) -> carry`. `is_first`
        resets the carry; the caller masks `stoch` and the action.
      deter: `carry (...) -> (..., D)`, the deterministic state: what the model reads of the memory.
      sequence: `params, carry (B,), stoch (T, B, S), embedded (T, B, E), is_first (T, B) -> carry
        (B,), deter (T, B, D), carries (T, B) | None`. Equal to a scan of `step`, which is what
        `models.recurrent.sequence_by_scan` makes; a parallel core computes all rows at once.
    """

    init: Callable[[Key], Params]
    initial: Callable[[int], PyTree]
    embed: Callable[[Params, Array], Array]
    step: Callable[..., PyTree]
    deter: Callable[[PyTree], Array]
    sequence: Callable[..., tuple[PyTree, Array, PyTree | None]]


# `config (with the size deter), stoch size, action size, dtype -> Core`.
CoreConstructor = Callable[[Any, int, int, str], Core]


class Behavior(NamedTuple):
    """How to act with a world model, as pure functions.

    Attributes:
      init: `key -> params`.
      initial: `params -> state`: running statistics, slow copies, target networks.
      carry: `batch size -> carry`, such as a planner's last plan; `()` for a policy.
      draws: `key, (T, B) -> draws`, every random number of one `loss`, dreams included.
      act: `params, dreamer, carry, model_carry, latent, key, mode -> carry, action`. The latent
        (B, ...) is that of the present row, `model_carry` the model's memory after it, from which
        planners dream.
      loss: `params, state, dreamer, observed, steps (T, B), draws -> {name: losses}, state,
        metrics`.
      after: `state, params -> state`, after the optimiser's step: moves slow copies.
    """

    init: Callable[[Key], Params]
    initial: Callable[[Params], Any]
    carry: Callable[[int], PyTree]
    draws: Callable[..., PyTree]
    act: Callable[..., tuple[PyTree, Action]]
    loss: Callable[..., tuple[dict[str, Array], Any, Metrics]]
    after: Callable[[Any, Params], Any]


def _same(tree: Any) -> Any:
    return tree


class Shards(NamedTuple):
    """How the shards of a training meet: each acts and samples by itself, and all learn the same.

    The defaults are those of a training that is not divided.

    Attributes:
      own: `key -> key`, a different one in each shard.
      mean: `tree -> tree`, means over all shards. A tensor that devices hold in parts becomes the
        device's part of the mean.
      total: `tree -> tree`, sums over all shards.
      all_gather: `array -> array`, those of all shards, with further leading axes.
      slice: `tree -> tree`, the part of what was learned that a device holds.
      gather_params: `parameters -> parameters`, whole, from the parts of all devices.
      gather_rest: the same for `AgentState.rest`. Take what you need of its result: the compiler
        drops the rest.
      sum_parts: `numbers -> numbers`, one for each tensor of the parameters: from sums over a
        device's part to sums over the whole tensor.
      whole: whether devices hold whole tensors of what they learn.
    """

    own: Callable[[Key], Key] = _same
    mean: Callable[[Any], Any] = _same
    total: Callable[[Any], Any] = _same
    all_gather: Callable[[Array], Array] = _same
    slice: Callable[[Any], Any] = _same
    gather_params: Callable[[Params], Params] = _same
    gather_rest: Callable[[Any], Any] = _same
    sum_parts: Callable[[Params], Params] = _same
    whole: bool = True


ALONE = Shards()

__all__ = [
    "ALONE",
    "Action",
    "ActionSpace",
    "Agent",
    "AgentState",
    "Array",
    "Behavior",
    "Bool",
    "Box",
    "Core",
    "CoreConstructor",
    "Discrete",
    "Dreamer",
    "Env",
    "Float",
    "HostEnv",
    "Imagined",
    "Int",
    "JaxwmError",
    "Key",
    "Metrics",
    "Mode",
    "Net",
    "ObsSpace",
    "Observed",
    "Params",
    "PyTree",
    "Shards",
    "Simulator",
    "Space",
    "Start",
    "Step",
    "Window",
    "WorldModel",
    "as_dict",
    "first",
    "is_image",
    "nearest",
    "transition",
    "zeros",
]

"""A trained agent to act with on numpy arrays, outside of any compiled program.

policy = jaxwm.load("runs/demo")
action, state = policy.act(obs)           # starts an episode
action, state = policy.act(obs, state)    # continues it
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.config import require
from jaxwm.envs import wrappers
from jaxwm.recipes import RunConfig, agent_of, sweep
from jaxwm.run import checkpoint, weights
from jaxwm.types import (
    Action,
    Agent,
    Array,
    Box,
    Env,
    HostEnv,
    JaxwmError,
    Key,
    Mode,
    Params,
    PyTree,
    Space,
    Step,
    is_image,
    nearest,
    zeros,
)


class PolicyState(NamedTuple):
    """What a policy carries from one row to the next; leading axis B, 1 for a single row.

    Where `is_first` is set, the next observation starts an episode, and the agent forgets the
    carry: `state._replace(is_first=ended)` restarts some episodes of a batch.
    """

    carry: PyTree
    action: Action
    key: Key
    is_first: Array  # (B,)


class Policy:
    """An agent with fixed parameters; `load` makes one from a run.

    Args:
      agent: the agent.
      params: its parameters.
      env: a single environment.
      seed: determines the random draws.
      mode: "sample" draws from the agent's policy, "greedy" takes its mode.
      config: the run that trained the agent, if there is one.

    Attributes:
      agent: the agent; `agent.model` is its world model, with `params["model"]`.
      params: its parameters.
      env: a single environment.
      config: the run that trained the agent, or None.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
    """

    def __init__(
        self,
        agent: Agent,
        params: Params,
        env: Env | HostEnv,
        seed: int = 0,
        mode: Mode = "sample",
        config: RunConfig | None = None,
    ):
        self.agent, self.params, self.env, self.config = agent, params, env, config
        self.obs_space, self.action_space = env.obs_space, env.action_space
        self._seed = seed

        def clip(space: Space, value: Array) -> Array:
            if not isinstance(space, Box):
                return value
            low, high = wrappers.bounds(space)
            return jnp.clip(value, low[None], high[None])

        def act(params: Params, obs: dict[str, Array], state: PolicyState) -> Any:
            key, key_act = jax.random.split(state.key)
            no = jnp.zeros_like(state.is_first)
            reward = jnp.zeros(no.shape)
            row = Step(state.action, obs, reward, state.is_first, no, no)
            carry, action, _ = agent.act(params, state.carry, row, key_act, mode)
            # The model learned from actions as they were drawn; environments clip them.
            clipped = wrappers.map_spaces(clip, self.action_space, action)
            return clipped, PolicyState(carry, action, key, no)

        self._act = jax.jit(act)

    def initial(self, batch: int = 1) -> PolicyState:
        """The state at the start of `batch` episodes."""
        require(batch >= 1, f"A batch holds at least one episode, not {batch}.")
        action = zeros(self.action_space, (batch,))
        key = jax.random.key(self._seed)
        return PolicyState(self.agent.initial(batch), action, key, jnp.ones((batch,), bool))

    def act(self, obs: Any, state: PolicyState | None = None) -> tuple[Any, PolicyState]:
        """The action at an observation.

        Args:
          obs: an array per observation key, or the array itself if there is only one key; a single
            observation, or a batch with a leading axis.
          state: what the previous call returned; None starts an episode.

        Returns:
          The action as numpy arrays, with a leading axis if `obs` has one; boxes with bounds lie in
          [-1, 1]. And the state for the next call.

        Raises:
          JaxwmError: if the observation does not fit the space, or the state the observation.
        """
        arrays, batch = _arrays(obs, self.obs_space)
        before = self.initial(batch or 1) if state is None else state
        require(
            before.is_first.shape == (batch or 1,),
            f"The observation is a batch of {batch or 1} and the state one of "
            f"{before.is_first.shape[0]}. Start new episodes with policy.act(obs).",
        )
        action, after = self._act(self.params, arrays, before)
        action = jax.tree.map(np.asarray, action)
        return action if batch else jax.tree.map(lambda x: np.asarray(x[0]), action), after


def load(run: str | Path, seed: int = 0, member: int = 0, mode: Mode = "sample") -> Policy:
    """The policy of a run's newest checkpoint, or of exported weights.

    Args:
      run: the run's folder, or one that `jaxwm checkpoints RUN export` wrote.
      seed: determines the random draws.
      member: which of the members trained side by side, counted from 0: sorted by the settings of a
        sweep, each setting with all its seeds.
      mode: "sample" draws from the agent's policy, "greedy" takes its mode.

    Returns:
      A `Policy`.

    Raises:
      JaxwmError: if the folder is neither, has no sound checkpoint, or there is no such member.
    """
    config = checkpoint.read_config(Path(run))
    require(
        0 <= member < config.members,
        f"The run {run} trained {config.members} members side by side; member is {member}, and "
        f"must be 0 to {config.members - 1}.",
    )
    env, members = trained(Path(run), config)
    agent = agent_of(sweep.member(config, member), env.obs_space, env.action_space)
    return Policy(agent, members[member], env, seed, mode, config)


def trained(run: Path, config: RunConfig) -> tuple[Env | HostEnv, list[Params]]:
    """The single environment of a run, and the parameters of each of its members."""
    env, like = weights.shapes(config)
    if weights.is_exported(run):
        params = weights.read(run, like)
    else:
        params, _ = checkpoint.restore_params(run, like, config)
    return env, split_members(params, config.members)


def split_members(tree: Any, members: int) -> list[Any]:
    """The tree of each member, from one whose leaves lead with an axis of members."""
    if members == 1:
        return [tree]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(members)]


def _arrays(obs: Any, space: dict[str, Space]) -> tuple[dict[str, np.ndarray], int]:
    """A batch of observations as the agent takes them, and its size: 0 if it was a single one."""
    if not isinstance(obs, dict):
        require(
            len(space) == 1,
            f"The observation is a bare array, but this agent sees {sorted(space)}. Give a dict "
            "with an array for each.",
        )
        obs = {next(iter(space)): obs}
    for name in obs:
        if name not in space:
            raise nearest(name, space, "observation")
    absent = sorted(set(space) - set(obs))
    require(not absent, f"The observation lacks {', '.join(map(repr, absent))}.")
    arrays = {name: _array(name, space[name], np.asarray(obs[name])) for name in space}
    leads = {name: x.shape[: x.ndim - len(space[name].shape)] for name, x in arrays.items()}
    require(
        len(set(leads.values())) == 1,
        f"The observations should be all single or all batches of one size; their leading axes "
        f"are {leads}.",
    )
    (lead,) = next(iter(leads.values())) or (0,)
    return arrays if lead else {name: x[None] for name, x in arrays.items()}, lead


def _array(name: str, space: Space, value: np.ndarray) -> np.ndarray:
    """One observation or a batch of them, in the type of its space."""
    what = f"The observation {name!r}"
    shape = value.shape[max(value.ndim - len(space.shape), 0) :]
    if value.ndim not in (len(space.shape), len(space.shape) + 1) or shape != space.shape:
        raise JaxwmError(
            f"{what} has shape {value.shape}; it should be {space.shape}, or that with a batch "
            "axis before it."
        )
    require(value.size > 0, f"{what} is an empty batch, of shape {value.shape}. Give one or more.")
    if is_image(space):
        require(value.dtype == np.uint8, f"{what} is {value.dtype}; an image is uint8, 0 to 255.")
    elif isinstance(space, Box):
        require(value.dtype.kind in "fiub", f"{what} is {value.dtype}; it should be numbers.")
        number = value.astype(np.float64)
        good = np.isfinite(number) | (space.missing & np.isneginf(number))
        require(bool(good.all()), f"{what} has a NaN or an infinity; it should be finite.")
    else:
        require(value.dtype.kind in "iub", f"{what} is {value.dtype}; it should be integers.")
        counts = np.asarray(space.classes)
        top = counts.reshape(space.shape) if counts.ndim else counts
        good = (value < top) & (value >= (-1 if space.missing else 0))
        require(bool(good.all()), f"{what} is {value}; it should be 0 to {space.classes} less one.")
    return value.astype(space.dtype)

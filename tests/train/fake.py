"""An agent without networks, whose programs compile in a second, as a recipe of its own.

It counts the rows of each episode, and follows the mean of all observations it trains on. Its
actions depend on both, so that runs differ where anything of theirs differs.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.recipes import RECIPES, Recipe, RunConfig
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import ALONE, Agent, AgentState, Box, Shards, as_dict

WIDTH = 8


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """Args:
    rate: share of the mean that each update takes over.
    data: what it learns from.
    memos: whether it stores memos.
    noise: size of the random part of each update.
    """

    rate: float = 0.5
    data: str = "windows"
    memos: bool = True
    noise: float = 0.01


def fake(config: FakeConfig, obs_space: Any, action_space: Any, shards: Shards = ALONE) -> Agent:
    """The agent for one environment's spaces."""

    def init(key):
        mean = jax.random.normal(key, (WIDTH, 3))
        params = {"mean": mean, "bias": jnp.zeros((3,))}
        rest = {"slow": {"copy": jnp.zeros((3, 2 * WIDTH))}, "made": jnp.zeros((), jnp.int32)}
        return shards.slice(AgentState(params, rest))

    def initial(batch):
        return {"count": jnp.zeros((batch,)), "seen": jnp.zeros((batch, 2))}

    def act(params, carry, row, key, mode="explore"):
        params = shards.gather_params(params)
        count = jnp.where(row.is_first, 0.0, carry["count"] + 1)
        level = jnp.abs(params["mean"]).mean() + params["bias"].sum()
        seen = jnp.stack([carry["count"], jnp.broadcast_to(level, count.shape)], -1)
        draw = jax.random.uniform(key, count.shape)

        def choose(space):
            lead = (len(count), *space.shape)
            values = (count + jnp.floor(10 * level + draw)).reshape(-1, *(1,) * len(space.shape))
            if isinstance(space, Box):
                return jnp.broadcast_to(jnp.sin(values), lead)
            return jnp.broadcast_to((values % 2).astype(jnp.int32), lead)

        actions = {name: choose(space) for name, space in as_dict(action_space).items()}
        action = actions if isinstance(action_space, dict) else actions["action"]
        memo = {"count": count, "seen": seen} if config.memos else ()
        return {"count": count, "seen": seen}, action, memo

    def update(state, window, key):
        params, slow = shards.gather_params(state.params), shards.gather_rest(state.rest)["slow"]
        trained = jax.tree.map(lambda x: x[1:], window.steps)
        flat = [x.astype(jnp.float32).mean() for x in jax.tree.leaves(trained.obs)]
        level = sum(flat) + trained.reward.mean() + 0.1 * slow["copy"].mean()
        if config.memos:
            level += 0.1 * window.memo["seen"].mean()
        level += config.noise * jax.random.normal(key, ())
        grads = {"mean": params["mean"] - level, "bias": params["bias"] - level / 2}
        grads, level = shards.mean((grads, level))
        after = jax.tree.map(lambda x, g: x - config.rate * g, state.params, grads)
        squares = shards.sum_parts(jax.tree.map(lambda g: jnp.square(g).sum(), grads))
        made = state.rest["made"] + 1
        copies = jax.tree.map(lambda x: 0.9 * x + 0.1 * level, state.rest["slow"])
        metrics = {
            "loss/level": level,
            "loss/total": level,
            "grad_norm": jnp.sqrt(sum(jax.tree.leaves(squares))),
            "made": made.astype(jnp.float32),
        }
        return AgentState(after, {"slow": copies, "made": made}), fresh(window), metrics

    def fresh(window):
        if not config.memos or config.data == "newest":
            return None
        # Rows of a window carry on counting from its context, through the ends of episodes.
        rows = jnp.arange(1, len(window.index))[:, None]
        count = (window.memo["count"][None] + rows) % 5
        return {"count": count, "seen": jnp.stack([count, -count], -1)}

    return Agent(init, initial, act, update, config.data)


RECIPE = Recipe("fake", FakeConfig, fake, lambda env, size, variant, preset: run_config(env), {})


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The recipe "fake" exists."""
    RECIPES["fake"] = RECIPE
    try:
        yield
    finally:
        del RECIPES["fake"]


def run_config(env: str = "toy/Memory", agent: FakeConfig = FakeConfig(), **changes: Any) -> Any:
    """A run of 4 environments: 9 rows of each before learning, and 12 trained rows per update."""
    memory = {"capacity": 400, "batch_size": 2, "batch_length": 6, "train_ratio": 3.0}
    memory |= {x: changes.pop(x) for x in list(changes) if x in ReplayConfig.__annotations__}
    changes = {"envs": 4, **changes}
    return RunConfig(
        env=env, recipe="fake", size="debug", agent=agent, replay=ReplayConfig(**memory), **changes
    )


def newest(env: str = "toy/Memory", envs: int = 4, length: int = 6, **changes: Any) -> Any:
    """A run that learns from the newest rows."""
    memory = {"capacity": envs * (length + 1), "batch_size": envs, "batch_length": length}
    agent = changes.pop("agent", FakeConfig(data="newest"))
    return run_config(env, agent, envs=envs, **{"train_ratio": 1.0, **memory, **changes})

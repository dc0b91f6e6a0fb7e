"""Agents that tests share: DreamerV3 with a core that is parallel over time."""

import dataclasses
from typing import Any

from jaxwm import agent as agents
from jaxwm.behaviors.actor_critic import actor_critic
from jaxwm.models import running_mean
from jaxwm.models.encoders import token_size
from jaxwm.models.heads import Style, posterior
from jaxwm.models.rssm import rssm
from jaxwm.optim import laprop, square_sums, value_at
from jaxwm.recipes import Recipe, RunConfig, dreamer_v3
from jaxwm.types import ALONE, ActionSpace, Agent, Core, ObsSpace, Shards


def mean_core(config: Any, stoch_size: int, action_size: int, dtype: str = "float32") -> Core:
    """The running mean in the place of DreamerV3's core."""
    own = running_mean.RunningMeanConfig(config.deter)
    return running_mean.core(own, stoch_size, action_size, dtype)


def parallel_core(
    obs_space: ObsSpace,
    action_space: ActionSpace,
    config: dreamer_v3.Config | None = None,
    shards: Shards = ALONE,
    filters: bool = False,
) -> Agent:
    """DreamerV3 with the running mean as its memory.

    Args:
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      config: sizes and hyperparameters; None for size debug.
      shards: how the shards of the training meet, if it is divided.
      filters: whether the posterior reads the memory. A local one observes all rows at once.
    """
    config = config or dreamer_v3.sized("debug")
    if filters:
        return dreamer_v3.agent(config, obs_space, action_space, shards, mean_core)
    sizes, units = config.model, config.model.core.hidden
    parts = dreamer_v3.parts(sizes, obs_space, action_space, core=mean_core)
    tokens, outputs = token_size(parts.encoder, obs_space), parts.latent.outputs
    local = posterior(0, tokens, units, outputs, Style())
    parts = parts._replace(posterior=local, filters=False)
    model = rssm(parts, obs_space, action_space)
    features = sizes.core.deter + parts.latent.size
    behavior = actor_critic(
        config.behavior,
        action_space,
        model,
        features,
        slow_rate=config.slow_rate,
        all_gather=shards.all_gather,
    )
    sums = lambda tree: shards.sum_parts(square_sums(tree))  # noqa: E731
    optimizer = laprop(**vars(config.optim), square_sums=sums)
    weights = lambda name, updates: value_at(config.weights.of(name), updates)  # noqa: E731
    return agents.joint(model, behavior, weights, optimizer, shards)


def _agent(
    config: dreamer_v3.Config,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    shards: Shards = ALONE,
) -> Agent:
    return parallel_core(obs_space, action_space, config, shards)


def _run(
    env: str | None, size: str | None = None, variant: str | None = None, preset: str | None = None
) -> RunConfig:
    config = dreamer_v3.config(env, size, variant, preset)
    return dataclasses.replace(config, recipe="parallel_core")


PARALLEL_CORE = Recipe("parallel_core", dreamer_v3.Config, _agent, _run, {})

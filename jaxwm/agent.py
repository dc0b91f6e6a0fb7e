"""The agent: a world model, a behaviour and one optimiser over both.

One loss, one gradient, one optimiser step: the world model's losses on a replayed batch and the
behaviour's losses on dreams that start from it are added with fixed weights. The slow critic
follows after the step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.behaviors.actor_critic import ActorCriticConfig, actor_critic
from jaxwm.config import at_least, share
from jaxwm.models.world_model import WorldModelConfig, world_model
from jaxwm.numerics import Scalar
from jaxwm.optim import (
    OptimConfig,
    apply_updates,
    global_norm,
    laprop,
    slow_copy,
    square_sums,
)
from jaxwm.types import (
    ALONE,
    Action,
    ActionSpace,
    Array,
    Behavior,
    Key,
    Latent,
    Metrics,
    ObsSpace,
    Params,
    Shards,
    Step,
    WorldModel,
    as_dict,
)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each loss term in the total; "rec" is that of every observation key."""

    rec: float = 1.0
    reward: float = 1.0
    cont: float = 1.0
    dyn: float = 1.0
    rep: float = 0.1
    policy: float = 1.0
    value: float = 1.0
    replay_value: float = 0.3

    def __post_init__(self):
        at_least(self, 0, *(field.name for field in dataclasses.fields(self)))

    def of(self, name: str) -> Scalar:
        """The weight of the loss term `name`."""
        return getattr(self, {"continue": "cont"}.get(name, name.split("/")[0]))


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """World model, behaviour, loss weights and optimiser.

    Args:
      model: the world model.
      behavior: the imagined actor-critic.
      weights: weights of the loss terms.
      optim: the optimiser.
      slow_rate: share of the critic that its slow copy takes over after each update.
      dtype: compute type; "auto" is bfloat16 on accelerators that have it, else float32.
    """

    model: WorldModelConfig = WorldModelConfig()
    behavior: ActorCriticConfig = ActorCriticConfig()
    weights: LossWeights = LossWeights()
    optim: OptimConfig = OptimConfig()
    slow_rate: float = 0.02
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        share(self, "slow_rate")


class AgentState(NamedTuple):
    """What an agent has learned: one pytree."""

    params: Params  # {"model", "behavior"}
    slow: Any  # the slow critic, following params["behavior"]["value"]
    opt: Any
    behavior: Any  # the behaviour's running statistics


class Noise(NamedTuple):
    """Every random draw of one update."""

    posterior: Array  # (T, B, ...)
    prior: Array  # (H, T * B, ...)
    action: Any  # (H, T * B, ...)


class Agent(NamedTuple):
    """An agent as pure functions.

    Attributes:
      model: the world model.
      behavior: the behaviour.
      init: `key -> AgentState`.
      initial: `batch size -> carry`.
      act: `params, carry, row (B,), key -> carry, action`.
      noise: `key, T, B -> Noise` of one update.
      loss: `params, slow, behavior state, carry, steps (T, B), noise -> total, Report`.
      update: `state, carry, steps (T, B), key -> state, latents (T, B), metrics`.
    """

    model: WorldModel
    behavior: Behavior
    init: Callable[[Key], AgentState]
    initial: Callable[[int], Latent]
    act: Callable[..., tuple[Latent, Action]]
    noise: Callable[..., Noise]
    loss: Callable[..., Any]
    update: Callable[..., tuple[AgentState, Latent, Metrics]]


class Report(NamedTuple):
    """What an evaluation of the loss leaves behind."""

    latents: Latent
    behavior: Any
    losses: dict[str, Array]
    metrics: Metrics


def compute_dtype(name: str) -> str:
    """The compute type `name`, with "auto" settled for the present backend."""
    if name != "auto":
        return name
    device = jax.devices()[0]
    # Turing and Volta have no bfloat16 units: XLA would emulate it.
    capability = str(getattr(device, "compute_capability", ""))  # of AMD's a name, such as "gfx90a"
    emulated = capability[:1].isdigit() and float(capability) < 8
    return "bfloat16" if device.platform in ("gpu", "tpu") and not emulated else "float32"


def make_agent(
    config: AgentConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    shards: Shards = ALONE,
) -> Agent:
    """The agent for one environment's spaces.

    Args:
      config: sizes and numbers.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if the model or the behaviour cannot take the spaces.
    """
    dtype = compute_dtype(config.dtype)
    model_config = dataclasses.replace(config.model, dtype=dtype)
    model = world_model(model_config, obs_space, as_dict(action_space))
    feature_size = jax.eval_shape(lambda: model.features(model.initial(1))).shape[-1]
    behavior = actor_critic(
        config.behavior, action_space, model, feature_size, dtype, shards.all_gather
    )
    squares = lambda tree: shards.sum_parts(square_sums(tree))  # noqa: E731
    optimizer = laprop(**vars(config.optim), square_sums=squares)
    slow = slow_copy(config.slow_rate)

    def init(key: Key) -> AgentState:
        key_model, key_behavior = jax.random.split(key)
        params = {"model": model.init(key_model), "behavior": behavior.init(key_behavior)}
        slow_value = slow.init({"value": params["behavior"]["value"]})
        state = AgentState(params, slow_value, optimizer.init(params), behavior.initial())
        return shards.slice(state)

    def act(params: Params, carry: Latent, row: Step, key: Key) -> tuple[Latent, Action]:
        key_latent, key_action = jax.random.split(key)
        params = shards.gather_params(params)
        batch = row.is_first.shape
        one = jax.tree.map(lambda x: x[None], row)
        draws = model.noise(key_latent, (1, *batch))
        latents, _ = model.observe(params["model"], carry, one, draws)
        carry = jax.tree.map(lambda x: x[0], latents)
        action_draws = behavior.noise(key_action, batch)
        return carry, behavior.act(params["behavior"], model.features(carry), action_draws)

    def noise(key: Key, time: int, batch: int) -> Noise:
        key_post, key_prior, key_action = jax.random.split(key, 3)
        dream = (config.behavior.imagine, time * batch)
        return Noise(
            model.noise(key_post, (time, batch)),
            model.noise(key_prior, dream),
            behavior.noise(key_action, dream),
        )

    def loss(
        params: Params, slow: Params, state: Any, carry: Latent, steps: Step, noise: Noise
    ) -> tuple[Array, Report]:
        losses, latents, metrics = model.loss(params["model"], carry, steps, noise.posterior)
        behavior_losses, state, behavior_metrics = behavior.loss(
            params["behavior"],
            slow,
            state,
            params["model"],
            latents,
            steps,
            noise.prior,
            noise.action,
        )
        losses |= behavior_losses
        means = {name: term.mean() for name, term in losses.items()}
        weighted = [config.weights.of(name) * mean for name, mean in means.items()]
        total = jnp.sum(jnp.stack(weighted))
        metrics |= behavior_metrics | {f"loss/{name}": mean for name, mean in means.items()}
        return total, Report(latents, state, losses, metrics | {"loss/total": total})

    def update(
        state: AgentState, carry: Latent, steps: Step, key: Key
    ) -> tuple[AgentState, Latent, Metrics]:
        draws = noise(key, *steps.is_first.shape)
        params = shards.gather_params(state.params)
        slow_params = shards.gather_slow(state.slow.params)
        grads, report = jax.grad(loss, has_aux=True)(
            params, slow_params, state.behavior, carry, steps, draws
        )
        # The only reduction of an update: what is read comes along with what is learned from.
        grads, means = shards.mean((grads, report.metrics))
        updates, opt = optimizer.update(grads, state.opt, state.params)
        learned: Any = apply_updates(state.params, updates)
        slow_value = slow.update(state.slow, {"value": learned["behavior"]["value"]})
        metrics = means | {"grad_norm": global_norm(grads, squares)}
        return AgentState(learned, slow_value, opt, report.behavior), report.latents, metrics

    # Traced once for a batch's shapes, however often a program asks for it.
    update = jax.jit(update, inline=True)
    return Agent(model, behavior, init, model.initial, act, noise, loss, update)

"""The imagined actor-critic of DreamerV3 (arXiv:2301.04104, "Critic learning", "Actor learning").

From every latent of a replayed batch the policy is rolled out in the world model; the critic
learns lambda-returns of the dream, the actor follows the score-function gradient of returns
normalised by the range of their percentiles. The critic also learns on the replayed rows, from
the dream's returns as bootstrap; that loss alone sends a gradient into the world model.

Indices: imagined states 0..H, of which state 0 is the replayed one; action i is drawn at state
i; reward, continue and value belong to the state they are predicted at.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import dists, threefry
from jaxwm import nets_before as nets
from jaxwm.config import at_least, positive, require, share
from jaxwm.numerics import (
    Percentiles,
    percentiles_init,
    percentiles_scale,
    percentiles_update,
    symexp_bins,
)
from jaxwm.products import rounded
from jaxwm.returns import lambda_return, replay_lambda_return
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Behavior,
    Box,
    Discrete,
    JaxwmError,
    Key,
    Latent,
    Metrics,
    Params,
    Step,
    WorldModel,
    as_dict,
)

sg = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
    """Numbers of the imagined actor-critic.

    Args:
      units: width of policy and critic.
      layers: depth of policy and critic.
      bins: bins of the two-hot critic.
      imagine: steps H of each dream.
      horizon: discount horizon in steps, for the replayed rows; the dream's discount is in the
        predicted continue probability.
      lambda_: mixing weight of the lambda-returns.
      entropy: weight of the policy's entropy.
      slow_regularizer: weight of the critic's loss towards its slow copy.
      unimix: share of the uniform distribution in discrete policies.
      start_weight: weight of the first imagined state, "predicted" by the continue head or
        "true", 1 - is_terminal.
      return_rate: update rate of the percentiles of the returns.
    """

    units: int = 1024
    layers: int = 3
    bins: int = 255
    imagine: int = 15
    horizon: int = 333
    lambda_: float = 0.95
    entropy: float = 3e-4
    slow_regularizer: float = 1.0
    unimix: float = 0.01
    start_weight: Literal["predicted", "true"] = "predicted"
    return_rate: float = 0.01

    def __post_init__(self):
        at_least(self, 1, "units", "layers", "imagine", "horizon")
        at_least(self, 3, "bins")
        share(self, "lambda_", "unimix", "return_rate")
        at_least(self, 0, "entropy", "slow_regularizer")
        positive(self, "return_rate")


class Dream(NamedTuple):
    """What an imagined batch yields, none of it differentiated; H states unless noted."""

    reward: Array  # (H + 1, N)
    cont: Array  # (H + 1, N), probability, discount included
    value: Array  # (H + 1, N)
    weight: Array  # (H, N), probability of having got here
    returns: Array  # (H, N)
    advantage: Array  # (H, N)
    scale: Array  # (), the divisor of the advantages


def dream_targets(
    config: ActorCriticConfig,
    returns_range: Percentiles,
    reward: Array,
    cont: Array,
    value: Array,
    all_gather: Callable[[Array], Array] = lambda returns: returns,
) -> tuple[Dream, Percentiles]:
    """Returns, advantages and weights of imagined trajectories.

    R_i = r_{i+1} + c_{i+1} ((1 - lambda) v_{i+1} + lambda R_{i+1}),  R_H = v_H
    w_i = c_0 ... c_i,   A_i = (R_i - v_i) / max(1, hi - lo)

    where lo and hi are running percentiles that already include this batch.

    Args:
      config: gives lambda and the rate of the percentiles.
      returns_range: the running percentiles.
      reward: (H+1, N) predicted rewards.
      cont: (H+1, N) predicted probabilities to go on, times the discount.
      value: (H+1, N) predicted values.
      all_gather: `returns (H, N) -> (..., H, N)` of all shards, of which the percentiles are.

    Returns:
      The targets, and the updated percentiles. No gradient flows through either.
    """
    reward, cont, value = sg((reward, cont, value))
    columns = jax.vmap(lambda_return, in_axes=(1, 1, 1, None), out_axes=1)
    returns = columns(reward[1:], cont[1:], value[1:], config.lambda_)
    returns_range = percentiles_update(returns_range, all_gather(returns), config.return_rate)
    scale = percentiles_scale(returns_range)
    weight = jnp.cumprod(cont, 0)[:-1]
    advantage = (returns - value[:-1]) / scale
    return Dream(reward, cont, value, weight, returns, advantage, scale), returns_range


def actor_critic(
    config: ActorCriticConfig,
    action_space: ActionSpace,
    model: WorldModel,
    feature_size: int,
    dtype: str = "float32",
    all_gather: Callable[[Array], Array] = lambda returns: returns,
) -> Behavior:
    """The behaviour as pure functions; see `types.Behavior`.

    `loss(params, slow, state, model_params, latents, steps, noise, action_noise)` returns
    `{"policy" (T, B), "value" (T, B), "replay_value" (T-1, B)}`, the new state and metrics.

    Args:
      config: numbers.
      action_space: one space, or a space per key.
      model: the world model to dream in.
      feature_size: length of the model's features.
      dtype: compute type.
      all_gather: see `dream_targets`.

    Raises:
      JaxwmError: if an action space is neither discrete nor a box of numbers, or two outputs of the
        policy's network would have one name.
    """
    spaces, sizes = as_dict(action_space), {}
    for name, space in spaces.items():
        if isinstance(space, Discrete):
            outputs = {name: math.prod(space.shape) * space.width}
        elif isinstance(space, Box) and space.dtype == "float32" and len(space.shape) > 0:
            outputs = dict.fromkeys((f"{name}_mean", f"{name}_std"), math.prod(space.shape))
        else:
            raise JaxwmError(
                f"The action {name!r} has the space {space}, which the actor-critic cannot "
                "take: use Discrete, or a float32 Box of at least one dimension."
            )
        taken = outputs.keys() & {*sizes, "mlp"}
        require(
            not taken,
            f"The action {name!r} would be the output {', '.join(taken)} of the policy's network, "
            "which has one of that name. Rename the action.",
        )
        sizes |= outputs
    heads = (feature_size, config.units, config.layers)
    policy_net = nets.Heads(*heads, sizes, 0.01, dtype)
    value_net = nets.Heads(*heads, {"out": config.bins}, 0.0, dtype)
    bins = symexp_bins(config.bins)

    def init(key: Key) -> Params:
        key_policy, key_value = jax.random.split(key)
        feat = jnp.zeros((1, feature_size))
        return {
            "policy": policy_net.init(key_policy, feat)["params"],
            "value": value_net.init(key_value, feat)["params"],
        }

    def plan(out: dict[str, Array]) -> dict[str, Any]:
        """The policy from its network's output."""
        result = {}
        for name, space in spaces.items():
            if isinstance(space, Discrete):
                logits = out[name].reshape(*out[name].shape[:-1], *space.shape, space.width)
                rank = len(space.shape)
                result[name] = dists.Categorical(logits, space.mask(), config.unimix, rank)
            else:
                mean, std = out[f"{name}_mean"], out[f"{name}_std"]
                shape = (*mean.shape[:-1], *space.shape)
                mean, std = mean.reshape(shape), std.reshape(shape)
                result[name] = dists.BoundedNormal(mean, std, event_ndims=len(space.shape))
        return result

    def draw(plan: dict[str, Any], draws: dict[str, Array]) -> Action:
        chosen = {name: dist.sample_noise(draws[name]) for name, dist in plan.items()}
        return chosen if isinstance(action_space, Mapping) else chosen["action"]

    def policy(params: Params, feat: Array) -> dict[str, Any]:
        return plan(nets.call(policy_net)(params["policy"], feat))

    def value(params: Params, feat: Array) -> dists.TwoHot:
        return dists.TwoHot(nets.call(value_net)(params["value"], feat)["out"], bins)

    def noise(key: Key, lead: tuple[int, ...]) -> dict[str, Array]:
        draws = {}
        for index, (name, space) in enumerate(sorted(spaces.items())):
            key_name = jax.random.fold_in(key, index)
            if isinstance(space, Discrete):
                shape = (*lead, *space.shape, space.width)
                draws[name] = threefry.gumbel(key_name, shape)
            else:
                draws[name] = threefry.normal(key_name, (*lead, *space.shape))
        return draws

    def act(params: Params, feat: Array, draws: dict[str, Array]) -> Action:
        return draw(policy(params, feat), draws)

    def replay_value_loss(
        params: Params,
        latents: Latent,
        steps: Step,
        bootstrap: Array,
        products: Any,
        total: Array,
        slow_value: Array,
    ) -> Array:
        """The critic's loss (T-1, B) on replayed rows; its gradient goes on into the world model.

        Dreams start from these rows: their first returns are the bootstrap, and the critic's
        products and totals, and the slow critic's values, are known from them.
        """
        columns = jax.vmap(replay_lambda_return, in_axes=(1, 1, 1, 1, None, None), out_axes=1)
        discount = 1.0 - 1.0 / config.horizon
        targets = columns(
            steps.reward, steps.is_last, steps.is_terminal, bootstrap, discount, config.lambda_
        )
        rows, products, total, slow_value = jax.tree.map(
            lambda x: x[:-1], (latents, products, total, slow_value)
        )
        out = nets.recalling(value_net)(params["value"], products, model.features(rows))
        critic = dists.TwoHot(out["out"], bins, total)
        loss = -critic.log_prob(targets)
        loss -= config.slow_regularizer * critic.log_prob(slow_value)
        return loss * (1.0 - steps.is_last[:-1])

    def loss(
        params: Params,
        slow: Params,
        state: Percentiles,
        model_params: Params,
        latents: Latent,
        steps: Step,
        prior_noise: Array,
        action_noise: dict[str, Array],
    ) -> tuple[dict[str, Array], Percentiles, Metrics]:
        lead = steps.is_first.shape
        # Dreams are not differentiated: neither the model nor the policy learns through them.
        fixed_model, fixed_params = sg(model_params), sg(params)
        start = jax.tree.map(lambda x: sg(x).reshape(-1, *x.shape[2:]), latents)

        # Policy and critic are computed once per imagined state. What they learn from is known
        # only when all have been, so that their products are kept until then.
        def step(feat: Array, draws: dict[str, Array]) -> tuple[Action, Any]:
            out, products = nets.remembering(policy_net)(fixed_params["policy"], feat)
            return draw(plan(out), draws), (feat, products)

        dreamt = model.imagine(fixed_model, start, step, prior_noise, action_noise)
        imagined, actions, (feat, policy_products) = sg(dreamt)
        last = rounded(model.features(imagined)[-1])

        critics = {"value": fixed_params["value"], "slow": slow["value"]}

        def judge(feat: Array, *names: str) -> tuple[list[Array], Any]:
            """Means of reward, continue and critics; the first critic's products and total."""
            heads = model.predict(fixed_model, model.split(feat), ("reward", "continue"))
            outs, products = nets.abreast(dict.fromkeys(names, value_net))(critics, feat)
            values = [dists.TwoHot(outs[name]["out"], bins) for name in names]
            means = [x.mean() for x in (heads["reward"], heads["continue"], *values)]
            return means, (products[names[0]], values[0].total())

        # The last state apart from the others, which the dream stacked: together they are copied.
        (*judged, slow_values), (value_products, totals) = sg(
            nets.by_slices(lambda feat: judge(feat, "value", "slow"), feat)
        )
        judged = zip(judged, judge(last, "value")[0], strict=True)
        reward, cont, values = sg([jnp.concatenate([xs, x[None]]) for xs, x in judged])
        if config.start_weight == "true":
            cont = cont.at[0].set(1.0 - steps.is_terminal.reshape(-1))
        dream, state = dream_targets(config, state, reward, cont, values, all_gather)

        learners = nets.abreast({"policy": policy_net, "value": value_net})
        products = {"policy": policy_products, "value": value_products}

        def learn(feat, products, total, action, advantage, returns, slow_value) -> tuple:
            outs, _ = learners(params, feat, products)
            actor, estimate = plan(outs["policy"]), dists.TwoHot(outs["value"]["out"], bins, total)
            log_prob = sum(actor[k].log_prob(x) for k, x in as_dict(action).items())
            entropy: Any = sum(dist.entropy() for dist in actor.values())
            score = log_prob * advantage + config.entropy * entropy
            pull = estimate.log_prob(slow_value)
            return score, estimate.log_prob(returns) + config.slow_regularizer * pull, entropy

        score, fit, entropy = nets.by_slices(
            learn,
            feat,
            products,
            totals,
            actions,
            dream.advantage,
            dream.returns,
            slow_values,
        )
        policy_loss, value_loss = (-(dream.weight * x).mean(0) for x in (score, fit))

        known = jax.tree.map(
            lambda x: x[0].reshape(*lead, *x.shape[2:]), (value_products, totals, slow_values)
        )
        bootstrap = dream.returns[0].reshape(lead)
        replay_loss = replay_value_loss(params, latents, steps, bootstrap, *known)

        losses = {
            "policy": policy_loss.reshape(lead),
            "value": value_loss.reshape(lead),
            "replay_value": replay_loss,
        }
        metrics = {
            "dream/return": dream.returns.mean(),
            "dream/return_scale": dream.scale,
            "dream/value": dream.value.mean(),
            "dream/reward": dream.reward.mean(),
            "dream/continue": dream.cont.mean(),
            "dream/advantage": jnp.abs(dream.advantage).mean(),
            "policy/entropy": entropy.mean(),
        }
        return losses, state, metrics

    return Behavior(init, percentiles_init, noise, policy, value, act, loss)

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

from jaxwm import backend, dists, nets
from jaxwm.config import at_least, positive, require, share
from jaxwm.numerics import (
    Percentiles,
    Scalar,
    percentiles_init,
    percentiles_scale,
    percentiles_update,
    symexp_bins,
)
from jaxwm.optim import SlowCopy, SlowState, slow_copy
from jaxwm.returns import lambda_return, replay_lambda_return
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Behavior,
    Box,
    Discrete,
    Dreamer,
    Imagined,
    JaxwmError,
    Key,
    Metrics,
    Mode,
    Net,
    Observed,
    Params,
    PyTree,
    Step,
    WorldModel,
    as_dict,
)

sg = jax.lax.stop_gradient
HEADS = ("reward", "continue")


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
    """Hyperparameters of the imagined actor-critic.

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


class Targets(NamedTuple):
    """What policy and critic learn from; no gradient flows into any of it."""

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
) -> tuple[Targets, Percentiles]:
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
    return Targets(reward, cont, value, weight, returns, advantage, scale), returns_range


class State(NamedTuple):
    """What the behaviour keeps beside its parameters."""

    returns: Percentiles
    slow: SlowState  # the slow copy of the critic


class Draws(NamedTuple):
    """Every random number of one loss, for dreams that start from T * B rows."""

    model: PyTree  # (H, T * B, ...)
    action: dict[str, Array]  # (H, T * B, ...)


def policy(
    config: ActorCriticConfig, action_space: ActionSpace, feature_size: int, dtype: str = "float32"
) -> Net:
    """The policy: `params, features (..., F) -> {action key: distribution}`.

    Args:
      config: sizes.
      action_space: one space, or a space per key.
      feature_size: length F of the features.
      dtype: compute type.

    Raises:
      JaxwmError: if an action space is neither discrete nor a box of numbers, or two outputs of the
        policy's network would have one name.
    """
    spaces, sizes = as_dict(action_space), {}
    for name, space in spaces.items():
        outputs = _outputs(name, space)
        taken = outputs.keys() & {*sizes, "mlp"}
        require(
            not taken,
            f"The action {name!r} needs an output of the policy's network called "
            f"{', '.join(taken)}, and there already is one. Rename the action.",
        )
        sizes |= outputs
    module = nets.Heads(feature_size, config.units, config.layers, sizes, 0.01, dtype)
    run = nets.call(module)

    def apply(params: Params, feat: Array) -> dict[str, Any]:
        out, result = run(params, feat), {}
        for name, space in spaces.items():
            if isinstance(space, Discrete):
                logits = out[name].reshape(*out[name].shape[:-1], *space.shape, space.width)
                rank = len(space.shape)
                result[name] = dists.Categorical(logits, space.mask(), config.unimix, rank)
            else:
                shape = (*feat.shape[:-1], *space.shape)
                mean, std = out[f"{name}_mean"].reshape(shape), out[f"{name}_std"].reshape(shape)
                result[name] = dists.BoundedNormal(mean, std, event_ndims=len(space.shape))
        return result

    return Net(lambda key: module.init(key, jnp.zeros((1, feature_size)))["params"], apply)


def _outputs(name: str, space: Any) -> dict[str, int]:
    """The outputs of the policy's network for one action, with their sizes."""
    if isinstance(space, Discrete):
        return {name: math.prod(space.shape) * space.width}
    if isinstance(space, Box) and space.dtype == "float32" and len(space.shape) > 0:
        return dict.fromkeys((f"{name}_mean", f"{name}_std"), math.prod(space.shape))
    raise JaxwmError(
        f"The action {name!r} has the space {space}, which the actor-critic cannot take: use "
        "Discrete, or a float32 Box of at least one dimension."
    )


def action_draws(action_space: ActionSpace, key: Key, lead: tuple[int, ...]) -> dict[str, Array]:
    """Random numbers for actions of shape `lead`: Gumbel for choices, normal for boxes."""
    draws = {}
    for index, (name, space) in enumerate(sorted(as_dict(action_space).items())):
        key_name = jax.random.fold_in(key, index)
        if isinstance(space, Discrete):
            draws[name] = jax.random.gumbel(key_name, (*lead, *space.shape, space.width))
        else:
            draws[name] = jax.random.normal(key_name, (*lead, *space.shape))
    return draws


def critic(config: ActorCriticConfig, feature_size: int, dtype: str = "float32") -> Net:
    """The critic: `params, features (..., F) -> distribution` of the return from there."""
    bins = symexp_bins(config.bins)
    module = nets.Heads(feature_size, config.units, config.layers, {"out": config.bins}, 0.0, dtype)
    run = nets.call(module)
    return Net(
        lambda key: module.init(key, jnp.zeros((1, feature_size)))["params"],
        lambda params, feat: dists.TwoHot(run(params, feat)["out"], bins),
    )


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """The imagined actor-critic; its methods are the functions of `types.Behavior`."""

    config: ActorCriticConfig
    action_space: ActionSpace
    model: WorldModel
    policy: Net
    critic: Net
    slow: SlowCopy
    all_gather: Callable[[Array], Array]

    def init(self, key: Key) -> Params:
        key_policy, key_value = jax.random.split(key)
        return {"policy": self.policy.init(key_policy), "value": self.critic.init(key_value)}

    def initial(self, params: Params) -> State:
        return State(percentiles_init(), self.slow.init(params["value"]))

    def after(self, state: State, params: Params) -> State:
        return state._replace(slow=self.slow.update(state.slow, params["value"]))

    def draws(self, key: Key, lead: tuple[int, int]) -> Draws:
        key_model, key_action = jax.random.split(key)
        dream = (self.config.imagine, math.prod(lead))
        actions = action_draws(self.action_space, key_action, dream)
        return Draws(self.model.draws(key_model, dream), actions)

    def act(
        self,
        params: Params,
        dreamer: Dreamer,
        carry: PyTree,
        model_carry: PyTree,
        latent: PyTree,
        key: Key,
        mode: Mode,
    ) -> tuple[PyTree, Action]:
        del model_carry  # a policy needs no plan
        feat = dreamer.features(latent)
        plan = self.policy.apply(params["policy"], feat)
        if mode == "greedy":
            return carry, self._bare({name: dist.mode() for name, dist in plan.items()})
        return carry, self._sample(plan, action_draws(self.action_space, key, feat.shape[:-1]))

    def loss(
        self,
        params: Params,
        state: State,
        dreamer: Dreamer,
        observed: Observed,
        steps: Step,
        draws: Draws,
    ) -> tuple[dict[str, Array], State, Metrics]:
        lead = steps.is_first.shape
        dreams = self._dream(params, dreamer, observed, draws)
        *judged, slow_value = self._judge(params, state, dreamer, dreams)
        reward, cont, value = judged
        if self.config.start_weight == "true":
            cont = cont.at[0].set(1.0 - steps.is_terminal.reshape(-1))
        targets, returns = dream_targets(
            self.config, state.returns, reward, cont, value, self.all_gather
        )
        gain, fit, entropy = self._score(params, dreamer, dreams, targets, slow_value)

        # The first states of the dreams are the replayed rows.
        bootstrap, slow_start = targets.returns[0].reshape(lead), slow_value[0].reshape(lead)
        real = dreamer.features(observed.latents)
        losses = {
            "policy": -(targets.weight * gain).mean(0).reshape(lead),
            "value": -(targets.weight * fit).mean(0).reshape(lead),
            "replay_value": self._replay_value(params, real, steps, bootstrap, slow_start),
        }
        metrics = {
            "dream/return": targets.returns.mean(),
            "dream/return_scale": targets.scale,
            "dream/value": targets.value.mean(),
            "dream/reward": targets.reward.mean(),
            "dream/continue": targets.cont.mean(),
            "dream/advantage": jnp.abs(targets.advantage).mean(),
            "policy/entropy": entropy.mean(),
        }
        return losses, state._replace(returns=returns), metrics

    def _dream(
        self, params: Params, dreamer: Dreamer, observed: Observed, draws: Draws
    ) -> Imagined:
        """Dreams from every replayed row. Nothing is learned by changing what they contain."""
        fixed = sg(params["policy"])

        def act(feat: Array, draws: dict[str, Array]) -> Action:
            return self._sample(self.policy.apply(fixed, feat), draws)

        return sg(dreamer.imagine(dreamer.starts(observed), act, draws))

    def _judge(
        self, params: Params, state: State, dreamer: Dreamer, dreams: Imagined
    ) -> list[Array]:
        """Rewards, continue probabilities and values (H+1, N), and slow values (H, N)."""
        critics = sg((params["value"], state.slow.params))

        def judge(latents: PyTree) -> list[Array]:
            heads, feat = dreamer.predict(latents, HEADS), dreamer.features(latents)
            values = [self.critic.apply(critic, feat) for critic in critics]
            return [x.mean() for x in (*(heads[name] for name in HEADS), *values)]

        *along, slow_value = backend.by_slices(judge, dreams.latents)
        last = judge(dreams.last)[:-1]
        whole = [jnp.concatenate([x, end[None]]) for x, end in zip(along, last, strict=True)]
        return sg([*whole, slow_value])

    def _score(
        self,
        params: Params,
        dreamer: Dreamer,
        dreams: Imagined,
        targets: Targets,
        slow_value: Array,
    ) -> tuple[Array, Array, Array]:
        """What policy and critic maximise at each dreamed state, and the policy's entropy."""
        config = self.config

        def score(
            latents: PyTree, action: Any, advantage: Array, returns: Array, slow_value: Array
        ) -> tuple[Array, Array, Array]:
            feat = dreamer.features(latents)
            plan = self.policy.apply(params["policy"], feat)
            log_prob = sum(plan[name].log_prob(x) for name, x in as_dict(action).items())
            entropy: Any = sum(dist.entropy() for dist in plan.values())
            value = self.critic.apply(params["value"], feat)
            fit = value.log_prob(returns) + config.slow_regularizer * value.log_prob(slow_value)
            return log_prob * advantage + config.entropy * entropy, fit, entropy

        return backend.by_slices(
            score, dreams.latents, dreams.action, targets.advantage, targets.returns, slow_value
        )

    def _replay_value(
        self, params: Params, feat: Array, steps: Step, bootstrap: Array, slow_value: Array
    ) -> Array:
        """The critic's loss (T-1, B) on replayed rows. Its gradient reaches the world model."""
        config = self.config
        returns = jax.vmap(replay_lambda_return, in_axes=(1, 1, 1, 1, None, None), out_axes=1)(
            steps.reward,
            steps.is_last,
            steps.is_terminal,
            bootstrap,
            1.0 - 1.0 / config.horizon,
            config.lambda_,
        )
        value = self.critic.apply(params["value"], feat[:-1])
        fit = value.log_prob(returns) + config.slow_regularizer * value.log_prob(slow_value[:-1])
        return -fit * (1.0 - steps.is_last[:-1])

    def _sample(self, plan: dict[str, Any], draws: dict[str, Array]) -> Action:
        return self._bare({name: dist.sample_noise(draws[name]) for name, dist in plan.items()})

    def _bare(self, chosen: dict[str, Array]) -> Action:
        return chosen if isinstance(self.action_space, Mapping) else chosen["action"]


def actor_critic(
    config: ActorCriticConfig,
    action_space: ActionSpace,
    model: WorldModel,
    feature_size: int,
    dtype: str = "float32",
    slow_rate: Scalar = 0.02,
    all_gather: Callable[[Array], Array] = lambda returns: returns,
) -> Behavior:
    """The behaviour as pure functions; see `types.Behavior`.

    `loss` returns `{"policy" (T, B), "value" (T, B), "replay_value" (T-1, B)}`.

    Args:
      config: hyperparameters.
      action_space: one space, or a space per key.
      model: the world model to dream in.
      feature_size: length of the model's features.
      dtype: compute type.
      slow_rate: share of the critic that its slow copy takes over after each update.
      all_gather: see `dream_targets`.

    Raises:
      JaxwmError: see `policy`.
    """
    behavior = ActorCritic(
        config,
        action_space,
        model,
        policy(config, action_space, feature_size, dtype),
        critic(config, feature_size, dtype),
        slow_copy(slow_rate),
        all_gather,
    )
    return Behavior(
        init=behavior.init,
        initial=behavior.initial,
        carry=lambda batch: (),
        draws=behavior.draws,
        act=behavior.act,
        loss=behavior.loss,
        after=behavior.after,
    )

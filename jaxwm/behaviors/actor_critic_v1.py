"""The imagined actor-critic of Dreamer V1 (arXiv:1912.01603, section 3).

From every latent of a replayed batch the policy is rolled out in the world model. The policy
follows the gradient of lambda-returns through the dream: through actions, states, rewards, values
and, if the model predicts them, discounts. The critic learns the same returns; there is no target
network.

Indices: imagined states 1..H, each reached by an action; the replayed state they start from is not
one of them. Reward r_i, discount d_i and value v_i are predicted at state i. Without a continue
head d_i is a constant.

    R_i = r_i + d_i ((1 - lambda) v_{i+1} + lambda R_{i+1}),   R_H = v_H         i = 1..H-1
    w_i = d_1 ... d_{i-1}
    policy: -w_i R_i                                                             i = 1..H-1
    critic: -w_i log N(sg(R_i) | critic(s_i), 1)                                 i = 1..H-1

With a continue head no dream starts from the last row of a sequence, as in the authors' code.

Differs from the authors' code: the most likely of 100 samples, which it acts with in evaluation, is
found for every environment by itself; the code uses the index of the first one for all.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import backend, dists, nets
from jaxwm.behaviors import explore, policies
from jaxwm.behaviors.policies import Plan, Policy
from jaxwm.config import at_least, positive, share
from jaxwm.numerics import Scalar
from jaxwm.returns import lambda_return
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Behavior,
    Dreamer,
    Imagined,
    Key,
    Metrics,
    Mode,
    Net,
    Observed,
    Params,
    PyTree,
    Step,
    WorldModel,
)

sg = jax.lax.stop_gradient

# Samples among which the most likely one is what a greedy policy does.
SAMPLES = 100


@dataclasses.dataclass(frozen=True)
class ActorCriticV1Config:
    """Hyperparameters of the imagined actor-critic.

    Args:
      units: width of policy and critic.
      policy_layers: depth of the policy.
      value_layers: depth of the critic.
      imagine: steps H of each dream, at least 2.
      lambda_: mixing weight of the lambda-returns.
      init_std: standard deviation of continuous actions, before they are squashed, at the start.
      explore: in mode "explore", standard deviation of the noise added to continuous actions, and
        probability of a random discrete one.
    """

    units: int = 400
    policy_layers: int = 4
    value_layers: int = 3
    imagine: int = 15
    lambda_: float = 0.95
    init_std: float = 5.0
    explore: float = 0.3

    def __post_init__(self):
        at_least(self, 1, "units", "policy_layers", "value_layers")
        at_least(self, 2, "imagine")
        share(self, "lambda_", "explore")
        positive(self, "init_std")


class Draws(NamedTuple):
    """Every random number of one loss, for dreams that start from T * B rows."""

    model: PyTree  # (H, T * B, ...)
    action: dict[str, Array]  # (H, T * B, ...)


class ActDraws(NamedTuple):
    """Every random number of one action."""

    action: dict[str, Array]
    explore: dict[str, Any]
    mode: dict[str, Array]  # (SAMPLES, ...)


class Values(NamedTuple):
    """What is predicted at imagined states 1..H; gradients flow into all of it."""

    reward: Array  # (H, N)
    discount: Array  # (H, N)
    value: Array  # (H, N)


def returns_of(values: Values, lambda_: Scalar) -> Array:
    """The lambda-returns R_1..R_{H-1} (H - 1, N) of a dream; gradients flow into everything."""
    columns = jax.vmap(lambda_return, in_axes=(1, 1, 1, None), out_axes=1)
    return columns(values.reward[:-1], values.discount[:-1], values.value[1:], lambda_)


def weights_of(discount: Array) -> Array:
    """The weights w_1..w_{H-1} (H - 1, N): products of the discounts before."""
    return sg(jnp.cumprod(jnp.concatenate([jnp.ones_like(discount[:1]), discount[:-2]]), 0))


@dataclasses.dataclass(frozen=True)
class ActorCriticV1:
    """The imagined actor-critic; its methods are the functions of `types.Behavior`."""

    config: ActorCriticV1Config
    action_space: ActionSpace
    model: WorldModel
    discount: Scalar
    policy: Policy
    critic: Net

    def init(self, key: Key) -> Params:
        key_policy, key_value = jax.random.split(key)
        return {"policy": self.policy.init(key_policy), "value": self.critic.init(key_value)}

    def draws(self, key: Key, lead: tuple[int, int]) -> Draws:
        key_model, key_action = jax.random.split(key)
        dream = (self.config.imagine, math.prod(lead))
        return Draws(self.model.draws(key_model, dream), self.policy.draws(key_action, dream))

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
        action = self.choose(plan, self.act_draws(key, feat.shape[:-1]), mode)
        return carry, policies.for_env(self.action_space, action)

    def act_draws(self, key: Key, lead: tuple[int, ...]) -> ActDraws:
        """Random numbers for actions of shape `lead`."""
        key_action, key_explore, key_mode = jax.random.split(key, 3)
        return ActDraws(
            self.policy.draws(key_action, lead),
            explore.draws(self.action_space, key_explore, lead, gate=True),
            self.policy.draws(key_mode, (SAMPLES, *lead)),
        )

    def choose(self, plan: Plan, draws: ActDraws, mode: Mode) -> dict[str, Array]:
        """The action of every key, from the policy's distributions."""
        if mode == "greedy":
            return {
                name: dist.mode_noise(draws.mode[name])
                if isinstance(dist, dists.TanhNormal)
                else dist.mode()
                for name, dist in plan.items()
            }
        action = policies.sample(plan, draws.action)
        if mode == "sample":
            return action
        return explore.noisy(self.action_space, action, draws.explore, self.config.explore)

    def loss(
        self,
        params: Params,
        state: Any,
        dreamer: Dreamer,
        observed: Observed,
        steps: Step,
        draws: Draws,
    ) -> tuple[dict[str, Array], Any, Metrics]:
        del steps  # the dream ends where the model says
        dreams = self.dream(params, dreamer, observed, draws)
        latents = self.reached(dreams)
        values = self.judge(params, dreamer, latents)
        returns, weight = returns_of(values, self.config.lambda_), weights_of(values.discount)
        feat = sg(dreamer.features(jax.tree.map(lambda x: x[:-1], latents)))
        fit = self.critic.apply(params["value"], feat).log_prob(sg(returns))
        losses = {"policy": -(weight * returns).mean(0), "value": -(weight * fit).mean(0)}
        metrics = {
            "dream/return": returns.mean(),
            "dream/value": values.value.mean(),
            "dream/reward": values.reward.mean(),
            "dream/discount": values.discount.mean(),
        }
        return losses, state, metrics

    def dream(self, params: Params, dreamer: Dreamer, observed: Observed, draws: Draws) -> Imagined:
        """Dreams from the replayed rows, the last ones excepted. Policies see constants."""
        ends = "continue" in dreamer.predict(observed.latents, ("continue",))
        if ends and observed.carries is not None:
            observed = observed._replace(
                latents=jax.tree.map(lambda x: x[:-1], observed.latents),
                carries=jax.tree.map(lambda x: x[:-1], observed.carries),
            )
        start = dreamer.starts(observed)
        count = start.index.shape[0]

        def act(feat: Array, draws: dict[str, Array]) -> dict[str, Array]:
            return policies.sample(self.policy.apply(params["policy"], sg(feat)), draws)

        return dreamer.imagine(start, act, jax.tree.map(lambda x: x[:, :count], draws))

    def reached(self, dreams: Imagined) -> PyTree:
        """The latents of states 1..H, those that an action has led to."""
        join = lambda x, end: jnp.concatenate([x[1:], end[None]])  # noqa: E731
        return jax.tree.map(join, dreams.latents, dreams.last)

    def judge(self, params: Params, dreamer: Dreamer, latents: PyTree) -> Values:
        """Predictions at the imagined states. The policy does not change the critic."""
        fixed = sg(params["value"])

        def judge(latents: PyTree) -> Values:
            heads = dreamer.predict(latents, ("reward", "continue"))
            reward = heads["reward"].mode()
            constant = jnp.full_like(reward, self.discount)
            discount = heads["continue"].mean() if "continue" in heads else constant
            value = self.critic.apply(fixed, dreamer.features(latents)).mode()
            return Values(reward, discount, value)

        return backend.by_slices(judge, latents)


def actor_critic_v1(
    config: ActorCriticV1Config,
    action_space: ActionSpace,
    model: WorldModel,
    feature_size: int,
    discount: Scalar = 0.99,
    dtype: str = "float32",
) -> Behavior:
    """The behaviour as pure functions; see `types.Behavior`.

    `loss` returns `{"policy" (N,), "value" (N,)}`, a number for every dream.

    Args:
      config: hyperparameters.
      action_space: one space, or a space per key.
      model: the world model to dream in. Its predicted "continue" is a discount: `discount` times
        the probability that the episode goes on. Without that head every step has `discount`.
      feature_size: length of the model's features.
      discount: discount of one step, in [0, 1].
      dtype: compute type.

    Raises:
      JaxwmError: see `policies.policy`.
    """
    behavior = ActorCriticV1(
        config,
        action_space,
        model,
        discount,
        policy_v1(config, action_space, feature_size, dtype),
        critic_v1(config, feature_size, dtype),
    )
    return Behavior(
        init=behavior.init,
        initial=lambda params: (),
        carry=lambda batch: (),
        draws=behavior.draws,
        act=behavior.act,
        loss=behavior.loss,
        after=lambda state, params: state,
    )


def policy_v1(
    config: ActorCriticV1Config,
    action_space: ActionSpace,
    feature_size: int,
    dtype: str = "float32",
) -> Policy:
    """One-hot choices and squashed normals; arguments as in `actor_critic_v1`."""

    def numbers(mean: Array, std: Array, event_ndims: int) -> dists.TanhNormal:
        return dists.TanhNormal.from_raw(mean, std, config.init_std, event_ndims)

    net = lambda sizes: _net(config, feature_size, config.policy_layers, sizes, dtype)  # noqa: E731
    return policies.policy(action_space, net, numbers, jax.random.normal)


def critic_v1(config: ActorCriticV1Config, feature_size: int, dtype: str = "float32") -> Net:
    """`params, features (..., F) -> normal of variance one`, the return from there."""
    module = _net(config, feature_size, config.value_layers, {"out": 1}, dtype)
    run = nets.call(module)
    return Net(
        lambda key: module.init(key, jnp.zeros((1, feature_size)))["params"],
        lambda params, feat: dists.UnitNormal(run(params, feat)["out"][..., 0], event_ndims=0),
    )


def _net(
    config: ActorCriticV1Config, feature_size: int, layers: int, sizes: dict[str, int], dtype: str
) -> nets.Heads:
    """An MLP with ELU and kernels of Glorot, as all networks of the paper."""
    shape = feature_size, config.units, layers, sizes
    return nets.Heads(*shape, 1.0, dtype, "none", "elu", "glorot")

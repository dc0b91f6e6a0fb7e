"""The imagined actor-critic of Dreamer V2 (arXiv:2010.02193, "Behavior learning").

From every latent of a replayed batch the policy is rolled out in the world model. A critic learns
lambda-returns of the dream; the policy follows score-function gradients of them, or gradients
through the dream itself, or a mix of both. A slow copy of the critic, renewed at every 100th
update, gives the values in the returns and the baseline.

Indices: imagined states 0..H, of which state 0 is the replayed one; action i is drawn at state i
and leads to state i + 1; reward r_i, discount d_i and value v_i are predicted at state i.

    R_i = r_i + d_i ((1 - lambda) v_{i+1} + lambda R_{i+1}),   R_H = v_H         i = 0..H-1
    w_i = d_0 ... d_{i-1}
    critic: -w_i log N(sg(R_i) | critic(s_i), 1)                                 i = 0..H-1
    policy: -w_i (objective_i + eta entropy(policy(s_i)))                        i = 0..H-2
        dynamics   objective_i = R_{i+1}
        reinforce  objective_i = log policy(a_i | s_i) sg(R_{i+1} - v_i)
        both       mix times the first, 1 - mix times the second

Differs from DreamerV3: the reward of state i counts for the return of state i, so the return that
an action can change is the next one; d_0 is known from the replayed row, not predicted.

Differs from the authors' code: the slow critic starts as a copy, where theirs is a network of its
own until the first update has been made.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import backend, dists, nets
from jaxwm.behaviors import explore, policies
from jaxwm.behaviors.policies import Plan, Policy
from jaxwm.config import at_least, positive, share
from jaxwm.numerics import Scalar
from jaxwm.optim import SlowCopy, SlowState, slow_copy
from jaxwm.returns import lambda_return
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Behavior,
    Discrete,
    Dreamer,
    Imagined,
    Key,
    Metrics,
    Mode,
    Net,
    Observed,
    Params,
    PyTree,
    Start,
    Step,
    WorldModel,
    as_dict,
)

sg = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class ActorCriticV2Config:
    """Hyperparameters of the imagined actor-critic; the defaults are those for Atari.

    Args:
      units: width of policy and critic.
      layers: depth of policy and critic.
      norm: "layer" puts a LayerNorm before their activations.
      imagine: steps H of each dream, at least 2.
      lambda_: mixing weight of the lambda-returns.
      entropy: weight of the policy's entropy.
      gradient: what the policy learns from; "auto" is "dynamics" if an action is continuous, else
        "reinforce".
      mix: share of "dynamics" in "both".
      slow_every: updates between two moves of the slow critic; the first update moves it.
      slow_rate: share of the critic that it takes over then.
      min_std: smallest standard deviation of continuous actions.
      implicit: whether samples of continuous actions have their exact gradient, see
        `dists.TruncatedNormal`.
      explore: in mode "explore", standard deviation of the noise added to continuous actions, and
        share of the uniform distribution in discrete ones.
    """

    units: int = 400
    layers: int = 4
    norm: Literal["none", "layer"] = "none"
    imagine: int = 15
    lambda_: float = 0.95
    entropy: float = 1e-3
    gradient: Literal["auto", "dynamics", "reinforce", "both"] = "auto"
    mix: float = 0.1
    slow_every: int = 100
    slow_rate: float = 1.0
    min_std: float = 0.1
    implicit: bool = False
    explore: float = 0.0

    def __post_init__(self):
        at_least(self, 1, "units", "layers", "slow_every")
        at_least(self, 2, "imagine")
        at_least(self, 0, "entropy")
        share(self, "lambda_", "mix", "slow_rate", "explore")
        positive(self, "min_std")


class State(NamedTuple):
    """What the behaviour keeps beside its parameters."""

    slow: SlowState  # the slow copy of the critic


class Draws(NamedTuple):
    """Every random number of one loss, for dreams that start from T * B rows."""

    model: PyTree  # (H, T * B, ...)
    action: dict[str, Array]  # (H, T * B, ...)


class ActDraws(NamedTuple):
    """Every random number of one action."""

    action: dict[str, Array]
    explore: dict[str, Array]


class Values(NamedTuple):
    """What is predicted along dreams; gradients flow into all but `weight`."""

    reward: Array  # (H + 1, N)
    discount: Array  # (H + 1, N)
    slow: Array  # (H + 1, N), values of the slow critic
    weight: Array  # (H + 1, N), probability of having got here


def returns_of(values: Values, lambda_: Scalar) -> Array:
    """The lambda-returns R_0..R_{H-1} (H, N) of a dream; gradients flow into all predictions."""
    columns = jax.vmap(lambda_return, in_axes=(1, 1, 1, None), out_axes=1)
    return columns(values.reward[:-1], values.discount[:-1], values.slow[1:], lambda_)


def weights_of(discount: Array) -> Array:
    """The weights w_0..w_H (H + 1, N) of a dream's states: products of the discounts before."""
    return sg(jnp.cumprod(jnp.concatenate([jnp.ones_like(discount[:1]), discount[:-1]]), 0))


def gradient_of(config: ActorCriticV2Config, action_space: ActionSpace) -> str:
    """What the policy learns from: "dynamics", "reinforce" or "both"."""
    if config.gradient != "auto":
        return config.gradient
    spaces = as_dict(action_space).values()
    return "reinforce" if all(isinstance(space, Discrete) for space in spaces) else "dynamics"


@dataclasses.dataclass(frozen=True)
class ActorCriticV2:
    """The imagined actor-critic; its methods are the functions of `types.Behavior`."""

    config: ActorCriticV2Config
    action_space: ActionSpace
    model: WorldModel
    discount: Scalar
    policy: Policy
    critic: Net
    slow: SlowCopy

    def init(self, key: Key) -> Params:
        key_policy, key_value = jax.random.split(key)
        return {"policy": self.policy.init(key_policy), "value": self.critic.init(key_value)}

    def initial(self, params: Params) -> State:
        return State(self.slow.init(params["value"]))

    def after(self, state: State, params: Params) -> State:
        return State(self.slow.update(state.slow, params["value"]))

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
        key_action, key_explore = jax.random.split(key)
        return ActDraws(
            self.policy.draws(key_action, lead),
            explore.draws(self.action_space, key_explore, lead),
        )

    def choose(self, plan: Plan, draws: ActDraws, mode: Mode) -> dict[str, Array]:
        """The action of every key, from the policy's distributions."""
        if mode == "greedy":
            return policies.mode(plan)
        action = policies.sample(plan, draws.action)
        if mode == "sample":
            return action
        return explore.noisy(self.action_space, action, draws.explore, self.config.explore)

    def loss(
        self,
        params: Params,
        state: State,
        dreamer: Dreamer,
        observed: Observed,
        steps: Step,
        draws: Draws,
    ) -> tuple[dict[str, Array], State, Metrics]:
        start = dreamer.starts(observed)
        terminal = steps.is_terminal.reshape(-1)[start.index]
        dreams = self.dream(params, dreamer, start, draws)
        values = self.judge(state, dreamer, dreams, terminal)
        returns = returns_of(values, self.config.lambda_)
        feat, weight = sg((dreamer.features(dreams.latents), values.weight))

        plan = self.policy.apply(params["policy"], feat[:-1])
        entropy = policies.entropy(plan)
        gain = self.objective(plan, dreams, values, returns) + self.config.entropy * entropy
        fit = self.critic.apply(params["value"], feat).log_prob(sg(returns))
        losses = {
            "policy": -(weight[:-2] * gain).mean(0),
            "value": -(weight[:-1] * fit).mean(0),
        }
        metrics = {
            "dream/return": returns.mean(),
            "dream/value": values.slow.mean(),
            "dream/reward": values.reward.mean(),
            "dream/discount": values.discount.mean(),
            "policy/entropy": entropy.mean(),
        }
        return losses, state, metrics

    @property
    def gradient(self) -> str:
        """See `gradient_of`."""
        return gradient_of(self.config, self.action_space)

    def dream(self, params: Params, dreamer: Dreamer, start: Start, draws: Draws) -> Imagined:
        """Dreams from replayed rows. The policy's inputs are constants."""
        # Without this, gradients through the dream would be computed and then not used.
        fixed = sg(params["policy"]) if self.gradient == "reinforce" else params["policy"]

        def act(feat: Array, draws: dict[str, Array]) -> dict[str, Array]:
            return policies.sample(self.policy.apply(fixed, sg(feat)), draws)

        count = start.index.shape[0]
        return dreamer.imagine(start, act, jax.tree.map(lambda x: x[:, :count], draws))

    def judge(self, state: State, dreamer: Dreamer, dreams: Imagined, terminal: Array) -> Values:
        """Predictions at all states of dreams, whose start may be a known end of an episode."""
        slow = sg(state.slow.params)

        def judge(latents: PyTree) -> dict[str, Array]:
            heads = dreamer.predict(latents, ("reward", "continue"))
            feat = dreamer.features(latents)
            found = {"slow": self.critic.apply(slow, feat).mode(), "reward": heads["reward"].mode()}
            if "continue" in heads:
                found["discount"] = heads["continue"].mean()
            return found

        along, last = backend.by_slices(judge, dreams.latents), judge(dreams.last)
        found = jax.tree.map(lambda x, end: jnp.concatenate([x, end[None]]), along, last)
        if "discount" in found:
            discount = found["discount"].at[0].set(self.discount * (1.0 - terminal))
        else:
            discount = jnp.full_like(found["reward"], self.discount)
        return Values(found["reward"], discount, found["slow"], weights_of(discount))

    def objective(self, plan: Plan, dreams: Imagined, values: Values, returns: Array) -> Array:
        """What the policy maximises at states 0..H-2 (H - 1, N), without its entropy."""
        if self.gradient == "dynamics":
            return returns[1:]
        action: Any = jax.tree.map(lambda x: x[:-1], dreams.action)
        if self.gradient == "reinforce":
            action = sg(action)
        score = policies.log_prob(plan, action) * sg(returns[1:] - values.slow[:-2])
        if self.gradient == "reinforce":
            return score
        return self.config.mix * returns[1:] + (1 - self.config.mix) * score


def actor_critic_v2(
    config: ActorCriticV2Config,
    action_space: ActionSpace,
    model: WorldModel,
    feature_size: int,
    discount: Scalar = 0.999,
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
    behavior = ActorCriticV2(
        config,
        action_space,
        model,
        discount,
        policy_v2(config, action_space, feature_size, dtype),
        critic_v2(config, feature_size, dtype),
        slow_copy(config.slow_rate, config.slow_every, first=1.0),
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


def policy_v2(
    config: ActorCriticV2Config,
    action_space: ActionSpace,
    feature_size: int,
    dtype: str = "float32",
) -> Policy:
    """One-hot choices and truncated normals; arguments as in `actor_critic_v2`."""

    def numbers(mean: Array, std: Array, event_ndims: int) -> dists.TruncatedNormal:
        return dists.TruncatedNormal.from_raw(
            mean, std, config.min_std, event_ndims=event_ndims, implicit=config.implicit
        )

    net = lambda sizes: _net(config, feature_size, sizes, dtype)  # noqa: E731
    return policies.policy(action_space, net, numbers, jax.random.uniform)


def critic_v2(config: ActorCriticV2Config, feature_size: int, dtype: str = "float32") -> Net:
    """`params, features (..., F) -> normal of variance one`, the return from there."""
    module = _net(config, feature_size, {"out": 1}, dtype)
    run = nets.call(module)
    return Net(
        lambda key: module.init(key, jnp.zeros((1, feature_size)))["params"],
        lambda params, feat: dists.UnitNormal(run(params, feat)["out"][..., 0], event_ndims=0),
    )


def _net(
    config: ActorCriticV2Config, feature_size: int, sizes: dict[str, int], dtype: str
) -> nets.Heads:
    """An MLP with ELU and kernels of Glorot, as all networks of the paper."""
    shape = feature_size, config.units, config.layers, sizes
    return nets.Heads(*shape, 1.0, dtype, config.norm, "elu", "glorot")

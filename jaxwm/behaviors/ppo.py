"""Proximal policy optimisation (arXiv:1707.06347): an agent that learns without a world model.

An update reads the newest rows 0..T of every environment, in order. The action taken at row t
stands in row t + 1. The memo of row t holds the log-probability of that action and the value of
row t, both from the time of acting. The update thus trains on N = T * B actions: it computes
advantages and targets once, then goes through all actions in shuffled minibatches, once per epoch.
The step from the last row of an episode to the first row of the next one has weight 0 and changes
nothing, because no action caused it.

Differences from the public implementations (vwxyzjn/cleanrl, luchris429/purejaxrl):

- Rows include the final observation of an episode, so an episode cut short bootstraps from its
  value. `truncation="terminal"` treats it like a terminal one, as those codes do.
- The agent acts on the last row of a window before the update, and that row is row 0 of the next
  window. One action in T thus comes from the policy before the update; its ratio accounts for that.
- The statistics that normalise observations change after an update, not with every step. Acting
  and learning thus use the same statistics, and the first ratio is 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import optim
from jaxwm.behaviors.ppo_networks import (
    HeadsConfig,
    Networks,
    actor_and_critic,
    choose,
    log_prob_of,
)
from jaxwm.config import at_least, positive, require, share
from jaxwm.numerics import (
    Running,
    Scalar,
    running_init,
    running_update,
)
from jaxwm.optim import Number, numbers_at_least, value_at
from jaxwm.returns import generalized_advantage
from jaxwm.types import (
    ALONE,
    Action,
    ActionSpace,
    Agent,
    AgentState,
    Array,
    Float,
    Key,
    Metrics,
    Mode,
    Net,
    ObsSpace,
    Params,
    PyTree,
    Shards,
    Step,
    Window,
)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Hyperparameters of PPO. The defaults are those of the public implementations.

    Args:
      heads: the actor and the critic.
      epochs: passes through the rows of an update.
      minibatches: gradient steps of each pass.
      discount: discount per row, in [0, 1].
      lambda_: mixing weight of the generalised advantage, in [0, 1].
      clip: change of the probability ratio beyond which the policy gains nothing more.
      value_clip: change of the value beyond which the critic gains nothing more; 0 for no limit.
      value: weight of the critic's loss.
      entropy: weight of the policy's entropy.
      normalize_advantage: whether each minibatch divides its advantages by their "population" or
        their "sample" (n - 1) standard deviation, or leaves them alone ("none").
      truncation: "bootstrap" adds the value of its last row to an episode cut short; "terminal"
        treats it like one that ended.
      normalize_obs: whether to normalise observed numbers by their running mean and variance.
      normalize_reward: whether to divide rewards by the running standard deviation of the
        discounted sum of past rewards.
      learning_rate: step size of Adam. Schedules count updates, not minibatches.
      max_grad_norm: largest norm of the gradient over all parameters; 0 for no limit.
      eps: epsilon of Adam.
    """

    heads: HeadsConfig = HeadsConfig()
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    lambda_: float = 0.95
    clip: Number = 0.2
    value_clip: Number = 0.2
    value: Number = 0.5
    entropy: Number = 0.01
    normalize_advantage: Literal["population", "sample", "none"] = "population"
    truncation: Literal["bootstrap", "terminal"] = "bootstrap"
    normalize_obs: bool = False
    normalize_reward: bool = False
    learning_rate: Number = 2.5e-4
    max_grad_norm: float = 0.5
    eps: float = 1e-5

    def __post_init__(self):
        at_least(self, 1, "epochs", "minibatches")
        share(self, "discount", "lambda_")
        at_least(self, 0, "max_grad_norm")
        positive(self, "eps")
        numbers_at_least(self, 0, "clip", "value_clip", "value", "entropy", "learning_rate")


class Numbers(NamedTuple):
    """The entries of `PPOConfig` that may be schedules, at one update."""

    clip: Scalar
    value_clip: Scalar
    value: Scalar
    entropy: Scalar
    learning_rate: Scalar


class Batch(NamedTuple):
    """N actions to learn from; `log_prob` and `value` come from the time of acting."""

    obs: dict[str, Array]
    action: Action
    log_prob: Array
    value: Array
    advantage: Array
    target: Array
    weight: Array  # 1, or 0 for the step between two episodes


class Rest(NamedTuple):
    """The part of the agent's state that acting does not need."""

    opt: Any
    updates: Array
    rewards: Running | tuple[()]  # of discounted sums, if rewards are normalised


def normalized(
    advantage: Float[Array, " N"],
    weight: Float[Array, " N"],
    kind: Literal["population", "sample", "none"] = "population",
    total: Callable[[Array], Array] = lambda sums: sums,
) -> Float[Array, " N"]:
    """`(advantage - mean) / (standard deviation + 1e-8)`.

    Args:
      advantage: advantages of a minibatch.
      weight: entries of weight 0 do not count.
      kind: the variance divides by the number of entries ("population") or by one less
        ("sample"); "none" changes nothing.
      total: sums over the shards of a training, which share mean and standard deviation.
    """
    if kind == "none":
        return advantage
    count, first = total(jnp.stack([weight.sum(), (weight * advantage).sum()]))
    mean = first / jnp.maximum(count, 1)
    second = total((weight * jnp.square(advantage - mean)).sum())
    variance = second / jnp.maximum(count - (kind == "sample"), 1)
    return (advantage - mean) / (jnp.sqrt(variance) + 1e-8)


def clipped_losses(
    log_prob: Float[Array, " N"],
    value: Float[Array, " N"],
    advantage: Float[Array, " N"],
    batch: Batch,
    clip: Scalar = 0.2,
    value_clip: Scalar = 0.2,
) -> dict[str, Float[Array, " N"]]:
    """The losses of every action, with `ratio = exp(log_prob - batch.log_prob)`:

        policy  max(-A ratio, -A min(max(ratio, 1 - clip), 1 + clip))                (equation 7)
        value   max((v - R)^2, (v_old + min(max(v - v_old, -c), c) - R)^2) / 2

    where the value's clipping, by `c = value_clip`, is that of the public implementations.

    Args:
      log_prob: of the actions, under the present policy.
      value: present values of the rows where they were taken.
      advantage: advantages A, normalised or not.
      batch: the recorded actions; those of weight 0 get the ratio 1.
      clip: see `PPOConfig`.
      value_clip: see `PPOConfig`.

    Returns:
      "policy" and "value"; "ratio"; and three measures of how far the policy has moved: "kl"
      (`ratio - 1 - log ratio`) and "kl_old" (`-log ratio`) estimate the divergence from the policy
      that acted, "clipped" is 1 where the ratio is outside its limits.
    """
    log_ratio = jnp.where(batch.weight > 0, log_prob - batch.log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    kept = jnp.clip(ratio, 1 - clip, 1 + clip)
    near = batch.value + jnp.clip(value - batch.value, -value_clip, value_clip)
    error = jnp.square(value - batch.target)
    clipped_error = jnp.maximum(error, jnp.square(near - batch.target))
    return {
        "policy": jnp.maximum(-advantage * ratio, -advantage * kept),
        "value": 0.5 * jnp.where(value_clip > 0, clipped_error, error),
        "ratio": ratio,
        "kl": ratio - 1 - log_ratio,
        "kl_old": -log_ratio,
        "clipped": (jnp.abs(ratio - 1) > clip).astype(ratio.dtype),
    }


def ppo(
    config: PPOConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    encoder: Net,
    dtype: str = "float32",
    shards: Shards = ALONE,
) -> Agent:
    """PPO as an `Agent` that learns from the newest rows.

    Args:
      config: hyperparameters.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      encoder: what actor and critic read, see `ppo_networks.actor_and_critic`.
      dtype: compute type of the networks.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if the actor cannot take an action space.
    """
    spaces = obs_space, action_space
    networks = actor_and_critic(config.heads, *spaces, encoder, dtype, config.normalize_obs)
    squares = lambda tree: shards.sum_parts(optim.square_sums(tree))  # noqa: E731
    optimizer = optim.clipped_adam(config.max_grad_norm, config.eps, squares)

    def init(key: Key) -> AgentState:
        params = networks.init(key)
        rewards = running_init() if config.normalize_reward else ()
        rest = Rest(optimizer.init(params), jnp.zeros((), jnp.int32), rewards)
        return shards.slice(AgentState(params, rest))

    def initial(batch: int) -> PyTree:
        return {"return": jnp.zeros((batch,))} if config.normalize_reward else ()

    def act(
        params: Params, carry: PyTree, row: Step, key: Key, mode: Mode = "explore"
    ) -> tuple[PyTree, Action, PyTree]:
        policy, value = networks.apply(shards.gather_params(params), row.obs)
        action = choose(policy, key, mode)
        memo = {"log_prob": log_prob_of(policy, action), "value": value}
        if config.normalize_reward:
            past = jnp.where(row.is_first, 0.0, config.discount * carry["return"]) + row.reward
            carry = {"return": past}
            memo |= carry
        whole = isinstance(action_space, Mapping)
        return carry, action if whole else action["action"], memo

    def update(state: AgentState, window: Window, key: Key) -> tuple[AgentState, None, Metrics]:
        params, rest = state
        rewards = _reward_statistics(rest.rewards, window, shards)
        batch = batch_of(config, window, rewards)
        numbers = numbers_at(config, rest.updates)
        learn = gradient_step(config, numbers, networks, optimizer, batch, shards)
        params, opt, metrics = _epochs(config, learn, (params, rest.opt), batch, key)
        metrics |= {"value/explained_variance": _explained(batch, shards.mean)}
        params = _observe(params, window.steps.obs, shards)
        return AgentState(params, Rest(opt, rest.updates + 1, rewards)), None, metrics

    # Traced once for a window's shapes, however often a program asks for it.
    update = jax.jit(update, inline=True)
    return Agent(init, initial, act, update, data="newest")


def batch_of(config: PPOConfig, window: Window, rewards: Running | tuple[()] = ()) -> Batch:
    """The actions of a window, with their advantages and targets.

    Args:
      config: for the discount, lambda and truncation.
      window: rows 0..T and their memos.
      rewards: statistics of discounted sums; rewards are divided by their standard deviation.

    Returns:
      N = T * B actions, time-major.
    """
    steps, memo = window.steps, window.memo
    reward = steps.reward
    if isinstance(rewards, Running):
        reward = jnp.clip(reward / jnp.sqrt(rewards.variance + 1e-8), -10.0, 10.0)
    of_column = functools.partial(generalized_advantage, truncation=config.truncation)
    of_columns = jax.vmap(of_column, in_axes=(1, 1, 1, 1, 1, None, None), out_axes=1)
    flags = steps.is_first, steps.is_last, steps.is_terminal
    advantage, weight = of_columns(reward, *flags, memo["value"], config.discount, config.lambda_)
    value = memo["value"][:-1]
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)  # noqa: E731
    before = lambda tree: flat(jax.tree.map(lambda x: x[:-1], tree))  # noqa: E731
    return Batch(
        obs=before(steps.obs),
        action=flat(jax.tree.map(lambda x: x[1:], steps.action)),
        log_prob=before(memo["log_prob"]),
        value=flat(value),
        advantage=flat(advantage),
        target=flat(advantage + value),
        weight=flat(weight),
    )


def _epochs(
    config: PPOConfig, learn: Callable[..., Any], learner: Any, batch: Batch, key: Key
) -> tuple[Params, Any, Metrics]:
    """Makes all gradient steps of an update, and averages their metrics."""
    rows, parts = batch.weight.shape[0], config.minibatches
    require(
        parts <= rows,
        f"PPO should divide the {rows} rows of an update into {parts} minibatches. Lower "
        "minibatches, or learn from more rows with --envs or --replay.batch-length.",
    )
    size = -(-rows // parts)
    padding = size * parts - rows  # makes the last minibatch as large as the others

    def epoch(learner: Any, index: Array) -> tuple[Any, Metrics]:
        order = jax.random.permutation(jax.random.fold_in(key, index), rows)
        order = jnp.pad(order, (0, padding)).reshape(parts, size)
        there = (jnp.arange(size * parts) < rows).reshape(parts, size)
        return jax.lax.scan(lambda learner, part: learn(learner, *part), learner, (order, there))

    (params, opt), metrics = jax.lax.scan(epoch, learner, jnp.arange(config.epochs))
    return params, opt, jax.tree.map(jnp.mean, metrics)


def numbers_at(config: PPOConfig, updates: Array | int) -> Numbers:
    """The numbers that may be schedules, after the given number of updates."""
    return Numbers(*(value_at(getattr(config, name), updates) for name in Numbers._fields))


def objective(
    numbers: Numbers,
    networks: Networks,
    params: Params,
    batch: Batch,
    advantage: Float[Array, " N"],
    count: Scalar,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a minibatch: `policy + numbers.value * value - numbers.entropy * entropy`.

    Args:
      numbers: weights and limits.
      networks: the actor and the critic.
      params: their parameters.
      batch: the minibatch.
      advantage: its advantages, normalised or not.
      count: divisor of the sums over actions: the sum of the weights, if there are no shards.

    Returns:
      The loss, and metrics.
    """
    policy, value = networks.apply(params, batch.obs)
    log_prob = log_prob_of(policy, batch.action)
    each = clipped_losses(log_prob, value, advantage, batch, numbers.clip, numbers.value_clip)
    each |= {"entropy": sum(dist.entropy() for dist in policy.values())}
    mean = {name: (batch.weight * x).sum() / count for name, x in each.items()}
    total = mean["policy"] + numbers.value * mean["value"] - numbers.entropy * mean["entropy"]
    return total, {
        "loss/policy": mean["policy"],
        "loss/value": mean["value"],
        "loss/total": total,
        "policy/entropy": mean["entropy"],
        "policy/kl": mean["kl"],
        "policy/kl_old": mean["kl_old"],
        "policy/clipped": mean["clipped"],
    }


def gradient_step(
    config: PPOConfig,
    numbers: Numbers,
    networks: Networks,
    optimizer: optim.Optimizer,
    batch: Batch,
    shards: Shards = ALONE,
) -> Callable[..., Any]:
    """`(params, opt), rows, there -> (params, opt), metrics`: one step on some rows of a batch.

    Args:
      config: for the way to normalise advantages.
      numbers: weights, limits and the learning rate.
      networks: the actor and the critic.
      optimizer: returns the change to subtract, in units of the learning rate.
      batch: all actions of the update. `rows` are indices into it; a row whose `there` is False
        is padding.
      shards: how the shards of the training meet.
    """

    def step(learner: Any, rows: Array, there: Array) -> tuple[Any, Metrics]:
        params, opt = learner
        part = jax.tree.map(lambda x: x[rows], batch)
        part = part._replace(weight=part.weight * there)
        kind = config.normalize_advantage
        advantage = normalized(part.advantage, part.weight, kind, shards.total)
        # Every shard divides by the mean count, so the mean of their gradients is the gradient of
        # the mean over the rows of all shards.
        count = jnp.maximum(shards.mean(part.weight.sum()), 1e-6)
        loss = functools.partial(objective, numbers, networks)
        whole = shards.gather_params(params)
        gradient, metrics = jax.grad(loss, has_aux=True)(whole, part, advantage, count)
        gradient, metrics = shards.mean((gradient, metrics))
        squares = shards.sum_parts(optim.square_sums(gradient))
        metrics |= {"grad_norm": optim.global_norm(gradient, lambda _: squares)}
        change, opt = optimizer.update(gradient, opt)
        step_size = numbers.learning_rate
        params = jax.tree.map(lambda x, change: x - step_size * change, params, change)
        return (params, opt), metrics

    return step


def _explained(batch: Batch, mean: Callable[[Array], Array]) -> Array:
    """Share of the targets' variance that the recorded values explain; 0 without variance."""
    count = jnp.maximum(mean(batch.weight.sum()), 1e-6)

    def variance(x: Array) -> Array:
        off = x - mean((batch.weight * x).sum()) / count
        return mean((batch.weight * jnp.square(off)).sum()) / count

    residual, whole = variance(batch.target - batch.value), variance(batch.target)
    varies = whole > 0
    return jnp.where(varies, 1 - residual / jnp.where(varies, whole, 1.0), 0.0)


def _reward_statistics(
    rewards: Running | tuple[()], window: Window, shards: Shards
) -> Running | tuple[()]:
    """Adds the discounted sums of rewards of a window to their statistics, if there are any."""
    if not isinstance(rewards, Running):
        return rewards
    sums = window.memo["return"][1:].reshape(-1)
    arrived = ~window.steps.is_first[1:].reshape(-1)
    return running_update(rewards, sums, arrived.astype(sums.dtype), shards.total)


def _observe(params: Params, obs: dict[str, Array], shards: Shards) -> Params:
    """Adds the observations of a window to the statistics among the parameters, if any."""
    if "observations" not in params:
        return params
    whole = shards.gather_params(params)["observations"]
    fresh = {}
    for name, state in whole.items():
        rows = obs[name][1:].reshape(-1, *state.mean.shape)
        fresh[name] = running_update(state, rows, jnp.ones(rows.shape[:1]), shards.total)
    return params | {"observations": shards.slice(fresh)}

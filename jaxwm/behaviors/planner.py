"""Planning with the cross-entropy method (CEM) in a world model, as PlaNet does it.

The planner searches for the best sequence of H actions from the present state, executes the first
one, and plans again at the next step. One iteration of the search:

    a^k_0..a^k_{H-1} = clip(mean + std * noise, -1, 1)       candidates k = 1..K
    s^k_t ~ p(s_t | s^k_{t-1}, a^k_{t-1})                    sampled, with noise of its own
    R^k = r(s^k_1) + ... + r(s^k_H)                          means of the predicted rewards
    mean, std = mean(elites), sqrt(var(elites) + 1e-6)       elites: the candidates of largest R^k

The search starts from mean 0 and std 1 at every step and ends after a fixed number of iterations;
the action is the first one of the last mean, not that of the best candidate.

Every environment of a batch has a search of its own. The original code is right for one
environment only: it tiles states and candidates in different orders.

Additions of ours: discrete actions (each step of the plan has class probabilities, refitted to the
elites), several actions at once, and returns that end with the predicted end of the episode.

Arrays are (H, B, K, ...): steps of the plan, environments, candidates.

Source: PlaNet (arXiv:1811.04551, Algorithm 2) and its code, github.com/google-research/planet.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.config import at_least, positive, require, share
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Behavior,
    Box,
    Discrete,
    Dreamer,
    Float,
    JaxwmError,
    Key,
    Mode,
    PyTree,
    Space,
    WorldModel,
    as_dict,
)


@dataclasses.dataclass(frozen=True)
class CEMConfig:
    """Hyperparameters of the search; the defaults are those of the paper.

    Args:
      horizon: actions H of a plan.
      iterations: rounds of sampling, evaluation and refitting.
      candidates: plans K sampled in each iteration.
      elites: best plans that the next iteration is fitted to.
      start_std: standard deviation of continuous actions in the first iteration.
      explore: standard deviation of the noise on continuous actions in mode "explore".
      explore_discrete: probability of a uniform choice for discrete actions in mode "explore".
      unimix: share of the uniform distribution in refitted class probabilities, so that a class
        without elites can return.
      continues: whether a predicted reward counts only as far as the model predicts that the
        episode still goes on; needs a model with a continue head.
    """

    horizon: int = 12
    iterations: int = 10
    candidates: int = 1000
    elites: int = 100
    start_std: float = 1.0
    explore: float = 0.3
    explore_discrete: float = 0.1
    unimix: float = 0.01
    continues: bool = False

    def __post_init__(self):
        at_least(self, 1, "horizon", "iterations", "candidates", "elites")
        at_least(self, 0, "explore")
        positive(self, "start_std")
        share(self, "explore_discrete", "unimix")
        require(
            self.elites <= self.candidates,
            f"CEMConfig.elites is {self.elites}, but there are only {self.candidates} candidates. "
            "Lower elites or raise candidates.",
        )


class Proposal(NamedTuple):
    """The distribution of one action in a plan, which CEM refits to its elites.

    Attributes:
      start: `lead -> parameters (*lead, ...)`, the distribution of the first iteration.
      draws: `key, lead -> noise (*lead, ...)` for `lead` actions.
      sample: `parameters (H, B), noise (H, B, K) -> actions (H, B, K)`.
      refit: `elites (H, B, E) -> parameters (H, B)`.
      best: `parameters -> action`, the one to execute.
      explore: `action (B), noise (B) -> action (B)`, the action with exploration noise added.
    """

    start: Callable[[tuple[int, ...]], PyTree]
    draws: Callable[[Key, tuple[int, ...]], Array]
    sample: Callable[[PyTree, Array], Array]
    refit: Callable[[Array], PyTree]
    best: Callable[[PyTree], Array]
    explore: Callable[[Array, Array], Array]


class Normal(NamedTuple):
    """Parameters of a `gaussian` proposal."""

    mean: Array
    std: Array


class Search(NamedTuple):
    """Every iteration of a search; the refit of the last one is the plan.

    Attributes:
      candidates: (I, H, B, K, ...) evaluated actions by key.
      returns: (I, B, K) their returns.
      refit: (I, H, B, ...) parameters of the proposals after each iteration, by key.
    """

    candidates: dict[str, Array]
    returns: Array
    refit: dict[str, PyTree]

    @property
    def plan(self) -> dict[str, PyTree]:
        """(H, B, ...) parameters of the proposals after the last iteration, by key."""
        return jax.tree.map(lambda x: x[-1], self.refit)


def gaussian(config: CEMConfig, space: Box) -> Proposal:
    """Independent normal distributions, clipped to [-1, 1].

    Args:
      config: gives the first standard deviation and the exploration noise.
      space: a box of float32; only its shape counts.
    """

    def start(lead: tuple[int, ...]) -> Normal:
        shape = (*lead, *space.shape)
        return Normal(jnp.zeros(shape), jnp.full(shape, config.start_std, jnp.float32))

    def draws(key: Key, lead: tuple[int, ...]) -> Array:
        return jax.random.normal(key, (*lead, *space.shape))

    def sample(normal: Normal, noise: Array) -> Array:
        # Before the evaluation and the refit, so that the elites are actions that were tried.
        return jnp.clip(normal.mean[:, :, None] + normal.std[:, :, None] * noise, -1.0, 1.0)

    def refit(elites: Array) -> Normal:
        return Normal(elites.mean(2), jnp.sqrt(elites.var(2) + 1e-6))

    def best(normal: Normal) -> Array:
        return normal.mean

    def explore(action: Array, noise: Array) -> Array:
        return jnp.clip(action + config.explore * noise, -1.0, 1.0)

    return Proposal(start, draws, sample, refit, best, explore)


def categorical(config: CEMConfig, space: Discrete) -> Proposal:
    """Independent choices; the parameters are probabilities (..., *space.shape, classes).

    The refit is the share of the elites that chose a class, mixed with the uniform distribution.
    Not in the paper, whose actions are continuous.

    Args:
      config: gives the share of the uniform distribution and of random exploration.
      space: the space of the action.
    """
    mask = space.mask()
    exists = np.ones((*space.shape, space.width)) if mask is None else mask
    uniform = jnp.asarray(exists / np.sum(exists, -1, keepdims=True), jnp.float32)

    def start(lead: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(uniform, (*lead, *uniform.shape))

    def draws(key: Key, lead: tuple[int, ...]) -> Array:
        return jax.random.gumbel(key, (*lead, *uniform.shape))

    def sample(probs: Array, noise: Array) -> Array:
        return jnp.argmax(jnp.log(probs[:, :, None]) + noise, -1).astype(jnp.int32)

    def refit(elites: Array) -> Array:
        shares = jax.nn.one_hot(elites, space.width).mean(2)
        return (1 - config.unimix) * shares + config.unimix * start(shares.shape[:2])

    def best(probs: Array) -> Array:
        return jnp.argmax(probs, -1).astype(jnp.int32)

    def explore(action: Array, noise: Array) -> Array:
        planned = jax.nn.one_hot(action, space.width)
        share = config.explore_discrete
        probs = (1 - share) * planned + share * start(action.shape[:1])
        return jnp.argmax(jnp.log(probs) + noise, -1).astype(jnp.int32)

    return Proposal(start, draws, sample, refit, best, explore)


def proposals(config: CEMConfig, action_space: ActionSpace) -> dict[str, Proposal]:
    """The proposal of each action by key; a bare action has the key "action".

    Args:
      config: hyperparameters.
      action_space: one space, or a space per key.

    Raises:
      JaxwmError: if a space is neither discrete nor a box of float32.
    """
    found: dict[str, Proposal] = {}
    for name, space in sorted(as_dict(action_space).items()):
        found[name] = _proposal(config, name, space)
    return found


def _proposal(config: CEMConfig, name: str, space: Space) -> Proposal:
    if isinstance(space, Discrete):
        return categorical(config, space)
    if space.dtype == "float32":
        return gaussian(config, space)
    raise JaxwmError(
        f"The planner cannot choose the action {name!r}, which has the space {space}. Use Discrete "
        "or a float32 Box."
    )


def cem(
    config: CEMConfig,
    proposals: Mapping[str, Proposal],
    step: Callable[[Any, dict[str, Array], Any], tuple[Any, Any]],
    score: Callable[[Any], Float[Array, "H N"]],
    start: PyTree,
    action_draws: Mapping[str, Array],
    step_draws: PyTree,
) -> Search:
    """Searches for the sequences of actions with the largest returns, one for each environment.

    All B * K candidates roll out as one batch of N, the K candidates of an environment in a row.
    The world may be a learned model or a true simulator. No gradient is needed of it.

    Args:
      config: hyperparameters.
      proposals: the distribution of each action by key.
      step: `state (N), actions (N) by key, draws (N) -> state (N), outcome (N)`.
      score: `outcomes (H, N) -> rewards (H, N)`, summed over H to returns; outcome t follows action
        t. A return that is NaN counts as minus infinity.
      start: (B, ...) states that the plans start from.
      action_draws: (I, H, B, K, ...) noise of the candidates, as from `Proposal.draws`.
      step_draws: (I, H, N, ...) noise of `step`.

    Returns:
      The candidates, returns and refits of all I iterations.

    Source: PlaNet (arXiv:1811.04551), Algorithm 2.
    """
    batch, count = next(iter(action_draws.values())).shape[2:4]
    tiled = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), start)

    def evaluate(actions: dict[str, Array], draws: PyTree) -> Float[Array, "B K"]:
        rows = {k: x.reshape(x.shape[0], batch * count, *x.shape[3:]) for k, x in actions.items()}
        _, outcomes = jax.lax.scan(lambda s, inputs: step(s, *inputs), tiled, (rows, draws))
        returns = score(outcomes).sum(0).reshape(batch, count)
        # `top_k` takes NaN for the largest number: one bad rollout would be an elite.
        return jnp.where(jnp.isnan(returns), -jnp.inf, returns)

    def iterate(params: dict[str, PyTree], draws: Any) -> tuple[dict[str, PyTree], Search]:
        noise, model_noise = draws
        actions = {k: p.sample(params[k], noise[k]) for k, p in proposals.items()}
        returns = evaluate(actions, model_noise)
        _, best = jax.lax.top_k(returns, config.elites)
        choose = jax.vmap(lambda action, index: action[:, index], (1, 0), 1)
        params = {k: p.refit(choose(actions[k], best)) for k, p in proposals.items()}
        return params, Search(actions, returns, params)

    lead = (config.horizon, batch)
    first = {k: p.start(lead) for k, p in proposals.items()}
    _, search = jax.lax.scan(iterate, first, (dict(action_draws), step_draws))
    return search


def planner(
    config: CEMConfig,
    action_space: ActionSpace,
    model: WorldModel | None = None,
    feature_size: int = 0,
    dtype: str = "float32",
    all_gather: Callable[[Array], Array] = lambda returns: returns,
) -> Behavior:
    """CEM as a behaviour without parameters, state and losses; see `types.Behavior`.

    `act` plans from the model's state after the present row. Mode "explore" adds the exploration
    noise to the planned action; "sample" and "greedy" execute it as it is.

    Args:
      config: hyperparameters.
      action_space: one space, or a space per key.
      model: unused; the planner gets its `Dreamer` when it acts.
      feature_size: unused.
      dtype: unused; the planner itself computes in float32.
      all_gather: unused.

    Raises:
      JaxwmError: if a space is neither discrete nor a box of float32; later, when a program with
        `act` is built, if the model does not predict what the plan's return is made of.
    """
    del model, feature_size, dtype, all_gather
    found = proposals(config, action_space)
    bare = not isinstance(action_space, Mapping)

    def unwrap(actions: dict[str, Array]) -> Action:
        return actions["action"] if bare else actions

    def draws(key: Key, lead: tuple[int, ...]) -> dict[str, Array]:
        keys = jax.random.split(key, len(found))
        return {name: found[name].draws(k, lead) for name, k in zip(found, keys, strict=True)}

    def act(
        params: PyTree,
        dreamer: Dreamer,
        carry: tuple[()],
        model_carry: PyTree,
        latent: PyTree,
        key: Key,
        mode: Mode = "explore",
    ) -> tuple[tuple[()], Action]:
        del params
        key_actions, key_model, key_explore = jax.random.split(key, 3)
        batch = jax.tree.leaves((model_carry, latent))[0].shape[0]
        lead = (config.iterations, config.horizon)
        search = cem(
            config,
            found,
            lambda state, actions, draws: dreamer.step(state, unwrap(actions), draws),
            lambda latents: predicted_rewards(dreamer, latents, config.continues),
            model_carry,
            draws(key_actions, (*lead, batch, config.candidates)),
            dreamer.draws(key_model, (*lead, batch * config.candidates)),
        )
        actions = {k: p.best(search.plan[k])[0] for k, p in found.items()}
        if mode == "explore":
            noise = draws(key_explore, (batch,))
            actions = {k: p.explore(actions[k], noise[k]) for k, p in found.items()}
        return carry, unwrap(actions)

    return Behavior(
        init=lambda key: {},
        initial=lambda params: (),
        carry=lambda batch: (),
        draws=lambda key, lead: (),
        act=act,
        loss=lambda params, state, dreamer, observed, steps, draws: ({}, state, {}),
        after=lambda state, params: state,
    )


def predicted_rewards(
    dreamer: Dreamer, latents: PyTree, continues: bool = False
) -> Float[Array, "H N"]:
    """Means of the rewards that the model predicts at dreamed states 1..H.

    With `continues` the reward of state t is weighted by the predicted probability that the
    episode has not ended before: `c_1 * ... * c_{t-1}`.

    Args:
      dreamer: the model.
      latents: (H, N) states, each after an action.
      continues: whether to weight.

    Raises:
      JaxwmError: if the model does not predict rewards, or continue probabilities though they are
        wanted.
    """
    wanted = ("reward", "continue") if continues else ("reward",)
    predicted = dreamer.predict(latents, wanted)
    missing = [key for key in wanted if key not in predicted]
    require(
        not missing,
        f"The planner needs a model that predicts {' and '.join(wanted)}; this one does not "
        f"predict {' and '.join(missing)}. Give the model that head"
        + (", or set CEMConfig.continues to False." if missing == ["continue"] else "."),
    )
    reward = predicted["reward"].mean()
    if not continues:
        return reward
    alive = jnp.cumprod(predicted["continue"].mean(), 0)
    return reward * jnp.concatenate([jnp.ones_like(alive[:1]), alive[:-1]])

"""Agents that learn by gradients: a world model and a behaviour, and how their losses meet.

`joint` adds all losses, takes one gradient and makes one step (DreamerV3, Dreamer V1, PlaNet).
`in_turn` steps the model first; the behaviour then dreams in the model that has just learned
(Dreamer V2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.models.imagine import dreamer
from jaxwm.numerics import Scalar
from jaxwm.optim import Optimizer, apply_updates, global_norm, square_sums
from jaxwm.types import (
    ALONE,
    Action,
    Agent,
    AgentState,
    Array,
    Behavior,
    Int,
    Key,
    Metrics,
    Mode,
    Observed,
    Params,
    PyTree,
    Shards,
    Step,
    Window,
    WorldModel,
)

# `loss name, updates made before -> weight` of a loss.
Weights = Callable[[str, Array], Scalar]


class Rest(NamedTuple):
    """What learning keeps beside the parameters.

    Attributes:
      behavior: the behaviour's running statistics and slow copies.
      opt: the optimiser's state.
      updates: updates made so far.
    """

    behavior: Any
    opt: Any
    updates: Int[Array, ""]


class Carry(NamedTuple):
    """What acting remembers: the model's memory and the behaviour's."""

    model: PyTree
    behavior: PyTree


class Draws(NamedTuple):
    """Every random number of one update."""

    model: PyTree  # for latents (T, B)
    behavior: PyTree


def joint(
    model: WorldModel,
    behavior: Behavior,
    weights: Weights,
    optimizer: Optimizer,
    shards: Shards = ALONE,
) -> Agent:
    """An agent with one loss, one gradient and one optimiser step.

    Args:
      model: the world model.
      behavior: how to act with it.
      weights: the weight of each loss.
      optimizer: a transformation of gradients of `{"model": ..., "behavior": ...}`. Several
        optimisers are one transformation over groups (`optim.grouped`).
      shards: how the shards of the training meet, if it is divided.
    """

    def loss(
        params: Params, state: Any, updates: Array, carry: PyTree, steps: Step, draws: Draws
    ) -> tuple[Array, tuple[Observed, Any, Metrics]]:
        losses, observed, metrics = model.loss(params["model"], carry, steps, draws.model)
        dreams = dreamer(model, params["model"])
        behavior_losses, state, behavior_metrics = behavior.loss(
            params["behavior"], state, dreams, observed, steps, draws.behavior
        )
        total, means = weighted_sum(losses | behavior_losses, weights, updates)
        return total, (observed, state, metrics | behavior_metrics | means | {"loss/total": total})

    def learn(
        state: AgentState, carry: PyTree, steps: Step, draws: Draws
    ) -> tuple[AgentState, Observed, Metrics]:
        params, rest = shards.gather_params(state.params), state.rest
        before = shards.gather_rest(rest.behavior)
        grads, (observed, after, metrics) = jax.grad(loss, has_aux=True)(
            params, before, rest.updates, carry, steps, draws
        )
        # The only reduction of an update: the metrics come along with the gradients.
        grads, metrics = shards.mean((grads, metrics))
        changes, opt = optimizer.update(grads, rest.opt, state.params)
        learned: Any = apply_updates(state.params, changes)
        after = behavior.after(shards.slice(after), learned["behavior"])
        rest = Rest(after, opt, rest.updates + 1)
        metrics["grad_norm"] = norm_over_shards(grads, shards)
        return AgentState(learned, rest), observed, metrics

    return _agent(model, behavior, optimizer.init, learn, shards)


def in_turn(
    model: WorldModel,
    behavior: Behavior,
    weights: Weights,
    model_optimizer: Optimizer,
    behavior_optimizer: Optimizer,
    shards: Shards = ALONE,
) -> Agent:
    """An agent whose model makes its step before the behaviour dreams in it.

    Dreams start from the latents of the model before its step, as in Dreamer V2.

    Args:
      model: the world model.
      behavior: how to act with it.
      weights: the weight of each loss.
      model_optimizer: a transformation of the model's gradients.
      behavior_optimizer: a transformation of the behaviour's gradients.
      shards: how the shards of the training meet, if it is divided.
    """

    def model_loss(
        params: Params, updates: Array, carry: PyTree, steps: Step, draws: Draws
    ) -> tuple[Array, tuple[Observed, Metrics]]:
        losses, observed, metrics = model.loss(params, carry, steps, draws.model)
        total, means = weighted_sum(losses, weights, updates)
        return total, (observed, metrics | means | {"loss/model": total})

    def behavior_loss(
        params: Params,
        state: Any,
        updates: Array,
        model_params: Params,
        observed: Observed,
        steps: Step,
        draws: Draws,
    ) -> tuple[Array, tuple[Any, Metrics]]:
        losses, state, metrics = behavior.loss(
            params, state, dreamer(model, model_params), observed, steps, draws.behavior
        )
        total, means = weighted_sum(losses, weights, updates)
        return total, (state, metrics | means | {"loss/behavior": total})

    def init_optimizers(params: Params) -> dict[str, Any]:
        return {
            "model": model_optimizer.init(params["model"]),
            "behavior": behavior_optimizer.init(params["behavior"]),
        }

    def learn(
        state: AgentState, carry: PyTree, steps: Step, draws: Draws
    ) -> tuple[AgentState, Observed, Metrics]:
        params, rest = shards.gather_params(state.params), state.rest
        grads, (observed, metrics) = jax.grad(model_loss, has_aux=True)(
            params["model"], rest.updates, carry, steps, draws
        )
        grads, metrics = shards.mean((grads, metrics))
        changes, opt_model = model_optimizer.update(grads, rest.opt["model"], state.params["model"])
        learned: Any = {**state.params, "model": apply_updates(state.params["model"], changes)}
        metrics["grad_norm/model"] = norm_over_shards(grads, shards)

        params, before = shards.gather_params(learned), shards.gather_rest(rest.behavior)
        grads, (after, behavior_metrics) = jax.grad(behavior_loss, has_aux=True)(
            params["behavior"], before, rest.updates, params["model"], observed, steps, draws
        )
        grads, behavior_metrics = shards.mean((grads, behavior_metrics))
        changes, opt_behavior = behavior_optimizer.update(
            grads, rest.opt["behavior"], state.params["behavior"]
        )
        learned["behavior"] = apply_updates(state.params["behavior"], changes)
        metrics |= behavior_metrics | {"grad_norm/behavior": norm_over_shards(grads, shards)}

        after = behavior.after(shards.slice(after), learned["behavior"])
        opt = {"model": opt_model, "behavior": opt_behavior}
        return AgentState(learned, Rest(after, opt, rest.updates + 1)), observed, metrics

    return _agent(model, behavior, init_optimizers, learn, shards)


def _agent(
    model: WorldModel,
    behavior: Behavior,
    init_optimizer: Callable[[Params], Any],
    learn: Callable[..., tuple[AgentState, Observed, Metrics]],
    shards: Shards,
) -> Agent:
    """The agent around a function that makes one update from sequences and draws."""

    def init(key: Key) -> AgentState:
        key_model, key_behavior = jax.random.split(key)
        params = {"model": model.init(key_model), "behavior": behavior.init(key_behavior)}
        state = behavior.initial(params["behavior"])
        rest = Rest(state, init_optimizer(params), jnp.zeros((), jnp.int32))
        return shards.slice(AgentState(params, rest))

    def initial(batch: int) -> Carry:
        return Carry(model.initial(batch), behavior.carry(batch))

    def act(
        params: Params, carry: Carry, row: Step, key: Key, mode: Mode = "explore"
    ) -> tuple[Carry, Action, PyTree]:
        key_latent, key_action = jax.random.split(key)
        params = shards.gather_params(params)
        rows = jax.tree.map(lambda x: x[None], row)
        draws = model.draws(key_latent, rows.is_first.shape)
        observed = model.observe(params["model"], carry.model, rows, draws)
        memory, latent = observed.carry, jax.tree.map(lambda x: x[0], observed.latents)
        dreams = dreamer(model, params["model"])
        plan, action = behavior.act(
            params["behavior"], dreams, carry.behavior, memory, latent, key_action, mode
        )
        return Carry(memory, plan), action, model.pack(memory)

    def update(
        state: AgentState, window: Window, key: Key
    ) -> tuple[AgentState, PyTree | None, Metrics]:
        key_model, key_behavior = jax.random.split(key)
        steps = jax.tree.map(lambda x: x[1:], window.steps)
        lead = steps.is_first.shape
        stored = jax.tree.leaves(window.memo) != []
        if not stored:  # without a memory a sequence starts like an episode
            steps = steps._replace(is_first=steps.is_first.at[0].set(True))
        carry = model.unpack(window.memo, lead[1])
        draws = Draws(model.draws(key_model, lead), behavior.draws(key_behavior, lead))
        state, observed, metrics = learn(state, carry, steps, draws)
        return state, model.pack(observed.carries) if stored else None, metrics

    # Traced once for a batch's shapes, however often a program calls it.
    update = jax.jit(update, inline=True)
    return Agent(init, initial, act, update, "windows", model, behavior)


def weighted_sum(
    losses: dict[str, Array], weights: Weights, updates: Array
) -> tuple[Array, Metrics]:
    """The weighted sum of the losses' means, and the means as metrics "loss/NAME"."""
    means = {name: term.mean() for name, term in losses.items()}
    terms = [weights(name, updates) * mean for name, mean in means.items()]
    total = jnp.sum(jnp.stack(terms)) if terms else jnp.zeros(())
    return total, {f"loss/{name}": mean for name, mean in means.items()}


def norm_over_shards(grads: Params, shards: Shards) -> Array:
    """The norm of gradients that each device may hold a part of."""
    return global_norm(grads, lambda tree: shards.sum_parts(square_sums(tree)))

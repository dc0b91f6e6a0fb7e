"""Policies of imagined actor-critics: a network with a distribution for every action.

In a dream an action is a sample of its distribution. Where gradients should flow through it, a
choice is a one-hot vector; `for_env` turns such vectors into the indices that environments take.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import dists, nets
from jaxwm.config import require
from jaxwm.types import Action, ActionSpace, Array, Box, Discrete, JaxwmError, Key, Params, as_dict

Plan = dict[str, Any]
"""A distribution for every action key."""


class Policy(NamedTuple):
    """A policy as pure functions.

    Attributes:
      init: `key -> params`.
      apply: `params, features (..., F) -> {action key: distribution}`.
      draws: `key, lead -> {action key: draws}` for actions of shape `lead`.
    """

    init: Callable[[Key], Params]
    apply: Callable[[Params, Array], Plan]
    draws: Callable[[Key, tuple[int, ...]], dict[str, Array]]


def policy(
    action_space: ActionSpace,
    net: Callable[[dict[str, int]], nets.Heads],
    numbers: Callable[[Array, Array, int], Any],
    noise: Callable[[Key, tuple[int, ...]], Array],
    choices: Callable[[Array, Any, int], Any] = dists.OneHotAction,
) -> Policy:
    """A policy with the distributions of the paper at hand.

    Args:
      action_space: one space, or a space per key.
      net: the network, from the sizes of its outputs by name.
      numbers: the distribution of a box: `mean part, std part (..., *shape), event axes -> dist`.
      noise: draws for its `sample_noise`, such as `jax.random.normal`.
      choices: the distribution of a choice: `logits (..., *shape, K), mask, event axes -> dist`.

    Raises:
      JaxwmError: if an action space is neither discrete nor a box of numbers, or two outputs of the
        network would have one name.
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
    module = net(sizes)
    run = nets.call(module)

    def apply(params: Params, feat: Array) -> Plan:
        out, plan = run(params, feat), {}
        for name, space in spaces.items():
            lead, rank = feat.shape[:-1], len(space.shape)
            if isinstance(space, Discrete):
                logits = out[name].reshape(*lead, *space.shape, space.width)
                plan[name] = choices(logits, space.mask(), rank)
            else:
                mean, std = out[f"{name}_mean"], out[f"{name}_std"]
                shape = (*lead, *space.shape)
                plan[name] = numbers(mean.reshape(shape), std.reshape(shape), rank)
        return plan

    def draws(key: Key, lead: tuple[int, ...]) -> dict[str, Array]:
        found = {}
        for index, (name, space) in enumerate(sorted(spaces.items())):
            key_name = jax.random.fold_in(key, index)
            if isinstance(space, Discrete):
                found[name] = jax.random.gumbel(key_name, (*lead, *space.shape, space.width))
            else:
                found[name] = noise(key_name, (*lead, *space.shape))
        return found

    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros((1, module.inputs)))["params"]

    return Policy(init, apply, draws)


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


def sample(plan: Plan, draws: Mapping[str, Array]) -> dict[str, Array]:
    """An action of every key, from draws of the policy."""
    return {name: dist.sample_noise(draws[name]) for name, dist in plan.items()}


def mode(plan: Plan) -> dict[str, Array]:
    """What the policy prefers to do, for every key."""
    return {name: dist.mode() for name, dist in plan.items()}


def log_prob(plan: Plan, action: Mapping[str, Array]) -> Array:
    """The log-density of all actions together."""
    return _total([dist.log_prob(action[name]) for name, dist in plan.items()])


def entropy(plan: Plan) -> Array:
    """The entropy of all actions together, in nats."""
    return _total([dist.entropy() for dist in plan.values()])


def _total(terms: list[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def for_env(action_space: ActionSpace, action: Mapping[str, Array]) -> Action:
    """Sampled actions as environments take them: choices as indices, a single action bare."""
    spaces = as_dict(action_space)
    chosen = {
        name: jnp.argmax(x, -1).astype(jnp.int32) if _is_one_hot(spaces[name], x) else x
        for name, x in action.items()
    }
    return chosen if isinstance(action_space, Mapping) else chosen["action"]


def _is_one_hot(space: Any, x: Array) -> bool:
    return isinstance(space, Discrete) and jnp.issubdtype(x.dtype, jnp.floating)

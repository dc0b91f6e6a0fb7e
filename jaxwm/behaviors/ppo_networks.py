"""The actor and the critic of PPO: observations to distributions of actions and to values."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import dists, nets
from jaxwm.config import require
from jaxwm.numerics import running_init, running_normalize, wide
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Box,
    Discrete,
    JaxwmError,
    Key,
    Mode,
    Net,
    ObsSpace,
    Params,
    Space,
    as_dict,
    is_image,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """The actor and the critic: one MLP each, of this form.

    Args:
      hidden: widths of the hidden layers; () makes actor and critic linear.
      act: activation of the hidden layers.
      kernel_init: how kernels start. "orthogonal" has the gain sqrt(2) in hidden layers, 0.01 in
        the actor's output and 1 in the critic's; the others have the scale 1 everywhere.
    """

    hidden: tuple[int, ...] = (64, 64)
    act: nets.Act = "tanh"
    kernel_init: nets.Init = "orthogonal"

    def __post_init__(self):
        require(
            all(units >= 1 for units in self.hidden),
            f"HeadsConfig.hidden is {self.hidden}; every layer must have at least one unit.",
        )


class Networks(NamedTuple):
    """Actor and critic as pure functions.

    Attributes:
      init: `key -> params`.
      apply: `params, obs (N, ...) -> {action key: distribution}, values (N,)`.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., tuple[dict[str, Any], Array]]


def actor_and_critic(
    config: HeadsConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    encoder: Net,
    dtype: str = "float32",
    normalize_obs: bool = False,
) -> Networks:
    """The actor and the critic for one environment's spaces.

    Discrete actions have a categorical distribution each, boxes independent normals whose standard
    deviations do not depend on the state. They are not squashed: environments clip actions.

    Args:
      config: form of actor and critic.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      encoder: `key -> params` and `params, obs (N, ...) -> (N, F)`, what actor and critic read. If
        it has parameters, both of them train it.
      dtype: compute type.
      normalize_obs: whether the parameters hold statistics of the observed numbers, which
        normalise them.

    Raises:
      JaxwmError: if the actor cannot take an action space.
    """
    spaces = dict(sorted(as_dict(action_space).items()))
    sizes = [_outputs(name, space) for name, space in spaces.items()]
    boxes = {name: space for name, space in spaces.items() if isinstance(space, Box)}
    numbers = [name for name, space in obs_space.items() if _normalizable(space)]
    encode = lambda key: encoder.apply(encoder.init(key), zeros(obs_space, (1,)))  # noqa: E731
    token = jax.eval_shape(encode, jax.random.key(0))
    actor = _mlp(config, token.shape[-1], sum(sizes), 0.01, dtype)
    critic = _mlp(config, token.shape[-1], 1, 1.0, dtype)

    def init(key: Key) -> Params:
        key_encoder, key_actor, key_critic = jax.random.split(key, 3)
        parts = {
            "encoder": encoder.init(key_encoder),
            "actor": actor.init(key_actor),
            "critic": critic.init(key_critic),
            "log_std": {name: jnp.zeros(space.shape) for name, space in boxes.items()},
        }
        if normalize_obs:
            parts["observations"] = {name: running_init(obs_space[name].shape) for name in numbers}
        return {name: part for name, part in parts.items() if part}

    def apply(params: Params, obs: dict[str, Array]) -> tuple[dict[str, Any], Array]:
        # No gradient: the statistics stand among the parameters because acting needs them.
        seen = jax.lax.stop_gradient(params.get("observations", {}))
        obs = obs | {name: running_normalize(seen[name], obs[name]) for name in seen}
        token = encoder.apply(params.get("encoder", {}), obs)
        value = critic.apply(params["critic"], token)[..., 0]
        outputs = jnp.split(actor.apply(params["actor"], token), np.cumsum(sizes)[:-1], -1)
        policy = {}
        for (name, space), out in zip(spaces.items(), outputs, strict=True):
            lead, rank = out.shape[:-1], len(space.shape)
            if isinstance(space, Discrete):
                logits = out.reshape(*lead, *space.shape, space.width)
                policy[name] = dists.Categorical(logits, space.mask(), event_ndims=rank)
            else:
                loc = out.reshape(*lead, *space.shape)
                scale = jnp.exp(params["log_std"][name])
                policy[name] = dists.Normal(loc, jnp.broadcast_to(scale, loc.shape), rank)
        return policy, wide(value)

    return Networks(init, apply)


def _mlp(config: HeadsConfig, inputs: int, outputs: int, gain: float, dtype: str) -> Net:
    """An MLP (..., inputs) to (..., outputs); the output has no activation.

    Args:
      config: hidden layers.
      inputs: numbers that it reads.
      outputs: numbers that it gives.
      gain: of the output's kernel, if kernels are orthogonal.
      dtype: compute type.
    """
    sizes = (inputs, *config.hidden, outputs)
    gains = [*(math.sqrt(2) for _ in config.hidden), gain]
    if config.kernel_init != "orthogonal":
        gains = [1.0] * len(gains)
    layers = [
        nets.Linear(*ends, gain, dtype, config.kernel_init)
        for ends, gain in zip(itertools.pairwise(sizes), gains, strict=True)
    ]

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(layers))
        blanks = [jnp.zeros((1, size)) for size in sizes[:-1]]
        made = [x.init(k, blank) for x, k, blank in zip(layers, keys, blanks, strict=True)]
        return {str(index): variables["params"] for index, variables in enumerate(made)}

    def apply(params: Params, x: Array) -> Array:
        for index, layer in enumerate(layers):
            x = nets.call(layer)(params[str(index)], x)
            if index + 1 < len(layers):
                x = nets.ACTIVATIONS[config.act](x)
        return x

    return Net(init, apply)


def _outputs(name: str, space: Space) -> int:
    """How many outputs of the actor an action takes."""
    if isinstance(space, Discrete):
        return math.prod(space.shape) * space.width
    if space.dtype == "float32":
        return math.prod(space.shape)
    raise JaxwmError(
        f"The action {name!r} has the space {space}, which PPO cannot take: use Discrete, or a "
        "float32 Box."
    )


def _normalizable(space: Space) -> bool:
    """Whether an observation holds numbers that are always there."""
    return isinstance(space, Box) and not is_image(space) and not space.missing


def choose(policy: dict[str, Any], key: Key, mode: Mode) -> dict[str, Array]:
    """An action of a policy: the mode if "greedy", else drawn."""
    if mode == "greedy":
        return {name: dist.mode() for name, dist in policy.items()}
    return {
        name: policy[name].sample(seed=jax.random.fold_in(key, index))
        for index, name in enumerate(policy)
    }


def log_prob_of(policy: dict[str, Any], action: Action) -> Array:
    """The log-probability of an action, all its entries together."""
    entries = as_dict(action)
    total: Any = sum(dist.log_prob(entries[name]) for name, dist in policy.items())
    return total

"""The optimiser of DreamerV3 as optax transformations, and slowly following copies.

Updates are computed per tensor and without Python state, so one more `vmap` trains many
seeds. Parameters and statistics are float32.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxwm.config import at_least, positive, require
from jaxwm.numerics import Scalar
from jaxwm.types import JaxwmError, Params


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The arguments of `laprop`: `laprop(**dataclasses.asdict(config))`.

    Args:
      learning_rate: step size after the warmup.
      warmup_steps: updates over which the step size grows from 0; 0 for none.
      anneal_steps: updates until it has then fallen to a tenth, the warmup included; 0 for never.
      agc: largest gradient norm of a tensor, as a share of the norm of the tensor.
      beta1: decay of the momentum.
      beta2: decay of the mean square gradient.
      eps: added to the root mean square gradient.
    """

    learning_rate: float = 4e-5
    warmup_steps: int = 1000
    anneal_steps: int = 0
    agc: float = 0.3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-20

    def __post_init__(self):
        positive(self, "learning_rate", "agc", "eps")
        at_least(self, 0, "warmup_steps", "anneal_steps")
        require(
            self.anneal_steps == 0 or self.anneal_steps > self.warmup_steps,
            f"OptimConfig.anneal_steps is {self.anneal_steps}, but it counts from the start: make "
            f"it more than the {self.warmup_steps} updates of the warmup, or 0 for never.",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"OptimConfig.{name} is {value}; it must lie in 0 to below 1.")


def square_sums(tree: Params) -> Params:
    """The sum of squares over all entries of each tensor, in float32."""
    return jax.tree.map(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))), tree)


def global_norm(
    tree: Params, square_sums: Callable[[Params], Params] = square_sums
) -> Float[Array, ""]:
    """Euclidean norm over all entries of all tensors, in float32.

    Args:
      tree: gradients, updates or parameters.
      square_sums: the sum of squares of each tensor, of which `tree` may hold but a part.

    Returns:
      One number; 0 for an empty tree.
    """
    return jnp.sqrt(sum(jax.tree.leaves(square_sums(tree)), start=jnp.zeros(())))


def adaptive_grad_clip(
    clip: Scalar = 0.3,
    floor: float = 1e-3,
    square_sums: Callable[[Params], Params] = square_sums,
) -> optax.GradientTransformation:
    """Shrink each tensor's gradient to at most a share of the tensor's own norm.

        g <- g / max(1, |g| / (clip * max(floor, |p|)))

    with Euclidean norms over whole tensors, biases and scales included.

    Args:
      clip: largest ratio of gradient to parameter norm.
      floor: smallest parameter norm assumed, so that tensors starting at 0 can move.
      square_sums: see `global_norm`.

    Returns:
      A transformation whose `update` needs `params`.

    Source: "Optimizer" in DreamerV3 (arXiv:2301.04104), after arXiv:2102.06171.
    """

    def clipped(g, square_g, square_p):
        largest = clip * jnp.maximum(floor, jnp.sqrt(square_p))
        return g / jnp.maximum(1.0, jnp.sqrt(square_g) / largest)

    return optax.stateless(
        lambda updates, params: jax.tree.map(
            clipped, updates, square_sums(updates), square_sums(params)
        )
    )


class LaPropState(NamedTuple):
    """Updates made, mean square gradient and momentum of the normalised gradient."""

    count: Int[Array, ""]
    square: Params
    momentum: Params


def scale_by_laprop(
    beta1: Scalar = 0.9, beta2: Scalar = 0.999, eps: Scalar = 1e-20
) -> optax.GradientTransformation:
    """Normalise the gradient first, then apply momentum (Adam does it the other way round).

        v <- beta2 * v + (1 - beta2) * g^2
        m <- beta1 * m + (1 - beta1) * g / (sqrt(v / (1 - beta2^t)) + eps)
        update = m / (1 - beta1^t)

    Gradient entries below about 3e-18 have a square that float32 cannot hold; dividing by
    `eps` alone they may move by more than one learning rate.

    Args:
      beta1: decay of the momentum.
      beta2: decay of the mean square gradient.
      eps: added outside the root.

    Returns:
      A transformation with a `LaPropState`.

    Source: LaProp (arXiv:2002.04839), as used in DreamerV3 (arXiv:2301.04104).
    """

    def init(params):
        square, momentum = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return LaPropState(jnp.zeros((), jnp.int32), square, momentum)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        # In float32 as the reference forms them: the rounding of 1 - beta2^t is visible in
        # the first updates.
        seen1, seen2 = (1 - beta ** count.astype(jnp.float32) for beta in (beta1, beta2))
        square = jax.tree.map(
            lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.square, updates
        )
        momentum = jax.tree.map(
            lambda m, v, g: beta1 * m + (1 - beta1) * g / (jnp.sqrt(v / seen2) + eps),
            state.momentum,
            square,
            updates,
        )
        scaled = jax.tree.map(lambda m: m / seen1, momentum)
        return scaled, LaPropState(count, square, momentum)

    return optax.GradientTransformation(init, update)


def warmup(learning_rate: Scalar, steps: int, anneal_steps: int = 0) -> optax.Schedule:
    """Learning rate growing linearly from 0, then constant or falling linearly to a tenth.

    The n-th update (n from 1) uses `learning_rate * min(1, (n - 1) / steps)`, so the first
    one does not move the parameters; the fall, if there is one, lasts `anneal_steps - steps`.

    Args:
      learning_rate: the highest value, a number or a traced scalar.
      steps: updates until it is reached; 0 for no warmup.
      anneal_steps: updates until it has fallen, the warmup included; 0 for never.

    Returns:
      A schedule of the number of updates made before, n - 1.

    Raises:
      JaxwmError: if `steps` is negative, or `anneal_steps` neither 0 nor above it.

    Source: "Optimizer" in DreamerV3 (arXiv:2301.04104); the fall is the schedule "linear" of
    github.com/danijar/dreamerv3.
    """
    if steps < 0 or (anneal_steps != 0 and anneal_steps <= steps):
        raise JaxwmError(
            f"warmup got steps={steps}, anneal_steps={anneal_steps}; give the updates it lasts, 0 "
            "for none, and the updates until the rate has fallen again, more than that or 0."
        )
    high = optax.constant_schedule(learning_rate)
    rise = optax.linear_schedule(0.0, learning_rate, steps) if steps else high
    if not anneal_steps:
        return rise
    fall = optax.linear_schedule(learning_rate, 0.1 * learning_rate, anneal_steps - steps)
    return optax.join_schedules([rise, fall], [steps])


def laprop(
    learning_rate: Scalar | optax.Schedule = OptimConfig.learning_rate,
    warmup_steps: int = OptimConfig.warmup_steps,
    anneal_steps: int = OptimConfig.anneal_steps,
    agc: Scalar = OptimConfig.agc,
    beta1: Scalar = OptimConfig.beta1,
    beta2: Scalar = OptimConfig.beta2,
    eps: Scalar = OptimConfig.eps,
    square_sums: Callable[[Params], Params] = square_sums,
) -> optax.GradientTransformation:
    """Adaptive gradient clipping, LaProp, and a learning rate with warmup.

    Args:
      learning_rate: step size after the warmup, a number or a traced scalar (one per seed,
        say); or a schedule, which is used as it is, without warmup.
      warmup_steps: see `warmup`.
      anneal_steps: see `warmup`.
      agc: see `adaptive_grad_clip`.
      beta1: see `scale_by_laprop`.
      beta2: see `scale_by_laprop`.
      eps: see `scale_by_laprop`.
      square_sums: see `global_norm`.

    Returns:
      A transformation whose `update` needs `params` and gives what to add to them.

    Source: "Optimizer" in DreamerV3 (arXiv:2301.04104).
    """
    schedule = learning_rate
    if not callable(schedule):
        schedule = warmup(schedule, warmup_steps, anneal_steps)
    return optax.chain(
        adaptive_grad_clip(agc, square_sums=square_sums),
        scale_by_laprop(beta1, beta2, eps),
        optax.scale_by_learning_rate(schedule),
    )


class SlowState(NamedTuple):
    """The slow copy and the number of updates made to it."""

    params: Params
    count: Int[Array, ""]


class SlowCopy(NamedTuple):
    """Parameters that follow others slowly: a target network.

    Attributes:
      init: `params -> SlowState`, an equal copy in its own memory.
      update: `SlowState, params -> SlowState`, called after every optimiser step.
    """

    init: Callable[[Params], SlowState]
    update: Callable[[SlowState, Params], SlowState]


def slow_copy(rate: Scalar = 0.02, every: int = 1) -> SlowCopy:
    """Move a copy by `slow <- (1 - rate) * slow + rate * fast` at every `every`-th update.

    Args:
      rate: share of the fast parameters, in [0, 1]; 1 copies them outright.
      every: updates between two moves; the first update moves.

    Returns:
      The pair of functions.

    Raises:
      JaxwmError: if `rate` or `every` is out of range.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """
    known = isinstance(rate, float | int)  # it may be traced
    if every < 1 or (known and not 0 <= rate <= 1):
        raise JaxwmError(
            f"slow_copy got rate={rate}, every={every}; give a rate in [0, 1] and every >= 1."
        )

    def init(params):
        # A real copy: the same buffer twice in a donated train state is an error.
        return SlowState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(state, params):
        mix = jnp.where(state.count % every == 0, rate, 0.0)
        slow = jax.tree.map(lambda s, p: (1 - mix) * s + mix * p, state.params, params)
        return SlowState(slow, state.count + 1)

    return SlowCopy(init, update)


apply_updates = optax.apply_updates
Optimizer = optax.GradientTransformation

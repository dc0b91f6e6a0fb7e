"""Optimisers, schedules and slowly following copies, as optax transformations and pure functions.

`laprop` is the optimiser of DreamerV3, `adam_tf` that of PlaNet, Dreamer V1 and Dreamer V2;
`grouped` gives parts of the parameters an optimiser each. Updates are computed per tensor and
without Python state, so one more `vmap` trains many seeds. Parameters and statistics are float32.

Where a device holds only a part of each tensor, a norm over a whole tensor needs the other parts:
such transformations take a function `square_sums`, tree of tensors -> tree of sums of squares.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxwm.config import Inline, at_least, changed, positive, require, unchecked
from jaxwm.numerics import Scalar, wide
from jaxwm.types import JaxwmError, Params

T = TypeVar("T")

SHAPES = ("linear", "cosine", "exponential")


@dataclasses.dataclass(frozen=True)
class Schedule(Inline):
    """A number that changes with n, the updates made before.

    It rises linearly from 0 to `start` during the warmup, `start * n / warmup`. Then, with
    `p = (n - warmup) / (updates - warmup)`, it moves from `start` to `end`:

        linear       start + (end - start) * min(1, p)
        cosine       end + (start - end) * (1 + cos(pi * min(1, p))) / 2
        exponential  end + (start - end) / 2^p, which never quite arrives

    On the command line it is one word, SHAPE:START:END[:WARMUP[:UPDATES]].

    Args:
      start: the number after the warmup.
      end: the number from then on.
      shape: how it gets from one to the other.
      warmup: updates of the warmup; 0 for none.
      updates: updates until `end` (exponential: until half of the way), the warmup included;
        0 for the length of the run, which `resolve` fills in.

    Source: the shapes "linear" and "exponential" are those of github.com/danijar/dreamerv2; cosine
    is SGDR (arXiv:1608.03983) without restarts.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "exponential"] = "linear"
    warmup: int = 0
    updates: int = 0

    def __post_init__(self):
        for name in ("start", "end"):
            value = getattr(self, name)
            require(math.isfinite(value), f"Schedule.{name} is {value}; it must be finite.")
        require(
            self.shape in SHAPES,
            f"Schedule.shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}.",
        )
        at_least(self, 0, "warmup", "updates")
        require(
            self.updates == 0 or self.updates > self.warmup,
            f"Schedule.updates is {self.updates}, but it counts from the start: make it more than "
            f"the {self.warmup} updates of the warmup, or 0 for the length of the run.",
        )
        for name in ("warmup", "updates"):
            value = getattr(self, name)
            require(value < 2**31, f"Schedule.{name} is {value}; it must be below 2^31.")

    def __str__(self) -> str:
        words = [self.shape, *map(repr, (self.start, self.end)), str(self.warmup)]
        return ":".join([*words, str(self.updates)])


Number = float | Schedule
"""A learning rate or the weight of a loss: constant, or a schedule."""


def parse_number(text: str) -> Number:
    """A number or a schedule from a word of the command line, see `Schedule`.

    Raises:
      ValueError: if the word is neither.
      JaxwmError: if the schedule is none that can be followed.
    """
    shape, *rest = text.split(":")
    if not rest:
        return float(text)
    if shape not in SHAPES or not 2 <= len(rest) <= 4:
        raise ValueError(f"{text!r} is not SHAPE:START:END[:WARMUP[:UPDATES]]")
    start, end = map(float, rest[:2])
    return Schedule(start, end, shape, *map(int, rest[2:]))


def value_at(number: Number | Scalar, count: Int[Array, ""] | int) -> Scalar:
    """The value of a number or schedule.

    Args:
      number: constant or schedule; members of a sweep may have traced entries.
      count: updates made before; it may be traced.

    Returns:
      `number` itself if it is constant, else a float32 scalar.

    Raises:
      JaxwmError: if a schedule lasts as long as the run, and nobody has said how long that is.
    """
    if not isinstance(number, Schedule):
        return number
    require(
        number.updates > 0,
        f"The schedule {number} lasts as long as the run. Fill in the run's number of updates with "
        "optim.resolve(config, updates) before you build an agent that learns.",
    )
    # At least one: a run may end during its warmup.
    move = _move(number, max(1, number.updates - number.warmup))
    if number.warmup:
        rise = optax.linear_schedule(0.0, number.start, number.warmup)
        move = optax.join_schedules([rise, move], [number.warmup])
    return jnp.asarray(move(count), jnp.float32)


def _move(number: Schedule, duration: int) -> optax.Schedule:
    """The schedule without its warmup: from `start` to `end` in `duration` updates."""
    start, end = number.start, number.end
    if number.shape == "linear":
        return optax.linear_schedule(start, end, duration)
    if number.shape == "exponential":
        return lambda count: end + (start - end) * 0.5 ** (count / duration)
    cosine = lambda p: (1 + jnp.cos(jnp.pi * jnp.minimum(1.0, p))) / 2  # noqa: E731
    return lambda count: end + (start - end) * cosine(count / duration)


def resolve(config: T, updates: int) -> T:
    """A configuration whose schedules know the length of the run.

    Args:
      config: a dataclass; schedules may stand anywhere in it, or in a dataclass that it holds.
      updates: updates of the whole run. They are not stored with the configuration, so that a
        resumed and lengthened run stretches its schedules.

    Returns:
      The same with `updates` in place of 0 in every schedule, or one more than the warmup.
    """
    if isinstance(config, Schedule):
        return (
            config if config.updates else unchecked(config, updates=max(updates, config.warmup + 1))
        )
    if not dataclasses.is_dataclass(config):
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return unchecked(config, **{name: resolve(value, updates) for name, value in values.items()})


def annealed(config: T, *names: str) -> T:
    """A configuration whose optimisers `names` end a run at a tenth of their learning rates.

    The rates fall linearly.

    Args:
      config: a dataclass that holds the optimisers' configurations.
      names: entries of it with a constant `learning_rate`.
    """
    optims = {}
    for name in names:
        rate = getattr(config, name).learning_rate
        falling = Schedule(rate, 0.1 * rate)
        optims[name] = changed(getattr(config, name), learning_rate=falling)
    return changed(config, **optims)


def numbers_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raises a `JaxwmError` unless the numbers and schedules `names` are never below `minimum`."""
    for name in names:
        value = getattr(config, name)
        text = f"{type(config).__name__}.{name} is {value}; it must be at least {minimum}."
        require(all(minimum <= x < math.inf for x in _ends(value)), text)


def _check_learning_rate(config: Any) -> None:
    value = config.learning_rate
    text = f"{type(config).__name__}.learning_rate is {value}; it must be positive."
    require(all(0 <= x < math.inf for x in _ends(value)) and max(_ends(value)) > 0, text)


def _check_betas(config: Any) -> None:
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        text = f"{type(config).__name__}.{name} is {value}; it must lie in 0 to below 1."
        require(0 <= value < 1, text)


def _ends(number: Number) -> tuple[float, ...]:
    return (number.start, number.end) if isinstance(number, Schedule) else (number,)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The arguments of `laprop`: `laprop(**vars(config))`.

    Args:
      learning_rate: step size after the warmup, a number or a schedule.
      warmup_steps: updates over which the step size grows from 0, 0 for none; a schedule with a
        warmup of its own keeps that.
      agc: largest gradient norm of a tensor, as a share of the norm of the tensor.
      beta1: decay of the momentum.
      beta2: decay of the mean square gradient.
      eps: added to the root mean square gradient.
    """

    learning_rate: Number = 4e-5
    warmup_steps: int = 1000
    agc: float = 0.3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-20

    def __post_init__(self):
        _check_learning_rate(self)
        positive(self, "agc", "eps")
        at_least(self, 0, "warmup_steps")
        _check_betas(self)
        if isinstance(rate := self.learning_rate, Schedule):
            require(
                rate.updates == 0 or rate.warmup > 0 or rate.updates > self.warmup_steps,
                f"OptimConfig.learning_rate lasts {rate.updates} updates, counted from the start: "
                f"make it more than the {self.warmup_steps} of warmup_steps, or 0 for the length "
                "of the run.",
            )


@dataclasses.dataclass(frozen=True)
class AdamConfig:
    """The arguments of `adam_tf`: `adam_tf(**vars(config))`.

    Args:
      learning_rate: step size, a number or a schedule.
      clip: largest norm of the gradient over all parameters; 0 for no limit.
      weight_decay: share of every parameter that each update takes away, whatever the step size.
      beta1: decay of the momentum.
      beta2: decay of the mean square gradient.
      eps: added to the root mean square gradient, see `scale_by_adam_tf`.
    """

    learning_rate: Number = 1e-4
    clip: float = 100.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-5

    def __post_init__(self):
        _check_learning_rate(self)
        positive(self, "eps")
        at_least(self, 0, "clip", "weight_decay")
        require(
            self.weight_decay < 1,
            f"AdamConfig.weight_decay is {self.weight_decay}; it must be below 1.",
        )
        _check_betas(self)


def square_sums(tree: Params) -> Params:
    """The sum of squares over all entries of each tensor, in float32 (of float64 in float64)."""
    return jax.tree.map(lambda x: jnp.sum(jnp.square(wide(x))), tree)


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


def warmup(learning_rate: Scalar, steps: int) -> optax.Schedule:
    """Learning rate growing linearly from 0, then constant.

    The n-th update (n from 1) uses `learning_rate * min(1, (n - 1) / steps)`, so the first
    one does not move the parameters.

    Args:
      learning_rate: the highest value, a number or a traced scalar.
      steps: updates until it is reached; 0 for no warmup.

    Returns:
      A schedule of the number of updates made before, n - 1.

    Raises:
      JaxwmError: if `steps` is negative.

    Source: "Optimizer" in DreamerV3 (arXiv:2301.04104).
    """
    require(steps >= 0, f"warmup got steps={steps}; give the updates it lasts, 0 for none.")
    if steps == 0:
        return optax.constant_schedule(learning_rate)
    return optax.linear_schedule(0.0, learning_rate, steps)


def _rate(learning_rate: Number | Scalar, warmup_steps: int) -> optax.Schedule:
    """The learning rate by the number of updates made before."""
    if not isinstance(learning_rate, Schedule):
        return warmup(learning_rate, warmup_steps)
    whole = unchecked(learning_rate, warmup=learning_rate.warmup or warmup_steps)
    return lambda count: value_at(whole, jnp.asarray(count))


def laprop(
    learning_rate: Number | Scalar = OptimConfig.learning_rate,
    warmup_steps: int = OptimConfig.warmup_steps,
    agc: Scalar = OptimConfig.agc,
    beta1: Scalar = OptimConfig.beta1,
    beta2: Scalar = OptimConfig.beta2,
    eps: Scalar = OptimConfig.eps,
    square_sums: Callable[[Params], Params] = square_sums,
) -> optax.GradientTransformation:
    """Adaptive gradient clipping, LaProp, and a learning rate with warmup.

    Args:
      learning_rate: step size after the warmup: a number, a traced scalar (one per seed, say) or
        a schedule, which moves from the end of the warmup on.
      warmup_steps: see `warmup`; a schedule with a warmup of its own keeps that.
      agc: see `adaptive_grad_clip`.
      beta1: see `scale_by_laprop`.
      beta2: see `scale_by_laprop`.
      eps: see `scale_by_laprop`.
      square_sums: see `global_norm`.

    Returns:
      A transformation whose `update` needs `params` and gives what to add to them.

    Source: "Optimizer" in DreamerV3 (arXiv:2301.04104).
    """
    return optax.chain(
        adaptive_grad_clip(agc, square_sums=square_sums),
        scale_by_laprop(beta1, beta2, eps),
        optax.scale_by_learning_rate(_rate(learning_rate, warmup_steps)),
    )


def clip_by_global_norm(
    clip: Scalar = 100.0, square_sums: Callable[[Params], Params] = square_sums
) -> optax.GradientTransformation:
    """Shrink the whole gradient to a norm of at most `clip`.

        g <- g / max(1, |g| / clip)

    with one Euclidean norm over all tensors.

    Args:
      clip: largest norm; 0 for no limit.
      square_sums: see `global_norm`.

    Returns:
      A transformation without state.

    Source: "On the difficulty of training recurrent neural networks" (arXiv:1211.5063).
    """

    def update(updates, params):
        del params
        limit = jnp.where(clip > 0, clip, jnp.inf)
        excess = jnp.maximum(1.0, global_norm(updates, square_sums) / limit)
        return jax.tree.map(lambda g: g / excess, updates)

    return optax.stateless(update)


class AdamState(NamedTuple):
    """Updates made, mean square gradient and momentum."""

    count: Int[Array, ""]
    square: Params
    momentum: Params


def scale_by_adam_tf(
    beta1: Scalar = 0.9, beta2: Scalar = 0.999, eps: Scalar = 1e-5
) -> optax.GradientTransformation:
    """Adam as TensorFlow computes it.

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        update = sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    Here `eps` is added to the root of the biased v. The textbook, and optax.adam, add it to the
    root of the unbiased one: their `eps / sqrt(1 - beta2^t)` is 31.6 times larger at t = 1.

    Args:
      beta1: decay of the momentum.
      beta2: decay of the mean square gradient.
      eps: added outside the root.

    Returns:
      A transformation with an `AdamState`.

    Source: "Adam" (arXiv:1412.6980), end of section 2, "epsilon hat".
    """

    def init(params):
        square, momentum = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamState(jnp.zeros((), jnp.int32), square, momentum)

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        seen1, seen2 = (1 - beta ** count.astype(jnp.float32) for beta in (beta1, beta2))
        square = jax.tree.map(
            lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.square, updates
        )
        momentum = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.momentum, updates)
        rate = jnp.sqrt(seen2) / seen1
        scaled = jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + eps), momentum, square)
        return scaled, AdamState(count, square, momentum)

    return optax.GradientTransformation(init, update)


def clipped_adam(
    clip: Scalar = 0.5,
    eps: Scalar = 1e-5,
    square_sums: Callable[[Params], Params] = square_sums,
) -> optax.GradientTransformation:
    """Clipping by the global norm and the textbook's Adam (arXiv:1412.6980), without a step size.

    Args:
      clip: see `clip_by_global_norm`.
      eps: added to the root of the unbiased mean square gradient.
      square_sums: see `global_norm`.

    Returns:
      A transformation that gives what to subtract from the parameters, in units of the step size.
    """
    return optax.chain(clip_by_global_norm(clip, square_sums), optax.scale_by_adam(eps=eps))


def decay_weights(rate: Scalar) -> optax.GradientTransformation:
    """Take a share of every parameter away: `update <- update - rate * p`.

    Args:
      rate: the share, in [0, 1); it is not multiplied by the learning rate.

    Returns:
      A transformation whose `update` needs `params`; it comes last in a chain.

    Source: github.com/danijar/dreamerv2, which does so for biases and norms too.
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p: u - rate * p, updates, params)
    )


def adam_tf(
    learning_rate: Number | Scalar = AdamConfig.learning_rate,
    clip: Scalar = AdamConfig.clip,
    weight_decay: Scalar = AdamConfig.weight_decay,
    beta1: Scalar = AdamConfig.beta1,
    beta2: Scalar = AdamConfig.beta2,
    eps: Scalar = AdamConfig.eps,
    square_sums: Callable[[Params], Params] = square_sums,
) -> optax.GradientTransformation:
    """Clipping by the global norm, TensorFlow's Adam and weight decay: PlaNet, Dreamer V1 and V2.

    Args:
      learning_rate: step size: a number, a traced scalar or a schedule.
      clip: see `clip_by_global_norm`.
      weight_decay: see `decay_weights`.
      beta1: see `scale_by_adam_tf`.
      beta2: see `scale_by_adam_tf`.
      eps: see `scale_by_adam_tf`.
      square_sums: see `global_norm`.

    Returns:
      A transformation whose `update` needs `params` and gives what to add to them.

    Source: github.com/danijar/dreamerv2.
    """
    return optax.chain(
        clip_by_global_norm(clip, square_sums),
        scale_by_adam_tf(beta1, beta2, eps),
        optax.scale_by_learning_rate(_rate(learning_rate, 0)),
        decay_weights(weight_decay),
    )


def grouped(groups: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """One optimiser for each group of parameters, as one transformation.

    Args:
      groups: transformations by the path at which their parameters begin, such as
        `{"model": one, "behavior/policy": two, "behavior/value": three}`. Each sees its parameters
        as a flat dict by path, and nothing of the others: norms are those of the group.

    Returns:
      A transformation of the whole tree, with a state per group.

    Raises:
      JaxwmError: in `init` and `update`, if a parameter belongs to no group or to several, or a
        group has no parameters.
    """

    def split(tree: Params) -> dict[str, dict[str, Any]]:
        leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        parts: dict[str, dict[str, Any]] = {group: {} for group in groups}
        for name, leaf in leaves.items():
            owners = [group for group in groups if f"{name}/".startswith(f"{group}/")]
            require(
                len(owners) == 1,
                f"The parameter {name} belongs to {' and '.join(owners) or 'no group'}; every "
                f"parameter needs exactly one optimiser. The groups are {', '.join(groups)}.",
            )
            parts[owners[0]][name] = leaf
        empty = [group for group, part in parts.items() if not part]
        require(
            not empty,
            f"No parameter belongs to the group {', '.join(empty)}. Parameters: "
            f"{', '.join(dict.fromkeys(name.rpartition('/')[0] or name for name in leaves))}.",
        )
        return parts

    def init(params: Params) -> dict[str, Any]:
        return {group: groups[group].init(part) for group, part in split(params).items()}

    def update(updates: Params, state: Any, params: Params | None = None) -> Any:
        given, values = split(updates), None if params is None else split(params)
        flat, after = {}, {}
        for group, optimizer in groups.items():
            part = None if values is None else values[group]
            new: Any
            new, after[group] = optimizer.update(given[group], state[group], part)
            flat |= new
        whole = jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], updates)
        return whole, after

    return optax.GradientTransformation(init, update)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


def slow_copy(rate: Scalar = 0.02, every: int = 1, first: Scalar | None = None) -> SlowCopy:
    """Move a copy by `slow <- (1 - rate) * slow + rate * fast` at every `every`-th update.

    Args:
      rate: share of the fast parameters, in [0, 1]; 1 copies them outright.
      every: updates between two moves; the first update moves.
      first: the rate of that first update; None for `rate`.

    Returns:
      The pair of functions.

    Raises:
      JaxwmError: if `rate` or `every` is out of range.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104); hard copies at every 100th update
    are those of DreamerV2 (arXiv:2010.02193).
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
        mix = mix if first is None else jnp.where(state.count == 0, first, mix)
        slow = jax.tree.map(lambda s, p: (1 - mix) * s + mix * p, state.params, params)
        return SlowState(slow, state.count + 1)

    return SlowCopy(init, update)


apply_updates = optax.apply_updates
Optimizer = optax.GradientTransformation

"""Returns and advantages of one sequence; `vmap` adds batches, trajectories and seeds.

Every function here is the linear recursion `G_k = a_k + b_k * G_{k+1}`, solved by an
associative scan: logarithmic depth instead of one device loop iteration per time step.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxwm.numerics import Scalar
from jaxwm.types import JaxwmError


def _backwards(
    offset: Float[Array, " T"], factor: Float[Array, " T"], last: Float[Array, ""]
) -> Float[Array, " T"]:
    """`G_k = offset_k + factor_k * G_{k+1}` for k = T-1..0 from `G_T = last`."""
    offset = offset.at[-1].add(factor[-1] * last)

    def compose(later, now):
        return now[0] + now[1] * later[0], now[1] * later[1]

    return jax.lax.associative_scan(compose, (offset, factor), reverse=True)[0]


def _check(name: str, least: int, **sequences: Array) -> None:
    shapes = {key: value.shape for key, value in sequences.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or first[0] < least or len(set(shapes.values())) > 1:
        given = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise JaxwmError(
            f"{name} got {given}, but expects 1-D sequences of one length, at least {least}. "
            "Add batch axes with jax.vmap (in_axes=1 for time-major arrays)."
        )


def lambda_return(
    reward_t: Float[Array, " T"],
    discount_t: Float[Array, " T"],
    value_t: Float[Array, " T"],
    lambda_: Scalar = 0.95,
) -> Float[Array, " T"]:
    """Bootstrapped lambda-return for each of the first T states.

    Backwards from `G_T = value_t[-1]`,

        G_k = r_{k+1} + d_{k+1} * ((1 - lambda) * v_{k+1} + lambda * G_{k+1}).

    `lambda_ = 0` is the one-step target, `1` the discounted sum plus the last value.

    Args:
      reward_t: reward for arriving in states 1..T, in environment units.
      discount_t: discount of states 1..T in [0, 1]; 0 at a true terminal.
      value_t: value estimates of states 1..T, in the units of `reward_t`.
      lambda_: mixing weight in [0, 1].

    Returns:
      Targets for states 0..T-1. Gradients flow into every input: stop them at the
      call site where the target is a constant.

    Raises:
      JaxwmError: if the sequences are not 1-D, non-empty and equally long.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """
    _check("lambda_return", 1, reward_t=reward_t, discount_t=discount_t, value_t=value_t)
    offset = reward_t + discount_t * (1 - lambda_) * value_t
    return _backwards(offset, discount_t * lambda_, value_t[-1])


def replay_lambda_return(
    reward: Float[Array, " T"],
    is_last: Bool[Array, " T"],
    is_terminal: Bool[Array, " T"],
    bootstrap: Float[Array, " T"],
    discount: Scalar = 1 - 1 / 333,
    lambda_: Scalar = 0.95,
) -> Float[Array, " T-1"]:
    """Lambda-return along replayed rows that may cross the ends of episodes.

    With `d_t = discount * (1 - is_terminal_t)` and `l_t = lambda * (1 - is_last_t)`,
    backwards from `G_{T-1} = bootstrap[-1]`,

        G_t = r_{t+1} + d_{t+1} * ((1 - l_{t+1}) * bootstrap_{t+1} + l_{t+1} * G_{t+1}).

    At an episode cut short the bootstrap stands for the unseen rest; after a terminal row
    nothing follows. The entry at a row with `is_last` looks into the next episode and means
    nothing: mask it in the loss.

    Args:
      reward: reward received on arriving in rows 0..T-1, in environment units.
      is_last: rows that end an episode.
      is_terminal: rows without a future.
      bootstrap: return estimates of rows 0..T-1, in the units of `reward`.
      discount: discount per row in [0, 1].
      lambda_: mixing weight in [0, 1].

    Returns:
      Targets for rows 0..T-2. Gradients flow into `reward` and `bootstrap`: stop them at
      the call site where the target is a constant.

    Raises:
      JaxwmError: if the sequences are not 1-D, equally long and of two rows or more.

    Source: "Critic learning" in DreamerV3 (arXiv:2301.04104).
    """
    _check(
        "replay_lambda_return",
        2,
        reward=reward,
        is_last=is_last,
        is_terminal=is_terminal,
        bootstrap=bootstrap,
    )
    live = discount * (1 - is_terminal[1:].astype(jnp.float32))
    mix = lambda_ * (1 - is_last[1:].astype(jnp.float32))
    offset = reward[1:] + live * (1 - mix) * bootstrap[1:]
    return _backwards(offset, live * mix, bootstrap[-1])


def generalized_advantage(
    reward: Float[Array, " R"],
    is_first: Bool[Array, " R"],
    is_last: Bool[Array, " R"],
    is_terminal: Bool[Array, " R"],
    value: Float[Array, " R"],
    discount: Scalar = 0.99,
    lambda_: Scalar = 0.95,
    truncation: Literal["bootstrap", "terminal"] = "bootstrap",
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Generalised advantage of the actions taken at rows 0..T-1, of T + 1 rows.

    With `d_t = discount * (1 - is_terminal_t)` and `l_t = lambda * (1 - is_last_t)`,
    backwards from `A_T = 0`,

        A_t = r_{t+1} + d_{t+1} * v_{t+1} - v_t + discount * l_{t+1} * A_{t+1}.

    An episode cut short bootstraps from the value of its last row. No action caused the step from
    the last row of an episode to the first row of the next one: its advantage and its weight are
    0, and nothing flows across it. The target of the critic is `advantage + value[:-1]`.

    Args:
      reward: reward received on arriving in each row, in environment units.
      is_first: rows that begin an episode. The row before one counts as last even if `is_last`
        is False, which cuts abandoned episodes short.
      is_last: rows that end an episode.
      is_terminal: rows without a future.
      value: value estimates of all rows, in the units of `reward`.
      discount: discount per row in [0, 1].
      lambda_: mixing weight in [0, 1]; 0 is the one-step error, 1 the sum of all rewards to come.
      truncation: "terminal" treats episodes cut short like terminal ones, as many public
        implementations of PPO do.

    Returns:
      Advantages of rows 0..T-1, and weights: 1 for real steps, 0 for those between episodes.
      Gradients flow into `reward` and `value`: stop them at the call site where the advantage is
      a constant.

    Raises:
      JaxwmError: if the sequences are not 1-D, equally long and of two rows or more.

    Source: arXiv:1506.02438, equations 11 to 16.
    """
    _check(
        "generalized_advantage",
        2,
        reward=reward,
        is_first=is_first,
        is_last=is_last,
        is_terminal=is_terminal,
        value=value,
    )
    last = is_last | jnp.concatenate([is_first[1:], jnp.zeros_like(is_first[:1])])
    ended = last if truncation == "terminal" else is_terminal
    error = reward[1:] + jnp.where(ended[1:], 0.0, discount) * value[1:] - value[:-1]
    factor = jnp.where(last[1:], 0.0, discount * lambda_)
    between = last[:-1]
    error = jnp.where(between, 0.0, error)
    advantage = _backwards(error, jnp.where(between, 0.0, factor), jnp.zeros_like(error[0]))
    return advantage, (~between).astype(value.dtype)

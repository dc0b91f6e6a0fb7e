"""What a run does about updates that are not finite, and what it says about them.

The drivers refuse such an update and count it in `TrainState.health`. `RunConfig.on_divergence`
decides what follows: the member stops learning ("abort"), continues ("skip"), or the whole run goes
back to its newest checkpoint and continues with other random numbers ("rollback").
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxwm.config import flatten
from jaxwm.recipes import RunConfig, sweep
from jaxwm.run.log import FILE, read_metrics
from jaxwm.train import TrainState, processes
from jaxwm.train.learn import watched
from jaxwm.types import JaxwmError, Key

# Rollbacks to the same checkpoint before the run gives up.
ATTEMPTS = 3
# Separates the random numbers after a rollback from all others.
_ROLLBACK = 0x524F4C


def refused(state: TrainState) -> np.ndarray:
    """Which members (M,) have had an update that was not finite."""
    return np.atleast_1d(processes.fetch(state.health.refused)) > 0


def stopped(state: TrainState, config: RunConfig) -> np.ndarray:
    """Which members (M,) have stopped learning."""
    return refused(state) & (config.on_divergence == "abort")


def stopped_at_end(folder: Path, config: RunConfig) -> np.ndarray:
    """Which members (M,) of a run had stopped learning at its end, judged by its metrics."""
    none = np.zeros(config.members, bool)
    if config.on_divergence != "abort" or not (folder / FILE).exists():
        return none
    last = read_metrics(folder)[-config.members :]
    if len(last) < config.members:
        return none
    return np.array([line.get("updates/refused", 0) > 0 for line in last])


def forgiven(state: TrainState, config: RunConfig) -> TrainState:
    """A restored state without the refusals from a time when the run still skipped them."""
    policy = config.on_divergence
    # Runs that roll back save no refusal; runs that abort, only those of a part of their members.
    if policy == "skip" or (policy == "abort" and not refused(state).all()):
        return state
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state.health)
    return state._replace(health=zeros)


def with_other_numbers(state: TrainState, config: RunConfig, attempt: int) -> TrainState:
    """The state with other random numbers for each attempt; attempt 0 changes nothing."""
    if not attempt:
        return state

    def other(key: Key) -> Key:
        fold = lambda key: jax.random.fold_in(key, _ROLLBACK + attempt)  # noqa: E731
        return fold(key) if config.members == 1 else jax.vmap(fold)(key)

    return state._replace(key=jax.jit(other, out_shardings=state.key.sharding)(state.key))


def report_stopped(
    state: TrainState,
    metrics: dict[str, Any],
    before: np.ndarray,
    config: RunConfig,
    console: Console,
) -> np.ndarray:
    """Reports members that have newly stopped learning.

    Args:
      state: the state of the run.
      metrics: the line of metrics with it.
      before: which members (M,) had stopped before.
      config: the run.
      console: where to report.

    Returns:
      Which members have stopped now.

    Raises:
      JaxwmError: if all have.
    """
    now = stopped(state, config)
    sentences = _sentences(state, metrics, now & (now.all() | ~before), config)
    if now.all():
        cure = _cure(config, "try --on-divergence skip or rollback")
        raise JaxwmError(f"{' '.join(sentences)} {cure}")
    for sentence in sentences:
        console.print(f"{sentence} It stops learning; the others continue.")
    return now


def report_rollback(
    state: TrainState,
    metrics: dict[str, Any],
    attempt: int,
    config: RunConfig,
    console: Console,
) -> None:
    """Reports why the run goes back to its newest checkpoint.

    Args:
      state: the state of the run.
      metrics: the line of metrics with it.
      attempt: the number of this rollback to the same checkpoint, from 1.
      config: the run.
      console: where to report.

    Raises:
      JaxwmError: after `ATTEMPTS` rollbacks.
    """
    told = " ".join(_sentences(state, metrics, refused(state), config))
    if attempt > ATTEMPTS:
        cure = _cure(config, "try --on-divergence skip")
        raise JaxwmError(f"{told} The run went back {ATTEMPTS} times in vain. {cure}")
    console.print(
        f"{told} The run goes back to its newest checkpoint, with other random numbers (attempt "
        f"{attempt} of {ATTEMPTS})."
    )


def _sentences(
    state: TrainState, metrics: dict[str, Any], which: np.ndarray, config: RunConfig
) -> list[str]:
    """A sentence about each of some members (M,)."""
    health = jax.tree.map(np.atleast_1d, processes.fetch(state.health))
    terms, names = watched(metrics), sweep.names(config)
    return [
        f"The training of {names[i]} diverged at update {health.first[i]}: {terms[health.term[i]]} "
        "is NaN or infinite."
        for i in np.flatnonzero(which)
    ]


def _cure(config: RunConfig, how: str) -> str:
    """What a user can do."""
    rates = {path: x for path, x in flatten(config).items() if path.endswith("learning_rate")}
    swept = {
        f"{value:g}"
        for setting in sweep.settings(config)
        for path, value in setting.items()
        if any(path == rate or path.startswith(f"{rate}.") for rate in rates)
    }
    flags = [f"--{path.replace('_', '-')} (now {value})" for path, value in rates.items()]
    lower = " or ".join(flags) or "the step size"
    if swept:
        lower = f"the learning rates of --sweep ({', '.join(sorted(swept, key=float))})"
    return (
        f"The run did not take that update, and keeps its checkpoints. Lower {lower}, look at the "
        f"scale of the rewards, or {how}."
    )

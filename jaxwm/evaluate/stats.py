"""Statistics of a handful of seeds: the interquartile mean and a bootstrap interval.

Both are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (arXiv:2108.13264), for the scores of one task.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxwm.config import require

Scores = Sequence[float] | np.ndarray


def iqm(values: Scores) -> float:
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter.

    Whole values are dropped, `floor(N / 4)` at each end, as in the paper's library. There are no
    fractions of values: of 4 to 7 one goes at each end, of 8 to 11 two, and of fewer than 4 none,
    which makes it the mean.

    Args:
      values: N scores, at least one.

    Returns:
      Their interquartile mean.

    Raises:
      JaxwmError: if there are no values, some are not finite, or they are not one row of numbers.
    """
    values = np.sort(_row(values))
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def bootstrap(
    values: Scores,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic.

    N values are drawn with replacement from the N given, `resamples` times. The interval reaches
    from quantile (1 - confidence) / 2 of the statistics of these draws to the quantile as far
    from the other end. With few values it is too narrow rather than too wide: never does it
    reach beyond the lowest and the highest of them.

    Args:
      values: N scores of independent seeds, at least two.
      statistic: a number from an array (N,).
      confidence: share of the draws that the interval holds, in 0 to 1, ends excluded.
      resamples: number of draws.
      seed: determines the draws.

    Returns:
      The lower and the upper end.

    Raises:
      JaxwmError: if there are fewer than two values, some are not finite, they are not one row of
        numbers, or a setting is out of range.
    """
    values = _row(values)
    require(len(values) > 1, "An interval over seeds needs at least two of them, not one.")
    require(0 < confidence < 1, f"The confidence lies between 0 and 1; it cannot be {confidence}.")
    require(resamples >= 1, f"A bootstrap makes at least one draw, not {resamples}.")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    found = [statistic(values[draw]) for draw in draws]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _row(values: Scores) -> np.ndarray:
    row = np.asarray(values, float)
    shape = f"Scores are one row of numbers; these have the shape {row.shape}."
    require(row.ndim == 1, shape)
    require(row.size > 0, "There are no scores.")
    broken = int((~np.isfinite(row)).sum())
    require(broken == 0, f"{broken} of the {row.size} scores are NaN or infinite.")
    return row

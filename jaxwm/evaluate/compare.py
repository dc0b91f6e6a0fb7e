"""Runs beside the published curve of their task: scores, intervals and a verdict.

A run is averaged as the published curves are: episode returns of training, over bins of frames
as wide as theirs. Its score at F frames is therefore the mean return of the episodes that ended
in the last bin up to F. Runs and curve are compared at the last end of a bin that every seed has
reached and in which every seed has ended an episode.

The published band is the mean plus and minus one standard deviation over the published seeds.
The runs are inside if their mean is; they are outside if their whole interval is; if the mean is
outside but the interval reaches into the band, these seeds cannot tell.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxwm.config import differences, require
from jaxwm.evaluate import published
from jaxwm.evaluate.stats import bootstrap, iqm
from jaxwm.recipes import RunConfig
from jaxwm.run.checkpoint import FREE, read_config
from jaxwm.run.log import read_metrics
from jaxwm.types import JaxwmError

CONFIDENCE = 0.95
_RETURN, _COUNT = "episode/return", "episode/count"
# Runs of one experiment may differ in these.
_OWN = ("seed", "seeds", *FREE)


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What can be said of runs at the frames that they and the published curve share.

    Args:
      frames: where they are compared; None if they share none.
      scores: score of each seed (S,), NaN if no frames are shared.
      interval: bootstrap interval of the mean over seeds; None for one seed.
      low: lower edge of the published band.
      high: its upper edge.
      inside: whether the runs are inside the band; None if that cannot be said.
      words: what came of it, in one or two sentences.
    """

    frames: int | None
    scores: np.ndarray
    interval: tuple[float, float] | None
    low: float
    high: float
    inside: bool | None
    words: str


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of one experiment beside a published curve.

    Args:
      config: what the runs share; its seed, seeds and steps are those of the first.
      seeds: name of each seed, such as "runs/a seed 3" (S).
      frames: frames (S, M) of the points of `returns`: ends of bins, the last one where the
        seed stands.
      returns: mean episode return (S, M) of each seed in each bin, NaN where no episode ended.
      curve: the published curve.
      verdict: what can be said.
      caveats: sentences without which the verdict should not be told.
    """

    config: RunConfig
    seeds: tuple[str, ...]
    frames: np.ndarray
    returns: np.ndarray
    curve: published.Curve
    verdict: Verdict
    caveats: tuple[str, ...]

    @property
    def label(self) -> str:
        """What results in the runs' environment are called, such as "DMC (MJX)"."""
        return published.label(self.config)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the curves, for JSON."""
        verdict, curve = self.verdict, self.curve
        shared = verdict.frames is not None
        at = curve.frames == verdict.frames
        return {
            "task": curve.task,
            "method": curve.method,
            "environment": self.config.env,
            "label": self.label,
            "frames": verdict.frames,
            "own": {
                "seeds": dict(zip(self.seeds, map(_six, verdict.scores), strict=True)),
                "mean": _six(verdict.scores.mean()) if shared else None,
                "iqm": _six(iqm(verdict.scores)) if shared else None,
                "interval": [_six(end) for end in verdict.interval] if verdict.interval else None,
                "confidence": CONFIDENCE,
            },
            "published": {
                "mean": float(curve.mean[at][0]) if shared else None,
                "low": _six(verdict.low),
                "high": _six(verdict.high),
                "band": "mean plus and minus one standard deviation over seeds",
                "seeds": int(curve.seeds[at][0]) if shared else None,
                "source": published.source(),
            },
            "inside": verdict.inside,
            "words": verdict.words,
            "caveats": list(self.caveats),
        }


def compare(
    runs: Sequence[Path], task: str | None = None, method: str = published.METHOD
) -> Comparison:
    """Compares runs with a published curve.

    Args:
      runs: folders of runs that differ in nothing but their seeds, lengths and what they write.
      task: the published task, such as "atari100k/pong"; None for that of the environment.
      method: the published method.

    Returns:
      The curves and what can be said of them.

    Raises:
      JaxwmError: if there are no runs, one is not a run or has ended no episode, they are not of
        one experiment, two hold the same seed, or no published curve is known for them.
    """
    require(len(runs) > 0, "There is nothing to compare: give at least one run folder.")
    configs = [read_config(run) for run in runs]
    config = configs[0]
    for run, other in zip(runs, configs, strict=True):
        _check_same(runs[0], config, run, other)
    curve = published.curve(task or published.task_of(config), method)
    caveats = published.caveats(config) + curve.caveats
    if task and not _is_known(config, curve.task):
        caveats += (
            f"That {config.env} is {curve.task} was said with --task; jaxwm does not know it.",
        )
    scale = published.frames_per_step(config)
    seeds: dict[int, _Seed] = {}
    for run, own in zip(runs, configs, strict=True):
        for number, seed in _read(run, own, scale, curve.width).items():
            if number in seeds:
                raise JaxwmError(
                    f"{seeds[number].name} and {seed.name} are the same seed, which counts once. "
                    "Leave one of these runs out."
                )
            seeds[number] = seed
    own = tuple(seeds.values())
    bins = max(len(seed.returns) for seed in own)
    returns = np.full((len(own), bins), np.nan)
    for row, seed in zip(returns, own, strict=True):
        row[: len(seed.returns)] = seed.returns
    reached = np.array([seed.reached for seed in own])
    ends = curve.width * np.arange(1, bins + 1)
    return Comparison(
        config=config,
        seeds=tuple(seed.name for seed in own),
        frames=np.minimum(ends, reached[:, None]),
        returns=returns,
        curve=curve,
        verdict=_judge(returns, reached, curve),
        caveats=caveats,
    )


class _Seed(NamedTuple):
    """One seed of a run: mean return in each bin of frames, and the frames it has reached."""

    name: str
    returns: np.ndarray
    reached: int


def _is_known(config: RunConfig, task: str) -> bool:
    """Whether a run's environment is known to be a published task."""
    try:
        return published.task_of(config) == task
    except JaxwmError:
        return False


def _check_same(run: Path, config: RunConfig, other_run: Path, other: RunConfig) -> None:
    """Raises an error unless two runs are seeds of one experiment."""
    if other.sweep:
        raise JaxwmError(
            f"{other_run} is a sweep ({' '.join(other.sweep)}), whose members are no seeds of one "
            "experiment. Compare runs of one setting each."
        )
    if config.env != other.env:
        raise JaxwmError(
            f"A comparison is about one environment: {run} is a run in {config.env} and "
            f"{other_run} one in {other.env}. Compare them one after the other."
        )
    alike = dataclasses.replace(other, **{name: getattr(config, name) for name in _OWN})
    wrong = differences(config, alike)
    if wrong:
        raise JaxwmError(
            f"The seeds of {run} and {other_run} cannot be pooled, because these runs differ in "
            f"more than their seeds: {'; '.join(wrong[:3])}. Compare them one after the other."
        )


def _read(run: Path, config: RunConfig, scale: int, width: int) -> dict[int, _Seed]:
    """The seeds of a run by number."""
    lines = read_metrics(run)
    seeds = {}
    for index in range(config.seeds):
        mine = [line for line in lines if line["seed"] == index]
        ended = [line for line in mine if _RETURN in line]
        name = f"{run} seed {config.seed + index}"
        if not ended:
            raise JaxwmError(f"No episode of {name} has ended yet: there is nothing to compare.")
        returns = published.binned(
            [line["step"] * scale for line in ended],
            [line[_RETURN] for line in ended],
            width,
            [line.get(_COUNT, 1) for line in ended],
        )
        seeds[config.seed + index] = _Seed(name, returns, mine[-1]["step"] * scale)
    return seeds


def _judge(returns: np.ndarray, reached: np.ndarray, curve: published.Curve) -> Verdict:
    """The verdict on mean returns (S, M) of seeds that have reached the frames (S,)."""
    count = min(returns.shape[1], len(curve.mean))
    shared = np.isfinite(returns[:, :count]).all(0) & np.isfinite(curve.mean[:count])
    shared &= curve.frames[:count] <= reached.min()
    name = f"{curve.method} on {curve.task}"
    if not shared.any():
        first = curve.frames[np.isfinite(curve.mean)][0]
        words = (
            f"The runs cannot be compared with {name}: every seed must reach a published point, "
            f"the first of which is at {first:,} frames, and end an episode within the "
            f"{curve.width:,} frames before it. The shortest seed has reached {reached.min():,}."
        )
        return Verdict(None, np.full(len(returns), np.nan), None, np.nan, np.nan, None, words)
    point = int(np.flatnonzero(shared)[-1])
    scores, frames = returns[:, point], int(curve.frames[point])
    mean, std, seeds = (float(x[point]) for x in (curve.mean, curve.std, curve.seeds))
    low, high, own = mean - std, mean + std, float(scores.mean())
    interval = bootstrap(scores, confidence=CONFIDENCE) if len(scores) > 1 else None
    where = _where(own, low, high)
    start = f"At {frames:,} frames the mean return of {len(scores)} seeds is {_short(own)}"
    if interval:
        start += f" ({CONFIDENCE:.0%} interval {_short(interval[0])} to {_short(interval[1])})"
    else:
        start = f"At {frames:,} frames the return of the only seed is {_short(own)}"
    start += f"; {name} is published with {_short(mean)}"
    if seeds < 2:
        words = f"{start}, from a single run. That is no band to be inside of."
        return Verdict(frames, scores, interval, low, high, None, words)
    start += f" ({_short(low)} to {_short(high)}, one standard deviation over {seeds:.0f} seeds)"
    if interval is None:
        inside = None
        end = f"This value is {where} the band, but one seed has no interval, so it is no verdict"
    elif where == "inside":
        inside, end = True, "The runs are inside the published band"
    elif interval[1] < low or interval[0] > high:
        inside, end = False, f"The runs are outside the published band, {where} it"
    else:
        inside = None
        end = (
            f"The mean is {where} the published band and its interval reaches into it: whether "
            "the runs are inside cannot be said with these seeds"
        )
    return Verdict(frames, scores, interval, low, high, inside, f"{start}. {end}.")


def _where(value: float, low: float, high: float) -> str:
    return "below" if value < low else "above" if value > high else "inside"


def _six(value: float) -> float | None:
    """Six significant digits, or None for NaN."""
    return None if np.isnan(value) else float(f"{value:.6g}")


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

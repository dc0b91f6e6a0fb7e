"""Pictures of runs and dreams: learning curves, film strips and traces.

Every function writes one picture, in the format its path's suffix names, and returns the path.
Figures are drawn on a canvas of their own: no window opens and no global backend changes.
matplotlib is imported where a figure is made, because importing it takes most of a second.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm.evaluate.compare import Comparison
from jaxwm.run.log import read_metrics
from jaxwm.types import Array, JaxwmError, nearest

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_STYLES = ("-", "--", ":", "-.")
_MOST_WITHIN = 6  # names in a picture; more stand beside it
_CONTEXT, _DREAM = "#7F7F7F", "#D55E00"
_INK, _PALE = "#222222", "#E3E3E3"
_DPI = 100
_BINS = 60
_MOST_TRACES = 12
_LABELS = {"episode/return": "episode return", "episode/length": "episode length (steps)"}


def learning_curve(runs: Sequence[Path], path: Path, metric: str = "episode/return") -> Path:
    """One metric over the environment steps of one or more runs, each setting of a sweep apart.

    The thick line is the mean over seeds, the band reaches from the lowest to the highest seed,
    thin lines are the seeds. Each seed is averaged over bins of steps, at most 60 of them.

    Args:
      runs: folders of runs.
      path: where the picture goes.
      metric: a metric's name in `metrics.jsonl`.

    Returns:
      `path`.

    Raises:
      JaxwmError: if there are no runs, or a run has no such metric.
    """
    if not runs:
        raise JaxwmError("There is nothing to plot: give at least one run folder.")
    curves = [
        (_plain(" ".join(filter(None, (Path(run).name, setting)))), *curve)
        for run in runs
        for setting, curve in _curves(Path(run), metric).items()
    ]
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    for i, (name, steps, values) in enumerate(curves):
        color, seeds = _COLORS[i % len(_COLORS)], len(values)
        style = _STYLES[i // len(_COLORS) % len(_STYLES)]
        mean = np.nanmean(values, 0)
        label = f"{name} (mean of {seeds} seeds)" if seeds > 1 else name
        marker = "o" if len(steps) == 1 else None
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": marker}
        axes.plot(steps, mean, **look, linewidth=2.2, label=label, zorder=3)
        if seeds > 1:
            low, high = np.nanmin(values, 0), np.nanmax(values, 0)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            for seed in values:
                axes.plot(steps, seed, color=color, linewidth=0.7, alpha=0.45)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(_LABELS.get(metric, metric))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlim(left=0)
    _clean(axes)
    if len(curves) > _MOST_WITHIN:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axes.legend(frameon=False, fontsize=10)
    return _save(figure, path)


def comparison(result: Comparison, path: Path) -> Path:
    """Runs beside the published curve of their task, over frames of the simulator.

    Grey is what was published: the line is the mean over seeds, the band one standard deviation
    to each side of it. Thin lines are the runs' seeds, the thick one is their mean where all have
    ended episodes. The dotted line stands at the frames at which they are compared.

    Args:
      result: from `evaluate.compare.compare`.
      path: where the picture goes.

    Returns:
      `path`.

    Raises:
      JaxwmError: if the path's suffix is not that of a picture.
    """
    curve, color, seeds = result.curve, _COLORS[0], len(result.seeds)
    figure = _figure(7.2, 4.2)
    axes = figure.subplots()
    low, high, most = curve.mean - curve.std, curve.mean + curve.std, curve.seeds.max()
    axes.fill_between(curve.frames, low, high, color=_CONTEXT, alpha=0.25, linewidth=0)
    about = f"mean ± standard deviation of {most} seeds" if most > 1 else "a single run"
    label = f"{curve.method}, published ({about})"
    axes.plot(curve.frames, curve.mean, color=_CONTEXT, linewidth=1.8, label=label)
    for frames, values in zip(result.frames, result.returns, strict=True):
        ended = np.isfinite(values)
        thin = {"linewidth": 0.7, "alpha": 0.6} if seeds > 1 else {"linewidth": 2.2}
        axes.plot(frames[ended], values[ended], color=color, marker=_dot(ended.sum()), **thin)
    all_ended = np.isfinite(result.returns).all(0)
    frames, mean = result.frames.min(0)[all_ended], result.returns[:, all_ended].mean(0)
    label = f"{result.label} ({f'mean of {seeds} seeds' if seeds > 1 else 'one seed'})"
    axes.plot(frames, mean, color=color, linewidth=2.2, label=label, marker=_dot(len(mean)))
    if result.verdict.frames is not None:
        axes.axvline(result.verdict.frames, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_title(curve.task, fontsize=11, loc="left", color=_INK)
    axes.set_xlabel("frames")
    axes.set_ylabel(_LABELS["episode/return"])
    axes.xaxis.set_major_formatter(lambda frame, _: f"{frame:,.0f}")
    axes.set_xlim(left=0)
    _clean(axes)
    axes.legend(frameon=False, fontsize=10)
    return _save(figure, path)


def film_strip(
    truth: Array | np.ndarray,
    dream: Array | np.ndarray,
    context: int,
    path: Path,
    frames: int = 12,
) -> Path:
    """What was seen, what was dreamed and their difference, as three rows of images.

    Grey frames are context, whose images the model was given; orange ones are the dream.

    Args:
      truth: what was seen, (T, h, w, c) uint8.
      dream: what the model drew for the same times, of the same shape.
      context: number of first times whose images the model was given, in 0..T.
      path: where the picture goes.
      frames: number of columns at most, spread evenly over the T times.

    Returns:
      `path`.

    Raises:
      JaxwmError: if the films are empty, of different shapes or not uint8 images.
    """
    truth, dream = _film(truth, "truth"), _film(dream, "dream")
    if truth.shape != dream.shape:
        raise JaxwmError(f"The films have different shapes: {truth.shape} and {dream.shape}.")
    if frames < 1:
        raise JaxwmError(f"A film strip needs at least one frame, not {frames}.")
    _check_context(context, len(truth))
    times = np.unique(np.linspace(0, len(truth) - 1, min(frames, len(truth))).round().astype(int))
    truth, dream = truth[times], dream[times]
    difference = np.abs(truth.astype(int) - dream.astype(int)).astype(np.uint8)
    rows = np.stack([_rgb(truth), _rgb(dream), _rgb(difference)])
    picture, cell = _mosaic(rows, times < context)

    # The figure is as large as the mosaic and its labels, so each pixel is drawn as it is.
    (high, wide, _), (left, right, top, bottom) = picture.shape, (96, 12, 12, 58)
    width, height = max(wide + left + right, 420), high + top + bottom
    figure = _figure(width / _DPI, height / _DPI, layout=None)
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.imshow(picture, interpolation="nearest", extent=(0, wide, high, 0))
    axes.set_axis_off()
    cell_high, cell_wide = cell
    for row, name in enumerate(("seen", "dreamed", "difference")):
        middle = (row + 0.5) * cell_high
        axes.text(-10, middle, name, ha="right", va="center", fontsize=11, color=_INK)
    for column, time in enumerate(times):
        middle, color = (column + 0.5) * cell_wide, _CONTEXT if time < context else _DREAM
        axes.text(middle, high + 6, str(time), ha="center", va="top", fontsize=10, color=color)
    axes.text(-10, high + 6, "step", ha="right", va="top", fontsize=11, color=_INK)
    for column, (word, color) in enumerate((("■ context", _CONTEXT), ("■ dream", _DREAM))):
        x = (left + 6 + 96 * column) / width
        figure.text(x, 10 / height, word, fontsize=11, color=color)
    return _save(figure, path)


def traces(
    truth: Mapping[str, Array | np.ndarray],
    dream: Mapping[str, Array | np.ndarray],
    context: int,
    path: Path,
) -> Path:
    """What was seen and what was dreamed over time, one panel per dimension, 12 at most.

    Args:
      truth: what was seen, (T, F) per observation key.
      dream: what the model predicted for the same times, of the same keys and shapes.
      context: number of first times the model was given, in 0..T; shaded.
      path: where the picture goes.

    Returns:
      `path`.

    Raises:
      JaxwmError: if there is nothing to draw, or the two do not match.
    """
    if not truth:
        raise JaxwmError("There is nothing to plot: no observation keys were given.")
    if set(truth) != set(dream):
        raise JaxwmError(f"The keys seen, {sorted(truth)}, and dreamed, {sorted(dream)}, differ.")
    lines = []
    for key in truth:
        seen, dreamed = np.asarray(truth[key]), np.asarray(dream[key])
        if seen.shape != dreamed.shape or seen.ndim != 2 or not seen.size:
            raise JaxwmError(
                f"The traces of {key!r} should be two arrays of one shape (T, F), not empty; they "
                f"have shapes {seen.shape} and {dreamed.shape}."
            )
        names = [f"{key}[{i}]" for i in range(seen.shape[1])] if seen.shape[1] > 1 else [key]
        lines += zip(names, seen.T, dreamed.T, strict=True)
    _check_context(context, min(len(seen) for _, seen, _ in lines))

    shown = lines[:_MOST_TRACES]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(max(3.1 * columns, 4.2), 1.7 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, (name, seen, dreamed) in zip(grid.flat, shown, strict=False):
        axes.axvspan(0, max(context - 1, 0), color=_PALE, linewidth=0, label="context")
        axes.plot(seen, color=_INK, linewidth=1.6, label="seen")
        axes.plot(dreamed, color=_DREAM, linewidth=1.6, linestyle=(0, (4, 1.5)), label="dreamed")
        axes.set_title(name, fontsize=10, loc="left", color=_INK)
        axes.set_xlim(0, max(len(seen) - 1, 1))
        _clean(axes)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    # Under each column's last panel, which is not in the last row where the grid is not full.
    for column in range(columns):
        lowest = grid[(len(shown) - 1 - column) // columns, column]
        lowest.set_xlabel("step", fontsize=10)
        lowest.tick_params(labelbottom=True)
    figure.legend(
        *grid.flat[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=10,
    )
    if len(lines) > len(shown):
        note = f"the first {len(shown)} of {len(lines)} dimensions"
        figure.supxlabel(note, fontsize=9, color=_CONTEXT)
    return _save(figure, path)


def _curves(run: Path, metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Binned steps (bins,) and values (seeds, bins) of each setting of a run."""
    lines = read_metrics(run)
    if not lines:
        raise JaxwmError(f"{run} has no metrics yet.")
    found: dict[str, list[tuple[float, ...]]] = {}
    for line in lines:
        if metric in line:
            row = line["seed"], line["step"], line[metric]
            found.setdefault(line.get("setting", ""), []).append(row)
    if not found:
        told = {name for line in lines for name in line} - {*_OF_LINE}
        raise nearest(metric, told, f"metric in {run}")
    return {setting: _binned(np.array(rows, float)) for setting, rows in found.items()}


_OF_LINE = ("step", "updates", "seed", "setting", "time")  # what no metric is


def _binned(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Binned steps (bins,) and values (seeds, bins) of rows (seed, step, value).

    Values are NaN outside a seed's own range.
    """
    seed, step, value = rows.T
    bins = min(_BINS, len(np.unique(step)))
    last = step.max()
    index = np.clip((step / max(last, 1) * bins).astype(int), 0, bins - 1)
    used = np.unique(index)
    steps = np.array([step[index == i].mean() for i in used])
    values = np.full((len(np.unique(seed)), len(used)), np.nan)
    for row, name in zip(values, np.unique(seed), strict=True):
        mine = seed == name
        own = np.unique(index[mine])
        means = [value[mine & (index == i)].mean() for i in own]
        row[:] = np.interp(used, own, means, left=np.nan, right=np.nan)
    return steps, values


def _dot(points: int | np.integer) -> str | None:
    """The marker of a line, which one point alone needs to be seen."""
    return "o" if points == 1 else None


def _film(film: Any, name: str) -> np.ndarray:
    film = np.asarray(film)
    if film.ndim != 4 or film.dtype != np.uint8 or not film.size:
        raise JaxwmError(
            f"The film {name!r} should be uint8 images of shape (T, h, w, c), not empty; it is "
            f"{film.dtype} of shape {film.shape}."
        )
    return film


def _check_context(context: int, length: int) -> None:
    if not 0 <= context <= length:
        raise JaxwmError(f"The context should be 0 to {length} steps of {length}, not {context}.")


def _rgb(film: np.ndarray) -> np.ndarray:
    """Colours for any number of channels: grey for one, itself for three, else one for each."""
    channels = film.shape[-1]
    if channels == 3:
        return film
    if channels == 1:
        return np.repeat(film, 3, -1)
    colors = [_bytes(_COLORS[i % len(_COLORS)]) for i in range(channels)]
    lit = film[..., None] / 255 * np.array(colors)
    return lit.max(-2).round().astype(np.uint8)


def _mosaic(images: np.ndarray, is_context: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Images (rows, columns, h, w, 3) in framed cells on white; the picture and a cell's size.

    Small images are enlarged by a whole factor to about 112 pixels, without blurring.
    """
    border, space = 3, 3
    scale = max(1, round(112 / max(images.shape[2:4])))
    images = images.repeat(scale, 2).repeat(scale, 3)
    rows, columns, high, wide, _ = images.shape
    cell_high, cell_wide = high + 2 * (border + space), wide + 2 * (border + space)
    cells = np.full((rows, columns, cell_high, cell_wide, 3), 255, np.uint8)
    frame = np.array([_bytes(_CONTEXT) if seen else _bytes(_DREAM) for seen in is_context])
    cells[:, :, space:-space, space:-space] = frame[None, :, None, None]
    inner = border + space
    cells[:, :, inner:-inner, inner:-inner] = images
    picture = cells.transpose(0, 2, 1, 3, 4).reshape(rows * cell_high, columns * cell_wide, 3)
    return picture, (cell_high, cell_wide)


def _bytes(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color.removeprefix("#")))


def _figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """An empty figure, in inches, on a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=_DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Any) -> None:
    """A light grid, two spines, quiet ticks."""
    axes.grid(color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_CONTEXT)
    axes.tick_params(color=_CONTEXT, labelcolor=_INK, labelsize=9)


def _plain(name: str) -> str:
    """A name as a label that shows it as it is: no formula, and not left out of the legend."""
    name = name.encode("utf-8", "replace").decode().replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _save(figure: Any, path: Path) -> Path:
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise JaxwmError(f"{path} should end in .png, .pdf, .svg or another picture's suffix.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Names of runs may have letters that the font lacks: it draws boxes for them.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            figure.savefig(path, dpi=_DPI if path.suffix == ".png" else 200)
    except OSError as error:
        raise JaxwmError(f"The picture {path} cannot be written: {error.strerror}.") from None
    return path

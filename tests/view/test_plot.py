"""Pictures: what is in them, and what is told when there is nothing to draw."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from jaxwm.types import JaxwmError
from jaxwm.view import plot

GREY, ORANGE = (127, 127, 127), (213, 94, 0)


def run_folder(folder, rows):
    """A run whose metrics.jsonl holds (step, seed, metrics) rows."""
    folder.mkdir()
    lines = [
        json.dumps({"step": step, "updates": 0, "seed": seed, "time": 0.0, **metrics}) + "\n"
        for step, seed, metrics in rows
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def has_color(picture, color):
    return (picture == np.array(color, np.uint8)[None, None]).all(-1).any()


def returns(seeds, writes=10):
    return [(10 * i, s, {"episode/return": i + s}) for i in range(writes) for s in range(seeds)]


# Learning curves


def test_curves_of_several_runs_are_drawn_in_their_colours(tmp_path):
    runs = [run_folder(tmp_path / "a", returns(2)), run_folder(tmp_path / "b", returns(1))]
    path = plot.learning_curve(runs, tmp_path / "pictures" / "curve.png")
    picture = pixels(path)
    assert picture.shape == (420, 720, 3)
    assert has_color(picture, (0, 114, 178)) and has_color(picture, (230, 159, 0))


def test_a_vector_picture_by_suffix(tmp_path):
    run = run_folder(tmp_path / "a", returns(1))
    assert plot.learning_curve([run], tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_bins_average_and_bridge_gaps(tmp_path):
    # Seed 0 ends an episode at every step, seed 1 at 0 and 20 only, seed 2 from 10 to 20.
    ended = {0: (1, 2, 3, 4), 1: (5, None, 9, None), 2: (None, 7, 8, None)}
    rows = [
        (10 * i, seed, {} if value is None else {"episode/return": value})
        for i in range(4)
        for seed, value in ((s, ended[s][i]) for s in ended)
    ]
    steps, values = plot._curves(run_folder(tmp_path / "a", rows), "episode/return")[""]
    # Four steps, four bins of width 30 / 4 = 7.5: one step in each. The gap of seed 1 at step 10
    # is bridged, (5 + 9) / 2; nothing is made up before its first or after its last episode.
    nan = np.nan
    np.testing.assert_allclose(steps, [0, 10, 20, 30])
    np.testing.assert_allclose(values, [[1, 2, 3, 4], [5, 7, 9, nan], [nan, 7, 8, nan]])


def test_long_runs_are_averaged_over_bins(tmp_path):
    rows = [(i, 0, {"loss/total": i % 2}) for i in range(601)]
    steps, values = plot._curves(run_folder(tmp_path / "a", rows), "loss/total")[""]
    # 60 bins of 10 steps (the last of 11): means of 5 zeros and 5 ones; 0..9 is 4.5 on average.
    assert values.shape == (1, 60)
    np.testing.assert_allclose(values[0, :-1], 0.5)
    np.testing.assert_allclose(steps[:2], [4.5, 14.5])


def test_settings_of_a_sweep_are_curves_of_their_own(tmp_path):
    rows = [(i, 0, {"setting": x, "loss/total": i}) for i in range(3) for x in ("a=1", "a=2")]
    curves = plot._curves(run_folder(tmp_path / "a", rows), "loss/total")
    assert [(name, values.tolist()) for name, (_, values) in curves.items()] == [
        ("a=1", [[0, 1, 2]]),
        ("a=2", [[0, 1, 2]]),
    ]


def test_many_curves_can_be_told_apart(tmp_path):
    """Beyond the seven colours lines are dashed; beyond six names they stand beside the axes."""
    names = [f"a={i}" for i in range(9)]
    rows = [(i, 0, {"setting": x, "loss/total": i}) for i in range(3) for x in names]
    run, drawn = run_folder(tmp_path / "a", rows), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_save", lambda figure, path: drawn.append(figure) or path)
        plot.learning_curve([run], tmp_path / "curve.png", "loss/total")
    axes = drawn[0].axes[0]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == len(names)
    drawn[0].canvas.draw()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


def test_one_point_is_a_curve(tmp_path):
    run = run_folder(tmp_path / "a", returns(1, writes=1))
    assert plot.learning_curve([run], tmp_path / "curve.png").stat().st_size > 1000


def test_nothing_to_plot_is_told(tmp_path):
    path = tmp_path / "curve.png"
    with pytest.raises(JaxwmError, match="give at least one run folder"):
        plot.learning_curve([], path)
    with pytest.raises(JaxwmError, match="is not the folder of a run"):
        plot.learning_curve([tmp_path], path)
    with pytest.raises(JaxwmError, match="has no metrics yet"):
        plot.learning_curve([run_folder(tmp_path / "empty", [])], path)
    run = run_folder(tmp_path / "a", returns(1))
    with pytest.raises(JaxwmError, match=r"no metric in .* Did you mean episode/return\?"):
        plot.learning_curve([run], path, metric="episode_return")
    with pytest.raises(JaxwmError, match=r"should end in \.png"):
        plot.learning_curve([run], tmp_path / "curve.docx")
    assert not path.exists()


# Film strips


def film(seed=0, length=9, size=8, channels=3):
    shape = (length, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def cell(picture, row, column, size=112):
    """The image in a cell of a saved film strip; cells are framed by 6 pixels on each side."""
    top, left = 12 + row * (size + 12) + 6, 96 + column * (size + 12) + 6
    return picture[top : top + size, left : left + size]


def test_film_strip_shows_every_pixel(tmp_path):
    truth, dream = film(0), film(1)
    picture = pixels(plot.film_strip(truth, dream, 2, tmp_path / "film.png", frames=3))
    # Times 0, 4 and 8; 8 x 8 images enlarged 14 times to 112 pixels, in cells of 124; labels
    # take 96 + 12 pixels of the width and 12 + 58 of the height.
    assert picture.shape == (3 * 124 + 12 + 58, 3 * 124 + 96 + 12, 3)
    difference = np.abs(truth.astype(int) - dream.astype(int))
    for row, images in enumerate((truth, dream, difference)):
        for column, time in enumerate((0, 4, 8)):
            np.testing.assert_array_equal(cell(picture, row, column)[7::14, 7::14], images[time])
    # The frames: time 0 is context, times 4 and 8 are dreamed.
    for column, color in enumerate((GREY, ORANGE, ORANGE)):
        np.testing.assert_array_equal(picture[12 + 4, 96 + 124 * column + 62], color)


def test_difference_is_black_where_the_dream_is_true(tmp_path):
    truth = film()
    picture = pixels(plot.film_strip(truth, truth, 3, tmp_path / "film.png", frames=4))
    for column in range(4):
        assert not cell(picture, 2, column).any()


@pytest.mark.parametrize("channels", [1, 4])
def test_films_of_other_channels(tmp_path, channels):
    images = film(channels=channels)
    picture = pixels(plot.film_strip(images, images, 3, tmp_path / "film.png", frames=2))
    shown = cell(picture, 0, 0)[7::14, 7::14]
    if channels == 1:
        np.testing.assert_array_equal(shown, np.repeat(images[0], 3, -1))
    else:
        assert shown.any()


def test_each_channel_beyond_three_has_a_colour():
    # One pixel lit in one of four channels: the first four colours, #0072B2 and so on.
    colors = plot._rgb(255 * np.eye(4, dtype=np.uint8))
    np.testing.assert_array_equal(
        colors, [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)]
    )


def test_short_films_have_a_column_per_time(tmp_path):
    images = film(length=5, size=112)
    picture = pixels(plot.film_strip(images, images, 0, tmp_path / "film.png", frames=12))
    assert picture.shape[1] == 5 * 124 + 96 + 12


@pytest.mark.parametrize(
    ("truth", "dream", "context", "frames", "words"),
    [
        (film(length=0), film(length=0), 0, 3, "not empty; it is uint8 of shape"),
        (film().astype(np.float32), film(), 0, 3, "'truth' should be uint8 images"),
        (film(), film()[0], 0, 3, "'dream' should be uint8 images"),
        (film(), film(length=4), 0, 3, "different shapes"),
        (film(), film(), 10, 3, "0 to 9 steps of 9, not 10"),
        (film(), film(), 0, 0, "at least one frame"),
    ],
)
def test_films_that_cannot_be_shown_are_told(tmp_path, truth, dream, context, frames, words):
    with pytest.raises(JaxwmError, match=words):
        plot.film_strip(truth, dream, context, tmp_path / "film.png", frames)


# Traces


def test_traces_are_drawn_in_their_colours(tmp_path):
    truth = {"position": np.zeros((20, 3), np.float32), "angle": np.zeros((20, 1), np.float32)}
    dream = {key: values + 1 for key, values in truth.items()}
    picture = pixels(plot.traces(truth, dream, 5, tmp_path / "traces.png"))
    # Four panels of 310 x 170 in two rows, and 80 for the legend.
    assert picture.shape == (2 * 170 + 80, 930, 3)
    assert has_color(picture, ORANGE) and has_color(picture, (0x22, 0x22, 0x22))
    assert has_color(picture, (0xE3, 0xE3, 0xE3))


def test_no_more_than_twelve_traces(tmp_path):
    values = {"obs": np.zeros((6, 40), np.float32)}
    picture = pixels(plot.traces(values, values, 2, tmp_path / "traces.png"))
    assert picture.shape == (4 * 170 + 80, 930, 3)


@pytest.mark.parametrize(
    ("truth", "dream", "context", "words"),
    [
        ({}, {}, 0, "no observation keys"),
        ({"a": np.zeros((3, 1))}, {"b": np.zeros((3, 1))}, 0, r"\['a'\], and dreamed, \['b'\]"),
        ({"a": np.zeros((3, 1))}, {"a": np.zeros((4, 1))}, 0, r"\(3, 1\) and \(4, 1\)"),
        ({"a": np.zeros(3)}, {"a": np.zeros(3)}, 0, r"one shape \(T, F\)"),
        ({"a": np.zeros((0, 2))}, {"a": np.zeros((0, 2))}, 0, "not empty"),
        ({"a": np.zeros((3, 1))}, {"a": np.zeros((3, 1))}, -1, "0 to 3 steps of 3, not -1"),
    ],
)
def test_traces_that_cannot_be_shown_are_told(tmp_path, truth, dream, context, words):
    with pytest.raises(JaxwmError, match=words):
        plot.traces(truth, dream, context, pathlib.Path(tmp_path / "traces.png"))


def test_the_backend_of_others_is_left_alone(tmp_path):
    import matplotlib

    before = matplotlib.get_backend()
    images = film()
    plot.film_strip(images, images, 3, tmp_path / "film.png")
    assert matplotlib.get_backend() == before

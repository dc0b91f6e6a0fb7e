"""Agreement with arrays recorded from the reference implementation, gradients included.

`pytest tests/test_parity.py --parity-dir DIR` runs the same checks on any other arrays of the
layout of tests/data/parity: other sizes, keys, numbers of actions, images and vectors mixed. Files
are told apart by what they hold, not by name. DIR itself holds arrays of DreamerV3, its folders
those of other systems (`parity.systems`); a folder of another name is skipped.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import parity_model
import parity_units
import pytest

from jaxwm.replay.device import close_abandoned
from jaxwm.types import Step
from tests.parity import systems
from tests.parity.common import run

pytestmark = pytest.mark.no_cover

TOLERANCE = 1e-4
GROUPS = (
    "out/enc",
    "out/rssm",
    "out/dec",
    "out/rew",
    "out/con",
    "out/val",
    "out/slowval",
    "out/pol",
    "out/loss",
    "out/img",
    "out/repl",
    "out/total",
    "out/retnorm",
    "grad/",
    "gradnorm/values",
    "act/",
)


@functools.cache
def load(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


def files(folder: Path, marker: str) -> list[Path]:
    """The files of a folder that hold an array called `marker`."""
    return [path for path in sorted(folder.glob("*.npz")) if marker in np.load(path).files]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--parity-dir"))
    markers = {"model_file": "in/obs/reward", "unit_file": "symlog/x", "opt_file": "grad2/"}
    for name, marker in markers.items():
        if name in metafunc.fixturenames:
            if marker.endswith("/"):
                found = [
                    path
                    for path in sorted(folder.glob("*.npz"))
                    if any(key.startswith(marker) for key in np.load(path).files)
                ]
            else:
                found = files(folder, marker)
            metafunc.parametrize(name, found, ids=[path.stem for path in found], scope="session")
    if "check" in metafunc.fixturenames:
        found = systems.applicable(folder)
        ids = [f"{name}/{path.stem}-{check.topic}" for name, path, check in found]
        metafunc.parametrize(("path", "check"), [case[1:] for case in found], ids=ids)
    if "system" in metafunc.fixturenames:
        found = [(name, x) for name in systems.FOLDERS for x in systems.files(folder / name)]
        ids = [f"{name}/{path.stem}" for name, path in found]
        metafunc.parametrize(("system", "path"), found, ids=ids)


def test_system_agrees(path, check):
    run(path, check)


def test_every_array_of_a_system_is_compared(system, path):
    assert not systems.forgotten(system, path)


@pytest.fixture(scope="session")
def recomputed(model_file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The recorded arrays of a file and ours under the same names."""
    return load(model_file), _recompute(model_file)


@functools.cache
def _recompute(path: Path) -> dict[str, np.ndarray]:
    case = parity_model.Case(load(path))
    return parity_model.recompute(case) | parity_model.gradients(case) | parity_model.acting(case)


@pytest.mark.parametrize("group", GROUPS)
def test_model_arrays_agree(recomputed, group):
    recorded, ours = recomputed
    names = [name for name in recorded if name.startswith(group)]
    names = [name for name in names if not name.startswith("act/noise")]
    assert names or group.startswith("out/"), f"nothing recorded under {group}"
    wrong = []
    for name in names:
        assert name in ours, f"{name} is recorded, but not recomputed"
        want = np.asarray(recorded[name], np.float64)
        have = np.asarray(ours[name], np.float64)
        assert have.shape == want.shape, f"{name}: {have.shape}, recorded {want.shape}"
        error = np.abs(have - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-12)
        if error > TOLERANCE:
            wrong.append(f"{name}: {error:.1e}")
    assert not wrong, wrong


def test_loss_terms_reach_the_same_parameters(recomputed):
    recorded, ours = recomputed
    reached = recorded["gradnorm/values"] > 0
    np.testing.assert_array_equal(ours["gradnorm/values"] > 0, reached)


def test_every_parameter_has_its_place(model_file):
    case = parity_model.Case(load(model_file))
    shapes = jax.eval_shape(case.agent.init, jax.random.key(0)).params
    ours = jax.tree.map(lambda x: x.shape, shapes)
    assert jax.tree.map(lambda x: x.shape, case.params) == ours


@pytest.mark.parametrize("topic", [name for name, _ in parity_units.UNITS])
def test_units_agree(unit_file, topic):
    dict(parity_units.UNITS)[topic](load(unit_file))


@pytest.mark.parametrize("topic", [name for name, _ in parity_units.OPTIMIZER])
def test_optimizer_agrees(opt_file, topic):
    recorded = load(opt_file)
    dict(parity_units.OPTIMIZER)[topic](recorded, _model_of(opt_file, recorded))


def _model_of(path: Path, recorded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model file whose gradients the optimiser's first step used."""
    names = {key.removeprefix("grad2/") for key in recorded if key.startswith("grad2/")}
    for other in files(path.parent, "in/obs/reward"):
        arrays = load(other)
        grads = {key: arrays[key] for key in arrays if key.startswith("grad/")}
        if {key.removeprefix("grad/") for key in grads} != names:
            continue
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in grads.values()))
        if np.isclose(norm, recorded["default/grad_norm1"], rtol=1e-4):
            return arrays
    raise AssertionError(f"no model file beside {path} has the gradients of its first step")


def test_dict_observations_become_the_recorded_vectors(unit_file):
    recorded = load(unit_file)
    names = [key for key in recorded if key.startswith("dictconcat/") and "/y" not in key]
    parity_model.check_concat(recorded, [key.removeprefix("dictconcat/") for key in names])


def test_windows_close_abandoned_episodes(unit_file):
    arrays = load(unit_file)
    length = arrays["replay/windows/x"].shape[1]
    starts = np.arange(arrays["replay/windows/x"].shape[0])
    index = starts[None] + np.arange(length)[:, None]  # (T, B)
    stream = {
        key.removeprefix("replay/stream/"): value
        for key, value in arrays.items()
        if key.startswith("replay/stream/")
    }
    flags = {k: jax.numpy.asarray(stream[k][index]) for k in ("is_first", "is_last", "is_terminal")}
    rows = Step(action=np.zeros(index.shape), obs={}, reward=np.zeros(index.shape), **flags)
    closed = close_abandoned(rows)
    for name in ("is_last", "is_terminal"):
        want = arrays[f"replay/windows/{name}"].T
        np.testing.assert_array_equal(getattr(closed, name), want)
    # Row 0 is context: it is never trained on, so the mark it gets in the recording is moot.
    np.testing.assert_array_equal(closed.is_first[1:], arrays["replay/windows/is_first"].T[1:])


def test_context_of_a_window(unit_file):
    parity_model.check_context(load(unit_file))

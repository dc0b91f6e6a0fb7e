"""Agreement with arrays recorded from the original implementations, gradients included.

`pytest tests/test_parity.py --parity-dir DIR` runs the same checks on any other arrays of the
layout of tests/data/parity: other sizes, keys, numbers of actions, images and vectors mixed. Files
are told apart by what they hold, not by name. DIR itself holds arrays of DreamerV3, its folders
those of other systems (`parity.systems`); a folder of another name is skipped.
"""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import parity_model
import parity_units
import pytest

from jaxwm.replay.device import close_abandoned
from jaxwm.types import Step
from tests.parity import systems
from tests.parity.common import Check, Recorded, names, run, used

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
INPUTS = r"(params|in|noise|state)/.*|act/noise.*|gradnorm/(losses|params)"


@functools.cache
def load(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


def files(folder: Path, marker: str) -> list[Path]:
    """The files of a folder that hold an array whose name starts with `marker`."""
    return [
        path
        for path in sorted(folder.glob("*.npz"))
        if any(name.startswith(marker) for name in np.load(path).files)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--parity-dir"))
    markers = {"model_file": "in/obs/reward", "unit_file": "symlog/x", "opt_file": "grad2/"}
    for name, marker in markers.items():
        if name in metafunc.fixturenames:
            found = files(folder, marker)
            metafunc.parametrize(name, found, ids=[path.stem for path in found], scope="session")
    if "system_check" in metafunc.fixturenames:
        found = systems.applicable(folder)
        ids = [f"{name}/{path.stem}-{check.topic}" for name, path, check in found]
        cases = [case[1:] for case in found]
        metafunc.parametrize(("system_file", "system_check"), cases, ids=ids)
    elif "system" in metafunc.fixturenames:
        found = [(name, x) for name in systems.FOLDERS for x in systems.files(folder / name)]
        ids = [f"{name}/{path.stem}" for name, path in found]
        metafunc.parametrize(("system", "system_file"), found, ids=ids)


def test_system_agrees(system_file, system_check):
    run(system_file, system_check)


def test_every_array_of_a_system_is_compared(system, system_file):
    assert not systems.forgotten(system, system_file)


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
    compared = [name for name in recorded if _belongs(name, group)]
    assert compared or group.startswith("out/"), f"nothing recorded under {group}"
    wrong = []
    for name in compared:
        assert name in ours, f"{name} is recorded, but not recomputed"
        want = np.asarray(recorded[name], np.float64)
        have = np.asarray(ours[name], np.float64)
        assert have.shape == want.shape, f"{name}: {have.shape}, recorded {want.shape}"
        error = np.abs(have - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-12)
        if not error <= TOLERANCE:
            wrong.append(f"{name}: {error:.1e}")
    assert not wrong, wrong


def _belongs(name: str, group: str) -> bool:
    return name.startswith(group) and not re.fullmatch(INPUTS, name)


def test_every_array_of_a_model_is_compared(model_file):
    left = [name for name in load(model_file) if not re.fullmatch(INPUTS, name)]
    assert not [name for name in left if not any(_belongs(name, group) for group in GROUPS)]


def test_loss_terms_reach_the_same_parameters(recomputed):
    recorded, ours = recomputed
    reached = recorded["gradnorm/values"] > 0
    np.testing.assert_array_equal(ours["gradnorm/values"] > 0, reached)


def test_every_parameter_has_its_place(model_file):
    case = parity_model.Case(load(model_file))
    shapes = jax.eval_shape(case.agent.init, jax.random.key(0)).params
    ours = jax.tree.map(lambda x: x.shape, shapes)
    assert jax.tree.map(lambda x: x.shape, case.params) == ours


def dict_observations(recorded: Recorded) -> None:
    """Dicts of observations become the recorded vectors."""
    keys = [key for key in recorded if key.startswith("dictconcat/") and "/y" not in key]
    parity_model.check_concat(recorded, [key.removeprefix("dictconcat/") for key in keys])


def replay_windows(recorded: Recorded) -> None:
    """Windows close abandoned episodes."""
    stream = recorded.flat("replay/stream/")
    windows = recorded.flat("replay/windows/")
    count, length = windows["x"].shape
    index = np.arange(count)[None] + np.arange(length)[:, None]  # (T, B)
    np.testing.assert_array_equal(stream["x"][index], windows["x"].T)
    flags = {k: jax.numpy.asarray(stream[k][index]) for k in ("is_first", "is_last", "is_terminal")}
    rows = Step(action=np.zeros(index.shape), obs={}, reward=np.zeros(index.shape), **flags)
    closed = close_abandoned(rows)
    for name in ("is_last", "is_terminal"):
        np.testing.assert_array_equal(getattr(closed, name), windows[name].T)
    # Row 0 is context: it is never trained on, so the mark it gets in the recording is moot.
    np.testing.assert_array_equal(closed.is_first[1:], windows["is_first"].T[1:])


UNITS = [
    *(Check(topic, r"symlog/x", function) for topic, function in parity_units.UNITS),
    Check("dict_observations", r"symlog/x", dict_observations),
    Check("replay_windows", r"symlog/x", replay_windows),
    Check("replay_context", r"symlog/x", parity_model.check_context),
]


@pytest.mark.parametrize("check", UNITS, ids=[check.topic for check in UNITS])
def test_units_agree(unit_file, check):
    run(unit_file, check)


def test_every_array_of_units_is_compared(unit_file):
    assert not _left(unit_file, UNITS)


# Arrays that no check needs, with the reason.
UNUSED = {
    r"context/in_carry/.*": "belongs to windows that continue the last one, which we do not make",
    r"tiny/.*": "recorded as a warning about entries that underflow, not as a test",
}


def _left(path: Path, checks: list[Check]) -> list[str]:
    """Arrays of a file that no check has used."""
    read, compared = used(path, checks)
    left = [name for name in names(path) if name not in read | compared]
    return [name for name in left if not any(re.fullmatch(pattern, name) for pattern in UNUSED)]


def _optimizer(function) -> Check:
    return Check(
        function.__name__,
        r"grad2/.*",
        lambda recorded: function(recorded, _model_of(recorded.path, recorded)),
    )


def _model_of(path: Path, recorded: Recorded) -> dict[str, np.ndarray]:
    """The model file whose gradients the optimiser's first step used."""
    wanted = {key.removeprefix("grad2/") for key in recorded if key.startswith("grad2/")}
    for other in files(path.parent, "in/obs/reward"):
        arrays = load(other)
        grads = {key: arrays[key] for key in arrays if key.startswith("grad/")}
        if {key.removeprefix("grad/") for key in grads} != wanted:
            continue
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in grads.values()))
        if np.isclose(norm, recorded["default/grad_norm1"], rtol=1e-4):
            return arrays
    raise AssertionError(f"no model file beside {path} has the gradients of its first step")


OPTIMIZER = [_optimizer(function) for _, function in parity_units.OPTIMIZER]


@pytest.mark.parametrize("check", OPTIMIZER, ids=[check.topic for check in OPTIMIZER])
def test_optimizer_agrees(opt_file, check):
    run(opt_file, check)


def test_every_array_of_the_optimizer_is_compared(opt_file):
    assert not _left(opt_file, OPTIMIZER)

"""Silent bugs become errors, and compiled programs are kept from one run to the next.

Everything here happens before jax or jaxwm is imported, because flags and the import hook
have no effect afterwards.
"""

import importlib.metadata
import os
import pathlib
from collections.abc import Generator

# A quarter of the compile time of the defaults, with the same numbers. How fast a program then runs
# hardly matters: compiling is what tests do most. Releases that may not know a flag go without.
_CHEAP = {"xla_backend_optimization_level": "0"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _CHEAP["xla_cpu_use_fusion_emitters"] = "false"
_FLAGS = os.environ.get("XLA_FLAGS", "")
_MORE = [f"--{name}={value}" for name, value in _CHEAP.items() if name not in _FLAGS]
os.environ["XLA_FLAGS"] = " ".join([_FLAGS, *_MORE]).strip()
_ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("jaxwm", "typecheck.checked")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_num_cpu_devices", 1)  # in whatever order tests run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Files that take minutes start first: one at the end would leave the other worker without work.
_LONG = ("test_train_host", "test_sweep", "test_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(_LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Tests marked no_cover have their fixtures untraced too: pytest-cov sees to calls alone."""
    cov = item.config.pluginmanager.get_plugin("_cov")
    paused = cov and cov.cov_controller and item.get_closest_marker("no_cover")
    if paused:
        cov.cov_controller.pause()
    try:
        return (yield)
    finally:
        if paused:
            cov.cov_controller.resume()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        type=pathlib.Path,
        default=_ROOT / "tests" / "data" / "parity",
        metavar="DIR",
        help="folder of arrays recorded from the original implementations "
        "(default: tests/data/parity)",
    )


@pytest.fixture(scope="session")
def parity_dir(request: pytest.FixtureRequest) -> pathlib.Path:
    """The folder with the recorded arrays of the reference implementations."""
    folder = request.config.getoption("--parity-dir").resolve()
    if not folder.is_dir():
        pytest.fail(f"--parity-dir: there is no folder {folder}", pytrace=False)
    return folder


@pytest.fixture(scope="session")
def tiny() -> "jaxwm.RunConfig":
    """A run of seconds, for tests of what surrounds the learning; they share its program."""
    from tests.faults.damage import TINY

    return TINY


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of the run `tiny`, from start to end; tests leave it as it is."""
    from jaxwm.run.loop import run

    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny, folder, quiet=True)
    return folder

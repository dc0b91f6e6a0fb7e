"""Silent bugs become errors, and compiled programs are kept from one run to the next.

Everything here happens before jax or jaxwm is imported, because flags and the import hook
have no effect afterwards.
"""

import os
import pathlib

# Two thirds of the compile time of the default level, with the same numbers and run time.
_CHEAP = "--xla_backend_optimization_level=1"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_CHEAP}".strip()
_ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("jaxwm", "typecheck.checked")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        type=pathlib.Path,
        default=_ROOT / "tests" / "data",
        metavar="DIR",
        help="folder of the arrays recorded from reference implementations (default: tests/data)",
    )


@pytest.fixture(scope="session")
def parity_dir(request: pytest.FixtureRequest) -> pathlib.Path:
    """The folder with the recorded arrays of the reference implementations."""
    folder = request.config.getoption("--parity-dir").resolve()
    if not folder.is_dir():
        pytest.fail(f"--parity-dir: there is no folder {folder}", pytrace=False)
    return folder

"""The house: imports point down, outside packages have one home, functions are short."""

import ast
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxwm"

FLOORS = [
    {"spaces", "types", "numerics", "config", "backend"},
    {"returns", "dists", "nets", "optim", "replay"},
    {"envs", "models", "behaviors"},
    {"agent"},
    {"recipes"},
    {"train"},
    {"run", "evaluate", "view", "policy", "zoo", "cli", "__init__", "__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS, start=1) for name in names}
STRANGERS = {"envs", "models", "behaviors"}

# Outside package: the files or folders of jaxwm that may import it.
HOMES = {
    "flax": ("nets", "models"),
    "distrax": ("dists",),
    "optax": ("optim",),
    "orbax": ("run.checkpoint", "run.saver"),
    "safetensors": ("run.weights",),
    "matplotlib": ("view",),
    "tensorboardX": ("run.log",),
    "gymnax": ("envs.gymnax",),
    "brax": ("envs.brax",),
    "mujoco": ("envs.brax", "envs.dm_control", "envs.playground"),
    "mujoco_playground": ("envs.playground",),
    "craftax": ("envs.craftax",),
    "gymnasium": ("envs.gymnasium",),
    "dm_control": ("envs.dm_control",),
    "ale_py": ("envs.atari",),
}
# The others only inside the function that needs them.
EAGER = {"flax", "distrax", "optax", "orbax", "safetensors"}


class Import(NamedTuple):
    """`name` is imported by `module` (dotted, below jaxwm) at `line`."""

    module: str
    name: str
    line: int
    in_function: bool


def imports_of(module: str, source: str) -> list[Import]:
    """Every import of a module; `from jaxwm import dists` counts as `jaxwm.dists`."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                start = "." * child.level + (child.module or "")
                whole = start == "jaxwm" or child.level
                names = [f"{start}.{alias.name}" for alias in child.names] if whole else [start]
            found.extend(Import(module, name, child.lineno, in_function) for name in names)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, in_function or function)

    visit(ast.parse(source), in_function=False)
    return found


def offences(imports: list[Import]) -> list[str]:
    """What is wrong with these imports, one sentence each."""
    told = []
    for module, name, line, in_function in imports:
        here, where = module.partition(".")[0], f"jaxwm.{module}:{line}"
        top, _, rest = name.partition(".")
        if top == "":
            told.append(f"{where} imports {name} relatively; write jaxwm.…")
        elif top == "jaxwm":
            there = rest.partition(".")[0] if rest.partition(".")[0] in FLOOR else "__init__"
            if FLOOR[there] > FLOOR[here]:
                told.append(f"{where} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]})")
            if here != there and {here, there} <= STRANGERS:
                told.append(f"{where} imports {name}: {here} and {there} must not know each other")
        elif top in HOMES:
            if not any(module == home or module.startswith(f"{home}.") for home in HOMES[top]):
                told.append(f"{where} imports {top}, whose home is {' or '.join(HOMES[top])}")
            if top not in EAGER and not in_function:
                told.append(f"{where} imports {top} outside a function")
        elif here == "cli" and top == "jax" and not in_function:
            told.append(f"{where} imports jax outside a function")
    return told


def test_imports_point_down():
    told = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        assert module.partition(".")[0] in FLOOR, f"{path.name} has no floor: give it one in FLOORS"
        told += offences(imports_of(module, path.read_text()))
    assert not told, "\n".join(told)


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("types", "from jaxwm import agent", "(floor 1) imports jaxwm.agent (floor 4)"),
        (
            "nets",
            "def f():\n  import jaxwm.view.plot",
            "jaxwm.nets:2 (floor 2) imports jaxwm.view.plot",
        ),
        ("agent", "from jaxwm import __version__", "(floor 7)"),
        ("envs.toy", "from jaxwm.models.gru import GRU", "envs and models must not know each"),
        ("agent", "from .types import Step", "relatively"),
        ("agent", "import optax", "whose home is optim"),
        ("envs.toy", "def f():\n  import brax.envs", "whose home is envs.brax"),
        ("envs.brax", "import brax.envs", "outside a function"),
        ("view.plot", "from matplotlib.figure import Figure", "outside a function"),
        ("cli", "import jax.numpy as jnp", "imports jax outside a function"),
    ],
)
def test_an_import_in_the_wrong_place_is_told(module, source, words):
    (told,) = offences(imports_of(module, source))
    assert words in told


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("agent", "from jaxwm import nets, optim\nfrom jaxwm.behaviors.planner import cem"),
        ("models.gru", "import flax.linen as nn\nfrom jaxwm.models.latents import sample"),
        ("envs.brax", "def make():\n  from brax import envs"),
        ("cli", "def main():\n  import jax\n  from jaxwm import train"),
    ],
)
def test_an_import_in_its_place_is_silent(module, source):
    assert offences(imports_of(module, source)) == []


# What only `backend` may ask or do. `.platform` says whether devices share one memory in `mesh`.
DEVICE_WORDS = re.compile(r"default_backend|\.platform\b|custom_vjp|optimization_barrier")
PLACES_ARRAYS = {"train/mesh.py": {".platform"}}


def test_only_the_backend_asks_what_the_device_is():
    told = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        words = set(DEVICE_WORDS.findall(path.read_text("utf-8")))
        if not name.startswith("backend/") and words - PLACES_ARRAYS.get(name, set()):
            told.append(f"{name}: {words}")
    assert not told, "\n".join(told)


def test_functions_are_short():
    """No function has more than 120 lines, and nine in ten have at most 35."""
    lengths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                lengths[f"{path.name}:{node.lineno} {node.name}"] = length
    assert len(lengths) > 1000
    assert {name: x for name, x in lengths.items() if x > 120} == {}
    assert sum(x <= 35 for x in lengths.values()) >= 0.9 * len(lengths)


def test_few_rooms_lie_at_the_top():
    rooms = [x for x in PACKAGE.iterdir() if x.suffix == ".py" or (x / "__init__.py").exists()]
    assert len(rooms) <= 22, sorted(x.name for x in rooms)


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules loaded by `python ARGUMENTS` in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_importing_jaxwm_is_light():
    heavy = {"gymnax", "brax", "mujoco", "distrax", "matplotlib", "orbax", "pandas"}
    assert not modules_after("-c", "import jaxwm") & heavy


def test_worker_processes_do_without_jax():
    adapters = [f"jaxwm.envs.{x}" for x in ("atari", "crafter", "dm_control", "gymnasium")]
    loaded = modules_after("-c", f"import jaxwm.envs.worker, {', '.join(adapters)}")
    assert "jaxwm" in loaded and not loaded & {"jax", "jaxlib"}


def test_help_does_not_wait_for_jax():
    loaded = modules_after("-m", "jaxwm.cli", "--help")
    assert "jaxwm" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "matplotlib"}

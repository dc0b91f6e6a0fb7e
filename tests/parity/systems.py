"""The systems with recorded arrays in a folder of their own, and the checks of each.

The checks of a folder are the `CHECKS` of all modules here that bear its name: `planet.py`,
`planet_units.py` and so on. A module may also have `UNUSED`: patterns of arrays that nothing needs,
each with the reason.
"""

import functools
import importlib
import pkgutil
import re
from pathlib import Path

import tests.parity
from tests.parity.common import Check, names, used

FOLDERS = ("dreamer_v1", "dreamer_v2", "planet", "ppo")

# Arrays of a recorded batch that are inputs; all others are results and must be compared.
INPUTS = (
    r"(params|in|cfg|noise)/.*",
    r"act/\d+/(noise\w*|prev_action)",
    r"open/(action|noise)",
    r"cem/(noise/.*|sizes)",
    r"gradnorm/(losses|params)",
    r"out/(scale/\w+|free_nats)",
)


@functools.cache
def modules(folder: str) -> list:
    """The modules that hold checks of a folder."""
    found = [module.name for module in pkgutil.iter_modules(tests.parity.__path__)]
    mine = [name for name in found if name == folder or name.startswith(f"{folder}_")]
    return [importlib.import_module(f"tests.parity.{name}") for name in mine]


def checks(folder: str) -> list[Check]:
    """All checks of a folder, whatever file they apply to."""
    return [check for module in modules(folder) for check in module.CHECKS]


def files(folder: Path) -> list[Path]:
    """The arrays of a system, `--parity-dir` / its name; none if there is no such folder."""
    return sorted(folder.glob("*.npz"))


def applicable(root: Path) -> list[tuple[str, Path, Check]]:
    """Every check of every file below `root`."""
    return [
        (folder, path, check)
        for folder in FOLDERS
        for path in files(root / folder)
        for check in checks(folder)
        if check.applies(names(path))
    ]


def forgotten(folder: str, path: Path) -> list[str]:
    """The arrays of a file that no check has used and no `UNUSED` names."""
    read, compared = used(path, checks(folder))
    unused = [pattern for module in modules(folder) for pattern in getattr(module, "UNUSED", {})]
    recorded = names(path)
    is_batch = any(name.startswith("params/") for name in recorded)

    def any_of(patterns: tuple[str, ...] | list[str], name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    def fine(name: str) -> bool:
        if name in compared or any_of(unused, name):
            return True
        return name in read and (any_of(INPUTS, name) or not is_batch)

    return [name for name in recorded if not fine(name)]

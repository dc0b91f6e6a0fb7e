"""Earlier formats of checkpoints and configurations, and how they are read.

Format 1 (version 0.1) had no checksums, and the whole replay in the part `rest`. Format 2 knew one
agent, DreamerV3, whose state had fixed fields; since format 3 (`manifest.FORMAT`) a state holds
whatever its agent keeps. Leaves of the formats 1 and 2 are the same numbers under other paths.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxwm.config import from_dict, read_json
from jaxwm.optim import Schedule
from jaxwm.recipes import RunConfig
from jaxwm.run import arrays, manifest, parts
from jaxwm.run.manifest import Damaged

# The path of each leaf of DreamerV3, or of all below it, and its path in the formats 1 and 2.
_BEFORE_3 = {
    "agent/rest/behavior/returns": "agent/behavior",
    "agent/rest/behavior/slow/params": "agent/slow/params/value",
    "agent/rest/behavior/slow/count": "agent/slow/count",
    "agent/rest/opt": "agent/opt",
    "agent/rest/updates": "agent/opt/1/count",  # both count the updates that were taken
    "carry/model/core": "carry/deter",
    "carry/model/stoch": "carry/stoch",  # one-hot (..., S, K), now flat (..., S * K)
    "memo/core": "deter",
    "memo/stoch": "stoch",
    "buffer/memo/core": "buffer/deter",
    "buffer/memo/stoch": "buffer/stoch",
}
# Entries that configurations of these formats may lack, and the values with which they ran.
_ADDED = {
    "replay": {"context_every": 1, "prefill": 0, "train_every": 0, "pretrain": 0},
    "agent": {"model": {"recompute": False}},
}


def unlike(form: int, there: dict[str, str], part: PyTree) -> list[str]:
    """The leaves that differ between a part of a checkpoint and what it should be.

    Args:
      form: the format of the checkpoint.
      there: type and shape of its leaves, by their paths there.
      part: the part as it is now.

    Returns:
      A line for each difference.
    """
    here = dict(arrays.describe(part))
    names = {path: _stored_path(path, form) for path in here}
    wrong = [
        f"{path}: {here[path]} here, {there.get(name, 'absent')} there"
        for path, name in names.items()
        if not _same(form, here[path], there.get(name, ""))
    ]
    return wrong + [
        f"{name}: absent here, {there[name]} there" for name in there.keys() - set(names.values())
    ]


def places(found: dict[str, Any], name: str, like: PyTree) -> dict[str, Any]:
    """What to read for a part of a checkpoint: a place for each number that it is stored under.

    Args:
      found: the manifest.
      name: the part.
      like: the part as it is now.
    """
    leaves = arrays.numbered(like)
    return {
        stored: _reshaped(arrays.place(leaves[number]), shape)
        for number, stored, shape in _numbers(found, name, like)
    }


def renumbered(
    found: dict[str, Any], name: str, like: PyTree, got: dict[str, Any]
) -> dict[str, Any]:
    """The leaves that were read from `places`, by their numbers in `like`."""
    if found["format"] >= 3:
        return got
    leaves, taken, result = arrays.numbered(like), set(), {}
    for number, stored, shape in _numbers(found, name, like):
        leaf = got[stored]
        if shape is not None:
            leaf = leaf.reshape(leaves[number].shape)
        # A state that holds one array twice cannot be donated.
        result[number] = leaf.copy() if stored in taken else leaf
        taken.add(stored)
    return result


def _numbers(
    found: dict[str, Any], name: str, like: PyTree
) -> list[tuple[str, str, tuple[int, ...] | None]]:
    """Number in `like`, number in the checkpoint, and the stored shape if it is another."""
    if found["format"] >= 3 or name not in found["leaves"]:
        return [(number, number, None) for number in arrays.numbered(like)]
    there = dict(found["leaves"][name])
    order = {path: str(number) for number, path in enumerate(there)}
    here, result = arrays.describe(like), []
    for number in arrays.numbered(like):
        path, description = here[int(number)]
        stored = _stored_path(path, found["format"])
        shape = None if there[stored] == description else _shape(there[stored])
        result.append((number, order[stored], shape))
    return result


def _stored_path(path: str, form: int) -> str:
    """The path that a leaf has in a checkpoint of format `form`."""
    if form >= 3:
        return path
    for new, old in _BEFORE_3.items():
        if path == new or path.startswith(f"{new}/"):
            return old + path.removeprefix(new)
    return path


def _same(form: int, here: str, there: str) -> bool:
    """Whether two descriptions "dtype (shape)" say the same; early formats may have more axes."""
    same_type = here.partition(" ")[0] == there.partition(" ")[0]
    same_size = math.prod(_shape(here)) == math.prod(_shape(there))
    return here == there or (form < 3 and same_type and same_size)


def _shape(description: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", description.partition(" ")[2]))


def _reshaped(place: Any, shape: tuple[int, ...] | None) -> Any:
    if shape is None:
        return place
    if isinstance(place, np.ndarray):
        return np.broadcast_to(np.zeros((), place.dtype), shape)
    return jax.ShapeDtypeStruct(shape, place.dtype, sharding=place.sharding)


def memo_part(form: int) -> str:
    """The name of the part with the replay's memos in a checkpoint of format `form`."""
    return parts.MEMO if form >= 3 else "latents"


def is_first(folder: Path) -> bool:
    """Whether a checkpoint's folder has format 1."""
    return (folder / "manifest" / "metadata").is_file() and not (folder / manifest.NAME).exists()


def read_first(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of format 1, as far as it had one.

    Raises:
      Damaged: if it cannot be read.
    """
    try:
        manifest.ordinary(folder)
        found = read_json(folder / "manifest" / "metadata", manifest.LARGEST)
        leaves = {name: found[name] for name in (parts.PARAMS, parts.REST)}
        return {"format": 1, "step": int(folder.name), "config": found["config"], "leaves": leaves}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Damaged("its manifest cannot be read") from None


def configured(data: Any) -> RunConfig:
    """A configuration from JSON, also of earlier formats.

    Raises:
      JaxwmError: if it is not valid.
    """
    agent = _table(data, "agent")
    if "anneal_steps" in _table(agent, "optim"):  # the mark of the formats 1 and 2
        data = _filled(data, _ADDED)
        agent = {**data["agent"], "optim": _annealed(data)}
        if model := _table(agent, "model"):  # its dtype was never read
            agent["model"] = {name: value for name, value in model.items() if name != "dtype"}
        data = {**data, "agent": agent}
        if data.get("on_divergence") == "stop":
            data["on_divergence"] = "abort"
    return from_dict(RunConfig, data)


def _annealed(data: dict[str, Any]) -> Any:
    """The optimiser's entries, with `anneal_steps` as a schedule.

    The learning rate fell to a tenth at the update `anneal_steps`. Where that was the last update
    of the run, the schedule lasts as long as the run does.
    """
    table = _table(data["agent"], "optim")
    optim = {name: value for name, value in table.items() if name != "anneal_steps"}
    try:
        rate, steps = float(table["learning_rate"]), int(table["anneal_steps"])
        replay, warmup = data["replay"], int(table["warmup_steps"])
        batch = replay["batch_size"] * replay["batch_length"]
        last = max(int(data["steps"] * replay["train_ratio"] / batch), warmup + 1)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return optim  # `from_dict` says what is wrong
    if steps:
        schedule = Schedule(rate, 0.1 * rate, updates=0 if steps == last else steps)
        optim["learning_rate"] = dataclasses.asdict(schedule)
    return optim


def _table(data: Any, name: str) -> dict[str, Any]:
    """An entry that should be a table; an empty one if it is not."""
    entry = data.get(name) if isinstance(data, dict) else None
    return entry if isinstance(entry, dict) else {}


def _filled(data: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """Tables with the entries that they lack."""
    tables = {
        name: _filled(data[name], added)
        for name, added in entries.items()
        if isinstance(added, dict) and isinstance(data.get(name), dict)
    }
    plain = {name: added for name, added in entries.items() if not isinstance(added, dict)}
    return {**plain, **data, **tables}

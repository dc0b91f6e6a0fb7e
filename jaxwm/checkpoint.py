"""Checkpoints: the whole experiment on disk, and back bit for bit.

A checkpoint is a folder RUN/checkpoints/STEP with three parts: "params" (the networks, all that
acting needs), "rest" (optimiser, replay, environments, counters, keys) and "manifest" (the
configuration and every leaf's path, type and shape). Leaves are stored by number, so any pytree
can be stored; the manifest is compared before anything is read or allocated.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxwm.config import differences, from_dict, read, require, to_dict
from jaxwm.recipes import RunConfig
from jaxwm.types import JaxwmError, Params

CONFIG = "config.json"
KEPT = 2
# These may change from one part of a run to the next.
FREE = ("steps", "eval_episodes", "log_every", "save_every", "host", "shard_params")
_FOLDER = "checkpoints"
_PARTS = ("params", "rest", "manifest")


def manager(run: Path) -> ocp.CheckpointManager:
    """What `save` writes with; use it in a `with` statement. Keeps the last two checkpoints."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        cleanup_tmp_directories=True,
        # The next chunk overwrites the state in place, so a copy to write from later would have
        # to be made, as large as the replay.
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager((run / _FOLDER).resolve(), options=options, item_names=_PARTS)


def save(manager: ocp.CheckpointManager, step: int, state: Any, config: RunConfig) -> None:
    """Writes a checkpoint; it counts only once it is complete.

    Args:
      manager: from `manager`.
      step: environment steps of one seed so far.
      state: the `TrainState`.
      config: the run.
    """
    parts = _split(state)
    manifest = {name: _describe(part) for name, part in parts.items()}
    items = {
        name: ocp.args.StandardSave(
            {number: _raw(leaf) for number, leaf in _stored(part).items()}  # type: ignore
        )
        for name, part in parts.items()
    }
    about = ocp.args.JsonSave({"config": to_dict(config), **manifest})  # type: ignore
    manager.save(step, args=ocp.args.Composite(**items, manifest=about))


def latest(run: Path) -> int:
    """The step of the newest checkpoint of a run.

    Raises:
      JaxwmError: if the run has none.
    """
    folder = run / _FOLDER
    steps = [int(x.name) for x in folder.glob("*") if x.name.isdigit()] if folder.exists() else []
    require(
        bool(steps),
        f"The run {run} has no checkpoint: it was stopped before the first one. Delete the folder "
        "and train again, with a smaller --save-every if need be.",
    )
    return max(steps)


def read_config(run: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      JaxwmError: if there is no such folder, it is not a run, or its configuration is not valid.
    """
    require(run.exists(), f"There is no run folder {run}. `jaxwm train` makes one.")
    require(
        (run / CONFIG).is_file(),
        f"{run} is not the folder of a run: it has no {CONFIG}. Give the folder that `jaxwm train` "
        "named, such as runs/demo.",
    )
    return read(RunConfig, run / CONFIG)


def restore(run: Path, like: Any, config: RunConfig) -> Any:
    """The state of the newest checkpoint, on the device but for what is numpy in `like`.

    Args:
      run: the run's folder.
      like: the shapes of the state, `program.shapes()`.
      config: what the run is now; it may differ from the stored one in `FREE` entries.

    Returns:
      A state of the same type as `like`, ready to be donated to `Program.chunk`.

    Raises:
      JaxwmError: if there is no checkpoint, it cannot be read, or it is another configuration's.
    """
    parts = _restore(run, _split(like), config)
    state = parts["rest"]
    return state._replace(agent=state.agent._replace(params=parts["params"]))


def restore_params(run: Path, like: Params, config: RunConfig) -> Params:
    """The networks of the newest checkpoint; nothing else is read. See `restore`."""
    return _restore(run, {"params": like}, config)["params"]


def _split(state: Any) -> dict[str, Any]:
    """The parts of a state that are stored apart."""
    rest = state._replace(agent=state.agent._replace(params=()))
    return {"params": state.agent.params, "rest": rest}


def _restore(run: Path, parts: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    step = latest(run)
    folder = run / _FOLDER
    try:
        with ocp.CheckpointManager(folder.resolve(), item_names=_PARTS) as source:
            manifest = source.restore(
                step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())
            )["manifest"]
            _check(folder / str(step), manifest, parts, config)
            args = {
                name: ocp.args.StandardRestore(
                    {number: _place(leaf) for number, leaf in _stored(part).items()}  # type: ignore
                )
                for name, part in parts.items()
            }
            found = source.restore(step, args=ocp.args.Composite(**args))
    except JaxwmError:
        raise
    except Exception as error:
        raise JaxwmError(
            f"The checkpoint {folder / str(step)} cannot be read ({type(error).__name__}: "
            f"{str(error)[:200]}). Delete that folder to fall back on the one before it, if any."
        ) from error
    return {name: _join(part, found[name]) for name, part in parts.items()}


def _check(folder: Path, manifest: Any, parts: dict[str, Any], config: RunConfig) -> None:
    """Raises an error unless configuration and leaves are those of the checkpoint."""
    stored = from_dict(RunConfig, manifest["config"])
    same = dataclasses.replace(stored, **{name: getattr(config, name) for name in FREE})
    wrong = differences(config, same)
    if not wrong:
        for name, part in parts.items():
            here, there = dict(_describe(part)), dict(manifest[name])
            wrong += [
                f"{path}: {here.get(path, 'absent')} here, {there.get(path, 'absent')} there"
                for path in {**here, **there}
                if here.get(path) != there.get(path)
            ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise JaxwmError(
            f"The checkpoint {folder} is one of another configuration, or was made by another "
            f"version or on another kind of device. {shown}. Put {CONFIG} back as it was, or "
            "start a new run in another folder."
        )


def _describe(tree: PyTree) -> list[list[str]]:
    """Path and "dtype (shape)" of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    return [[path, f"{x.dtype} {tuple(x.shape)}"] for path, x in named]


def _stored(tree: PyTree) -> dict[str, Any]:
    """The leaves by number; empty arrays cannot be stored and need not be."""
    leaves = enumerate(jax.tree.leaves(tree))
    return {str(number): leaf for number, leaf in leaves if leaf.size > 0}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    """A typed key as numbers, anything else as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _place(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Shape, type and devices of an array to read; what is numpy is read as numpy."""
    if isinstance(leaf, np.ndarray):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=where)


def _join(like: PyTree, found: dict[str, Any]) -> PyTree:
    """The tree `like` with the leaves that were read."""
    leaves, tree = jax.tree.flatten(like)
    full = []
    for number, leaf in enumerate(leaves):
        value: Any = found.get(str(number))
        if value is None:
            if isinstance(leaf, np.ndarray):
                value = np.zeros(leaf.shape, leaf.dtype)
            else:
                value = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        full.append(jax.random.wrap_key_data(value) if _is_key(leaf) else value)
    return jax.tree.unflatten(tree, full)

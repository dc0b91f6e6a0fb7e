"""Weights for exchange: the networks of a run as safetensors and JSON, and back.

An exported folder holds `params.safetensors`, with one tensor for each leaf, named by its path in
the tree of parameters ("a/b/c"; members that trained side by side lead the axes); `config.json`,
the run; and `weights.json`, which says what the tensors are and has the checksum of their file.
Any reader of safetensors can use it.

Nothing of it is ever run, and reading is strict: what is missing, unknown or of another shape or
type is refused, before anything larger than what the configuration asks for is allocated. No file
but these three is opened, whatever they say.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxwm import config as configs
from jaxwm import train
from jaxwm.config import few, require
from jaxwm.recipes import RunConfig, agent_of
from jaxwm.run import checkpoint
from jaxwm.types import Env, HostEnv, JaxwmError, Params

ABOUT, TENSORS = "weights.json", "params.safetensors"
FORMAT = 1
_ABOUT_LIMIT = 1 << 22  # bytes; a tensor takes less than a hundred
_HEADER = 1 << 10  # bytes of the tensors' file for the description of each, at most
_TYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


@dataclasses.dataclass(frozen=True)
class About:
    """What `weights.json` says.

    Args:
      format: of the folder.
      jaxwm: the version of jaxwm that wrote it.
      env: the environment that the agent was trained in.
      step: environment steps of each seed until then.
      tensors: type and shape of every tensor, by its name.
      sha256: of the file of the tensors.
    """

    format: int
    jaxwm: str
    env: str
    step: int
    tensors: dict
    sha256: str


def export(run: Path, folder: Path, best: bool = False) -> Path:
    """Writes the networks of a run's newest sound checkpoint for others to use.

    Args:
      run: the run's folder.
      folder: where they go; it should not exist yet, or be empty.
      best: take those with the best returns in training instead.

    Returns:
      The folder.

    Raises:
      JaxwmError: if the run has no such checkpoint, or the folder is taken or cannot be written.
    """
    config = checkpoint.read_config(run)
    _refuse_taken(folder)
    like = shapes(config)[1]
    params, step = checkpoint.restore_params(run, like, config, best)
    return write(folder, params, config, step)


def write(folder: Path, params: Params, config: RunConfig, step: int) -> Path:
    """Writes an exported folder; it is there whole, or not at all.

    Args:
      folder: where it goes; it should not exist yet, or be empty.
      params: the parameters, of all members.
      config: the run.
      step: environment steps of each seed until then.

    Returns:
      The folder.

    Raises:
      JaxwmError: if the folder is taken or cannot be written, or a tensor is of a type that
        safetensors does not have.
    """
    _refuse_taken(folder)
    described = _described(params)
    for name, (dtype, _) in described.items():
        require(
            dtype in _TYPES.values(),
            f"The tensor {name} is {dtype}, which safetensors cannot hold. Cast it to float32.",
        )
    raw = safetensors.numpy.save({k: np.asarray(x, order="C") for k, x in _named(params).items()})
    about = About(
        format=FORMAT,
        jaxwm=importlib.metadata.version("jaxwm"),
        env=config.env,
        step=step,
        tensors=described,
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".weights-") as work:
            whole = Path(work) / "whole"
            whole.mkdir()
            (whole / TENSORS).write_bytes(raw)
            configs.write(config, whole / checkpoint.CONFIG)
            configs.write(about, whole / ABOUT)
            whole.rename(folder)
    except OSError as error:
        why = f"{folder} cannot be written: {error.strerror}."
        raise JaxwmError(f"{why} Give another folder, or make room.") from None
    return folder


def read(folder: Path, like: Params) -> Params:
    """The parameters in an exported folder.

    Args:
      folder: from `export`.
      like: their shapes and types, see `shapes`.

    Returns:
      Parameters of the same tree as `like`, on the device.

    Raises:
      JaxwmError: if a file is missing, damaged or no ordinary one, or the tensors are not exactly
        those of `like`.
    """
    about = read_about(folder)
    wanted = _described(like)
    _compare(folder / ABOUT, about.tensors, wanted)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    path = folder / TENSORS
    raw = configs.read_bytes(path, size + _HEADER * (1 + len(wanted)))
    require(
        hashlib.sha256(raw).hexdigest() == about.sha256,
        f"{path} is not the file that {ABOUT} describes: it was changed or damaged. Get it again.",
    )
    try:
        found = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError as error:
        raise JaxwmError(f"{path} cannot be read: {error}.") from None
    there = {k: [_TYPES.get(x["dtype"], x["dtype"]), list(x["shape"])] for k, x in found.items()}
    _compare(path, there, wanted)

    def array(name: str, leaf: Any) -> jax.Array:
        return jnp.asarray(np.frombuffer(found[name]["data"], leaf.dtype).reshape(leaf.shape))

    leaves = [array(name, leaf) for name, leaf in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_about(folder: Path) -> About:
    """What `weights.json` says.

    Raises:
      JaxwmError: if it is not there, cannot be read, or is of a later format.
    """
    path = folder / ABOUT
    try:
        about = configs.from_dict(About, configs.read_json(path, _ABOUT_LIMIT))
    except JaxwmError as error:
        raise JaxwmError(f"{folder} holds no weights that can be read. {error}") from None
    require(
        about.format == FORMAT,
        f"{path} has format {about.format}, and this version of jaxwm reads {FORMAT}. Install the "
        f"version that wrote it, {about.jaxwm[:20]!r}, or a later one.",
    )
    return about


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported one, and not that of a run."""
    return os.path.lexists(folder / ABOUT)


def shapes(config: RunConfig) -> tuple[Env | HostEnv, Params]:
    """The single environment of a run, and the shapes of its parameters, members first."""
    env = train.make_env(config)
    agent = agent_of(config, env.obs_space, env.action_space)

    def init() -> Params:
        make = lambda key: agent.init(key).params  # noqa: E731
        if config.members == 1:
            return make(jax.random.key(0))
        return jax.vmap(make)(jax.random.split(jax.random.key(0), config.members))

    return env, jax.eval_shape(init)


def _refuse_taken(folder: Path) -> None:
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} is there already, and is not an empty folder. Give another one.",
    )


def _named(tree: Params) -> dict[str, Any]:
    """The leaves by their paths, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    require(len(named) == len(leaves), "Two tensors have the same path, so they cannot be named.")
    return named


def _described(tree: Params) -> dict[str, list[Any]]:
    """Type and shape of every leaf, by its path."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in _named(tree).items()}


def _compare(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises an error unless a file has exactly the tensors that are wanted."""
    wrong = [
        f"{name}: {there.get(name, 'absent')} there, {wanted.get(name, 'absent')} expected"
        for name in {**wanted, **there}
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        shown = few([text[:200] for text in wrong])
        raise JaxwmError(
            f"The tensors of {path} are not those of its {checkpoint.CONFIG}: {shown}. It "
            "was made by another version of jaxwm, or was changed."
        )

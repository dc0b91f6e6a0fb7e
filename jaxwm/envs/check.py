"""Does a single environment keep its promises? Checked before anything runs.

`validate` looks at the spaces. Of an environment on the device it also traces `reset` and `step`
without computing anything and compares what would come out with the spaces; NaN and infinity show
only in a run: see `wrappers.guard`. What simulators on the host give is compared with their
spaces row by row: see `envs.worker`.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxwm.config import require
from jaxwm.types import (
    ActionSpace,
    Box,
    Discrete,
    Env,
    HostEnv,
    JaxwmError,
    Space,
    Step,
    zeros,
)

RESERVED = ("action", "continue", "is_first", "is_last", "is_terminal", "reward")


def validate(env: Env | HostEnv) -> None:
    """Raises an error that says what is wrong with a single environment, if anything is.

    Args:
      env: a single environment, before `wrappers.batch`.

    Raises:
      JaxwmError: naming the environment, the key, what came and what was expected.
    """

    def fail(text):
        raise JaxwmError(f"Environment {env.name}: {text}")

    require(
        not jax.config.values["jax_enable_x64"],
        "jaxwm computes in float32 and bfloat16, and jax is told to take 64 bits instead. Unset "
        "JAX_ENABLE_X64 (in Python: jax.config.update('jax_enable_x64', False)).",
    )

    if not isinstance(env.obs_space, dict) or not env.obs_space:
        fail(
            "the observation space is empty. Give a dict with at least one entry, such as "
            "{'vector': Box((4,))}."
        )
    for name, space in env.obs_space.items():
        if name in RESERVED:
            fail(f"observation {name!r} has a name that rows use themselves. Rename it.")
        _check_space(fail, f"observation {name!r}", space)
    if isinstance(env.action_space, dict) and not env.action_space:
        fail("the action space is an empty dict. An agent needs something to choose.")
    for name, space in _named(env.action_space).items():
        _check_space(fail, name, space)
        if isinstance(space, Box) and space.dtype != "float32":
            fail(f"{name} is a Box of {space.dtype}. Use float32, or Discrete for integers.")
    if isinstance(env, HostEnv):
        return

    key = jax.random.key(0)
    state, start = _trace(fail, "reset", env.reset, key)
    _check_row(fail, "reset", env, start)
    after, row = _trace(fail, "step", env.step, state, zeros(env.action_space), key)
    _check_row(fail, "step", env, row)
    _check_state(fail, state, after)


def _named(space: Any) -> dict[str, Space]:
    """The parts of an action space under the names that messages use."""
    if isinstance(space, dict):
        return {f"action {name!r}": part for name, part in space.items()}
    return {"the action": space}


def _check_space(fail: Any, what: str, space: Any) -> None:
    """A space that encoders and replay can hold."""
    if not isinstance(space, Box | Discrete):
        fail(f"{what} has the space {space!r}. Use jaxwm.types.Box or Discrete.")
    size = int(np.prod(space.shape))
    if size == 0 or len(space.shape) > 3:
        fail(f"{what} has shape {space.shape}. Use 0 to 3 axes, none of length 0.")
    if isinstance(space, Discrete):
        counts = space.classes if isinstance(space.classes, tuple) else (space.classes,) * size
        if len(counts) != size or min(counts) < 1:
            fail(
                f"{what} has classes {space.classes} for shape {space.shape}. Give one number "
                f"of at least 1, or a tuple of {size} of them."
            )
        return
    if space.dtype not in ("float32", "uint8"):
        fail(
            f"{what} is a Box of {space.dtype}. Cast it to float32, or use Discrete for "
            "integers and booleans (int32)."
        )
    if space.dtype == "uint8" and len(space.shape) != 3:
        fail(
            f"{what} is uint8 of shape {space.shape}, but uint8 means an image (height, width, "
            "channels). Add the missing axis, or cast it to float32."
        )
    bounds = []
    for bound in (space.low, space.high):
        if isinstance(bound, tuple) and len(bound) != size:
            fail(f"{what} has {len(bound)} bounds for {size} entries. Give one, or one each.")
        bounds.append(np.broadcast_to(np.asarray(bound, np.float64), (size,)))
    if not (bounds[0] <= bounds[1]).all():
        fail(f"{what} has low {space.low} above high {space.high}. Swap them.")


def _trace(fail: Any, what: str, function: Any, *args: Any) -> Any:
    """The shapes that a function of the environment returns: a state and a `Step`."""
    try:
        out = jax.eval_shape(function, *args)
    except (jax.errors.JAXTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        text = str(error).split("\n", 1)[0]
        fail(
            f"{what} cannot be compiled ({type(error).__name__}: {text}) Write it with jax "
            "functions only; Python's `if` and numpy cannot see traced values."
        )
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Step)):
        fail(f"{what} must return a state and a jaxwm.types.Step, but it returns {out!r}.")
    return out


def _check_row(fail: Any, what: str, env: Env, row: Step) -> None:
    """A row of the declared shapes."""
    if not isinstance(row.obs, dict):
        fail(f"{what} returns the observation {row.obs!r}, but a dict of arrays is expected.")
    missing, extra = set(env.obs_space) - set(row.obs), set(row.obs) - set(env.obs_space)
    if missing or extra:
        fail(
            f"{what} returns the observations {sorted(row.obs)}, but the space has "
            f"{sorted(env.obs_space)}. Make the two agree."
        )
    for name, space in env.obs_space.items():
        _check_array(fail, what, f"observation {name!r}", row.obs[name], space.shape, space.dtype)
    _check_array(fail, what, "the reward", row.reward, (), "float32")
    for name in ("is_first", "is_last", "is_terminal"):
        _check_array(fail, what, name, getattr(row, name), (), "bool")
    _check_action(fail, what, env.action_space, row.action)


def _check_action(fail: Any, what: str, space: ActionSpace, action: Any) -> None:
    """The action of a row: the one that was given, zeros at the first."""
    expected = space if isinstance(space, dict) else {"": space}
    given = action if isinstance(action, dict) else {"": action}
    if set(given) != set(expected):
        fail(f"{what} returns the action {action!r}, but the action space is {space!r}.")
    for (name, part), key in zip(_named(space).items(), expected, strict=True):
        _check_array(fail, what, name, given[key], part.shape, part.dtype)


def _check_array(
    fail: Any, what: str, name: str, value: Any, shape: tuple[int, ...], dtype: str
) -> None:
    """One array of a row."""
    if not hasattr(value, "shape"):
        fail(f"{what} returns {name} as {value!r}, but one array is expected.")
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        fail(
            f"{what} returns {name} as {value.dtype} of shape {tuple(value.shape)}, but "
            f"{dtype} of shape {tuple(shape)} is expected. Change the environment or its space."
        )


def _check_state(fail: Any, state: PyTree, after: PyTree) -> None:
    """A state that keeps its structure, as a compiled loop requires."""
    if jax.tree.structure(state) != jax.tree.structure(after):
        fail(
            f"the state has the structure {jax.tree.structure(state)} after reset but "
            f"{jax.tree.structure(after)} after step. Keep the same fields in both."
        )
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True
    ):
        if x.shape != y.shape or x.dtype != y.dtype:
            fail(
                f"the state's leaf {jax.tree_util.keystr(path) or 'itself'} is {x.dtype} of "
                f"shape {x.shape} after reset but {y.dtype} of shape {y.shape} after step. "
                "Keep shapes and dtypes the same: often a missing astype or a Python number."
            )

"""The DeepMind Control Suite, simulated by MuJoCo on the host.

A name is `domain-task`, such as "cartpole-swingup". Every entry of the task's observation is an
entry of the same name, float32 and of the same shape; with ":image" after the name the
observation is a picture instead. The time limit (1000 steps in nearly all tasks) cuts an episode,
and only a discount of 0 ends it for good.
"""

import functools
import importlib
import inspect
import os
import subprocess
import sys
from typing import Any

import numpy as np

from jaxwm.spaces import Box, HostEnv, JaxwmError, nearest

EXCLUDED = {"lqr": "its actions have no bounds and its episodes no limit"}
# As in the DreamerV3 experiments: camera 0 of a quadruped sees it from very far.
CAMERAS = {"quadruped": 2}
# Draws even for its vectors: it hands its terrain to the graphics library at every reset.
DRAWS = ("quadruped-escape",)
# Ways to draw without a window first.
BACKENDS = ("egl", "osmesa", "glfw")
_PROBE = "from dm_control import suite; suite.load('cartpole', 'balance').physics.render(8, 8)"


def names() -> list[str]:
    """The tasks of the installed suite, then the same with pictures as `name:image`."""
    known = ["-".join(x) for x in _suite("off").ALL_TASKS if x[0] not in EXCLUDED]
    return known + [f"{name}:image" for name in known]


def make(
    name: str, image: bool = False, size: int = 64, camera: int | None = None, **options: Any
) -> HostEnv:
    """A task of the control suite.

    Args:
      name: `domain-task`; with ":image" after it as with `image`.
      image: observe pictures of `size` x `size` x 3 instead of numbers.
      size: side of the pictures.
      camera: number of the camera; None: 2 for quadrupeds, else 0.
      options: arguments of the task's function in the suite, such as `time_limit=5.0` (seconds
        of simulated time).

    Returns:
      An environment on the host.

    Raises:
      JaxwmError: if the name or an option is unknown, or pictures cannot be drawn here.
    """
    base, _, suffix = name.partition(":")
    domain, _, task = base.partition("-")
    image = image or suffix == "image"
    if domain in EXCLUDED:
        raise JaxwmError(f"dm_control/{base} is left out because {EXCLUDED[domain]}.")
    drawn = image or base in DRAWS
    backend = _backend(os.environ.get("MUJOCO_GL")) if drawn else "off"
    known = names()
    if base not in known or suffix not in ("", "image"):
        raise nearest(name, known, "dm_control task")
    if size < 1:
        raise JaxwmError(f"Pictures need a size of at least 1, but size is {size}.")

    suite = _suite(backend)
    arguments = inspect.signature(getattr(suite, domain).SUITE[task]).parameters
    arguments = set(arguments) - {"random", "environment_kwargs"}
    for option in options:
        if option not in arguments:
            raise nearest(option, arguments, f"option of dm_control/{base}")
    env = suite.load(domain, task, options)
    obs, action = env.observation_spec(), env.action_spec()
    cameras = env.physics.model.ncam
    env.close()

    obs_space: Any = {key: Box(tuple(spec.shape)) for key, spec in obs.items()}
    view = None
    if image:
        view = size, CAMERAS.get(domain, 0) if camera is None else camera
        if not 0 <= view[1] < cameras:
            raise JaxwmError(f"{base} has the cameras 0 to {cameras - 1}, but camera is {camera}.")
        obs_space = {"image": Box((size, size, 3), "uint8", 0.0, 255.0)}
    factory = functools.partial(_Simulator, domain, task, options, backend, view)
    space = Box(tuple(action.shape), "float32", -1.0, 1.0)
    return HostEnv(f"dm_control/{name}", obs_space, space, factory)


class _Simulator:
    """A task as `types.Simulator`; `view` is the side and the camera of pictures, or None."""

    def __init__(
        self,
        domain: str,
        task: str,
        options: dict[str, Any],
        backend: str,
        view: tuple[int, int] | None,
    ):
        self._load = functools.partial(_suite(backend).load, domain, task)
        self._options, self._view = options, view
        self._env: Any = None

    def reset(self, seed: int | None) -> dict[str, Any]:
        # Some tasks draw random numbers already when they are made, so a seed makes a new one.
        if seed is not None or self._env is None:
            self.close()
            self._env = self._load({**self._options, "random": seed})
            spec = self._env.action_spec()
            self._low, self._high = spec.minimum, spec.maximum
        return self._see(self._env.reset())

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        share = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
        row = self._env.step(self._low + share * (self._high - self._low))
        terminal = row.last() and row.discount == 0
        return self._see(row), float(row.reward), terminal, row.last() and not terminal

    def _see(self, row: Any) -> dict[str, Any]:
        if self._view is None:
            return {key: np.asarray(x, np.float32) for key, x in row.observation.items()}
        size, camera = self._view
        return {"image": self._env.physics.render(size, size, camera_id=camera)}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


def _suite(backend: str) -> Any:
    """`dm_control.suite`, to draw through `backend`; "off" where nothing is to be drawn.

    Left to itself, dm_control settles at its import on a library that may not work without a
    screen, and warns.
    """
    before = os.environ.get("MUJOCO_GL")
    try:
        import mujoco  # noqa: F401  (first, so that its own choice is the user's)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise JaxwmError(
            f"MuJoCo cannot be imported while MUJOCO_GL is {before}: {error}. Unset it, or install "
            "the graphics library that it names."
        ) from error
    os.environ["MUJOCO_GL"] = backend
    try:
        from dm_control import _render, suite

        if backend not in ("off", _render.BACKEND):
            importlib.reload(_render)
    finally:
        os.environ.pop("MUJOCO_GL")
        if before is not None:
            os.environ["MUJOCO_GL"] = before
    return suite


@functools.cache
def _backend(chosen: str | None) -> str:
    """The first way to draw that works here, tried in processes of their own.

    A graphics library that fails may leave its process unable to try another, or end it.

    Args:
      chosen: the user's choice, which alone is tried.

    Raises:
      JaxwmError: if none works.
    """
    told = []
    for backend in [chosen] if chosen else BACKENDS:
        path = os.pathsep.join(x for x in sys.path if x)
        try:
            subprocess.run(
                [sys.executable, "-c", _PROBE],
                env={**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            return backend
        except subprocess.CalledProcessError as error:
            last = error.stderr.strip().rpartition("\n")[2]
            told.append(f"{backend} ({last or f'it ended with code {error.returncode}'})")
        except subprocess.TimeoutExpired:
            told.append(f"{backend} (no picture within two minutes)")
    tried = "as MUJOCO_GL says" if chosen else "in turn"
    raise JaxwmError(
        f"dm_control cannot draw here. Tried {tried}: {'; '.join(told)}. With an NVIDIA GPU its "
        "driver brings EGL along; else install Mesa (Debian, Ubuntu: apt install libegl1 "
        "libgl1-mesa-dri for MUJOCO_GL=egl, libosmesa6 for MUJOCO_GL=osmesa). Without ':image' "
        "tasks observe numbers and nothing is drawn."
    )

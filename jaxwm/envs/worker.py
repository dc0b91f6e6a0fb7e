"""What runs in a worker process of `envs.host.Pool`: simulators, and the rows they put down.

The parent writes actions into shared memory and says "step" or "reset" through a pipe; the worker
writes rows into the same memory and answers with the faults it met, or with why it gives up.
"""

import faulthandler
import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxwm.spaces import Box, Discrete, HostEnv, JaxwmError, Simulator, Space, as_dict

# How often a simulator may fail to begin an episode before its worker gives up.
_TRIES = 3


class Batch(Protocol):
    """Simulators that step as one and begin new episodes by themselves (NEXT_STEP).

    The action given after a row that ended is ignored and the observation that comes back begins
    the next episode; its reward and flags are ignored.
    """

    def reset(self, seed: int) -> dict[str, Any]:
        """Begins an episode in each; observations (n, ...)."""
        ...

    def step(self, action: Any) -> tuple[dict[str, Any], Any, Any, Any]:
        """Observations (n, ...), rewards (n,), ended for good (n,), cut (n,)."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...


class Views(NamedTuple):
    """Arrays over shared memory; leading axis B, or a worker's share of it."""

    action: dict[str, np.ndarray]
    obs: dict[str, np.ndarray]
    reward: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray
    current: np.ndarray  # at a worker's first place: which simulator it steps, counted from 0

    def share(self, first: int, last: int) -> "Views":
        """The places first..last-1."""
        cut = slice(first, last)
        return Views(
            {name: x[cut] for name, x in self.action.items()},
            {name: x[cut] for name, x in self.obs.items()},
            self.reward[cut],
            self.is_first[cut],
            self.is_last[cut],
            self.is_terminal[cut],
            self.current[cut],
        )


def views(env: HostEnv, count: int, memory: Any = None) -> tuple[Views, int]:
    """The arrays for `count` simulators over some memory, and the bytes they take.

    Args:
      env: gives the spaces.
      count: number of simulators.
      memory: a writable buffer; None makes arrays of their own.
    """
    offset = 0

    def array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        nonlocal offset
        here, size = offset, int(np.prod((count, *shape))) * np.dtype(dtype).itemsize
        offset += -(-size // 64) * 64
        if memory is None:
            return np.zeros((count, *shape), dtype)
        return np.ndarray((count, *shape), dtype, memory, here)

    def arrays(spaces: dict[str, Space]) -> dict[str, np.ndarray]:
        return {name: array(space.shape, space.dtype) for name, space in sorted(spaces.items())}

    action, obs = arrays(as_dict(env.action_space)), arrays(env.obs_space)
    is_first, is_last, is_terminal = (array((), "bool") for _ in range(3))
    reward, current = array((), "float32"), array((), "int32")
    return Views(action, obs, reward, is_first, is_last, is_terminal, current), offset


class BadRow(Exception):
    """A row that does not fit its spaces; `kind` is the kind of fault."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def fit(name: str, space: Space, value: Any, lead: tuple[int, ...] = ()) -> np.ndarray:
    """An observation as its space has it, or many with leading axes `lead`.

    Raises:
      BadRow: if it has another shape or kind of number, is out of range, or not finite.
    """
    array = np.asarray(value)
    wrong = f"observation {name!r} came as {array.dtype} of shape {array.shape}, but "
    if array.shape != (*lead, *space.shape):
        raise BadRow("bad shape or type", f"{wrong}its space has shape {tuple(space.shape)}")
    if array.dtype.kind not in "biuf":
        raise BadRow("bad shape or type", f"{wrong}numbers are expected")
    if isinstance(space, Box) and space.dtype == "uint8":
        if array.dtype != np.uint8:
            raise BadRow("bad shape or type", f"{wrong}uint8 is expected")
        return array
    if isinstance(space, Discrete):
        if array.dtype.kind == "f":
            raise BadRow("bad shape or type", f"{wrong}integers are expected")
        lowest = -1 if space.missing else 0
        most = np.reshape(space.classes, space.shape) if np.ndim(space.classes) else space.classes
        if (array < lowest).any() or (array >= most).any():
            text = f"observation {name!r} is {array}, but its classes are {space.classes}"
            raise BadRow("bad value", text)
        return array
    good = np.isfinite(array)
    if space.missing:
        good |= np.isneginf(array)
    if not good.all():
        raise BadRow("bad value", f"observation {name!r} holds a NaN or an infinity: {array}")
    return array


class Repeated:
    """A simulator that repeats actions and cuts episodes."""

    def __init__(self, make: Callable[[], Simulator], limit: int, repeat: int):
        self._inner, self._limit, self._repeat = make(), limit, repeat
        self._elapsed = 0

    def reset(self, seed: int | None) -> dict[str, Any]:
        self._elapsed = 0
        return self._inner.reset(seed)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminal, cut = self._inner.step(action)
            total += reward
            if terminal or cut:
                break
        self._elapsed += 1
        return obs, total, terminal, cut or bool(self._limit and self._elapsed >= self._limit)

    def close(self) -> None:
        self._inner.close()


class Loop:
    """Simulators stepped one after the other, each replaced by a new one when it fails.

    Args:
      env: makes them.
      rows: a worker's share of the memory.
      seed: determines their first episodes.
    """

    def __init__(self, env: HostEnv, rows: Views, seed: int):
        self._env, self._rows = env, rows
        self._seeds = np.random.default_rng(seed)
        self._simulators: list[Simulator | None] = [None] * len(rows.reward)
        self._bare = not isinstance(env.action_space, dict)

    def begin(self) -> list[tuple[str, int, str]]:
        """Makes every simulator that is not there, and begins an episode in each."""
        return self._each(lambda i: self._reset(i, self._seed()))

    def step(self) -> list[tuple[str, int, str]]:
        """One step of each; the faults as kind, place and text."""
        return self._each(self._step)

    def _each(self, act: Callable[[int], None]) -> list[tuple[str, int, str]]:
        faults = []
        for i in range(len(self._simulators)):
            self._rows.current[0] = i
            try:
                act(i)
            except Exception as error:
                faults.append((_kind(error), i, _told(error)))
                self._renew(i, faults)
        return faults

    def _renew(self, i: int, faults: list[tuple[str, int, str]]) -> None:
        for left in reversed(range(_TRIES)):
            try:
                self._close(i)
                return self._reset(i, self._seed())
            except Exception as error:
                if not left:
                    raise
                faults.append((_kind(error), i, _told(error)))

    def _step(self, i: int) -> None:
        rows = self._rows
        if rows.is_last[i]:
            return self._reset(i, None)
        simulator = self._simulators[i]
        assert simulator is not None
        action = {name: x[i] for name, x in rows.action.items()}
        out = simulator.step(action["action"] if self._bare else action)
        if not (isinstance(out, tuple) and len(out) == 4):
            raise BadRow("bad shape or type", f"step returned {out!r}, not four things")
        obs, reward, terminal, cut = out
        if np.ndim(reward) or np.asarray(reward).dtype.kind not in "biuf":
            raise BadRow("bad shape or type", f"the reward is {reward!r}, not one number")
        if not np.isfinite(reward):
            raise BadRow("bad value", f"the reward is {reward}")
        self._write(i, obs, reward, False, bool(terminal or cut), bool(terminal))

    def _reset(self, i: int, seed: int | None) -> None:
        simulator = self._simulators[i]
        if simulator is None:
            simulator = self._simulators[i] = self._env.open()
        self._write(i, simulator.reset(seed), 0.0, True, False, False)

    def _write(self, i: int, obs: Any, reward: Any, first: bool, last: bool, end: bool) -> None:
        rows, spaces = self._rows, self._env.obs_space
        if not isinstance(obs, dict) or set(obs) != set(spaces):
            keys = sorted(obs) if isinstance(obs, dict) else type(obs).__name__
            text = f"the observation is {keys}, but the space has {sorted(spaces)}"
            raise BadRow("bad shape or type", text)
        for name, space in spaces.items():
            rows.obs[name][i] = fit(name, space, obs[name])
        rows.reward[i], rows.is_first[i] = reward, first
        rows.is_last[i], rows.is_terminal[i] = last, end

    def _seed(self) -> int:
        return int(self._seeds.integers(2**31))

    def _close(self, i: int) -> None:
        simulator, self._simulators[i] = self._simulators[i], None
        if simulator is not None:
            try:
                simulator.close()
            except Exception:
                traceback.print_exc()

    def close(self) -> None:
        """Closes every simulator."""
        for i in range(len(self._simulators)):
            self._close(i)


class Native:
    """Simulators that their package steps as one; a fault of one begins all of them anew.

    Args: as `Loop`.
    """

    def __init__(self, env: HostEnv, rows: Views, seed: int):
        self._env, self._rows = env, rows
        self._seeds = np.random.default_rng(seed)
        self._batch: Batch | None = None

    def begin(self) -> list[tuple[str, int, str]]:
        """Makes them if they are not there, and begins an episode in each."""
        rows, make = self._rows, self._env.batch
        assert make is not None
        batch = self._batch = self._batch or make(len(rows.reward))
        self._write(batch.reset(int(self._seeds.integers(2**31))))
        rows.reward[:], rows.is_first[:] = 0.0, True
        rows.is_last[:], rows.is_terminal[:] = False, False
        return []

    def step(self) -> list[tuple[str, int, str]]:
        """One step of all; the faults as kind, place and text."""
        rows, batch = self._rows, self._batch
        assert batch is not None
        action = rows.action if isinstance(self._env.action_space, dict) else rows.action["action"]
        begun = rows.is_last.copy()
        try:
            obs, reward, terminal, cut = batch.step(action)
            self._write(obs)
            reward = np.asarray(reward)
            if not np.isfinite(reward).all():
                raise BadRow("bad value", f"the rewards are {reward}")
        except Exception as error:
            faults = [(_kind(error), 0, _told(error))]
            self.close()
            return faults + self.begin()
        last = np.asarray(terminal, bool) | np.asarray(cut, bool)
        rows.reward[:], rows.is_first[:] = np.where(begun, 0.0, reward), begun
        rows.is_last[:] = last & ~begun
        rows.is_terminal[:] = np.asarray(terminal, bool) & ~begun
        return []

    def _write(self, obs: Any) -> None:
        for name, space in self._env.obs_space.items():
            self._rows.obs[name][:] = fit(name, space, obs[name], self._rows.reward.shape)

    def close(self) -> None:
        """Closes them all."""
        batch, self._batch = self._batch, None
        if batch is not None:
            try:
                batch.close()
            except Exception:
                traceback.print_exc()


def _kind(error: Exception) -> str:
    return error.kind if isinstance(error, BadRow) else "raised"


def _told(error: Exception) -> str:
    # Our own words say it all; of others' errors one wants to know where they come from.
    return str(error) if isinstance(error, BadRow | JaxwmError) else traceback.format_exc()


def main() -> None:
    """Serves a parent until it hangs up. Arguments: pipe, memory and notes, as descriptors."""
    pipe, memory, notes = (int(x) for x in sys.argv[1:4])
    # Ctrl-C reaches the whole group of processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(notes)
    faulthandler.register(signal.SIGUSR1, notes)
    parent = Connection(pipe)
    task = json.loads(parent.recv_bytes())
    sys.path[:] = task["path"]
    try:
        import cloudpickle

        env: HostEnv = cloudpickle.loads(parent.recv_bytes())
        whole, _ = views(env, task["count"], mmap.mmap(memory, os.fstat(memory).st_size))
        rows = whole.share(task["first"], task["last"])
        group = (Loop if env.batch is None else Native)(env, rows, task["seed"])
        answer = {"faults": group.begin()}
    except Exception as error:
        parent.send_bytes(json.dumps({"failed": _told(error)}).encode())
        return
    while True:
        try:
            parent.send_bytes(json.dumps(answer).encode())
            word = parent.recv_bytes()
        except (EOFError, OSError):
            group.close()
            sys.stdout.flush()
            os._exit(0)  # nothing is left to tidy, and libraries take their time over it
        try:
            answer = {"faults": group.step() if word == b"step" else group.begin()}
        except Exception as error:
            answer = {"failed": _told(error)}

"""Simulators for tests: one misbehaves when its action says so, one has a twin on the device."""

import ctypes
import functools
import os
import time
from typing import Any

import numpy as np

# Worker processes import this module: jax is only for the twin.
from jaxwm.spaces import Box, Discrete, HostEnv

# What each action does.
GOOD, RAISE, EXIT, HANG, CRASH, NAN, SHAPE, DTYPE, REWARD, KEYS = range(10)
LENGTH = 5


class Scripted:
    """Observes its seed, episode and step; every step pays the step's number."""

    def __init__(self, terminal: bool = True, length: int = LENGTH):
        self._terminal, self._length = terminal, length
        self._seed = self._episode = -1

    def reset(self, seed: int | None) -> dict[str, Any]:
        self._seed = self._seed if seed is None else seed % 1000
        self._episode, self._time = self._episode + 1, 0
        return self._look()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        self._time += 1
        if action == RAISE:
            raise RuntimeError("the gripper is stuck")
        if action == EXIT:
            os._exit(7)
        if action == HANG:
            time.sleep(1000)
        if action == CRASH:
            ctypes.string_at(0)
        obs, reward, end = self._look(), float(self._time), self._time == self._length
        if action == NAN:
            obs["vector"][1] = np.nan
        if action == SHAPE:
            obs["vector"] = np.zeros(4)
        if action == DTYPE:
            obs["vector"] = np.array(["a", "b", "c"])
        if action == KEYS:
            obs["camera"] = np.zeros(3)
        if action == REWARD:
            reward = float("inf")
        return obs, reward, end and self._terminal, end and not self._terminal

    def _look(self) -> dict[str, Any]:
        return {"vector": np.array([self._seed, self._episode, self._time], np.float64)}

    def close(self) -> None:
        pass


def scripted(terminal: bool = True, length: int = LENGTH) -> HostEnv:
    """The environment of `Scripted` simulators."""
    make = functools.partial(Scripted, terminal, length)
    return HostEnv("scripted", {"vector": Box((3,))}, Discrete(10), make)


class Chain:
    """A walk on 0..4 that pays at 4 and ends there, or is cut after 7 steps; nothing is random."""

    def __init__(self, nap: float = 0.0, fails_at: int = -1):
        self._nap, self._fails_at, self._total = nap, fails_at, 0

    def reset(self, seed: int | None) -> dict[str, Any]:
        self._place, self._time = 0, 0
        return self._look()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        time.sleep(self._nap)
        self._total += 1
        if self._total == self._fails_at:
            raise RuntimeError("the chain broke")
        self._place = max(self._place + 2 * int(action) - 1, 0)
        self._time += 1
        end = self._place == 4
        return self._look(), float(end), end, self._time == 7

    def _look(self) -> dict[str, Any]:
        return {"vector": np.eye(5, dtype=np.float32)[self._place]}

    def close(self) -> None:
        pass


def chain(nap: float = 0.0, fails_at: int = -1) -> HostEnv:
    """`Chain` on the host."""
    make = functools.partial(Chain, nap, fails_at)
    return HostEnv("chain", {"vector": Box((5,))}, Discrete(2), make)


def device_chain() -> Any:
    """The same chain on the device."""
    import jax
    import jax.numpy as jnp

    from jaxwm.types import Env, first, transition

    def look(place):
        return {"vector": jax.nn.one_hot(place, 5)}

    def reset(key):
        zero = jnp.zeros((), jnp.int32)
        return (zero, zero), first(Discrete(2), look(zero))

    def step(state, action, key):
        place, count = jnp.maximum(state[0] + 2 * action - 1, 0), state[1] + 1
        end = place == 4
        return (place, count), transition(action, look(place), end * 1.0, end, count == 7)

    return Env("chain", {"vector": Box((5,))}, Discrete(2), reset, step)

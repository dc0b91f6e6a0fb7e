"""Small runs of every recipe, for the tests that all recipes must pass.

A recipe joins by being in `RECIPES`: what it takes is found by asking it.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax

from jaxwm import envs
from jaxwm.recipes import RECIPES, RunConfig
from jaxwm.types import Agent, JaxwmError
from tests.conformance.parallel_core import PARALLEL_CORE

NAMES = (*RECIPES, PARALLEL_CORE.name)
# From the richest actions to the plainest: several at once, a vector, one of a few.
DEVICE_WORLDS = ("toy/Dials", "toy/Reach", "toy/Credit")
HOST_WORLDS = ("gymnasium/CartPole-v1", "gymnasium/Pendulum-v1")


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The recipe of the parallel core exists."""
    RECIPES[PARALLEL_CORE.name] = PARALLEL_CORE
    try:
        yield
    finally:
        del RECIPES[PARALLEL_CORE.name]


def small(name: str, worlds: tuple[str, ...] = DEVICE_WORLDS, **changes: Any) -> RunConfig:
    """A run of seconds in the first of some environments that the recipe takes.

    Args:
      name: of the recipe.
      worlds: names of environments.
      changes: entries of the run that differ.
    """
    for world in worlds:
        run = RECIPES[name].run(world, "debug", None, None)
        with contextlib.suppress(JaxwmError):
            return dataclasses.replace(shortened(run, agent_in(run, world).data), **changes)
    raise AssertionError(f"{name} takes none of {', '.join(worlds)}")


def agent_in(run: RunConfig, world: str) -> Agent:
    """The agent of a run in an environment."""
    env = envs.make(world)
    return RECIPES[run.recipe].agent(run.agent, env.obs_space, env.action_space)


def shortened(run: RunConfig, data: str) -> RunConfig:
    """A run with its rhythm, whose numbers are small.

    Args:
      run: as the recipe makes it.
      data: what its agent learns from.
    """
    memory = run.replay
    if data == "newest":
        memory = dataclasses.replace(memory, capacity=4 * 7, batch_size=4, batch_length=6)
    else:
        memory = dataclasses.replace(
            memory,
            capacity=400,
            batch_size=2,
            batch_length=6,
            train_ratio=2.0,
            prefill=min(memory.prefill, 20),
            train_every=min(memory.train_every, 20),
            pretrain=min(memory.pretrain, 2),
        )
    return dataclasses.replace(
        run,
        replay=memory,
        envs=4,
        steps=240,
        time_limit=0,
        action_repeat=1,
        log_every=40,
        save_every=80,
        eval_episodes=2,
    )


@contextlib.contextmanager
def compilations(caplog: Any) -> Iterator[list[str]]:
    """The messages of all compilations until the end of the context."""
    found: list[str] = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        caplog.clear()
        yield found
        found += [x.getMessage() for x in caplog.records if "ompiling" in x.getMessage()]

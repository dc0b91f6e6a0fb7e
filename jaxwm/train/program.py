"""A run as a program: functions over a `TrainState`, whichever driver makes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.recipes import RunConfig
from jaxwm.replay.config import Rhythm
from jaxwm.replay.device import Replay
from jaxwm.train import mesh
from jaxwm.train.state import AgentOf, TrainState
from jaxwm.types import Agent, Env, HostEnv, Shards

NUMBER, TRUTH = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_)


class Chunk(NamedTuple):
    """Some iterations, one after the other; the state is updated in place.

    Attributes:
      function: `TrainState, count, fresh -> TrainState, metrics`, jitted or compiled.
      iterations: the usual count, which makes up a line of metrics.
      temporary: bytes that a compiled one needs beside the state, if the backend tells.
    """

    function: Callable[..., tuple[TrainState, Any]]
    iterations: int
    temporary: int = 0

    def __call__(
        self, state: TrainState, count: int | None = None, fresh: bool = True
    ) -> tuple[TrainState, Any]:
        """The state after `count` iterations, and the metrics since the last fresh start."""
        count = self.iterations if count is None else count
        return self.function(state, np.int32(count), np.bool_(fresh))


class Setup(NamedTuple):
    """What a driver makes a program of.

    Attributes:
      config: the run.
      agents: `shards -> values -> Agent`.
      memory: the replay of one shard.
      rhythm: when the run acts at random and when it learns.
      iterations: iterations between two lines of metrics.
      layout: which devices hold what.
    """

    config: RunConfig
    agents: Callable[[Shards], AgentOf]
    memory: Replay
    rhythm: Rhythm
    iterations: int
    layout: mesh.Layout


class Program(NamedTuple):
    """A run as functions over a `TrainState`.

    Attributes:
      env: the environment: batched on the device, or on the host.
      agent: the agent, as it acts outside of the program, without a sweep's values.
      agent_of: `values -> Agent`, with the values of swept entries.
      replay: the replay, of one shard.
      rhythm: when the run acts at random and when it learns.
      shapes: `() -> TrainState` of shapes, and of numpy arrays for what lies in the host's memory;
        it allocates and opens nothing.
      init: `() -> TrainState`; the key of the run's seed is an argument of the compiled code.
      resume: `TrainState -> TrainState`, makes a restored state ready to go on: simulators on the
        host, whose states cannot be stored, begin new episodes.
      chunk: takes a state through some iterations; their number is no part of the program.
      compile: `() -> chunk`, compiled before it is called.
      fault: `TrainState -> str | None`, what the environments did wrong, if it ends the run.
      close: closes the simulators.
      iterations: iterations between two lines of metrics.
      layout: which devices hold what. With several members every leaf but the clock leads with
        them; with several shards the parts that `device.LEADS` names lead with those.
    """

    env: Env | HostEnv
    agent: Agent
    agent_of: AgentOf
    replay: Replay
    rhythm: Rhythm
    shapes: Callable[[], TrainState]
    init: Callable[[], TrainState]
    resume: Callable[[TrainState], TrainState]
    chunk: Chunk
    compile: Callable[[], Chunk]
    fault: Callable[[TrainState], str | None]
    close: Callable[[], None]
    iterations: int
    layout: mesh.Layout


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results; 0 if unknown."""
    found = compiled.memory_analysis()
    return int(found.temp_size_in_bytes) if found else 0

"""From a configuration to a program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxwm import backend, envs, recipes
from jaxwm.config import require
from jaxwm.envs import check, wrappers
from jaxwm.envs.host import limit_and_repeat
from jaxwm.recipes import RunConfig, sweep
from jaxwm.replay.device import Replay, check_fits, replay
from jaxwm.train import mesh
from jaxwm.train.device import on_device
from jaxwm.train.host import on_host
from jaxwm.train.program import Program, Setup
from jaxwm.train.state import AgentOf, empty_row
from jaxwm.types import ALONE, Agent, Box, Env, HostEnv, Shards, as_dict


def make_env(config: RunConfig) -> Env | HostEnv:
    """The single environment of a run, with its wrappers; it takes boxes in [-1, 1].

    Raises:
      JaxwmError: if there is no such environment, or it breaks the contract of `types.Env`.
    """
    env = envs.make(config.env)
    if isinstance(env, HostEnv):
        env = limit_and_repeat(env, config.time_limit, config.action_repeat)
    else:
        if config.action_repeat > 1:
            env = wrappers.action_repeat(env, config.action_repeat)
        if config.time_limit:
            env = wrappers.time_limit(env, config.time_limit)
    check.validate(env)
    boxes = [x for x in as_dict(env.action_space).values() if isinstance(x, Box)]
    if isinstance(env, Env) and any(np.isfinite([*wrappers.bounds(x)]).all() for x in boxes):
        return wrappers.normalize_action(env)
    return env


def build(
    config: RunConfig,
    iterations: int | None = None,
    single: Env | HostEnv | None = None,
    devices: Sequence[Any] | None = None,
) -> Program:
    """The program of a run; it allocates, opens and compiles nothing before it is called.

    Args:
      config: the run.
      iterations: iterations between two lines of metrics; by default what `log_every` asks for.
      single: the single environment, if it is not the one that `config.env` names.
      devices: the devices to choose from, by default all; a run uses as many as shards and seeds
        can be divided among. Simulators on the host use the first one.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces, the replay does not fit its
        place or the agent, or simulators on the host should be divided into shards.
    """
    env = single or make_env(config)
    _check(config, env)
    if isinstance(env, HostEnv):
        devices = jax.devices()[:1]
    layout, agent = mesh.layout(config, devices), agents(config, env)({})
    if agent.data == "newest":
        config.replay.check_newest(config.envs)
    memory = make_replay(mesh.shard_config(config), env, agent)
    here = memory.nbytes * layout.members_here * layout.shards_here
    check_fits(here * layout.sharing, place=config.replay.place)
    setup = Setup(
        config=config,
        agents=functools.partial(agents, config, env),
        memory=memory,
        rhythm=config.replay.rhythm(config.envs, memory.warmup),
        iterations=iterations or max(1, config.log_every // config.envs),
        layout=layout,
    )
    return on_host(setup, env) if isinstance(env, HostEnv) else on_device(setup, env)


def _check(config: RunConfig, env: Env | HostEnv) -> None:
    """Refuses what no program can be made of."""
    require(
        not jax.config.values["jax_debug_nans"],
        "Metrics of nothing, such as the return where no episode ended, are NaN, at which "
        "JAX_DEBUG_NANS would end the run. Unset it: a run checks every update for NaN by itself, "
        "and says what was not finite first (--on-divergence).",
    )
    require(
        config.replay.place == "device" or isinstance(env, HostEnv),
        f"A replay in the host's memory needs simulators on the host, and {env.name} runs on the "
        "device, in one program with its replay. Leave --replay.place at device, and lower "
        "--replay.capacity if the device has too little memory.",
    )
    require(
        not isinstance(env, HostEnv) or (config.shards == 1 and jax.process_count() == 1),
        f"{env.name} runs on the host. Only what runs on the device can be divided into shards "
        "or among processes: set --shards to 1, and train in one process.",
    )


def make_replay(config: RunConfig, env: Env | HostEnv, agent: Agent) -> Replay:
    """The replay of a run, or of one shard of it.

    Args:
      config: the run, or one shard of it.
      env: its environment, for the spaces.
      agent: what learns from it.

    Raises:
      JaxwmError: if a window does not fit, or the settings do not fit the agent.
    """

    def one_row() -> tuple[Any, Any]:
        key_init, key_act = jax.random.split(jax.random.key(0))
        row, params = empty_row(env, config.envs), agent.init(key_init).params
        return row, agent.act(params, agent.initial(config.envs), row, key_act)[2]

    row, memo = jax.eval_shape(one_row)
    return replay(config.replay, row, memo, agent.data)


def agents(config: RunConfig, env: Env | HostEnv, shards: Shards = ALONE) -> AgentOf:
    """`values -> Agent`, the agent of a run with the values of some entries of its configuration.

    Args:
      config: the run.
      env: its environment, for the spaces.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if the agent cannot take the environment's spaces.
    """
    spaces = env.obs_space, env.action_space
    plain = recipes.agent_of(config, *spaces, shards)

    def made(values: dict[str, Any]) -> Agent:
        return recipes.agent_of(sweep.put(config, values), *spaces, shards) if values else plain

    # Whole updates: members share nothing within them, so each can use the cache by itself.
    update: Callable[..., Any] = backend.one_by_one(
        lambda values, *given: made(values).update(*given)
    )

    def agent_of(values: dict[str, Any]) -> Agent:
        agent = made(values)
        if config.members == 1 or shards is not ALONE:
            return agent
        return agent._replace(update=functools.partial(update, values))

    return agent_of

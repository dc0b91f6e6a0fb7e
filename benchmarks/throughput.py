"""Throughput of one update, of acting, and of the whole on-device loop.

    python -m benchmarks.throughput --size nano size1m --obs vector image --batch 16

One line of JSON for each size, kind of observation and batch.

The work is the reference's: 16 windows of 64 rows, dreams of 15 steps from all 1,024 latents;
24 numbers as observation and 6 continuous actions, or 64x64 colour images and 6 choices. The
data are synthetic: the cost does not depend on them.
"""

import dataclasses
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lines import emit, in_words, machine, number, parser_of, seconds
from benchmarks.loop import Run, measure
from jaxwm import backend
from jaxwm.envs import wrappers
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.device import ReplayConfig
from jaxwm.types import (
    ActionSpace,
    Agent,
    Box,
    Discrete,
    Env,
    ObsSpace,
    Step,
    Window,
    first,
    transition,
)

OBS = ("vector", "image")


def spaces(obs: str) -> tuple[ObsSpace, ActionSpace]:
    """Observation and action spaces of the synthetic work."""
    if obs == "image":
        return {"image": Box((64, 64, 3), "uint8")}, Discrete(6)
    return {"vector": Box((24,))}, Box((6,), low=-1.0, high=1.0)


def synthetic(obs: str) -> Env:
    """An environment of random observations and rewards in episodes of 1,000 steps."""
    obs_space, action_space = spaces(obs)

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        if obs == "image":
            return {"image": jax.random.bits(key, (64, 64, 3), jnp.uint8)}
        return {"vector": jax.random.normal(key, (24,))}

    def reset(key: jax.Array) -> tuple[jax.Array, Step]:
        return jnp.zeros(()), first(action_space, draw(key))

    def step(state: jax.Array, action: Any, key: jax.Array) -> tuple[jax.Array, Step]:
        key_obs, key_reward = jax.random.split(key)
        return state + 1, transition(action, draw(key_obs), jax.random.normal(key_reward), False)

    return wrappers.time_limit(Env("synthetic", obs_space, action_space, reset, step), 1000)


def window_of(agent: Agent, row: Step, length: int) -> Window:
    """A batch of sequences that repeat a row (B,), with `length` trained rows each."""
    steps = jax.tree.map(lambda x: jnp.stack([x] * (length + 1)), row)
    batch = row.is_first.shape[0]
    steps = steps._replace(is_first=jnp.zeros((length + 1, batch), bool))
    memo = () if agent.model is None else agent.model.pack(agent.model.initial(batch))
    index = jnp.zeros((length + 1, batch), jnp.int32)
    return Window(memo, steps, jnp.arange(batch), index)


def measure_update(
    config: dreamer_v3.Config, obs: str, batch: int, length: int, repeats: int
) -> dict:
    """Compile seconds, seconds per update and policy steps per second of a batch of rows."""
    agent = dreamer_v3.agent(config, *spaces(obs))
    env = wrappers.batch(synthetic(obs), batch)
    key = jax.random.key(0)
    state = jax.jit(agent.init)(key)
    row = jax.jit(env.reset)(key)[1]
    window, carry = window_of(agent, row, length), agent.initial(batch)
    start = time.perf_counter()
    update = backend.jit(agent.update, donate_argnums=0).lower(state, window, key).compile()
    compile_seconds = time.perf_counter() - start
    act = jax.jit(agent.act).lower(state.params, carry, row, key).compile()
    acting = seconds(lambda: act(state.params, carry, row, key), 10 * repeats)

    def once() -> Any:
        nonlocal state
        state, _, metrics = update(state, window, key)
        return metrics

    updating = seconds(once, repeats)
    return {
        "compile_seconds": compile_seconds,
        "seconds_per_update": statistics.median(updating),
        "seconds_per_update_best": min(updating),
        "updates_per_second": 1 / statistics.median(updating),
        "policy_steps_per_second": batch / statistics.median(acting),
    }


def measure_loop(config: RunConfig, obs: str, updates: int, repeats: int) -> dict:
    """The compiled loop of environment, replay and updates, with `updates` per chunk."""
    per_update = config.replay.batch_size * config.replay.batch_length
    iterations = -(-updates * per_update // int(config.replay.train_ratio * config.envs))
    run = Run(config, iterations, synthetic(obs))
    while run.updates == 0:  # fill the replay
        run()
    line = measure(run, repeats)
    return line | {"train_ratio": config.replay.train_ratio, "envs": config.envs}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", nargs="+", default=["size1m"], help="sizes of dreamer_v3")
    parser.add_argument("--obs", nargs="+", default=["vector"], choices=OBS)
    parser.add_argument("--batch", type=number, nargs="+", default=[16])
    parser.add_argument("--length", type=number, default=64)
    parser.add_argument("--repeats", type=number, default=10)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--no-loop", action="store_true", help="the update alone")
    args = parser.parse_args()
    for size, obs, batch in itertools.product(args.size, args.obs, args.batch):
        agent = dataclasses.replace(dreamer_v3.sized(size), dtype=args.dtype)
        result = {
            "size": size,
            "obs": obs,
            "batch": [batch, args.length],
            "imagine": agent.behavior.imagine,
            "dtype": backend.compute_dtype(args.dtype),
            **machine(),
            **measure_update(agent, obs, batch, args.length, args.repeats),
        }
        if not args.no_loop:
            replay = ReplayConfig(
                capacity=20_000, batch_size=batch, batch_length=args.length, train_ratio=512
            )
            config = RunConfig(
                env="synthetic", recipe="dreamer_v3", size=size, agent=agent, replay=replay
            )
            result["loop"] = measure_loop(config, obs, 8, max(2, args.repeats // 4))
        emit(result, args.out)


if __name__ == "__main__":
    in_words(main)

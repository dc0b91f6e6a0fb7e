"""Steps per second and memory of environments, alone and acted on by an agent.

    python -m benchmarks.environments --out benchmarks/results/environments.jsonl
    python -m benchmarks.environments --envs atari/Pong gymnax/CartPole-v1 --counts 16

One line of JSON for each environment and number of copies. On the device, copies and policy are
one compiled program; on the host, the copies step in worker processes between compiled acting.
Nothing learns.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.lines import emit, in_words, machine, number, parser_of
from jaxwm import envs
from jaxwm.envs import wrappers
from jaxwm.envs.examine import random_actions
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.recipes import dreamer_v3
from jaxwm.types import Agent, Env, HostEnv, JaxwmError, zeros

FAMILIES = (
    "gymnax/CartPole-v1",
    "gymnax/Catch-bsuite",
    "gymnax/Breakout-MinAtar",
    "brax/inverted_pendulum",
    "playground/CartpoleSwingup",
    "craftax/Craftax-Classic-Pixels-v1",
    "gymnasium/CartPole-v1",
    "gymnasium/CartPole-v1:vector",
    "dm_control/walker-walk",
    "atari/Pong:100k",
    "crafter/reward",
    "envpool/Pong-v5",
)
STEPS = 32  # of each copy, between two looks at the clock


def rate(call: Callable[[], Any], steps: int, seconds: float) -> float:
    """Steps per second of calls that take `steps` each, after one that is not counted."""
    jax.block_until_ready(call())
    begun, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        jax.block_until_ready(call())
        calls += 1
    return calls * steps / passed


def on_device(env: Env, agent: Agent, params: Any, count: int, seconds: float) -> dict[str, Any]:
    """Speeds and state bytes of `count` copies on the device."""
    many = wrappers.batch(env, count)
    key = jax.random.key(0)
    actions = random_actions(env, key, (STEPS, count))

    def alone(state: Any) -> Any:
        keys = jax.random.split(key, STEPS)
        return jax.lax.scan(lambda s, x: many.step(s, *x), state, (actions, keys))

    def acting(carry: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            state, row, latent = carry
            latent, action, _ = agent.act(params, latent, row, key)
            state, row = many.step(state, action, key)
            return (state, row, latent), row.reward

        return jax.lax.scan(step, carry, jax.random.split(key, STEPS))

    state, row = jax.jit(many.reset)(key)
    row = row._replace(action=zeros(env.action_space, (count,)))
    alone, acting = jax.jit(alone), jax.jit(acting)
    carry = (state, row, agent.initial(count))
    sizes = [x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes")]
    return {
        "alone": rate(lambda: alone(state), STEPS * count, seconds),
        "acting": rate(lambda: acting(carry), STEPS * count, seconds),
        "bytes_per_copy": sum(sizes) // count,
    }


def on_host(env: HostEnv, agent: Agent, params: Any, count: int, seconds: float) -> dict[str, Any]:
    """Speeds of `count` copies in worker processes, and their share of the workers' memory."""
    key = jax.random.key(0)
    actions = jax.device_get(random_actions(env, key, (STEPS, count)))
    act = jax.jit(agent.act)
    with Pool(env, count, HostConfig()) as pool:
        row, latent = pool.reset(), agent.initial(count)

        def alone() -> None:
            for t in range(STEPS):
                pool.step(jax.tree.map(lambda x, t=t: x[t], actions))

        def acting() -> None:
            nonlocal row, latent
            for _ in range(STEPS):
                latent, action, _ = act(params, latent, row, key)
                row = pool.step(jax.device_get(action))

        return {
            "alone": rate(alone, STEPS * count, seconds),
            "acting": rate(acting, STEPS * count, seconds),
            "bytes_per_copy": pool.resident_bytes() // count,
        }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--envs", nargs="+", default=FAMILIES)
    parser.add_argument("--counts", type=number, nargs="+", default=[1, 16, 256])
    parser.add_argument("--size", default="size1m", help="a size of dreamer_v3")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a speed is measured for")
    args = parser.parse_args()
    for name in args.envs:
        try:
            env = envs.make(name)
        except JaxwmError as error:
            print(json.dumps({"env": name, "error": str(error)}))
            continue
        agent = dreamer_v3.agent(dreamer_v3.sized(args.size), env.obs_space, env.action_space)
        params = jax.jit(agent.init)(jax.random.key(0)).params
        for count in args.counts:
            measure = on_host if isinstance(env, HostEnv) else on_device
            result = {
                "env": name,
                "where": "host" if isinstance(env, HostEnv) else "device",
                "copies": count,
                **measure(env, agent, params, count, args.seconds),
                "size": args.size,
                **machine(),
            }
            rounded = {
                k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()
            }
            emit(rounded, args.out)


if __name__ == "__main__":
    in_words(main)

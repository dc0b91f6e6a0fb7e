"""Worker processes against threads: steps per second of the same simulators.

    python -m benchmarks.workers --out benchmarks/results/workers.jsonl

For each environment, 16 simulators with random actions: one after the other, in two threads of
this process, and in the two worker processes of `envs.host.Pool`; alternating, medians. Threads
save the pipes and the copies, but simulators in Python share one interpreter lock, and neither a
hang nor a crash of one can be survived.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from benchmarks.lines import emit, in_words, machine, number, parser_of
from jaxwm import envs
from jaxwm.config import require
from jaxwm.envs.examine import random_actions
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.envs.worker import Loop, views
from jaxwm.types import HostEnv, JaxwmError, as_dict

FAMILIES = ("gymnasium/CartPole-v1", "dm_control/walker-walk", "atari/Pong:100k", "crafter/reward")
WORKERS = 2


def in_threads(env: HostEnv, count: int, threads: int) -> Callable[[dict[str, np.ndarray]], None]:
    """`actions (count, ...)`-taking step of simulators that so many threads share."""
    rows, _ = views(env, count)
    edges = [count * i // threads for i in range(threads + 1)]
    loops = [Loop(env, rows.share(a, b), a) for a, b in itertools.pairwise(edges)]
    pool = ThreadPoolExecutor(threads)
    list(pool.map(Loop.begin, loops))

    def step(actions: dict[str, np.ndarray]) -> None:
        for name, value in actions.items():
            rows.action[name][:] = value
        faults = [fault for some in pool.map(Loop.step, loops) for fault in some]
        assert not faults, faults

    return step


def measure(env: HostEnv, count: int, steps: int, rounds: int) -> dict[str, float]:
    """Median steps per second of each way."""
    drawn = jax.device_get(random_actions(env, jax.random.key(0), (steps, count)))
    actions = {name: np.asarray(x) for name, x in as_dict(drawn).items()}
    whole = isinstance(env.action_space, dict)
    with Pool(env, count, HostConfig(workers=WORKERS)) as pool:
        pool.reset()
        ways: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
            "alone": in_threads(env, count, 1),
            "threads": in_threads(env, count, WORKERS),
            "processes": lambda x: pool.step(x if whole else x["action"]),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, step in ways.items():
                begun = time.perf_counter()
                for t in range(steps):
                    step({key: x[t] for key, x in actions.items()})
                rates[name].append(count * steps / (time.perf_counter() - begun))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--envs", nargs="+", default=FAMILIES)
    parser.add_argument("--count", type=number, default=16, help="simulators")
    parser.add_argument("--steps", type=number, default=64, help="of each, between clock readings")
    parser.add_argument("--rounds", type=number, default=5)
    args = parser.parse_args()
    for name in args.envs:
        try:
            env = envs.make(name)
        except JaxwmError as error:
            print(json.dumps({"env": name, "error": str(error)}))
            continue
        require(isinstance(env, HostEnv), f"{name} steps on the device, not in workers.")
        rates = measure(env, args.count, args.steps, args.rounds)
        result = {
            "env": name,
            "simulators": args.count,
            "workers": WORKERS,
            **{way: float(f"{rate:.4g}") for way, rate in rates.items()},
            "processes_over_threads": round(rates["processes"] / rates["threads"], 2),
            **machine(),
        }
        emit(result, args.out)


if __name__ == "__main__":
    in_words(main)

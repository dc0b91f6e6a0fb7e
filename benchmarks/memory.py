"""Memory by size: a row of replay, parameters, optimiser, and what an update takes in between.

    python -m benchmarks.memory --out benchmarks/results/memory.jsonl

All of it is known before anything runs: shapes say what is stored, and the compiler says what an
update needs beside it. Nothing is allocated, so sizes larger than the machine can be looked at.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lines import emit, in_words, machine, number, parser_of
from benchmarks.roofline import work
from benchmarks.throughput import OBS, spaces
from jaxwm import backend
from jaxwm.recipes import dreamer_v3
from jaxwm.replay.device import ReplayConfig, device_bytes, replay
from jaxwm.types import zeros

DTYPES = ("float32", "bfloat16")


def nbytes(tree: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def row_bytes(config: dreamer_v3.Config, obs: str) -> dict[str, float]:
    """Bytes that a row takes in the replay: of its observation, its latent, and the rest of it.

    With few latents, of which the replay keeps every 64th.
    """
    window = work(config, obs, 1, 1, shapes=True).window
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), window.steps)
    memory = replay(ReplayConfig(6400, 1, 64), row, window.memo)
    stored = (memory.shapes.rows, memory.shapes.memo.core, memory.shapes.memo.stoch)
    rows, deter, stoch = (nbytes(part) // 6400 for part in stored)
    few = replay(ReplayConfig(6400, 1, 64, context_every=64), row, window.memo).nbytes / 6400
    seen = nbytes(jax.eval_shape(lambda: zeros(spaces(obs)[0], ())))
    parts = {"observation": seen, "deter": deter, "stoch": stoch, "rest": rows - seen}
    above = {"above_observation": deter + stoch + rows - seen}
    return parts | above | {"above_observation_with_few_latents": round(few - seen, 1)}


def update_bytes(config: dreamer_v3.Config, obs: str, batch: int, length: int) -> dict[str, int]:
    """Bytes of what is learned, and of what an update takes in between."""
    agent, state, *rest = work(config, obs, batch, length, shapes=True)
    compiled = backend.jit(agent.update, donate_argnums=0).lower(state, *rest).compile()
    return {
        "parameter_count": sum(x.size for x in jax.tree.leaves(state.params)),
        "parameters": nbytes(state.params),
        "slow_critic": nbytes(state.rest.behavior.slow),
        "optimiser": nbytes(state.rest.opt),
        "batch": nbytes(rest[:-1]),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano", *dreamer_v3.DETER])
    parser.add_argument("--obs", nargs="+", default=OBS, choices=OBS)
    parser.add_argument("--batch", type=number, default=16)
    parser.add_argument("--length", type=number, default=64)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of the update")
    args = parser.parse_args()
    for size, obs in itertools.product(args.sizes, args.obs):
        config = dataclasses.replace(dreamer_v3.sized(size), dtype=args.dtype)
        rows = {x: row_bytes(dataclasses.replace(config, dtype=x), obs) for x in DTYPES}
        line = {
            "size": size,
            "obs": obs,
            "batch": [args.batch, args.length],
            "dtype": backend.compute_dtype(args.dtype),
            "row_bytes": rows,
            "bytes": update_bytes(config, obs, args.batch, args.length),
            "device_bytes": device_bytes(),
        }
        emit(line | machine(), args.out)


if __name__ == "__main__":
    in_words(main)

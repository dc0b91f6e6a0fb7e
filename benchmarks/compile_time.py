"""Seconds from nothing to the first update, with the compilation cache cold and warm.

    python -m benchmarks.compile_time --out benchmarks/results/compile_time.jsonl

For each size, four processes, of which two begin with an empty cache and two find what those left:
one traces, lowers and compiles an update and runs it; one does the same with the chunk of a run, in
which environments, replay and updates are one program, and runs it up to its first update.
`seconds_to_first_update` is a process's whole life, from its start and the import of jax on.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from benchmarks.lines import emit, in_words, machine, number, parser_of
from benchmarks.loop import training
from benchmarks.roofline import work
from jaxwm import backend, train
from jaxwm.backend import compute_dtype
from jaxwm.recipes import dreamer_v3
from jaxwm.train.program import NUMBER, TRUTH


def stages(function: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """A jitted function compiled for arguments or their shapes, and the seconds of each stage."""
    times = [time.perf_counter()]
    traced = function.trace(*args)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    names = ("trace_seconds", "lower_seconds", "compile_seconds")
    return compiled, {name: times[i + 1] - times[i] for i, name in enumerate(names)}


def first_update(size: str, dtype: str, obs: str, batch: int, length: int) -> dict[str, float]:
    """The stages of an update, which is then run."""
    config = dataclasses.replace(dreamer_v3.sized(size), dtype=dtype)
    agent, *shapes = work(config, obs, batch, length, shapes=True)
    compiled, took = stages(backend.jit(agent.update, donate_argnums=0), *shapes)
    jax.block_until_ready(compiled(*work(config, obs, batch, length, shapes=False)[1:]))
    return took


def first_chunk(size: str, dtype: str, envs: int, batch: int, length: int) -> dict[str, float]:
    """The stages of a run's chunk, which is then run until it has made an update."""
    config = training(size, envs, batch * length / envs, batch, length, dtype)
    program = train.build(config, 8)
    function = program.chunk.function
    compiled, took = stages(function, program.shapes(), NUMBER, TRUTH)
    chunk, state = train.Chunk(compiled, program.iterations), program.init()
    while int(state.clock.updates) == 0:
        state, _ = chunk(state)
    return took


def process(args: argparse.Namespace, what: str, size: str, cache: str) -> dict[str, float]:
    """What a fresh process finds out, with a compilation cache in the folder `cache`."""
    own = ["--inside", what, "--sizes", size, "--obs", args.obs, "--envs", str(args.envs)]
    own += ["--batch", str(args.batch), "--length", str(args.length), "--dtype", args.dtype]
    keep_all = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", *own],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, **keep_all},
    )
    whole = time.perf_counter() - start
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds_to_first_update": whole}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano", "size1m"])
    parser.add_argument(
        "--obs", default="vector", choices=("vector", "image"), help="of the update"
    )
    parser.add_argument("--envs", type=number, default=16, help="CartPoles of the chunk")
    parser.add_argument("--batch", type=number, default=16)
    parser.add_argument("--length", type=number, default=64)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--inside", choices=("update", "chunk"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        own = first_chunk if args.inside == "chunk" else first_update
        second = args.envs if args.inside == "chunk" else args.obs
        print(json.dumps(own(args.sizes[0], args.dtype, second, args.batch, args.length)))
        return
    for size in args.sizes:
        dreamer_v3.sized(size)  # in words, if there is none
        found = {}
        for what in ("update", "chunk"):
            with tempfile.TemporaryDirectory() as cache:
                found[what] = {x: process(args, what, size, cache) for x in ("cold", "warm")}
        # Only now: a process that knows the device may hold it, or its memory, for itself.
        line = {"size": size, "obs": args.obs, "envs": args.envs}
        line["dtype"] = compute_dtype(args.dtype)
        emit(line | {"batch": [args.batch, args.length]} | found | machine(), args.out)


if __name__ == "__main__":
    in_words(main)

"""Trains one tiny run in many ways and prints what came of it as JSON; a process of its own.

    python driver.py counts FOLDER         on 1, 2, 4 and 8 devices, with checkpoints in FOLDER
    python driver.py seeds                 seeds over devices, and without
    python driver.py process N ADDRESS     as process N of two, with four devices each

jax reads XLA_FLAGS, with the number of fake devices, when it starts: too late in the process of
the tests, which starts this one with it.
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxwm import train
from jaxwm.recipes import RECIPES, RunConfig, dreamer_v3
from jaxwm.replay.config import ReplayConfig
from jaxwm.run import checkpoint
from jaxwm.run.saver import Saver
from jaxwm.train import processes
from jaxwm.types import JaxwmError

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

COUNTS = (1, 2, 4, 8)
ENVS, BATCH, LENGTH = 8, 8, 4
# 8 rows of each environment before the first update, then an update per iteration: 101 in all.
ITERATIONS, CHUNKS = 27, 4


def config(**changes: Any) -> RunConfig:
    """The run: 100 updates in 4 chunks, of 8 shards."""
    agent = dreamer_v3.sized("debug")
    # A short warmup, so that the updates move the parameters visibly.
    agent = dataclasses.replace(agent, optim=dataclasses.replace(agent.optim, warmup_steps=20))
    memory = ReplayConfig(capacity=8 * 40, batch_size=BATCH, batch_length=LENGTH)
    memory = dataclasses.replace(memory, train_ratio=BATCH * LENGTH / ENVS)
    plain = RunConfig(
        "toy/Memory", "dreamer_v3", "debug", agent=agent, envs=ENVS, shards=8, replay=memory
    )
    return dataclasses.replace(plain, **changes)


def trained(chunk: Any, state: train.TrainState) -> tuple[train.TrainState, Any]:
    """The state after 100 updates, and the last metrics."""
    for _ in range(CHUNKS):
        state, metrics = chunk(state)
    return state, processes.fetch(metrics)


def numbers(state: train.TrainState) -> train.TrainState:
    """The state in numpy, keys as their numbers."""

    def raw(x: Any) -> Any:
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return processes.fetch(jax.tree.map(raw, state))


def learned(state: train.TrainState) -> Any:
    """Parameters, slow critic and percentiles, of a state in numpy.

    The optimiser's state is left out: dividing by the size of gradients that are almost nothing
    makes much of how they were rounded, and little of it reaches the parameters.
    """
    return state.agent._replace(rest=state.agent.rest._replace(opt=()))


def digest(tree: Any) -> str:
    """A hash of every bit of a tree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(f"{leaf.dtype}{leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def apart(one: Any, other: Any) -> float:
    """The largest difference between two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def traffic(text: str) -> list[dict[str, Any]]:
    """Kind, bytes and depth of loops of the collective operations in a compiled program."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "s8": 1, "u8": 1, "pred": 1}
    pattern = r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(-start)?\("
    found = []
    for line in text.splitlines():
        if match := re.search(pattern, line):
            parts = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            shapes = [(kind, [int(n) for n in shape.split(",") if n]) for kind, shape in parts]
            nbytes = sum(sizes[kind] * math.prod(shape) for kind, shape in shapes)
            depth = re.findall(r'op_name="([^"]*)"', line)[0].count("while/body")
            found.append({"kind": match[2], "bytes": nbytes, "depth": depth})
    return found


def counts(folder: Path) -> dict[str, Any]:
    """100 updates on every number of devices; every checkpoint restored on every number."""
    run = config()
    programs = {n: train.build(run, ITERATIONS, devices=jax.devices()[:n]) for n in COUNTS}
    chunks = {n: program.compile() for n, program in programs.items()}
    found: dict[str, Any] = {"training": {}, "restored": {}}
    begin, kept, last = programs[1].init(), {}, {}
    found["begun"] = digest(numbers(begin)) == digest(numbers(programs[8].init()))
    store(folder / "begin", begin, run)
    for n in COUNTS:
        state = checkpoint.restore(folder / "begin", programs[n].shapes(), run)
        state, last[n] = trained(chunks[n], state)
        store(folder / str(n), state, run)
        kept[n] = numbers(state)
        found["training"][n] = {
            "devices": len(jax.tree.leaves(state.agent)[0].sharding.device_set),
            "updates": int(state.clock.updates),
            "learned": apart(learned(kept[n]), learned(kept[1])),
            "told": apart(last[n], last[1]),
            "loss": float(last[n]["loss/total"]),
            "traffic": traffic(chunks[n].function.as_text()),
        }
    found["moved"] = apart(numbers(begin).agent.params, kept[1].agent.params)
    found["parameters"] = sum(x.size for x in jax.tree.leaves(kept[1].agent.params))
    found["metrics"] = sorted(last[1])
    found["returns"] = run.agent.behavior.imagine * LENGTH * BATCH
    for there in COUNTS:
        after = {}
        for here in COUNTS:
            state = checkpoint.restore(folder / str(there), programs[here].shapes(), run)
            same = digest(numbers(state)) == digest(kept[there])
            after[here] = numbers(chunks[here](state)[0])
            found["restored"][f"{there} to {here}"] = {
                "same": same,
                "updates": int(after[here].clock.updates),
                "learned": apart(learned(after[here]), learned(after[1])),
            }
    found["parts"] = parts(folder, run, kept[8], last[8])
    return found


def store(folder: Path, state: train.TrainState, run: RunConfig) -> None:
    """A checkpoint."""
    with Saver(folder, run, print) as saver:
        saver.save(1, state)


def parts(folder: Path, run: RunConfig, kept: train.TrainState, told: Any) -> dict[str, Any]:
    """The same training with parameters in parts on 8 devices, and a whole checkpoint in parts."""
    run = dataclasses.replace(run, shard_params=True)
    program = train.build(run, ITERATIONS)
    chunk, like = program.compile(), program.shapes()
    state, last = trained(chunk, checkpoint.restore(folder / "begin", like, run))
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.agent)]
    return {
        "learned": apart(learned(numbers(state)), learned(kept)),
        "told": apart(last, told),
        "held": sum(held) / sum(x.nbytes for x in jax.tree.leaves(state.agent)),
        "same": digest(numbers(checkpoint.restore(folder / "8", like, run))) == digest(kept),
        "traffic": traffic(chunk.function.as_text()),
    }


def seeds() -> dict[str, Any]:
    """Two seeds of two shards on four devices and on one; two whole seeds without learning."""
    run, ends, meshes = config(seeds=2, shards=2), [], []
    for devices in (4, 1):
        program = train.build(run, ITERATIONS, devices=jax.devices()[:devices])
        state, told = trained(program.compile(), program.init())
        ends.append((learned(numbers(state)), told))
        meshes.append(dict(program.layout.mesh.shape))
    RECIPES["dreamer_v3"] = RECIPES["dreamer_v3"]._replace(agent=still)
    run, whole = config(seeds=2, shards=1), []
    for devices in (2, 1):
        program = train.build(run, ITERATIONS, devices=jax.devices()[:devices])
        state, _ = trained(program.compile(), program.init())
        whole.append(digest(numbers(state)))
        held = jax.tree.leaves(state.agent)[0].sharding.device_set
        assert len(held) == devices
    return {"meshes": meshes, "apart": apart(*ends), "same": whole[0] == whole[1]}


def still(*args: Any) -> Any:
    """An agent that acts but never learns: it compiles in no time."""
    agent = dreamer_v3.agent(*args)

    def update(state: Any, window: Any, key: Any) -> Any:
        memo = jax.tree.map(lambda x: jax.numpy.stack([x] * LENGTH), window.memo)
        reward = window.steps.reward[1:].mean()
        return state, memo, {"reward": reward, "grad_norm": reward}

    return agent._replace(update=update)


def process(number: int, address: str) -> dict[str, Any]:
    """100 updates, each process with half of the devices; and what they tell each other."""
    processes.join(address, 2, number)
    processes.check_same(config())
    try:
        processes.check_same(dataclasses.replace(config(), seed=number))
        told = ""
    except JaxwmError as error:
        told = str(error)
    most = processes.most(15 * number)
    program = train.build(config(), ITERATIONS)
    state, metrics = trained(program.compile(), program.init())
    return {
        "refused": told,
        "most": most,
        "devices": jax.device_count(),
        "here": jax.local_device_count(),
        "loss": float(metrics["loss/total"]),
        "hash": digest(processes.fetch(state.agent)),
    }


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "counts":
        result = counts(Path(words[0]))
    elif command == "seeds":
        result = seeds()
    else:
        result = process(int(words[0]), words[1])
    print(json.dumps(result))

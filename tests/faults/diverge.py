"""Lets trainings diverge: each policy does what it says, and no checkpoint ever holds a NaN.

    python -m tests.faults.diverge --count 50 --out benchmarks/results/reliability.jsonl

Every run is in `tests.faults.poison`, where the seed decides which episodes overflow. Runs that met
none are not counted. All of a run's checkpoints are kept and looked through. The first run of
each policy is a process of its own.
"""

import collections
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from jaxwm import train
from jaxwm.recipes import RunConfig
from jaxwm.run import checkpoint, saver
from tests.faults.damage import Answer, call, command, holds, small, steady, train_words

POISONED = small(env="tests.faults.poison:poisoned", eval_episodes=0)
POLICIES = ("abort", "skip", "rollback")
_TERM = re.compile(r"diverged at update [1-9]\d*: (loss/[\w/]+|grad_norm) is NaN or infinite\.")


def trial(config: RunConfig, folder: Path, like: Any, alone: bool = False) -> str:
    """One run, and what came of it.

    Args:
      config: the run.
      folder: where it goes.
      like: the shapes of its state.
      alone: whether it is a process of its own, of which two checkpoints remain.

    Returns:
      "sound" if nothing was to be refused, or "ended" or "went on" after a divergence.

    Raises:
      Broken: if a promise does not hold.
    """
    words = train_words(config, folder)
    if alone:
        done = subprocess.run(
            [sys.executable, "-m", "jaxwm.cli", *words], capture_output=True, text=True, check=False
        )
        answer = Answer(done.returncode, done.stdout, done.stderr)
    else:
        with (
            mock.patch.object(saver, "KEPT", 1000),
            mock.patch.object(train, "build", _build),
            mock.patch("jaxwm.evaluate.final.draw", lambda *args: {}),
        ):
            answer = call(*words)
    holds("Traceback" not in answer.out + answer.err, f"a traceback: {answer.err[-2000:]}")
    for step in reversed(checkpoint.steps(folder)):
        state = checkpoint.restore(folder, like, config, _silent)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.agent):
            name = jax.tree_util.keystr(path)
            holds(np.isfinite(leaf).all(), f"{name} of checkpoint {step} is not finite")
        os.rename(folder / "checkpoints" / str(step), folder / f"seen-{step}")
    lines = steady(folder)
    refused = lines[-1]["updates/refused"] if lines else 0

    if answer.code:
        told = answer.refusal()
        holds(_TERM.search(told), f"no term and update is named: {told}")
        holds(config.on_divergence != "skip", f"it should have gone on: {told}")
        vain = "went back 3 times in vain" in told
        holds(vain == (config.on_divergence == "rollback"), f"why it ended is not told: {told}")
        return "ended"
    steps = list(range(config.log_every, config.steps + 1, config.log_every))
    holds([x["step"] for x in lines] == steps, "a line of metrics is missing, or there twice")
    if config.on_divergence == "abort":
        holds(refused == 0, f"{refused} updates were refused, and the run went on")
    if config.on_divergence == "rollback":
        holds(refused == 0, "it went on with what had diverged")
        return "went on" if "goes back to its newest checkpoint" in answer.out else "sound"
    return "went on" if refused else "sound"


_BUILD, _CHUNKS = train.build, {}


def _build(config: RunConfig) -> train.Program:
    """The program of a run; runs that differ in their seeds share what is compiled."""
    program, like = _BUILD(config), dataclasses.replace(config, seed=0)
    if like not in _CHUNKS:
        _CHUNKS[like] = program.compile()
    return program._replace(compile=lambda: _CHUNKS[like])


def _silent(text: str) -> None:
    holds(False, f"a checkpoint is damaged: {text}")


def measure(
    count: int, seed: int, folder: Path, policies: tuple[str, ...] = POLICIES, alone: bool = True
) -> dict[str, Any]:
    """So many divergences with each policy; gives the line of results."""
    broken, line = [], {"test": "diverge", "count": count}
    like = train.build(_loaded(POISONED)).shapes()
    for policy in policies:
        tally: collections.Counter[str] = collections.Counter()
        while tally["ended"] + tally["went on"] + tally["broken"] < count:
            config = dataclasses.replace(POISONED, on_divergence=policy, seed=seed + tally.total())
            run = folder / f"{policy}-{config.seed}"
            try:
                outcome = trial(config, run, like, alone and tally.total() == 0)
            except Exception as error:
                outcome = "broken"
                broken.append(f"{policy}, seed {config.seed}: {type(error).__name__}: {error}")
                print(broken[-1], flush=True)
            tally[outcome] += 1
        line[policy] = dict(tally)
        print(policy, dict(tally), flush=True)
    return line | {"broken": broken}


def _loaded(config: RunConfig) -> RunConfig:
    """The same, once the environment is known by its name."""
    from jaxwm.envs import load

    load(config.env)
    return config


if __name__ == "__main__":
    command(__doc__, 50, measure)

"""What the tests of damaged, full and contested run folders share."""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.lines import emit, machine
from jaxwm import cli
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.config import ReplayConfig

# A run of seconds; `tests/conftest.py` gives it to all tests.
TINY = RunConfig(
    env="toy/Memory",
    recipe="dreamer_v3",
    size="debug",
    variant="head",
    agent=dreamer_v3.sized("debug"),
    steps=200,
    envs=4,
    replay=ReplayConfig(capacity=400, batch_size=2, batch_length=6, train_ratio=2.0),
    eval_episodes=3,
    log_every=40,
    save_every=100,
)
VARYING = ("time", "memory/process")


class Broken(AssertionError):
    """A promise that did not hold, in words."""


def holds(condition: Any, text: str) -> None:
    """Raises `Broken` with `text` unless `condition` holds."""
    if not condition:
        raise Broken(text)


class Answer(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one paragraph of a command that was refused.

        Raises:
          Broken: if it was not, or not in one paragraph.
        """
        holds(self.code == 2, f"the exit code is {self.code}, not 2: {self.err[-2000:]}")
        holds("Traceback" not in self.out + self.err, f"a traceback: {self.err[-2000:]}")
        # Libraries may warn before; the last paragraph is jaxwm's.
        at = self.err.rfind("jaxwm:")
        holds(at >= 0 and "\n\n" not in self.err[at:].strip(), f"no paragraph: {self.err[-2000:]}")
        return " ".join(self.err[at:].split())


def call(*words: Any) -> Answer:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return Answer(code, out.getvalue(), err.getvalue())


def train_words(config: RunConfig, run: Path) -> list[str]:
    """The words of `jaxwm train` that make a run like `TINY`."""
    words = ["train", config.recipe, "--env", config.env, "--size", config.size, "--run", str(run)]
    for name in ("seed", "steps", "envs", "log_every", "save_every", "eval_episodes"):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += ["--on-divergence", config.on_divergence]
    for field in ("capacity", "batch_size", "batch_length", "train_ratio"):
        words += [f"--replay.{field.replace('_', '-')}", str(getattr(config.replay, field))]
    return words


def copy(run: Path, to: Path) -> Path:
    """A copy of a folder in which files that shared their bytes still do."""
    there: dict[int, str] = {}

    def put(source: str, target: str) -> None:
        number = os.stat(source).st_ino
        if number in there:
            os.link(there[number], target)
        else:
            there[number] = shutil.copy2(source, target)

    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(run, to, copy_function=put))


def bits(tree: Any) -> str:
    """A digest of path, type, shape and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def steady(run: Path) -> list[dict[str, Any]]:
    """The `plain` lines of `metrics.jsonl`.

    Raises:
      Broken: if a line is not whole.
    """
    text = (run / "metrics.jsonl").read_text("utf-8")
    holds(text.endswith("\n") or not text, "the last line of metrics.jsonl is not whole")
    try:
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        raise Broken("a line of metrics.jsonl is not whole") from None
    return plain(lines)


def plain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what differs from one run to the next."""
    return [{k: v for k, v in line.items() if k not in VARYING} for line in lines]


def command(doc: str, count: int, measure: Callable[[int, int, Path], dict[str, Any]]) -> None:
    """The command line of a script: measures, prints and appends a line, exits with 1 if it broke.

    Args:
      doc: the script's docstring.
      count: how many faults, unless --count says otherwise.
      measure: `count, seed, empty folder -> line`, of which "broken" lists what did not hold.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the line of JSON to this file too")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        line = measure(args.count, args.seed, Path(folder))
    line["broken"] = [text.replace(folder, "") for text in line["broken"]]
    line["seconds"] = round(time.monotonic() - begun, 1)
    emit(line | machine(), args.out)
    sys.exit(1 if line["broken"] else 0)


def small(**changes: Any) -> RunConfig:
    """`TINY` with other entries."""
    return dataclasses.replace(TINY, **changes)

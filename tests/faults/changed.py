"""Gives runs configurations that they cannot have: refused in words, before anything is spent.

    python -m tests.faults.changed --count 200 --out benchmarks/results/reliability.jsonl

Thirty times an entry of a run's `config.json` is changed before `jaxwm resume`: it must be named,
with both values and what to do. Then so many command lines of `jaxwm train` are made up that have
something wrong with them: each must be answered in one paragraph, with exit code 2, and leave
nothing on the disk.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from jaxwm.config import flatten, from_dict
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.run import checkpoint
from jaxwm.run.loop import run as train_run
from jaxwm.types import JaxwmError
from tests.faults.damage import TINY, Answer, Broken, call, command, copy, holds

# Other values of entries for which `_other` has none that could be meant.
OTHERS = {
    "env": "toy/Credit",
    "recipe": "other",
    "size": "nano",
    "variant": "paper",
    "sweep": ["learning_rate=0.001,0.01"],
    "on_divergence": "skip",
    "agent.dtype": "bfloat16",
    "agent.model.codec.convs": "strided",
    "agent.model.codec.mults": [1, 2],
    "agent.behavior.start_weight": "true",
}


def changed(run: Path, folder: Path, path: str) -> bool:
    """Changes an entry of a run's configuration; False if such a configuration cannot be."""
    before = json.loads((run / checkpoint.CONFIG).read_text())
    after = json.loads(json.dumps(before))
    *parents, name = path.split(".")
    table = after
    for parent in parents:
        table = table[parent]
    table[name] = OTHERS.get(path) or _other(table[name])
    try:
        config = from_dict(RunConfig, after)
    except JaxwmError:
        return False
    old, new = flatten(from_dict(RunConfig, before))[path], flatten(config)[path]
    copy(run, folder)
    (folder / checkpoint.CONFIG).write_text(json.dumps(after))
    with _nothing_compiled():
        told = call("resume", folder).refusal()
    for text in (f"{path}: {new!r} here, {old!r} there", "--accept-changes", "another folder"):
        holds(text in told, f"{text!r} is not told: {told}")
    return True


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return 2 * value if value else 1


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Whatever would be compiled was accepted, which is what should not be."""

    def compile(*args: Any, **options: Any) -> None:
        raise Broken("it was accepted")

    with mock.patch.object(jax.stages.Lowered, "compile", compile):
        yield


DEFAULT = dreamer_v3.config("toy/Memory", "debug")
ENTRIES = flatten(DEFAULT)
FLAGS = {path: f"--{path.replace('_', '-')}" for path in ENTRIES}
# Entries that may be 0; of the others, those that may be no more than 1.
_ZERO = ("seed", "time_limit", "eval_episodes", "host.workers", "host.max_faults", "unimix")
_ZERO += (
    "prefill",
    "train_every",
    "pretrain",
    "train_ratio",
    "free_nats",
    "layers",
    "lambda_",
    "entropy",
    "slow_regularizer",
    "slow_rate",
    "steps",
)
_SHARES = ("unimix", "lambda_", "return_rate", "slow_rate", "beta1", "beta2")
_BAD = {
    int: ("", "many", "1.5", "1e3", "-1", "-20", "nan", "None", "9" * 25),
    float: ("", "much", "1,5", "nan", "inf", "-inf", "-0.5", "-1e-9", "1e400", "None"),
    str: ("", "other", "../..", "\u00fc"),
}
_WORDS = st.text("abcdefghijklmnopqrstuvwxyz-_.=", min_size=1, max_size=12)
_CONTRADICTIONS = (
    "--replay.capacity 1024",  # 64 rows for each of 16 environments: less than a window
    "--replay.batch-length 400000",
    "--steps 10",
    "--log-every 5000 --steps 4000",
    "--shards 3",
    "--shards 32",
    "--shard-params",
    "--agent.model.core.blocks 3",
    "--agent.optim.warmup-steps 10 --agent.optim.learning-rate linear:1e-3:1e-4:0:5",
    "--sweep learning_rate=1e-3 optim.learning_rate=1e-4",
    "--sweep learning_rate=1e-3,1e-3",
    "--sweep learning_rate=",
    "--sweep layers=1,2",
    "--sweep unimix=0.1",
    "--sweep slow_rate=0.1,2",
    "--replay.place host",
    "--recipe other",
    "--size debug --variant none",
    "--preset none",
    "--agent.model.codec.mults 2 0",
    "--agent.model.codec.mults",
    "--processes 2",
)


@st.composite
def bad_words(draw: st.DrawFn) -> list[str]:
    """What follows `jaxwm train dreamer_v3 --env toy/Memory --size debug`, with one thing wrong."""
    kind = draw(st.sampled_from(("value", "value", "value", "flag", "word", "contradiction")))
    if kind == "flag":
        flag = draw(st.sampled_from(sorted(FLAGS.values())))
        at = draw(st.integers(3, len(flag)))
        wrong = flag[:at] + draw(st.sampled_from("qxz")) + flag[at:]
        return [wrong, "1"]
    if kind == "word":
        return [draw(_WORDS.filter(lambda word: not word.startswith("-")))]
    if kind == "contradiction":
        return draw(st.sampled_from(_CONTRADICTIONS)).split()
    path = draw(st.sampled_from([x for x, y in ENTRIES.items() if type(y) in _BAD and x != "env"]))
    wrong = list(_BAD[type(ENTRIES[path])])
    if type(ENTRIES[path]) is not str:
        wrong += [] if path.endswith(_ZERO) or ".weights." in path or "_steps" in path else ["0"]
        wrong += ["1.5"] if path.endswith(_SHARES) else []
    return [f"{FLAGS[path]}={draw(st.sampled_from(wrong))}"]


def bad(words: list[str], folder: Path) -> None:
    """Holds that `jaxwm train` refuses a command line, and leaves an empty folder empty."""
    folder.mkdir()
    try:
        with contextlib.chdir(folder), _nothing_compiled():
            call("train", "dreamer_v3", "--env", "toy/Memory", "--size", "debug", *words).refusal()
        left = [str(x) for x in folder.rglob("*")]
        holds(not left, f"it has left {left}")
    finally:
        shutil.rmtree(folder)


# What can be known to be wrong without jax.
_AT_ONCE = (
    "trian dreamer_v3",
    "train dreamer_v9 --env toy/Memory",
    "train dreamer_v3",
    "resume",
    "resume runs/none --stepz 4",
    "checkpoints",
    "envs check",
)


def at_once(words: list[str]) -> None:
    """Holds that a command is refused without jax."""
    code = "import sys; from jaxwm.cli import main; code = main(sys.argv[1:]); "
    code += "print('jax' in sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    Answer(done.returncode, done.stdout, done.stderr).refusal()
    holds("False" in done.stdout, "jax was imported")


def measure(
    count: int, seed: int, folder: Path, changes: int = 30, run: Path | None = None
) -> dict[str, Any]:
    """So many bad command lines, and changes of configurations; gives the line of results."""
    broken: list[str] = []

    def attempt(what: str, check: Any) -> bool:
        try:
            return check() is not False
        except Exception as error:
            broken.append(f"{what}: {type(error).__name__}: {error}")
            print(broken[-1], flush=True)
            return True

    if run is None:
        run = folder / "run"
        train_run(TINY, run, quiet=True)
    paths = [x for x in ENTRIES if x.partition(".")[0] not in checkpoint.FREE]
    done = 0
    for path in np.random.default_rng(seed).permutation(paths):
        if done < changes:
            done += attempt(f"{path} changed", lambda x=str(path): changed(run, folder / "copy", x))
    empty, seen = folder / "empty", []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(bad_words())
    def made_up(words: list[str]) -> None:
        seen.append(words)
        attempt(" ".join(words), lambda: bad(words, empty))

    made_up()
    for words in _AT_ONCE:
        attempt(words, lambda x=words: at_once(x.split()))
    return {
        "test": "changed",
        "count": len(seen),
        "changes": done,
        "at_once": len(_AT_ONCE),
        "broken": broken,
    }


if __name__ == "__main__":
    command(__doc__, 200, measure)

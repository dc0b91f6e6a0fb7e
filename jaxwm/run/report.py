"""What a run leaves for people to read: what was run, on what, how long it took, what came of it.

`SUMMARY.md` is for people, `versions.json` for machines.
"""

import importlib.metadata
import json
import shlex
import subprocess
from pathlib import Path
from platform import platform as system
from platform import python_version
from typing import NamedTuple

import jax
import numpy as np

from jaxwm import __version__, backend
from jaxwm.config import flatten
from jaxwm.recipes import RunConfig, find
from jaxwm.run import checkpoint
from jaxwm.run.log import read_metrics
from jaxwm.types import JaxwmError

SUMMARY = "SUMMARY.md"
PACKAGES = ("jax", "jaxlib", "flax", "optax")


class Summary(NamedTuple):
    """What came of a run.

    Attributes:
      folder: the run's folder.
      steps: environment steps of each seed.
      updates: gradient steps of each seed.
      returns: of the evaluation, (seeds, episodes); no episodes if there was none.
      train_seconds: time of training, over all resumes, compilation left out.
      compile_seconds: time to compile and to fill or read the state, of the last part of the run.
      first_update_seconds: time from the start of the last part of the run to the end of its first
        update; NaN if it made none.
    """

    folder: Path
    steps: int
    updates: int
    returns: np.ndarray
    train_seconds: float
    compile_seconds: float
    first_update_seconds: float


def versions() -> dict[str, str]:
    """Software and hardware: whatever may change the numbers but the configuration."""
    device = jax.devices()[0]
    found = {"jaxwm": __version__, "python": python_version()}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    found |= {"device": f"{jax.device_count()} x {device.device_kind}", "backend": backend.kind()}
    found["platform"] = system()
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def write_versions(folder: Path) -> None:
    """Writes `versions.json`."""
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", "utf-8")


def command(config: RunConfig) -> str:
    """The command that starts a run of exactly this configuration."""
    names = {"size": config.size, "variant": config.variant}
    try:
        plain = find(config.recipe).run(config.env, *(x or None for x in names.values()), None)
    except JaxwmError:  # a size of the user's own, made in Python: spell out the default's changes
        plain, names = find(config.recipe).run(config.env, None, None, None), {}
    words = ["jaxwm train", config.recipe, "--env", config.env]
    words += [word for name, value in names.items() if value for word in (f"--{name}", value)]
    there = flatten(plain)
    for path, value in flatten(config).items():
        if path in ("size", "variant") or value == there[path]:
            continue
        parent, dot, name = path.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{parent}{dot}{'' if value else 'no-'}{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{parent}{dot}{name}", *map(str, values)]
    return " ".join(words)


def write_summary(
    config: RunConfig,
    summary: Summary,
    lines: list[str],
    pictures: dict[str, Path],
    replay_bytes: int,
) -> Path:
    """Writes `SUMMARY.md` into the run's folder.

    Args:
      config: the run.
      summary: what came of it.
      lines: the evaluation, as it was printed.
      pictures: files in the folder, by what they show.
      replay_bytes: size of the replay of one member.

    Returns:
      The file.
    """
    folder, found, quoted = summary.folder, versions(), shlex.quote(str(summary.folder))
    seeds = f", {config.seeds} seeds side by side" if config.seeds > 1 else ""
    if config.sweep:
        seeds += f", {config.members // config.seeds} settings of {' '.join(config.sweep)}"
    size = f" {config.size}" if config.size else ""
    variant = f", variant {config.variant}" if config.variant else ""
    seconds, first = max(summary.train_seconds, 1e-9), summary.first_update_seconds
    rows = {
        "environment steps per seed": f"{summary.steps:,}",
        "updates per seed": f"{summary.updates:,}",
        "time of training": f"{summary.train_seconds:,.1f} s",
        "time of compiling": f"{summary.compile_seconds:,.1f} s",
        "time to the first update": f"{first:,.1f} s" if first >= 0 else "none was made",
        "updates per second and seed": f"{summary.updates / seconds:,.2f}",
        "steps per second and seed": f"{summary.steps / seconds:,.1f}",
        "last return in training": _last_return(folder, config.members),
        "replay": f"{replay_bytes * config.members:,} bytes in the {config.replay.place}'s memory",
    }
    evaluation = f"{config.eval_episodes} episodes for each" if lines else "none was asked for"
    text = f"""\
# {config.recipe}{size} in {config.env}

Seed {config.seed}{seeds}{variant}. To run it again:

    {command(config)}

## Result

Evaluation: {evaluation}.

{_indent(lines)}
{_table(rows)}

## Pictures

{_pictures(pictures)}

## Hardware and software

{_table(found)}

## What next

    jaxwm resume {quoted} --steps {2 * summary.steps}
    jaxwm eval {quoted} --episodes 100
    jaxwm plot {quoted}

In Python:

    import jaxwm
    policy = jaxwm.load({str(folder)!r})
    action, state = policy.act(obs)

The configuration is in `{checkpoint.CONFIG}`, the metrics are in `metrics.jsonl`.
"""
    path = folder / SUMMARY
    # A folder's name may be bytes that are no letters in the locale; they stay as they are.
    path.write_text(text, "utf-8", "surrogateescape")
    return path


def _commit() -> str | None:
    """The commit jaxwm is run from, with "-dirty" if files were changed; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _last_return(folder: Path, members: int) -> str:
    """Mean over members of the last returns told."""
    ended = [x for x in read_metrics(folder) if "episode/return" in x]
    last = {(x.get("setting"), x["seed"]): x["episode/return"] for x in ended}
    if not last:
        return "no episode ended"
    which = f" (mean of {len(last)})" if members > 1 else ""
    return f"{np.mean(list(last.values())):.6g}{which}"


def _indent(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _pictures(pictures: dict[str, Path]) -> str:
    return "\n\n".join(f"![{name}]({path.name})" for name, path in pictures.items())

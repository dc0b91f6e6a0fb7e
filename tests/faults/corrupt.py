"""Damages stored checkpoints: nothing damaged may ever be taken for what was saved.

    python -m tests.faults.corrupt --count 300 --out benchmarks/results/reliability.jsonl

A run is trained, and its folder copied for every trial, hard links included. One of its two
checkpoints is damaged, or both, in place. Restoring must then give, bit for bit, the newest one
that is whole, and say what was passed over; if none is, there is an error in words. Every damage
must be found, and may reach no other checkpoint than the one whose file it was.
"""

import collections
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxwm import train
from jaxwm.run import checkpoint, manifest
from jaxwm.run.loop import run as train_run
from jaxwm.types import JaxwmError
from tests.faults.damage import Broken, bits, command, copy, holds, small

Random = np.random.Generator


def flip(folder: Path, random: Random) -> None:
    """One bit of a file."""
    path, data = _one(folder, random)
    place = int(random.integers(8 * len(data)))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def zero(folder: Path, random: Random) -> None:
    """4 KB of a file, or what it has of them."""
    path, data = _one(folder, random)
    start = int(random.integers(len(data)))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def truncate(folder: Path, random: Random) -> None:
    path, data = _one(folder, random)
    path.write_bytes(data[: random.integers(len(data))])


def delete(folder: Path, random: Random) -> None:
    _one(folder, random)[0].unlink()


def swap(folder: Path, random: Random) -> None:
    """What is in two files."""
    (one, first), (two, second) = _one(folder, random), _one(folder, random)
    one.write_bytes(second)
    two.write_bytes(first)


def edit(folder: Path, random: Random) -> None:
    """One entry of the manifest."""
    path = folder / manifest.NAME
    found = json.loads(path.read_text())
    _change(found, random)
    path.write_text(json.dumps(found, indent=1))


def trade(folder: Path, random: Random) -> None:
    """The names of two checkpoints."""
    (other,) = [x for x in folder.parent.iterdir() if x.name.isdecimal() and x != folder]
    folder.rename(folder.with_name("between"))
    other.rename(folder)
    folder.with_name("between").rename(other)


KINDS = (flip, zero, truncate, delete, swap, edit, trade)


def _one(folder: Path, random: Random) -> tuple[Path, bytearray]:
    """A file that is not empty, one time in five the manifest, and what is in it."""
    if random.random() < 0.2:
        path = folder / manifest.NAME
    else:
        files = sorted(x for x in folder.rglob("*") if x.is_file() and x.stat().st_size)
        path = files[random.integers(len(files))]
    return path, bytearray(path.read_bytes())


def _change(entry: Any, random: Random) -> None:
    """Changes one number, string, truth or length, anywhere in what came from JSON."""
    keys = sorted(entry) if isinstance(entry, dict) else range(len(entry))
    if not keys:
        return
    key = keys[random.integers(len(keys))]
    value = entry[key]
    if isinstance(value, dict | list) and random.random() < 0.9:
        _change(value, random)
    elif isinstance(value, bool):
        entry[key] = not value
    elif isinstance(value, int | float):
        entry[key] = value + 1
    elif isinstance(value, str):
        entry[key] = value + "x"
    else:
        del entry[key]


class Run:
    """A run with two checkpoints, and what they hold.

    Args:
      folder: of the run.
      config: the run.
    """

    def __init__(self, folder: Path, config: Any):
        self.folder, self.config = folder, config
        self.like = train.build(config).shapes()
        self.steps = checkpoint.steps(folder)
        holds(len(self.steps) == 2, f"the run keeps the checkpoints {self.steps}, not two")
        self.state, self.params = {}, {}
        for step in self.steps:
            alone = copy(folder, folder.with_name("alone"))
            for other in set(self.steps) - {step}:
                (alone / "checkpoints" / str(other)).rename(alone / str(other))
            state = checkpoint.restore(alone, self.like, config, _silent)
            self.state[step], self.params[step] = bits(state), bits(state.agent.params)
        holds(len(set(self.params.values())) == 2, "the two checkpoints hold the same")


def _silent(text: str) -> None:
    raise Broken(f"a sound checkpoint is called damaged: {text}")


def trial(run: Run, folder: Path, kind: Any, which: list[int], random: Random) -> str:
    """Damages a copy of a run, and restores it.

    Args:
      run: the run.
      folder: where the copy goes.
      kind: one of `KINDS`.
      which: the steps of the checkpoints to damage.
      random: draws what is damaged.

    Returns:
      What came of it: "whole", "older", "none", or "same" if nothing has changed.

    Raises:
      Broken: if a promise does not hold.
    """
    copy(run.folder, folder)
    places = {step: folder / "checkpoints" / str(step) for step in run.steps}
    before = {step: _contents(place) for step, place in places.items()}
    for step in which:
        kind(places[step], random)
    after = {step: _contents(place) for step, place in places.items()}
    changed = {
        step: {
            x for x in {**before[step], **after[step]} if before[step].get(x) != after[step].get(x)
        }
        for step in run.steps
    }
    hit = {step for step in run.steps if changed[step]}
    if not hit:
        return "same"
    holds(hit <= set(which) or kind is trade, "damage to one checkpoint has reached another")
    found = {step for step, place in places.items() if checkpoint.faults(place)}
    holds(found == hit, f"damaged are {hit}, and found {found}")

    sound = max(set(run.steps) - hit, default=None)
    told: list[str] = []
    got = _attempt(lambda: checkpoint.restore(folder, run.like, run.config, told.append))
    _compare(got, sound, run.state, told, places)
    # Who needs only the networks reads only those.
    heads = {step: {x.partition("/")[0] for x in changed[step]} for step in run.steps}
    good = [step for step in run.steps if not heads[step] & {"params", manifest.NAME}]
    told = []
    got = _attempt(
        lambda: checkpoint.restore_params(
            folder, run.like.agent.params, run.config, tell=told.append
        )[0]
    )
    _compare(got, max(good, default=None), run.params, told, places)
    return "none" if sound is None else "whole" if sound == max(run.steps) else "older"


def _attempt(read: Any) -> Any:
    """What is read, or the error in words."""
    try:
        return bits(read())
    except JaxwmError as error:
        return error


def _compare(
    got: Any, sound: int | None, truth: dict[int, str], told: list[str], places: dict[int, Path]
) -> None:
    """Holds that what was read is what the checkpoint `sound` had, and that the rest was told."""
    if sound is None:
        holds(isinstance(got, JaxwmError), "a damaged checkpoint was read without a word")
        holds(all(str(place) in str(got) for place in places.values()), f"unclear: {got}")
    else:
        holds(not isinstance(got, JaxwmError), f"a sound checkpoint is refused: {got}")
        holds(got == truth[sound], "what was read is not what was saved")
    passed = [place for step, place in places.items() if sound is None or step > sound]
    holds(len(told) == len(passed), f"told were {told}, and passed over {passed}")
    holds(all(any(f"{x} is damaged" in text for text in told) for x in passed), f"told: {told}")


def _contents(folder: Path) -> dict[str, bytes | str]:
    """What is in each file; of a manifest, what it says."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    with contextlib.suppress(KeyError, ValueError):
        found[manifest.NAME] = json.dumps(json.loads(found[manifest.NAME]), sort_keys=True)
    return found


def measure(count: int, seed: int, folder: Path, run: Run | None = None) -> dict[str, Any]:
    """Damages so many copies of a run; gives the line of results."""
    if run is None:
        # Five saves, so that the last two have taken rows over from earlier ones.
        config = small(save_every=40)
        train_run(config, folder / "run", quiet=True)
        run = Run(folder / "run", config)
    random, tally, broken = np.random.default_rng(seed), collections.Counter(), []
    old, new = run.steps
    done = 0
    while done < count:
        kind = KINDS[done % len(KINDS)]
        which = [new] if kind is trade else [[new], [old], [old, new]][_draw(random)]
        try:
            outcome = trial(run, folder / "copy", kind, which, random)
        except Exception as error:
            outcome = "broken"
            broken.append(f"{kind.__name__} of {which}: {type(error).__name__}: {error}")
            print(broken[-1], flush=True)
        if outcome != "same":
            tally[outcome] += 1
            done += 1
    return {
        "test": "corrupt",
        "count": count,
        "newest_was_whole": tally["whole"],
        "went_on_from_the_older": tally["older"],
        "refused_in_words": tally["none"],
        "broken": broken,
    }


def _draw(random: Random) -> int:
    """Mostly the newest checkpoint, sometimes the older one or both."""
    return int(random.choice(3, p=[0.7, 0.15, 0.15]))


if __name__ == "__main__":
    command(__doc__, 300, measure)

"""This package beside other implementations of DreamerV3, in one run and on the same work.

    python -m benchmarks.peers --out benchmarks/results/peers.jsonl
    python -m benchmarks.peers --reference ~/dreamerv3 --work update loop
    python -m benchmarks.peers --peers --before ~/jaxwm-before --work update loop

Peers are the packages `sheeprl` (PyTorch) and `dreamerv3` (the authors' of the paper's first
version), and with `--reference` a checkout of the authors' present code. Each gets a virtual
environment of its own, made by this script under `--venvs`, and a process of its own
(`peer_worker.py`). They take turns: one works, the others sleep, and each turn is one update, or
some steps of the whole training loop. One line of JSON holds all times of one kind of work and the
ratios of medians. A peer that cannot be had here is in it too, with the reason in words.

All compute in float32, the others with `--dtype bfloat16` in that. With images this package takes
part a second time, as `jaxwm_strided`, with strided convolutions as the package `dreamerv3` has
them. `--before` adds another checkout of this package, which shows what a change costs or gains.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lines import emit, in_words, machine, number, parser_of
from jaxwm.envs.host import cores

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path("benchmarks") / "peer_worker.py"  # in the checkout that is measured
# What pip is asked for. `dreamerv3` needs releases of its year, and names a gym that no longer
# builds: it is installed without what it names.
REQUIREMENTS = {
    "sheeprl": ["torch==2.13.0 sheeprl==0.8.4"],
    "dreamerv3": [
        "jax==0.4.13 jaxlib==0.4.13 optax==0.1.5 tensorflow-probability==0.20.1 numpy<2 "
        "scipy<1.12 ruamel.yaml<0.18 setuptools<81 cloudpickle rich",
        "--no-deps dreamerv3==1.5.0",
    ],
    "reference": [
        "jax==0.5.0 ninjax>=3.5.1 elements>=3.19.1 granular>=0.20.3 portal>=3.5.0 scope>=0.4.4 "
        "numpy<2 chex einops jaxtyping optax ruamel.yaml gymnasium"
    ],
}


# How this package takes part, and what is set in its environment for it.
OURS = ("jaxwm", "jaxwm_strided")


class Failure(Exception):
    """Why a peer cannot be measured, in words."""


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's virtual environment, which is made if it is not there yet."""
    python, stamp = folder / peer / "bin" / "python", folder / peer / "installed.json"
    wanted = json.dumps(REQUIREMENTS[peer])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"Installing {peer} into {folder / peer}.", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / peer)], check=True)
    for packages in REQUIREMENTS[peer]:
        pip = [str(python), "-m", "pip", "install", "--quiet", *packages.split()]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"pip install {packages}: {_last(done.stderr)}")
    stamp.write_text(wanted)
    return python


def versions(python: Path | str) -> dict[str, str]:
    """Versions of a virtual environment that bear on speed."""
    code = (
        "import importlib.metadata as m, json, platform; names = ('jax', 'jaxlib', 'torch', "
        "'sheeprl', 'dreamerv3', 'ninjax', 'numpy'); have = {d.name: d.version for d in "
        "m.distributions()}; print(json.dumps({'python': platform.python_version()} | "
        "{n: have[n] for n in names if n in have}))"
    )
    done = subprocess.run([str(python), "-P", "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout)


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


class Worker:
    """A process that holds one implementation, and works when told."""

    def __init__(
        self,
        python: Path | str,
        job: dict[str, Any],
        log: Path,
        paths: str,
        environment: Mapping[str, str] = os.environ,
        checkout: Path = ROOT,
    ):
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [str(python), "-P", str(checkout / WORKER), json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**environment, "PYTHONPATH": paths},
                start_new_session=True,
            )

    def hear(self) -> Any:
        """What the process says next.

        Raises:
          Failure: if it ended instead.
        """
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Failure(f"ended with {self.process.returncode}: {_last(self.log.read_text())}")
        return json.loads(line)

    def turn(self) -> float:
        """Seconds of one turn of work."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and the processes of its environments
        self.process.communicate()


def compare(
    names: list[str],
    start: Callable[[str], Worker],
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Each one's `seconds` of so many alternating turns, or its `error`.

    Args:
      names: who takes part; processes are made one after the other.
      start: makes the process of one.
      repeats: turns of each.
    """
    workers: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for name in names:
            try:
                workers[name] = start(name)
                found[name] = workers[name].hear() | {"seconds": []}
            except Failure as failure:
                found[name] = {"error": str(failure)}
        for _ in range(repeats):
            for name, worker in workers.items():
                if "error" not in found[name]:
                    try:
                        found[name]["seconds"].append(worker.turn())
                    except Failure as failure:
                        found[name]["error"] = str(failure)
    finally:
        for worker in workers.values():
            worker.close()
    return found


def summary(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians and best times of all, and how often longer than this package each peer takes."""
    ours = found["jaxwm"]
    for result in found.values():
        if "error" not in result:
            result["median"] = statistics.median(result["seconds"])
            result["best"] = min(result["seconds"])
    for name, result in found.items():
        if name != "jaxwm" and "median" in result and "median" in ours:
            result["ratio"] = result["median"] / ours["median"]
            result["ratio_best"] = result["best"] / ours["best"]
            turns = zip(result["seconds"], ours["seconds"], strict=True)
            result["ratio_of_turns"] = statistics.median(a / b for a, b in turns)
    return found


def _last(text: str) -> str:
    """The last lines of what a process said, on one."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-3:])


def main() -> None:
    parser = parser_of(__doc__)
    peers = ("dreamerv3", "sheeprl")
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers)
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' present code")
    parser.add_argument("--before", type=Path, help="another checkout of this package")
    parser.add_argument("--work", nargs="+", default=["update"], choices=("update", "loop"))
    parser.add_argument("--size", nargs="+", default=["size1m"], help="size1m or size12m")
    parser.add_argument("--obs", nargs="+", default=["vector"], choices=("vector", "image"))
    parser.add_argument("--batch", type=number, default=16)
    parser.add_argument("--length", type=number, default=64)
    parser.add_argument("--envs", type=number, default=16, help="environments of the loop")
    parser.add_argument("--ratio", type=float, default=32, help="train ratio of the loop")
    parser.add_argument("--shards", type=number, help="of this package; one a core by default")
    parser.add_argument("--steps", type=number, default=128, help="environment steps of a turn")
    parser.add_argument("--repeats", type=number, default=10, help="turns of each")
    parser.add_argument("--warmup", type=number, default=2, help="turns before, not counted")
    parser.add_argument("--compile", action="store_true", help="let sheeprl use torch.compile")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the others")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".cache" / "peers")
    args = parser.parse_args()
    shards = range(1, cores() + 1)
    divide = [x for x in shards if args.batch % x == 0 and args.envs % x == 0]
    args.shards = args.shards or max(divide)
    pythons: dict[str, Path | str] = dict.fromkeys(OURS, sys.executable)
    absent: dict[str, dict[str, Any]] = {}
    for peer in [*args.peers, *(["reference"] if args.reference else [])]:
        try:
            pythons[peer] = environment(peer, args.venvs)
        except Failure as failure:
            absent[peer] = {"error": str(failure)}
    if args.before:
        pythons["jaxwm_before"] = sys.executable
    about = {name: versions(python) for name, python in pythons.items()}
    for name, checkout in (("reference", args.reference), ("jaxwm_before", args.before)):
        if checkout:
            about.setdefault(name, {})["commit"] = commit(checkout)
    kinds = [("update", size, obs) for size in args.size for obs in args.obs]
    kinds = kinds * ("update" in args.work)
    kinds += [("loop", size, "vector") for size in args.size] * ("loop" in args.work)
    for work, size, obs in kinds:
        job = {"work": work, "size": size, "obs": obs}
        job |= {x: getattr(args, x) for x in ("batch", "length", "warmup", "compile", "dtype")}
        job |= {x: getattr(args, x) for x in ("envs", "ratio", "steps", "shards")}
        job["path"] = str(args.reference.resolve()) if args.reference else ""
        # The packages have no loop that would be the same work.
        loops = (*OURS, "jaxwm_before", "reference")
        names = [x for x in pythons if work == "update" or x in loops]
        names = [x for x in names if obs == "image" or x != "jaxwm_strided"]
        with tempfile.TemporaryDirectory() as folder:

            def start(name: str, job: dict = job, folder: str = folder) -> Worker:
                log = Path(folder) / f"{name}.log"
                if name == "jaxwm_before":
                    before = args.before.resolve()
                    job = job | {"peer": "jaxwm", "variant": "head"}
                    return Worker(pythons[name], job, log, str(before), checkout=before)
                if name not in OURS:
                    return Worker(pythons[name], job | {"peer": name}, log, "")
                variant = "paper" if name == "jaxwm_strided" else "head"
                job = job | {"peer": "jaxwm", "variant": variant}
                return Worker(pythons[name], job, log, str(ROOT))

            found = summary(compare(names, start, args.repeats)) | absent
        for name, result in found.items():
            result["versions"] = about.get(name, {})
        kept = ("work", "size", "obs", "batch", "length", "shards", "dtype")
        kept += ("envs", "ratio", "steps") if work == "loop" else ()
        line = {name: job[name] for name in kept} | {"peers": found}
        emit(line | machine(), args.out)


if __name__ == "__main__":
    in_words(main)

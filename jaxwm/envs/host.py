"""Environments on the host: simulators that step in worker processes.

A `Pool` holds B simulators, a share of them in each of a few processes. Actions and rows lie in
memory that all processes share; a pipe to each worker carries the word to step and the word that
it is done. `send` returns at once, so the device can learn until `receive`. Rows follow the time
table of `jaxwm.types`.

A simulator that raises, hangs, dies or gives a row that does not fit its spaces costs no more
than its episode: the bad row is dropped, the simulator is made anew, and the next row begins an
episode. In the replay a row with `is_first` then follows one without `is_last`, which sampling
closes (`replay.close_abandoned`): nothing bridges the break and nothing invented is learned.

Why processes: simulators written in Python hold the interpreter's lock, and only a process can
be killed when it hangs, or die alone. They are started afresh rather than forked, because a fork
of a process that runs jax can lock up. Linux and macOS; Windows hands no descriptors on.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxwm.envs.worker import Repeated, views
from jaxwm.types import Box, HostEnv, JaxwmError, Step, as_dict

LOG = logging.getLogger("jaxwm")
# What can go wrong with a simulator.
KINDS = ("raised", "hung", "died", "bad value", "bad shape or type")
# Importing packages and making one simulator may take so much longer than a step.
_START_SECONDS = 60.0
# A worker that fails so often without one good step in between will not come back.
_PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class HostConfig:
    """How simulators on the host are run; environments on the device ignore it.

    Args:
      workers: processes that share the simulators; 0 is one per processor core.
      timeout: seconds that one step of a worker's simulators may take before it counts as hung.
      max_faults: faults after which a run saves its state and stops.
    """

    workers: int = 0
    timeout: float = 60.0
    max_faults: int = 1000

    def __post_init__(self):
        for name in ("workers", "max_faults"):
            if getattr(self, name) < 0:
                raise JaxwmError(f"host.{name} is {getattr(self, name)}; it cannot be negative.")
        if not 0 < self.timeout < math.inf:
            raise JaxwmError(
                f"host.timeout is {self.timeout} seconds; it must be positive, and finite."
            )


class Fault(NamedTuple):
    """One mishap of one simulator."""

    kind: str  # one of KINDS
    index: int  # of the simulator, in 0..B-1
    text: str  # what is known: a traceback, or a sentence


class TooManyFaults(JaxwmError):
    """The simulators fail so often that going on makes no sense."""


class _Worker:
    """One worker process, and the places first..last-1 of the simulators it holds."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.failures = 0
        self.deadline = 0.0
        self.beginning: int | None = None  # the simulator it was last seen to begin with
        self.notes = tempfile.TemporaryFile()  # noqa: SIM115  closed by the pool
        self.pipe: Connection
        self._process: subprocess.Popen | None = None

    def start(self, recipe: bytes, memory: int, count: int, seed: int) -> None:
        """Starts the process and tells it what to do; it answers once it has its first rows."""
        self.pipe, far = Pipe()
        self.notes.seek(0)
        self.notes.truncate()
        fds = (far.fileno(), memory, self.notes.fileno())
        # The workers' own libraries get one thread each: the cores are shared out already.
        quiet = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from jaxwm.envs.worker import main; main()", *map(str, fds)],
            pass_fds=fds,
            env={**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "PYTHONPATH": _search_path()},
        )
        far.close()
        task = {"path": sys.path, "count": count, "first": self.first, "last": self.last}
        # If it died at once, whoever waits for its answer will notice.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(json.dumps({**task, "seed": seed}).encode())
            self.pipe.send_bytes(recipe)

    def say(self, word: str) -> None:
        """Sends a word, which the process will answer."""
        with contextlib.suppress(OSError):  # as above
            self.pipe.send_bytes(word.encode())

    def last_words(self) -> str:
        """How the process ended."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "it hung up"
        try:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            how = f"signal {-code}"
        return f"{how}\n{self._read_notes()}"

    def hung_where(self) -> str:
        """Where the process is, as far as it can still tell."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        return f"it did not answer in time\n{self._read_notes()}"

    def _read_notes(self) -> str:
        self.notes.seek(0)
        return self.notes.read().decode(errors="replace")

    def resident_bytes(self) -> int:
        """Memory of the process; 0 where the system does not tell."""
        return resident_bytes(self._process.pid) if self._process else 0

    def hang_up(self) -> None:
        """Lets the process know that nothing more will come."""
        if self._process is not None:
            self.pipe.close()

    def end(self, gently: bool = True) -> None:
        """Ends the process: by hanging up, or at once."""
        self.hang_up()
        process, self._process = self._process, None
        if process is None:
            return
        if gently:
            try:
                process.wait(timeout=2.0)
                return
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        process.wait()


def _search_path() -> str:
    """Where a worker finds jaxwm itself, before it is told the rest of the path."""
    return os.pathsep.join(path for path in sys.path if path)


class Pool:
    """B simulators in worker processes; use it in a `with` statement, or `close` it.

    `faults` counts what went wrong, by kind, and `examples` holds the first of each; `failure`
    says why it gave up, if it has. Scripts need no `if __name__ == "__main__"` guard, because
    workers do not import the main module.

    Args:
      env: what to simulate.
      count: number of simulators B, at least 1.
      config: workers, timeout and patience.
      seed: determines the first episode of every simulator.

    Raises:
      JaxwmError: if `count` is below 1, or a simulator cannot be made at all.
    """

    def __init__(self, env: HostEnv, count: int, config: HostConfig = HostConfig(), seed: int = 0):
        if count < 1:
            raise JaxwmError(f"A pool needs at least one simulator, but count is {count}.")
        import cloudpickle

        self.env, self.count, self.config = env, count, config
        self.faults: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.failure: str | None = None
        self.examples: dict[str, Fault] = {}
        self._recipe = cloudpickle.dumps(env)
        self._seeds = np.random.SeedSequence(seed)
        self._file, memory = _shared_memory(views(env, count)[1])
        self._views, _ = views(env, count, memory)
        workers = min(config.workers or cores(), count)
        edges = [count * i // workers for i in range(workers + 1)]
        self._workers = [_Worker(a, b) for a, b in itertools.pairwise(edges)]
        self._waiting: set[_Worker] = set()
        self._fresh = True
        try:
            for worker in self._workers:
                self._start(worker)
            self._gather(first=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def reset(self) -> Step:
        """The rows (B,) that begin an episode in every simulator."""
        if not self._fresh:
            for worker in self._workers:
                self._begins(worker)
                worker.say("reset")
            self._gather()
        self._fresh = True
        return self._rows(None)

    def send(self, action: Any) -> None:
        """Lets every simulator take its action, without waiting for them.

        Args:
          action: one array (B, ...), or one per name of the action space. Simulators get boxes
            clipped to [-1, 1], rows carry them as they are.
        """
        self._fresh = False
        spaces = as_dict(self.env.action_space)
        self._action = {name: np.asarray(x) for name, x in as_dict(action).items()}
        for name, value in self._action.items():
            box = isinstance(spaces[name], Box)
            self._views.action[name][:] = np.clip(value, -1.0, 1.0) if box else value
        for worker in self._workers:
            worker.deadline = time.monotonic() + self.config.timeout
            self._waiting.add(worker)
            worker.say("step")

    def receive(self) -> Step:
        """The rows (B,) that the actions led to, in memory of their own.

        Raises:
          TooManyFaults: after `max_faults`, or if a simulator does not come back.
        """
        self._gather()
        return self._rows(self._action)

    def step(self, action: Any) -> Step:
        """`send` and `receive` in one."""
        self.send(action)
        return self.receive()

    def resident_bytes(self) -> int:
        """Memory of all workers together; 0 where the system does not tell."""
        return sum(worker.resident_bytes() for worker in self._workers)

    def close(self) -> None:
        """Ends the workers; the pool cannot be used afterwards."""
        for worker in self._workers:
            worker.hang_up()  # all at once, so that they end side by side
        for worker in self._workers:
            worker.end()
            worker.notes.close()
        if self._workers:
            os.close(self._file)
        self._workers = []

    def _rows(self, action: dict[str, np.ndarray] | None) -> Step:
        now = self._views
        is_first = now.is_first.copy()
        taken = {name: np.zeros_like(x) for name, x in now.action.items()}
        for name, value in (action or {}).items():
            keep = ~is_first.reshape(-1, *(1,) * (value.ndim - 1))
            taken[name] = np.where(keep, value, 0).astype(taken[name].dtype)
        whole = taken if isinstance(self.env.action_space, dict) else taken["action"]
        obs = {name: x.copy() for name, x in now.obs.items()}
        flags = (is_first, now.is_last.copy(), now.is_terminal.copy())
        return Step(whole, obs, now.reward.copy(), *flags)  # type: ignore

    def _start(self, worker: _Worker) -> None:
        (seed,) = self._seeds.spawn(1)
        self._begins(worker)
        worker.start(self._recipe, self._file, self.count, int(seed.generate_state(1)[0]))

    def _begins(self, worker: _Worker) -> None:
        """Notes that it begins with its simulators, from the first one on."""
        self._views.current[worker.first] = 0
        self._waiting.add(worker)
        self._allow(worker, 0)

    def _allow(self, worker: _Worker, simulator: int) -> None:
        """Gives it the time to make a simulator and begin an episode in it."""
        worker.beginning = simulator
        worker.deadline = time.monotonic() + _START_SECONDS + self.config.timeout

    def _is_hung(self, worker: _Worker) -> bool:
        """Whether it is late; one that begins with one simulator after the other is not."""
        if worker.deadline > time.monotonic():
            return False
        current = int(self._views.current[worker.first])
        if worker.beginning is None or worker.beginning == current:
            return True
        self._allow(worker, current)
        return False

    def _gather(self, first: bool = False) -> None:
        """Waits until every worker has put its rows down, and replaces those that fail."""
        while self._waiting:
            left = min(worker.deadline for worker in self._waiting) - time.monotonic()
            ready = wait([worker.pipe for worker in self._waiting], timeout=max(left, 0.0))
            for worker in [w for w in self._waiting if w.pipe in ready]:
                try:
                    answer = json.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError):
                    self._replace(worker, "died", worker.last_words(), first)
                    continue
                if "failed" in answer:
                    self._replace(worker, "raised", answer["failed"], first)
                    continue
                self._waiting.discard(worker)
                worker.failures, worker.beginning = 0, None
                for kind, index, text in answer["faults"]:
                    self._count(Fault(kind, worker.first + index, text))
            for worker in [w for w in self._waiting if self._is_hung(w)]:
                self._replace(worker, "hung", worker.hung_where(), first)

    def _replace(self, worker: _Worker, kind: str, text: str, first: bool) -> None:
        """Counts the fault and starts the worker anew; its other simulators begin again too."""
        index = int(self._views.current[worker.first])
        worker.end(gently=False)
        if first:
            raise JaxwmError(f"{self.env.name} cannot be made; its process {kind}: {text}")
        worker.failures += 1
        others = worker.last - worker.first - 1
        if others:
            text += f"\nThe {others} other simulators of its process begin new episodes too."
        self._count(Fault(kind, index, text), gone=worker.failures >= _PATIENCE)
        self._start(worker)

    def _count(self, fault: Fault, gone: bool = False) -> None:
        self.faults[fault.kind] += 1
        self.examples.setdefault(fault.kind, fault)
        total, most = sum(self.faults.values()), self.config.max_faults
        LOG.warning(
            "%s, environment %d: %s (fault %d, at most %d). Its episode is cut and it is made "
            "anew.\n%s", self.env.name, fault.index, fault.kind, total, most, fault.text.rstrip(),
        )  # fmt: skip
        if total > most or gone:
            counts = ", ".join(f"{kind} {n} times" for kind, n in self.faults.items() if n)
            limit = f"it failed {_PATIENCE} times in a row" if gone else f"the limit is {most}"
            self.failure = (
                f"{self.env.name} has {counts}; {limit}. The last time it was environment "
                f"{fault.index}: {fault.text.strip()[-2000:]}"
            )
            raise TooManyFaults(self.failure)


def limit_and_repeat(env: HostEnv, limit: int = 0, repeat: int = 1) -> HostEnv:
    """The environment with every action taken `repeat` times and episodes cut after `limit`.

    Args:
      env: the environment.
      limit: most steps (of `repeat` each) of an episode; 0 leaves it to the environment.
      repeat: how often each action is taken; rewards are summed, and it stops at an episode's end.

    Raises:
      JaxwmError: if the environment steps many as one, which must be told itself.
    """
    if not limit and repeat == 1:
        return env
    if env.batch is not None:
        raise JaxwmError(
            f"{env.name} steps its simulators as one, so jaxwm cannot repeat actions or cut "
            "episodes inside it. Leave action_repeat at 1 and time_limit at 0, and give its own "
            "options instead."
        )
    return env._replace(open=functools.partial(Repeated, env.open, limit, repeat))


def resident_bytes(process: int | str = "self") -> int:
    """Memory that a process holds; 0 where the system does not tell."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text("utf-8").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # on macOS


def _shared_memory(nbytes: int) -> tuple[int, mmap.mmap]:
    """Memory that can be handed to other processes by its descriptor."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("jaxwm")
    else:  # on macOS
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, nbytes)
    return file, mmap.mmap(file, nbytes)

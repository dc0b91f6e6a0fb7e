"""A run from start to end: train, save, resume, evaluate, and leave pictures and a summary.

A run's folder holds `config.json`, `versions.json`, `metrics.jsonl`, `lock`, `checkpoints/` and,
once it has ended, `curve.png`, `dream.png` (if the agent can draw one) and `SUMMARY.md`.
"""

import contextlib
import dataclasses
import errno
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxwm import backend, train
from jaxwm import config as configs
from jaxwm.config import require
from jaxwm.envs.host import resident_bytes
from jaxwm.evaluate import final
from jaxwm.policy import split_members
from jaxwm.recipes import RunConfig, sweep
from jaxwm.run import checkpoint, divergence, lock, memory, stop
from jaxwm.run.log import FILE, Logger, read_metrics
from jaxwm.run.report import SUMMARY, Summary, write_summary, write_versions
from jaxwm.run.saver import Saver
from jaxwm.train import mesh, processes
from jaxwm.types import HostEnv, JaxwmError, Params

# Seconds of one dispatch: long enough that its overhead costs nothing, and short enough that a run
# answers a signal soon.
_DISPATCH = 2.0


def run(
    config: RunConfig,
    folder: Path | None = None,
    *,
    resume: bool = False,
    accept: bool = False,
    tensorboard: bool = False,
    quiet: bool = False,
) -> Summary:
    """Trains until `config.steps`, then evaluates and writes the summary.

    If several processes train together (`processes.join`), all of them call this, with a folder
    that all of them see. Each evaluates by itself, with the same result; the first one prints and
    writes.

    Args:
      config: the run.
      folder: where it goes; by default `runs/` and a name made of recipe, environment, size and
        seed.
      resume: continue from the newest sound checkpoint in `folder`; from the start if there is
        none.
      accept: continue even if the checkpoint has another configuration.
      tensorboard: write TensorBoard event files too.
      quiet: print nothing.

    Returns:
      The results.

    Raises:
      KeyboardInterrupt, SystemExit: after SIGINT and SIGTERM, once a checkpoint is saved.
      JaxwmError: if the folder is taken or in use, or cannot be resumed; if the configuration does
        not fit the environment or the device; if the environment gives a NaN or an infinity, or
        the training diverges; if the last checkpoint cannot be written. Earlier checkpoints stay as
        they are.
    """
    begun = time.monotonic()
    folder = folder or default_folder(config)
    mesh.use_cores(config)
    processes.check_same(config)
    first = jax.process_index() == 0
    if first:
        lock.check(folder)
    if resume:
        _check_resumable(folder, config, accept)
    else:
        _refuse_used(folder)
    program = train.build(config)
    _check_length(program, config)
    console = _Console(quiet=quiet or not first, highlight=False, markup=False, soft_wrap=True)
    processes.wait("checked")  # before the first process writes into the folder
    with _disk_in_words(folder), lock.hold(folder) if first else contextlib.nullcontext():
        if first and not resume:
            _refuse_used(folder)  # another run may have come and gone
        console.print(_headline(config, program, folder))
        try:
            place = _Place(program, config, folder, accept, console)
            trained = _train(place, resume, tensorboard)
        finally:
            program.close()
        return _conclude(place, trained, begun)


def resume(folder: Path, steps: int | None = None, **options: Any) -> Summary:
    """Continues a run, bit for bit as if it had never stopped.

    Simulators on the host are the exception: they begin new episodes.

    Args:
      folder: the run's folder.
      steps: environment steps per seed to reach, instead of what the run was started with.
      options: `accept`, `tensorboard` and `quiet` of `run`.

    Returns:
      The results. A run that has reached its steps is evaluated once more.

    Raises:
      JaxwmError: as `run` does.
    """
    config = checkpoint.read_config(folder)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    return run(config, folder, resume=True, **options)


def default_folder(config: RunConfig) -> Path:
    """`runs/RECIPE-ENVIRONMENT-SIZE-seedN`, for a run that was given no folder."""
    name = "".join(x if x.isalnum() else "-" for x in config.env.lower()).strip("-")
    words = [config.recipe, name, config.size, f"seed{config.seed}"]
    return Path("runs") / "-".join(filter(None, words))


class _Place(NamedTuple):
    """What stays the same from the start of a run to its end."""

    program: train.Program
    config: RunConfig
    folder: Path
    accept: bool
    console: Console


class _Trained(NamedTuple):
    """What the training leaves behind."""

    params: Params
    stopped: np.ndarray  # (M,), whether a member diverged and stopped learning
    step: int
    updates: int
    compile_seconds: float
    first_update: float  # when it was made, NaN if none was


def _train(place: _Place, resume: bool, tensorboard: bool) -> _Trained:
    """Trains until the last step, and saves the last state."""
    program, config, folder, _, console = place
    start = time.monotonic()
    with memory.in_words():
        chunk = program.compile()
    used = memory.estimate(program, chunk, config)
    memory.ensure_free(used)
    with memory.in_words(used):
        state = _restored(place) if resume else program.init()
        jax.block_until_ready(state)
    compile_seconds = time.monotonic() - start
    console.print(f"Compiled in {compile_seconds:.1f} s. {memory.line(used)}")
    step = _steps(state, config)
    if step:
        console.print(f"Resuming from step {step:,}, after {int(state.clock.updates):,} updates.")
    with (
        memory.in_words(used),
        _logger(place, tensorboard, step if resume else None) as logger,
        Saver(folder, config, console.print, step) as saver,
        stop.asked() as signals,
    ):
        loop = _Loop(place, chunk, state, logger, saver, signals)
        del state  # the loop's alone: a rollback makes room for the checkpoint's
        loop.run()
        saver.wait()
        require(
            not saver.failed,
            f"The run has made its {loop.step:,} steps, but its last checkpoint could not be "
            f"written. Make room on the disk of {folder}, then run `jaxwm resume {folder}`.",
        )
    # Only the parameters stay: the evaluation needs the memory of the replay.
    params, updates = loop.state.agent.params, int(loop.state.clock.updates)
    params = params if program.layout.single else processes.fetch(params)
    return _Trained(params, loop.stopped, loop.step, updates, compile_seconds, loop.first_update)


class _Loop:
    """The training, from line of metrics to line of metrics.

    Args:
      place: the run.
      chunk: its compiled program.
      state: where it starts.
      logger: writes the metrics; None in all processes but the first.
      saver: writes the checkpoints.
      signals: the signals received so far.

    Attributes:
      state: the state of the run; no other reference to it exists between two lines.
      step: environment steps of one seed so far.
      stopped: which members (M,) have stopped learning.
      first_update: when the first update was made, NaN before.
    """

    def __init__(
        self,
        place: _Place,
        chunk: train.Chunk,
        state: train.TrainState,
        logger: Logger | None,
        saver: Saver,
        signals: list[int],
    ):
        self._place, self._chunk, self._logger, self._saver = place, chunk, logger, saver
        self._signals, self._attempts, self.first_update = signals, 0, math.nan
        self.stopped = divergence.stopped(state, place.config)
        for name in itertools.compress(sweep.names(place.config), self.stopped):
            place.console.print(
                f"The training of {name} diverged earlier. It stays as it is; the others continue."
            )
        self._begin(state)
        self._check_rows("at the start")

    def run(self) -> None:
        """Trains until the last step."""
        config, console = self._place.config, self._place.console
        while self.step < config.steps:
            before = self.step
            metrics, asked = self._advance()
            if isinstance(self._place.program.env, HostEnv) and self._fault():
                # Faulty rows never entered this state, so it is worth keeping.
                self._saver.save(self.step, self.state)
            self._check_rows(f"before step {self.step}")
            if config.on_divergence == "rollback" and divergence.refused(self.state).any():
                self._roll_back(metrics)
                continue
            self.stopped = divergence.report_stopped(
                self.state, metrics, self.stopped, config, console
            )
            # Metrics first: resuming drops the lines after the checkpoint, and adds none twice.
            self._log(metrics)
            due = self.step // config.save_every > before // config.save_every
            if due or asked or self.step >= config.steps:
                self._save()
            if asked:
                self._leave(asked)

    def _begin(self, state: train.TrainState) -> None:
        """Starts from a state."""
        self.state, self.step = state, _steps(state, self._place.config)
        self._returns = (0.0, 0.0)  # sum and count since the last checkpoint
        told = self._logger is not None and self._logger.last_step == self.step
        # Whether the last line has reported the sums in the state: the next then starts from zero.
        self._fresh, self._pace = bool(processes.agree(int(told))), math.inf

    def _advance(self) -> tuple[dict[str, Any], int]:
        """Trains until the next line of metrics, a fault of the environments, or a signal.

        Returns:
          The metrics, and the number of the signal or 0.
        """
        program, clock = self._place.program, self.state.clock
        done, updates = int(clock.iteration), int(clock.updates)
        begins = program.rhythm.begins
        while True:
            # Iterations take almost no time before learning begins, so their pace says nothing.
            count = program.iterations - done % program.iterations
            count = min(count, max(1, int(_DISPATCH / self._pace)))
            count = processes.agree(min(count, begins - done) if done < begins else count)
            begun = time.monotonic()
            self.state, metrics = self._chunk(self.state, count, self._fresh)
            metrics = processes.fetch(metrics)
            now, done = time.monotonic(), int(self.state.clock.iteration)
            self.step = _steps(self.state, self._place.config)
            if math.isnan(self.first_update) and int(self.state.clock.updates) > updates:
                self.first_update = now
            self._pace = math.inf if done == begins else max((now - begun) / count, 1e-9)
            self._fresh = done % program.iterations == 0
            asked = processes.most(self._signals[0] if self._signals else 0)
            if self._fresh or asked or self._fault():
                return metrics, asked

    def _log(self, metrics: dict[str, Any]) -> None:
        """Writes a line of metrics, if the state stands at one."""
        if not self._fresh:
            return
        self._returns = _add_returns(self._returns, metrics)
        if self._logger is not None:
            updates, sizes = int(self.state.clock.updates), _sizes(self.step, self._place)
            self._logger.write(self.step, updates, metrics | sizes)

    def _save(self) -> None:
        """Saves the state, if the lines of metrics before it have reached the disk."""
        if not processes.agree(int(self._logger is None or self._logger.flush())):
            self._saver.failed = True
            return
        total, count = self._returns
        self._saver.save(self.step, self.state, total / count if count else math.nan)
        self._attempts, self._returns = 0, (0.0, 0.0)

    def _roll_back(self, metrics: dict[str, Any]) -> None:
        """Goes back to the newest checkpoint, and continues with other random numbers."""
        self._attempts += 1
        config, console = self._place.config, self._place.console
        divergence.report_rollback(self.state, metrics, self._attempts, config, console)
        self._saver.wait()
        del self.state  # makes room for the checkpoint's
        state = _restored(self._place)
        self._begin(divergence.with_other_numbers(state, config, self._attempts))
        self._saver.rewind(self.step)
        if self._logger is not None:
            self._logger.rewind(self.step)

    def _leave(self, asked: int) -> None:
        """Ends as a signal asks, once the state is saved."""
        self._saver.wait()
        folder, failed = self._place.folder, self._saver.failed
        done = "not saved; the run will continue from before." if failed else "saved."
        self._place.console.print(
            f"{stop.name(asked)} at step {self.step:,}: {done} Continue with `jaxwm resume "
            f"{folder}`."
        )
        stop.leave(asked)

    def _fault(self) -> str | None:
        return self._place.program.fault(self.state)

    def _check_rows(self, when: str) -> None:
        """Raises an error if the environments have done something that ends the run."""
        message = self._fault()
        if message:
            raise JaxwmError(f"The run stopped {when}: {message} Earlier checkpoints are kept.")


def _steps(state: train.TrainState, config: RunConfig) -> int:
    """Environment steps of one member so far."""
    return int(state.clock.iteration) * config.envs


def _restored(place: _Place) -> train.TrainState:
    """The state that a run continues from: that of its newest checkpoint, or the first one."""
    program, config, folder, accept, console = place
    if not processes.agree(len(checkpoint.steps(folder))):
        console.print(f"{folder} has no checkpoint yet: the run starts again from its beginning.")
        return program.init()
    state = checkpoint.restore(folder, program.shapes(), config, console.print, accept)
    return program.resume(divergence.forgiven(state, config))


def _add_returns(sums: tuple[float, float], metrics: dict[str, Any]) -> tuple[float, float]:
    """Sum and count of the returns of all members' episodes, after a line of metrics."""
    count = np.asarray(metrics["episode/count"], float)
    total = np.where(count > 0, np.asarray(metrics["episode/return"], float) * count, 0.0)
    return sums[0] + float(total.sum()), sums[1] + float(count.sum())


def _sizes(step: int, place: _Place) -> dict[str, int]:
    """Metrics of sizes: rows in the replay, bytes of the process."""
    capacity = place.program.replay.shapes.rows.is_first.shape[1] * place.config.envs
    return {"replay/size": min(step, capacity), "memory/process": resident_bytes()}


def _logger(
    place: _Place, tensorboard: bool, resume_step: int | None
) -> contextlib.AbstractContextManager[Logger | None]:
    """The run's logger, beside its configuration and versions; only the first process has one."""
    config, folder = place.config, place.folder
    if jax.process_index() > 0:
        return contextlib.nullcontext()
    configs.write(config, folder / checkpoint.CONFIG)
    write_versions(folder)
    settings = sweep.labels(config) if config.sweep else []
    return Logger(
        folder, config.steps, config.seeds, settings, tensorboard, place.console, resume_step
    )


def _conclude(place: _Place, trained: _Trained, begun: float) -> Summary:
    """Evaluates a trained run; the first process also draws its pictures and writes its summary."""
    program, config, folder, _, console = place
    first = jax.process_index() == 0
    env, members = train.make_env(config), split_members(trained.params, config.members)
    done = "Trained." if trained.updates else _why_untrained(program, config)
    console.print(f"{done} Evaluating and drawing.")
    returns = final.evaluate(program.agent_of, env, members, config, config.eval_episodes)
    lines = final.evaluation_lines(returns, config, trained.stopped) if returns.size else []
    for line in lines:
        console.print(line)
    summary = Summary(
        folder=folder,
        steps=trained.step,
        updates=trained.updates,
        returns=returns,
        train_seconds=read_metrics(folder)[-1]["time"] if first else math.nan,
        compile_seconds=trained.compile_seconds,
        first_update_seconds=trained.first_update - begun,
    )
    if not first:
        return summary
    shown = int(np.argmin(trained.stopped))  # the first member that has not diverged
    agent = program.agent_of(sweep.settings(config)[shown // config.seeds])
    pictures = final.draw(folder, agent, env, members[shown], config)
    write_summary(config, summary, lines, pictures, program.replay.nbytes * config.shards)
    console.print(f"The summary is in {folder / SUMMARY}.")
    return summary


def _why_untrained(program: train.Program, config: RunConfig) -> str:
    """Why a run has made no update."""
    rows = program.rhythm.first_update
    if rows is None:
        return "Collected, without any update, as train_ratio is 0."
    needed = rows * config.envs
    return f"Nothing was learned: the first update comes with step {needed:,}. Raise --steps."


def _headline(config: RunConfig, program: train.Program, folder: Path) -> str:
    """Where the run goes and what it will take, before anything is allocated."""
    device, layout = jax.devices()[0], program.layout
    params = program.shapes().agent.params
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    replay = program.replay.nbytes * config.members * config.shards
    seeds = f", {config.seeds} seeds" if config.seeds > 1 else ""
    if config.sweep:
        seeds += f", {config.members // config.seeds} settings"
    shards = f", {config.shards} shards" if config.shards > 1 else ""
    used, there = layout.mesh.size, jax.device_count()
    many = f"{used} of {there} x " if used < there else f"{used} x " if used > 1 else ""
    each = f" ({replay // used:,} in that of each)" if used > 1 else ""
    size = f" {config.size}" if config.size else ""
    return (
        f"{config.recipe}{size} in {config.env}{seeds}{shards} on {many}{device.device_kind} "
        f"({backend.kind()}): {count:,} parameters, a replay of {replay:,} bytes in the memory of "
        f"the {config.replay.place}{each}; the run goes to {folder}"
    )


def _check_length(program: train.Program, config: RunConfig) -> None:
    chunk_steps = program.iterations * config.envs
    require(
        config.steps >= chunk_steps,
        f"The run has {config.steps} steps, fewer than the {chunk_steps} of one compiled chunk "
        f"(log_every, in whole iterations of {config.envs} environments). Raise --steps or lower "
        "--log-every.",
    )


def _refuse_used(folder: Path) -> None:
    require(
        not folder.exists() or folder.is_dir(),
        f"{folder} is a file; a run needs a folder. Give another one with --run.",
    )
    used = [x for x in (checkpoint.CONFIG, FILE, checkpoint.FOLDER) if (folder / x).exists()]
    require(
        not used,
        f"{folder} already holds a run ({', '.join(used)}). Continue it: `jaxwm resume {folder}`. "
        "Or give another folder with --run, or delete this one.",
    )


def _check_resumable(folder: Path, config: RunConfig, accept: bool) -> None:
    checkpoint.read_config(folder)
    checkpoint.refuse_links(folder)
    checkpoint.check_config(folder, config, accept)
    done = max(checkpoint.steps(folder), default=0)
    require(
        config.steps >= done,
        f"{folder} has made {done} steps already, so it cannot be resumed up to {config.steps}. "
        f"Give --steps {done} or more.",
    )


@contextlib.contextmanager
def _disk_in_words(folder: Path) -> Iterator[None]:
    """Says what to do when the disk of a run takes no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise JaxwmError(
            f"The disk of {folder} takes no more ({os.strerror(error.errno)}). Earlier checkpoints "
            f"are kept. Make room, then run `jaxwm resume {folder}`."
        ) from error


class _Console(Console):
    """A console that falls silent when its reader has gone: that ends no run."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()

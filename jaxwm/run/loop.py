"""A run from start to end: train, save, resume, evaluate, and leave pictures and a summary.

A run's folder holds `config.json`, `versions.json`, `metrics.jsonl`, `lock`, `checkpoints/` and,
once it has ended, `curve.png`, `dream.png` and `SUMMARY.md`.
"""

import contextlib
import dataclasses
import errno
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxwm import config as configs
from jaxwm import train
from jaxwm.agent import Agent
from jaxwm.config import require
from jaxwm.envs.host import Pool, resident_bytes
from jaxwm.evaluate import rollout
from jaxwm.policy import apart, trained
from jaxwm.recipes import RunConfig, sweep
from jaxwm.run import checkpoint, lock, memory, stop
from jaxwm.run.log import FILE, Logger, read_metrics
from jaxwm.run.report import SUMMARY, Summary, write_summary, write_versions
from jaxwm.train import mesh
from jaxwm.types import Env, HostEnv, JaxwmError, Key, Params, is_image
from jaxwm.view import plot

# Pictured are at most so many rows, of which the model sees the first few: those of the longest
# first episode among so many environments.
_ROWS, _CONTEXT, _TRIES = 50, 5, 8
# So often a run goes back to the same checkpoint, before it gives up.
_ATTEMPTS = 3


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

    If several processes train together (`mesh.join`), all of them call this, with a folder that all
    of them see. All evaluate, each for itself and with the same result; the first one prints and
    writes.

    Args:
      config: the run.
      folder: where it goes; by default `runs/` and a name made of recipe, environment, size and
        seed.
      resume: go on from the newest sound checkpoint in `folder`; from the start if there is none.
      accept: go on even if the checkpoint was made with another configuration.
      tensorboard: write TensorBoard event files too.
      quiet: print nothing.

    Returns:
      What came of it.

    Raises:
      KeyboardInterrupt, SystemExit: after SIGINT and SIGTERM, once a checkpoint is saved.
      JaxwmError: if the folder is taken or in use, or cannot be resumed; if the configuration does
        not fit the environment or the device; if the environment gives a NaN or an infinity, or
        the training diverges; if the last checkpoint cannot be written. Checkpoints made before
        stay as they are.
    """
    begun = time.monotonic()
    folder = folder or default_folder(config)
    mesh.use_cores(config)
    mesh.check_same(config)
    first = jax.process_index() == 0
    if first:
        lock.check(folder)
    if resume:
        _check_resumable(folder, config, accept)
    else:
        _refuse_used(folder)
    program = train.build(config)
    chunk_steps = program.iterations * config.envs
    require(
        config.steps >= chunk_steps,
        f"The run has {config.steps} steps, fewer than the {chunk_steps} of one compiled chunk "
        f"(log_every, in whole iterations of {config.envs} environments). Raise --steps or lower "
        "--log-every.",
    )
    console = _Console(quiet=quiet or not first, highlight=False, markup=False, soft_wrap=True)
    mesh.wait("checked")  # before the first process writes into the folder
    with _disk_in_words(folder), lock.hold(folder) if first else contextlib.nullcontext():
        if first and not resume:
            _refuse_used(folder)  # another run may have come and gone
        console.print(_headline(config, program, folder))
        try:
            made = _train(program, config, folder, resume, accept, tensorboard, console)
        finally:
            program.close()
        return _conclude(program, config, folder, made, made.first_update - begun, console)


def _conclude(
    program: train.Program,
    config: RunConfig,
    folder: Path,
    made: "_Trained",
    first_update_seconds: float,
    console: Console,
) -> Summary:
    """Evaluates a trained run; the first process also draws its pictures and writes its summary."""
    first = jax.process_index() == 0
    env, members = train.make_env(config), apart(made.params, config.members)
    done = "Trained." if made.updates else _untrained(program, config)
    console.print(f"{done} Evaluating, and drawing curve and dream.")
    returns = evaluate(program.agent_of, env, members, config, config.eval_episodes)
    lines = evaluation_lines(returns, config, made.stopped) if returns.size else []
    for line in lines:
        console.print(line)
    seconds = read_metrics(folder)[-1]["time"] if first else math.nan
    summary = Summary(
        folder,
        made.step,
        made.updates,
        returns,
        seconds,
        made.compile_seconds,
        first_update_seconds,
    )
    if not first:
        return summary
    shown = int(np.argmin(made.stopped))  # the first member that has not diverged
    agent = program.agent_of(sweep.settings(config)[shown // config.seeds])
    pictures = draw(folder, agent, env, members[shown], config)
    write_summary(config, summary, lines, pictures, program.replay.nbytes * config.shards)
    console.print(f"The summary is in {folder / SUMMARY}.")
    return summary


def _untrained(program: train.Program, config: RunConfig) -> str:
    """Why a run has made no update."""
    each = config.replay.updates_per_iteration(config.envs)
    if not each:
        return "Collected, without any update, as train_ratio is 0."
    needed = (program.replay.warmup - 1 + math.ceil(1 / each)) * config.envs
    return f"Nothing was learned: the first update comes with step {needed:,}. Raise --steps."


@contextlib.contextmanager
def _disk_in_words(folder: Path) -> Iterator[None]:
    """Says what to do when the disk of a run takes no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise JaxwmError(
            f"The disk of {folder} takes no more ({os.strerror(error.errno)}). Checkpoints made "
            f"before are kept. Make room, and go on with `jaxwm resume {folder}`."
        ) from error


class _Console(Console):
    """A console that falls silent when whoever read along has gone: that ends no run."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class _Trained(NamedTuple):
    params: Params
    stopped: np.ndarray  # (M,), whether a member diverged and learned no more
    step: int
    updates: int
    compile_seconds: float
    first_update: float  # when it was made, NaN if none was


def _train(
    program: train.Program,
    config: RunConfig,
    folder: Path,
    resume: bool,
    accept: bool,
    tensorboard: bool,
    console: Console,
) -> _Trained:
    start = time.monotonic()
    with memory.in_words():
        chunk = program.compile()
    used = memory.use(program, chunk, config)
    memory.check(used)
    with memory.in_words(used):
        state = _state(program, config, folder, console, accept) if resume else program.init()
        jax.block_until_ready(state)
    compile_seconds = time.monotonic() - start
    _check_rows(program, state, "at the start")
    step, updates = _counts(state, config)
    console.print(f"Compiled in {compile_seconds:.1f} s. {memory.line(used)}")
    if step:
        console.print(f"Going on from step {step:,}, after {updates:,} updates.")
    stopped, attempts, returns = _stopped(state, config), 0, (0.0, 0.0)
    for name in itertools.compress(_names(config), stopped):
        console.print(f"The training of {name} had diverged. It learns no more; the others go on.")
    first_update: list[float] = []
    with (
        memory.in_words(used),
        _logger(folder, config, tensorboard, console, step if resume else None) as logger,
        checkpoint.Saver(folder, config, console.print, step) as saver,
        stop.asked() as signals,
    ):

        def lines_from(state: train.TrainState, step: int) -> Iterator[_Line]:
            told = bool(mesh.agree(int(logger is not None and logger.last_step == step)))
            return _lines(program, chunk, state, told, signals, first_update)

        lines = lines_from(state, step)
        while step < config.steps:
            before = step
            state, metrics, asked = next(lines)
            step, updates = _counts(state, config)
            if isinstance(program.env, HostEnv) and program.fault(state):
                # Faulty rows never entered this state, so it is worth keeping.
                saver.save(step, state)
            _check_rows(program, state, f"before step {step}")
            if config.on_divergence == "rollback" and _refused(state).any():
                attempts += 1
                _tell_attempt(state, metrics, attempts, config, console)
                saver.wait()
                del state, lines  # makes room for the checkpoint's
                state = _state(program, config, folder, console, accept, attempts)
                step, updates = _counts(state, config)
                saver.rewind(step)
                if logger is not None:
                    logger.rewind(step)
                lines, returns = lines_from(state, step), (0.0, 0.0)
                continue
            stopped = _tell_stopped(state, metrics, stopped, config, console)
            # Metrics first: resuming drops the lines after the checkpoint, and adds none twice.
            if step % (program.iterations * config.envs) == 0:
                returns = _add_returns(returns, metrics)
                if logger is not None:
                    logger.write(step, updates, metrics | _sizes(step, config))
            due = step // config.save_every > before // config.save_every
            if due or asked or step >= config.steps:
                if mesh.agree(int(logger is None or logger.flush())):
                    saver.save(step, state, returns[0] / returns[1] if returns[1] else math.nan)
                    attempts, returns = 0, (0.0, 0.0)
                else:
                    saver.failed = True
            if asked:
                saver.wait()
                again = f"Go on with `jaxwm resume {folder}`."
                done = "not saved; the run goes on from before." if saver.failed else "saved."
                console.print(f"{stop.name(asked)} at step {step:,}: {done} {again}")
                stop.leave(asked)
        saver.wait()
        require(
            not saver.failed,
            f"The run has made its {step:,} steps, but its last checkpoint could not be written. "
            f"Make room on the disk of {folder}, and end it with `jaxwm resume {folder}`.",
        )

    # The rest of the state goes: the replay's memory serves the evaluation.
    params = state.agent.params if program.layout.single else mesh.fetch(state.agent.params)
    moment = first_update[0] if first_update else math.nan
    return _Trained(params, stopped, step, updates, compile_seconds, moment)


def _logger(
    folder: Path,
    config: RunConfig,
    tensorboard: bool,
    console: Console,
    resume_step: int | None,
) -> contextlib.AbstractContextManager[Logger | None]:
    """The run's logger, beside its configuration and versions; None but in the first process."""
    if jax.process_index() > 0:
        return contextlib.nullcontext()
    configs.write(config, folder / checkpoint.CONFIG)
    write_versions(folder)
    settings = sweep.labels(config) if config.sweep else []
    return Logger(folder, config.steps, config.seeds, settings, tensorboard, console, resume_step)


def _sizes(step: int, config: RunConfig) -> dict[str, int]:
    """Metrics of what the run holds: rows in the replay, bytes of the process."""
    capacity = config.replay.rows_per_env(config.envs) * config.envs
    return {"replay/size": min(step, capacity), "memory/process": resident_bytes()}


def _state(
    program: train.Program,
    config: RunConfig,
    folder: Path,
    console: Console,
    accept: bool,
    attempt: int = 0,
) -> train.TrainState:
    """The state that a run goes on from, with other random numbers in each further attempt."""
    if mesh.agree(len(checkpoint.steps(folder))):
        like = program.shapes()
        state = checkpoint.restore(folder, like, config, console.print, accept)
        state = program.resume(_pardoned(state, config))
    else:
        console.print(f"{folder} has no checkpoint yet: the run begins again from its start.")
        state = program.init()
    if not attempt:
        return state

    def other(key: Key) -> Key:
        fold = lambda key: jax.random.fold_in(key, _ROLLBACK + attempt)  # noqa: E731
        return fold(key) if config.members == 1 else jax.vmap(fold)(key)

    return state._replace(key=jax.jit(other, out_shardings=state.key.sharding)(state.key))


def _pardoned(state: train.TrainState, config: RunConfig) -> train.TrainState:
    """A restored state, without what it refused while the run still skipped such updates."""
    refused, policy = _refused(state), config.on_divergence
    # Runs that roll back save nothing of the kind, those that abort only of some of their members.
    if policy == "skip" or (policy == "abort" and not refused.all()):
        return state
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state.health)
    return state._replace(health=zeros)


def _add_returns(sums: tuple[float, float], metrics: dict[str, Any]) -> tuple[float, float]:
    """Sum and count of the returns of all members' episodes, after a line of metrics."""
    count = np.asarray(metrics["episode/count"], float)
    total = np.where(count > 0, np.asarray(metrics["episode/return"], float) * count, 0.0)
    return sums[0] + float(total.sum()), sums[1] + float(count.sum())


# A state, its line of metrics, and the signal that was given, or 0.
_Line = tuple[train.TrainState, dict[str, Any], int]
# A dispatch lasts about so many seconds: long enough that asking for it costs nothing, and short
# enough that a run answers soon.
_DISPATCH = 2.0


def _lines(
    program: train.Program,
    chunk: train.Chunk,
    state: train.TrainState,
    told: bool,
    signals: list[int],
    first_update: list[float],
) -> Iterator[_Line]:
    """The state at each line of metrics, with the line; used up by asking for the next.

    It may come before a line, at a fault of the environments, or at a signal, which is given too.
    `told` says whether the last line has reported the sums in the state: the next then starts from
    zero. The time of the first update is appended to `first_update`, if that is empty.
    """
    before = int(state.clock.updates)
    done, warm, pace = int(state.clock.iteration), program.replay.warmup, math.inf
    while True:
        # Iterations cost next to nothing before the first update, and are timed anew from there.
        count = program.iterations - done % program.iterations
        count = min(count, max(1, int(_DISPATCH / pace)))
        count = mesh.agree(min(count, warm - done) if done < warm else count)
        begun = time.monotonic()
        state, metrics = chunk(state, count, told)
        metrics = mesh.fetch(metrics)
        done = int(state.clock.iteration)
        if not first_update and int(state.clock.updates) > before:
            first_update.append(time.monotonic())
        pace = math.inf if done == warm else max((time.monotonic() - begun) / count, 1e-9)
        asked = mesh.most(signals[0] if signals else 0)
        told = done % program.iterations == 0
        if told or asked or program.fault(state):
            yield state, metrics, asked


def resume(folder: Path, steps: int | None = None, **options: Any) -> Summary:
    """Goes on with a run, bit for bit as if it had never stopped.

    Simulators on the host are the exception: they begin new episodes.

    Args:
      folder: the run's folder.
      steps: environment steps per seed to reach, instead of what the run was started with.
      options: `accept`, `tensorboard` and `quiet` of `run`.

    Returns:
      What came of it. A run that has reached its steps is evaluated once more.

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
    return Path("runs") / f"{config.recipe}-{name}-{config.size}-seed{config.seed}"


def evaluate_run(folder: Path, episodes: int, seed: int | None = None) -> np.ndarray:
    """Evaluates the newest checkpoint of a run.

    Args:
      folder: the run's folder.
      episodes: episodes for each of the run's members.
      seed: determines episodes and actions; by default as at the end of the run.

    Returns:
      Returns (members, episodes).

    Raises:
      JaxwmError: if the folder is no run, there is no checkpoint, or `episodes` is below 1.
    """
    require(episodes >= 1, f"An evaluation needs at least one episode, not {episodes}.")
    config = checkpoint.read_config(folder)
    env, members = trained(folder, config)
    return evaluate(train.agents(config, env), env, members, config, episodes, seed)


@memory.in_words(lower="the number of episodes (--eval-episodes; of eval --episodes)")
def evaluate(
    agent_of: Callable[[dict[str, Any]], Agent],
    env: Env | HostEnv,
    members: list[Params],
    config: RunConfig,
    episodes: int,
    seed: int | None = None,
) -> np.ndarray:
    """Returns (members, episodes) of the parameters of each member; see `rollout.evaluate`.

    Args:
      agent_of: the agent with the values of a sweep, see `train.agents`.
      env: a single environment.
      members: the parameters of each member.
      config: the run.
      episodes: episodes for each member; with 0 there are no returns.
      seed: determines episodes and actions; None is the run's.

    Raises:
      JaxwmError: if the environment gives a NaN or an infinity, or fails.
    """
    if episodes == 0:
        return np.zeros((len(members), 0), np.float32)
    key = jax.random.fold_in(jax.random.key(config.seed if seed is None else seed), _EVALUATION)
    keys = [jax.random.fold_in(key, i) for i in range(len(members))]
    settings = sweep.settings(config)
    if isinstance(env, HostEnv):
        with _pool(env, min(episodes, config.envs), config, key) as pool:
            players = [rollout.host_evaluator(agent_of(x), pool, episodes) for x in settings]
            each = [player for player in players for _ in range(config.seeds)]
            return np.stack([play(*x) for play, *x in zip(each, members, keys, strict=True)])

    @jax.jit
    def play(values: dict[str, Any], params: Params, key: Key) -> Any:
        return rollout.evaluate(agent_of(values), params, env, episodes, key)

    each = [values for values in settings for _ in range(config.seeds)]
    returns = np.stack([np.asarray(play(*x)) for x in zip(each, members, keys, strict=True)])
    require(
        bool(np.isfinite(returns).all()),
        f"{env.name} gave a NaN or an infinity in the evaluation. Look for a division by zero or "
        "a diverging simulation. The checkpoints are kept.",
    )
    return returns


def _pool(env: HostEnv, count: int, config: RunConfig, key: Key) -> Pool:
    """Simulators for an evaluation, whose first episodes depend on a key."""
    return Pool(env, count, config.host, int(jax.random.key_data(key)[-1]))


def evaluation_lines(
    returns: np.ndarray, config: RunConfig, stopped: np.ndarray | None = None
) -> list[str]:
    """What is printed of returns (members, episodes): each member's, and the mean of all.

    Args:
      returns: undiscounted sums of rewards.
      config: the run.
      stopped: which members (M,) diverged and learned no more; None if none did.
    """
    lines = []
    if len(returns) > 1:
        which = np.zeros(len(returns), bool) if stopped is None else stopped
        each = zip(_names(config), returns.mean(1), which, strict=True)
        lines = [
            f"evaluation return ({name}): {_decimal(mean)}{' (diverged)' if bad else ''}"
            for name, mean, bad in each
        ]
    return [*lines, f"evaluation return: {_decimal(returns.mean())}"]


def diverged(folder: Path, config: RunConfig) -> np.ndarray:
    """Which members (M,) of a run learned no more at its end, by its metrics if it has any."""
    none = np.zeros(config.members, bool)
    if config.on_divergence != "abort" or not (folder / FILE).exists():
        return none
    last = read_metrics(folder)[-config.members :]
    if len(last) < config.members:
        return none
    return np.array([line.get("updates/refused", 0) > 0 for line in last])


def _names(config: RunConfig) -> list[str]:
    """What people call each member: "learning_rate=1e-05 seed 3"."""
    seeds = [f"seed {config.seed + i % config.seeds}" for i in range(config.members)]
    return [f"{x} {y}".strip() for x, y in zip(sweep.labels(config), seeds, strict=True)]


def draw(
    folder: Path, agent: Agent, env: Env | HostEnv, params: Params, config: RunConfig
) -> dict[str, Path]:
    """The learning curve, if an episode has ended, and a dream, as pictures in the folder."""
    pictures = {}
    if any("episode/return" in line for line in read_metrics(folder)):
        pictures["learning curve"] = plot.learning_curve([folder], folder / "curve.png")
    key = jax.random.fold_in(jax.random.key(config.seed), _DREAM)
    key_collect, key_dream = jax.random.split(key)
    if isinstance(env, HostEnv):
        with _pool(env, min(_TRIES, config.envs), config, key) as pool:
            steps = rollout.host_collect(agent, params, pool, _ROWS, key_collect)
    else:
        collect = lambda params, key: rollout.collect(agent, params, env, _ROWS, key, _TRIES)  # noqa: E731
        steps = jax.jit(collect)(params, key_collect)
    # The sequence whose first episode is longest, up to the end of that episode.
    ends = np.asarray(steps.is_last)
    lengths = np.where(ends.any(0), ends.argmax(0) + 1, _ROWS)
    best = int(lengths.argmax())
    length = int(lengths[best])
    context = min(_CONTEXT, math.ceil(length / 3))
    steps = jax.tree.map(lambda x: x[:length, best : best + 1], steps)
    dream = jax.jit(
        lambda params, steps, key: rollout.open_loop(agent, params, steps, context, key)
    )(params, steps, key_dream)
    seen = {name: np.asarray(x)[:, 0] for name, x in steps.obs.items()}
    dreamed = {name: np.asarray(x)[:, 0] for name, x in dream.items()}
    path = folder / "dream.png"
    images = [name for name, space in env.obs_space.items() if is_image(space)]
    if images:
        name = images[0]
        pictures["dream"] = plot.film_strip(seen[name], dreamed[name], context, path)
    else:
        flat = [{name: x.reshape(length, -1) for name, x in y.items()} for y in (seen, dreamed)]
        pictures["dream"] = plot.traces(flat[0], flat[1], context, path)
    return pictures


# Apart from the keys of the training, which are made of the same seed.
_EVALUATION, _DREAM, _ROLLBACK = 0x45564C, 0x44524D, 0x524F4C


def _decimal(value: float | np.floating) -> str:
    return f"{float(value):.6g}"


def _counts(state: train.TrainState, config: RunConfig) -> tuple[int, int]:
    """Environment steps and updates of one member so far."""
    return int(state.clock.iteration) * config.envs, int(state.clock.updates)


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
    return (
        f"{config.recipe} {config.size} in {config.env}{seeds}{shards} on {many}"
        f"{device.device_kind} ({device.platform}): {count:,} parameters, a replay of {replay:,} "
        f"bytes in the memory of the {config.replay.place}{each}; the run goes to {folder}"
    )


def _refuse_used(folder: Path) -> None:
    require(
        not folder.exists() or folder.is_dir(),
        f"{folder} is a file; a run needs a folder. Give another one with --run.",
    )
    used = [x for x in (checkpoint.CONFIG, FILE, checkpoint.FOLDER) if (folder / x).exists()]
    require(
        not used,
        f"{folder} already holds a run ({', '.join(used)}). Go on with it: `jaxwm resume "
        f"{folder}`. Or give another folder with --run, or delete this one.",
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


def _check_rows(program: train.Program, state: train.TrainState, when: str) -> None:
    """Raises an error if the environments have done something that ends the run."""
    message = program.fault(state)
    if message:
        raise JaxwmError(f"The run was stopped {when}: {message} Checkpoints made before are kept.")


def _refused(state: train.TrainState) -> np.ndarray:
    """Which members (M,) have had an update that was not finite."""
    return np.atleast_1d(mesh.fetch(state.health.refused)) > 0


def _stopped(state: train.TrainState, config: RunConfig) -> np.ndarray:
    """Which members (M,) have diverged and learn no more."""
    return _refused(state) & (config.on_divergence == "abort")


def _diverged(
    state: train.TrainState, metrics: dict[str, Any], which: np.ndarray, config: RunConfig
) -> list[str]:
    """A sentence for each of those members."""
    health = jax.tree.map(np.atleast_1d, mesh.fetch(state.health))
    terms, names = train.watched(metrics), _names(config)
    return [
        f"The training of {names[i]} diverged at update {health.first[i]}: {terms[health.term[i]]} "
        "is NaN or infinite."
        for i in np.flatnonzero(which)
    ]


def _cure(config: RunConfig, how: str) -> str:
    rates = [x.get("agent.optim.learning_rate") for x in sweep.settings(config)]
    swept = [f"{rate:g}" for rate in rates if rate is not None]
    lower = f"--agent.optim.learning-rate (now {config.agent.optim.learning_rate})"
    if swept:
        lower = f"the learning rates of --sweep ({', '.join(dict.fromkeys(swept))})"
    return (
        f"That update was not taken, and checkpoints made before are kept. Lower {lower}, look at "
        f"the scale of the rewards, or {how}."
    )


def _tell_stopped(
    state: train.TrainState,
    metrics: dict[str, Any],
    before: np.ndarray,
    config: RunConfig,
    console: Console,
) -> np.ndarray:
    """Which members have diverged; tells of new ones, and raises an error once all have."""
    stopped = _stopped(state, config)
    told = _diverged(state, metrics, stopped & (stopped.all() | ~before), config)
    if stopped.all():
        cure = _cure(config, "try --on-divergence skip or rollback")
        raise JaxwmError(f"{' '.join(told)} {cure}")
    for text in told:
        console.print(f"{text} It learns no more; the others go on.")
    return stopped


def _tell_attempt(
    state: train.TrainState,
    metrics: dict[str, Any],
    attempt: int,
    config: RunConfig,
    console: Console,
) -> None:
    """Tells why the run goes back to its newest checkpoint, or raises an error after some times."""
    told = " ".join(_diverged(state, metrics, _refused(state), config))
    if attempt > _ATTEMPTS:
        cure = _cure(config, "try --on-divergence skip")
        raise JaxwmError(f"{told} The run had gone back {_ATTEMPTS} times in vain. {cure}")
    console.print(
        f"{told} The run goes back to its newest checkpoint, with other random numbers (attempt "
        f"{attempt} of {_ATTEMPTS})."
    )

"""What a trained agent is worth, and pictures of it: the end of every run, and `jaxwm eval`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxwm import train
from jaxwm.config import require
from jaxwm.envs.host import Pool
from jaxwm.evaluate import rollout
from jaxwm.policy import trained
from jaxwm.recipes import RunConfig, sweep
from jaxwm.run import checkpoint, memory
from jaxwm.run.log import read_metrics
from jaxwm.types import Agent, Env, HostEnv, Key, ObsSpace, Params, Step, is_image
from jaxwm.view import plot

# A picture shows at most this many rows, of which the model sees the first few. They are the
# longest first episode of this many environments.
_ROWS, _CONTEXT, _TRIES = 50, 5, 8
# Separate these random numbers from those of the training, whose key comes from the same seed.
_EVALUATION, _DREAM = 0x45564C, 0x44524D


def evaluate_run(folder: Path, episodes: int, seed: int | None = None) -> np.ndarray:
    """Evaluates the newest checkpoint of a run.

    Args:
      folder: the run's folder.
      episodes: episodes for each of the run's members.
      seed: determines episodes and actions; by default those of the evaluation at the end of the
        run.

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
      episodes: episodes for each member; 0 gives no returns.
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


def evaluation_lines(
    returns: np.ndarray, config: RunConfig, stopped: np.ndarray | None = None
) -> list[str]:
    """The text about returns (members, episodes): the mean of each member, and that of all.

    Args:
      returns: undiscounted sums of rewards.
      config: the run.
      stopped: which members (M,) diverged and stopped learning; None if none did.
    """
    lines = []
    if len(returns) > 1:
        which = np.zeros(len(returns), bool) if stopped is None else stopped
        each = zip(sweep.names(config), returns.mean(1), which, strict=True)
        lines = [
            f"evaluation return ({name}): {mean:.6g}{' (diverged)' if bad else ''}"
            for name, mean, bad in each
        ]
    return [*lines, f"evaluation return: {returns.mean():.6g}"]


def draw(
    folder: Path, agent: Agent, env: Env | HostEnv, params: Params, config: RunConfig
) -> dict[str, Path]:
    """Draws what there is to show into a run's folder.

    These are the learning curve, if an episode has ended, and a dream beside reality, if the agent
    has a model that predicts an observation.

    Args:
      folder: the run's folder.
      agent: the agent.
      env: a single environment.
      params: the agent's parameters.
      config: the run.

    Returns:
      The files, by what they show.
    """
    pictures = {}
    if any("episode/return" in line for line in read_metrics(folder)):
        pictures["learning curve"] = plot.learning_curve([folder], folder / "curve.png")
    if agent.model is not None:
        key = jax.random.fold_in(jax.random.key(config.seed), _DREAM)
        path = folder / "dream.png"
        if _draw_dream(agent, env, params, config, key, path):
            pictures["dream"] = path
    return pictures


def _draw_dream(
    agent: Agent, env: Env | HostEnv, params: Params, config: RunConfig, key: Key, path: Path
) -> bool:
    """Draws a dream beside reality; whether the model predicts anything to draw."""
    key_collect, key_dream = jax.random.split(key)
    steps = _longest_episode(_record(agent, env, params, config, key, key_collect))
    length = len(steps.is_first)
    context = min(_CONTEXT, math.ceil(length / 3))
    dream = jax.jit(rollout.open_loop, static_argnums=(0, 3))(
        agent.model, params["model"], steps, context, key_dream
    )
    if not dream:
        return False
    dreamed = {name: np.asarray(x)[:, 0] for name, x in dream.items()}
    seen = {name: np.asarray(steps.obs[name])[:, 0] for name in dreamed}
    images = _images(env.obs_space, dreamed)
    if images:
        plot.film_strip(seen[images[0]], dreamed[images[0]], context, path)
    else:
        flat = [{name: x.reshape(length, -1) for name, x in y.items()} for y in (seen, dreamed)]
        plot.traces(flat[0], flat[1], context, path)
    return True


def _images(space: ObsSpace, names: dict[str, Any]) -> list[str]:
    return [name for name, part in space.items() if name in names and is_image(part)]


def _record(
    agent: Agent, env: Env | HostEnv, params: Params, config: RunConfig, key: Key, key_collect: Key
) -> Step:
    """Rows (T, B) of some environments under the agent."""
    if isinstance(env, HostEnv):
        with _pool(env, min(_TRIES, config.envs), config, key) as pool:
            return rollout.host_collect(agent, params, pool, _ROWS, key_collect)
    collect = lambda params, key: rollout.collect(agent, params, env, _ROWS, key, _TRIES)  # noqa: E731
    return jax.jit(collect)(params, key_collect)


def _longest_episode(steps: Step) -> Step:
    """The longest of the first episodes of all environments, (T, 1)."""
    ends = np.asarray(steps.is_last)
    lengths = np.where(ends.any(0), ends.argmax(0) + 1, len(ends))
    best = int(lengths.argmax())
    return jax.tree.map(lambda x: x[: int(lengths[best]), best : best + 1], steps)


def _pool(env: HostEnv, count: int, config: RunConfig, key: Key) -> Pool:
    """Simulators for an evaluation, whose first episodes depend on a key."""
    return Pool(env, count, config.host, int(jax.random.key_data(key)[-1]))

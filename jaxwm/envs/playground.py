"""The DeepMind Control Suite as MuJoCo Playground wrote it for accelerators (MJX).

Results are labelled "DMC (MJX)", never "DMC": the tasks and rewards are the suite's, the
simulation is not (Euler steps, few iterations of the solver, capped contacts). In one and the
same state both suites give the same observation and reward to 1e-6. From the same start and
under the same random actions, rewards (in 0..1) were seen to differ by at most

    up to step            1     10     50    200   1000
    CartpoleSwingup    5e-7   8e-6   4e-5   5e-4   1e-2
    WalkerWalk         1e-3   1e-2   8e-2   8e-2   2e-1

What else Playground does in its own way, and the adapter leaves as it is:

- The Humanoid tasks and BallInCup start every episode in one and the same state, and
  PendulumSwingup in one half of the circle.
- The Walker tasks show how upright the torso is where the suite shows its height.
- FishSwim and PendulumSwingup order their entries differently.
- The first row of FingerTurn, FishSwim, Reacher and Swimmer tasks shows the target where the
  model has it by default; later rows show where it is.
- Angles and sensors in a row, and rewards, belong to the state one simulation step before.
"""

import contextlib
import importlib.util
import io
import warnings
from typing import Any

import jax

from jaxwm.envs.wrappers import normalize_action, time_limit
from jaxwm.types import Box, Env, first, nearest, transition

NAMES = (
    "AcrobotSwingup",
    "AcrobotSwingupSparse",
    "BallInCup",
    "CartpoleBalance",
    "CartpoleBalanceSparse",
    "CartpoleSwingup",
    "CartpoleSwingupSparse",
    "CheetahRun",
    "FingerSpin",
    "FingerTurnEasy",
    "FingerTurnHard",
    "FishSwim",
    "HopperHop",
    "HopperStand",
    "HumanoidRun",
    "HumanoidStand",
    "HumanoidWalk",
    "PendulumSwingup",
    "PointMass",
    "ReacherEasy",
    "ReacherHard",
    "SwimmerSwimmer6",
    "WalkerRun",
    "WalkerStand",
    "WalkerWalk",
)
# Of a task's configuration. Its other fields are for Playground's wrappers and for the simulator
# in Warp, which keeps arrays for a batch as a whole: `wrappers.batch` could not reset one of it.
OPTIONS = ("ctrl_dt", "episode_length", "sim_dt")


def names() -> list[str]:
    """The tasks of Playground's control suite (listed here: importing it takes seconds).

    Raises:
      ModuleNotFoundError: if Playground is not installed.
    """
    if importlib.util.find_spec("mujoco_playground") is None:
        raise ModuleNotFoundError("No module named 'mujoco_playground'", name="mujoco_playground")
    return list(NAMES)


def make(name: str, **options: Any) -> Env:
    """A task of the control suite, simulated in jax.

    Args:
      name: Playground's name.
      options: `episode_length`, control steps after which an episode is cut (1000 by default);
        `ctrl_dt` and `sim_dt`, seconds of a control step and of a simulation step.

    Returns:
      A single environment; its observation is "vector", its actions lie in [-1, 1].

    Raises:
      JaxwmError: if the name or an option is unknown.
    """
    if name not in NAMES:
        raise nearest(name, NAMES, "playground environment")
    for option in options:
        if option not in OPTIONS:
            raise nearest(option, OPTIONS, f"option of playground/{name}")
    with _lenient():
        import mujoco
        from mujoco_playground import dm_control_suite as suite

        env, limit = _load(mujoco, suite, name, options)
        adapted = _adapt(f"playground/{name}", env)
    return time_limit(normalize_action(adapted), limit)


def _load(mujoco: Any, suite: Any, name: str, options: dict[str, Any]) -> tuple[Any, int]:
    """Playground's own environment and the length of its episodes."""
    # Reacher compares versions as text, takes 3.17 for older than 3.3 and calls the old name.
    if not hasattr(mujoco.MjSpec, "find_body"):
        mujoco.MjSpec.find_body = lambda spec, name: spec.body(name)
    config = suite.get_default_config(name)
    # MuJoCo would write its warnings about the models to a file in the working directory.
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        env = suite.load(name, config, {"impl": "jax", **options})
    finally:
        mujoco.set_mju_user_warning(handler)
    return env, config.episode_length


def _adapt(name: str, env: Any) -> Env:
    """The `Env` of a Playground environment."""
    low, high = env.mj_model.actuator_ctrlrange.T.tolist()
    action_space = Box((env.action_size,), "float32", tuple(low), tuple(high))

    def reset(key):
        # Raw key data: Playground splits some keys twice, which the key checker forbids.
        with _lenient():
            state = env.reset(jax.random.key_data(key))
        return state, first(action_space, {"vector": state.obs})

    def step(state, action, key):
        del key  # the simulation is deterministic
        with _lenient():
            state = env.step(state, action)
        # `done` only says that the simulation diverged, which is not an end of the task.
        return state, transition(action, {"vector": state.obs}, state.reward, False, state.done > 0)

    space = Box((env.observation_size,))
    return Env(name, {"vector": space}, action_space, reset, step)


@contextlib.contextmanager
def _lenient():
    """Without what Playground and its dependencies print and warn about; any ranks promote."""
    silent = contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings()
    with silent[0], silent[1], jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield

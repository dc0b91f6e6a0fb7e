"""Recipes: papers as configurations. A recipe holds numbers and choices, never maths."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from jaxwm.config import flatten, require
from jaxwm.envs.host import HostConfig
from jaxwm.recipes import sweep
from jaxwm.replay.device import ReplayConfig

# In one program; a mistyped number is no reason to compute for hours.
_MOST_MEMBERS = 4096
# Whole numbers that need not be counted in 32 bits.
_WIDE = {"seed": 2**32 - 1, "steps": 2**53, "replay.capacity": 2**53}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run, but the versions of the software.

    Args:
      env: name of the environment, as `jaxwm envs` lists them.
      recipe: name of the recipe.
      size: name of the size the agent was made from.
      variant: name of the variant, where code and paper differ.
      seed: first seed.
      seeds: number of seeds trained side by side in one program: seed, seed + 1, ...
      sweep: entries of the agent to vary in that program, such as
        `learning_rate=1e-5,4e-5 entropy=1e-4,3e-4`: every combination, each with all seeds.
      on_divergence: after an update that is not finite, and so never taken: "abort" lets its member
        learn no more, and ends the run when that is true of all; "skip" goes on; "rollback" takes
        the whole run back to its newest checkpoint, with other random numbers from there on.
      steps: environment steps per seed, over all its environments.
      envs: environments per seed.
      shards: parts into which environments, replay and batch of each seed are divided; a device
        holds one or more of them. How many devices there are does not change the run.
      shard_params: whether each of the devices that divide a seed's shards holds but a part of
        parameters and optimiser, for sizes that would not fit otherwise.
      action_repeat: times each action is repeated in the environment.
      time_limit: steps after which an episode is cut; 0 leaves it to the environment.
      replay: the replay and the train ratio.
      host: how simulators on the host are run.
      agent: world model, behaviour and optimiser.
      eval_episodes: episodes of the evaluation at the end.
      log_every: environment steps between two lines of metrics.
      save_every: environment steps between two checkpoints.
    """

    env: str
    recipe: str = "dreamer_v3"
    size: str = "size200m"
    variant: str = "head"
    seed: int = 0
    seeds: int = 1
    sweep: tuple[str, ...] = ()
    on_divergence: Literal["abort", "skip", "rollback"] = "abort"
    steps: int = 1_000_000
    envs: int = 16
    shards: int = 1
    shard_params: bool = False
    action_repeat: int = 1
    time_limit: int = 0
    replay: ReplayConfig = ReplayConfig()
    host: HostConfig = HostConfig()
    agent: Any = None
    eval_episodes: int = 20
    log_every: int = 1_000
    save_every: int = 50_000

    def __post_init__(self):
        for path, value in flatten(self).items():
            most = _WIDE[path] if path in _WIDE else 2**31 - 1
            fits = not isinstance(value, int) or value <= most
            require(fits, f"{path} is {value}; it must be at most {most:,}.")
        counts = ("seeds", "steps", "envs", "shards", "action_repeat", "log_every", "save_every")
        for name in counts:
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1.")
        for name in ("seed", "time_limit", "eval_episodes"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it must not be negative.")
        require(
            self.seed + self.seeds <= 2**32,
            f"seed is {self.seed} and seeds is {self.seeds}; the last seed must be below 2^32, "
            "from where on keys repeat.",
        )
        for name, count in (("envs", self.envs), ("replay.batch_size", self.replay.batch_size)):
            require(
                count % self.shards == 0,
                f"{name} is {count}, which cannot be divided into {self.shards} equal shards. Make "
                f"it a multiple of {self.shards}, or give another number of shards.",
            )
        require(
            self.shards > 1 or not self.shard_params,
            "shard_params divides parameters among the devices that hold the shards of a seed, and "
            "there is one shard. Raise --shards, at best to the number of devices.",
        )
        self.replay.rows_per_env(self.envs)
        length = self.replay.batch_length
        most = (2**31 - 1) * min(self.envs, self.shards * length)
        require(
            self.steps <= most,
            f"steps is {self.steps:,}; with {self.envs} environments and windows of {length} rows "
            f"it must be at most {most:,}, for both are counted in 32 bits.",
        )
        earned, price = self.replay.updates_per_iteration(self.envs).as_integer_ratio()
        require(
            earned + price < 2**31,
            f"replay.train_ratio is {self.replay.train_ratio}; with {self.envs} environments the "
            "updates that are due cannot be counted in 32 bits. Round it to fewer decimals.",
        )
        count = math.prod(map(len, sweep.parse(self.sweep, self).values())) * self.seeds
        require(
            count <= _MOST_MEMBERS,
            f"The run has {count:,} members, every setting of the sweep with every seed; train no "
            f"more than {_MOST_MEMBERS:,} side by side.",
        )
        if self.sweep:
            for index in range(0, count, self.seeds):
                sweep.check(self, index)

    @property
    def updates(self) -> int:
        """Updates of each member in the whole run."""
        batch = self.replay.batch_size * self.replay.batch_length
        return int(self.steps * self.replay.train_ratio / batch)

    @property
    def members(self) -> int:
        """What trains side by side in one program: every setting of the sweep with every seed."""
        return len(sweep.settings(self)) * self.seeds


def recipes() -> dict[str, Callable[..., RunConfig]]:
    """Every recipe by name: functions `(env, size, variant, preset) -> RunConfig`."""
    from jaxwm.recipes import dreamer_v3

    return {"dreamer_v3": dreamer_v3.config}

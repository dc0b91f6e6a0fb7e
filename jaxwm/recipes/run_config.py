"""`RunConfig`: everything that determines a run, and the agent that it trains.

The run owns environment, steps, seeds, replay and devices. What belongs to the algorithm is
`RunConfig.agent`, the configuration of a recipe (`jaxwm.recipes`).
"""

import dataclasses
import math
from typing import Any, Literal

from jaxwm import optim
from jaxwm.config import flatten, require
from jaxwm.envs.host import HostConfig
from jaxwm.recipes import find, sweep
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import ALONE, ActionSpace, Agent, ObsSpace, Shards

# Members in one program: a mistyped number should not compute for hours.
_MOST_MEMBERS = 4096
# Whole numbers that may exceed 32 bits.
_WIDE = {"seed": 2**32 - 1, "steps": 2**53, "replay.capacity": 2**53}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run, except the versions of the software.

    Args:
      env: name of the environment, as `jaxwm envs` lists them.
      recipe: name of the recipe.
      size: name of the size that the agent's configuration came from.
      variant: name of the variant that it came from, for recipes with variants.
      seed: first seed.
      seeds: number of seeds to train side by side in one program: seed, seed + 1, ...
      sweep: numbers of the agent to vary in that program, such as
        `learning_rate=1e-5,4e-5 entropy=1e-4,3e-4`: every combination, each with all seeds.
      on_divergence: what follows a NaN or an infinity in a loss or gradient, whose update is never
        taken. "abort" stops the learning of that member, and ends the run once all have stopped;
        "skip" continues; "rollback" takes the whole run back to its newest checkpoint and continues
        with other random numbers.
      steps: environment steps per seed, over all its environments.
      envs: environments per seed.
      shards: parts into which environments, replay and batch of each seed are divided. A device
        holds one or more of them; the number of devices does not change the run.
      shard_params: whether each device holds only a part of parameters and optimiser, for sizes
        that would not fit otherwise. It needs several shards.
      action_repeat: times each action is repeated in the environment.
      time_limit: steps after which an episode is cut; 0 leaves it to the environment.
      replay: size and use of the replay.
      host: how simulators run on the host.
      agent: the recipe's own configuration.
      eval_episodes: episodes of the evaluation at the end.
      log_every: environment steps between two lines of metrics.
      save_every: environment steps between two checkpoints.
    """

    env: str
    recipe: str
    size: str = ""
    variant: str = ""
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
    agent: Any = dataclasses.field(kw_only=True)
    eval_episodes: int = 20
    log_every: int = 1_000
    save_every: int = 50_000

    def __post_init__(self):
        kind, given = find(self.recipe).config, type(self.agent)
        require(
            isinstance(self.agent, kind),
            f"The agent of the recipe {self.recipe} is configured by a {kind.__module__}."
            f"{kind.__qualname__}, not by a {given.__module__}.{given.__qualname__}.",
        )
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

    @staticmethod
    def entry_types(data: dict[str, Any]) -> dict[str, type]:
        """The types of entries that depend on other entries of a table (`config.from_dict`)."""
        return {"agent": find(str(data["recipe"])).config}

    @property
    def updates(self) -> int:
        """Updates that the steps of the whole run earn for each member."""
        replay = self.replay
        trained = max(0, self.steps - replay.prefill) * replay.train_ratio
        return replay.pretrain + int(trained / (replay.batch_size * replay.batch_length))

    @property
    def members(self) -> int:
        """What trains side by side in one program: every setting of the sweep with every seed."""
        return len(sweep.settings(self)) * self.seeds


def agent_of(
    config: RunConfig, obs_space: ObsSpace, action_space: ActionSpace, shards: Shards = ALONE
) -> Agent:
    """The agent of a run, whose schedules last as long as the run does.

    Args:
      config: the run.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if there is no such recipe, or its agent cannot take the spaces.
    """
    agent = optim.resolve(config.agent, config.updates)
    return find(config.recipe).agent(agent, obs_space, action_space, shards)

"""Size and use of the replay, and when a run acts at random and when it learns.

Counts of environment steps are per seed, over all its environments; in one iteration every
environment makes one step. Whole numbers keep every account exact over any number of iterations.
"""

import dataclasses
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from jaxwm.config import at_least, positive, require
from jaxwm.spaces import JaxwmError


class Rhythm(NamedTuple):
    """When a run acts at random and when it learns, in whole iterations and updates.

    Attributes:
      random: the first iterations, which take random actions.
      begins: rows of each environment from which on the run learns.
      every: iterations between two blocks of updates.
      pretrain: additional updates in the first block.
      earned: what each iteration earns, from `begins` on.
      price: what one update costs.
    """

    random: int
    begins: int
    every: int
    pretrain: int
    earned: int
    price: int

    def due(self, written: Any, credit: Any) -> tuple[Any, Any]:
        """The updates to make when an iteration has stored its rows, and the credit that is left.

        Args:
          written: rows of each environment so far, a Python number or an array.
          credit: what the iterations before earned and no update has used.
        """
        credit = (credit + self.earned) * (written >= self.begins)
        block = (written - self.begins) % self.every == 0
        made = credit // self.price * block
        left = credit - made * self.price
        return made + self.pretrain * (written == self.begins), left

    @property
    def most(self) -> int:
        """The largest number of updates in one block, without those of `pretrain`; at least 1."""
        return max(1, -(-self.every * self.earned // self.price))

    @property
    def first_update(self) -> int | None:
        """Rows of each environment at the first update; None if there never is one."""
        if self.pretrain:
            return self.begins
        if not self.earned:
            return None
        rows = -(-self.price // self.earned) - 1  # beyond those at `begins`, which earn too
        return self.begins + -(-rows // self.every) * self.every


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Size and use of the replay.

    Args:
      capacity: rows to keep, over all environments.
      batch_size: windows B per update.
      batch_length: trained rows T per window.
      train_ratio: trained rows per environment step, as a fraction with a denominator of at most
        1000; updates per environment step are then train_ratio / (B * T), kept exactly over a run.
        0 collects and never learns.
      online: whether every new window is trained on once before the uniform ones.
      context_every: rows from one whose memo is stored to the next; windows begin at these rows. A
        larger divisor of `batch_length` saves memory.
      prefill: environment steps with random actions, before anything is learned.
      train_every: environment steps between two blocks of updates, in which all updates earned
        since the last block are made; 0 makes each update as soon as it is earned.
      pretrain: additional updates, made at once when learning begins.
      place: whether the rows lie in the device's memory or, for simulators on the host, in the
        host's, which is often larger. It does not change the run.
    """

    capacity: int = 5_000_000
    batch_size: int = 16
    batch_length: int = 64
    train_ratio: float = 32.0
    online: bool = True
    context_every: int = 1
    prefill: int = 0
    train_every: int = 0
    pretrain: int = 0
    place: Literal["device", "host"] = "device"

    def __post_init__(self):
        positive(self, "capacity", "batch_size", "batch_length", "context_every")
        at_least(self, 0, "prefill", "train_every", "pretrain")
        ratio = self.train_ratio
        require(ratio <= 1e6, f"The replay's train_ratio is {ratio}; it must be at most 1e6.")
        require(
            ratio == 0 or ratio >= 1e-3,
            f"The replay's train_ratio is {ratio}; it must be positive, at least 0.001, or 0 to "
            "collect and never learn.",
        )
        require(
            self.batch_length >= 2,
            "The replay's batch_length is 1; it must be at least 2, for in a window of one row no "
            "step follows to learn from.",
        )
        require(
            self.batch_length % self.context_every == 0,
            f"The replay's context_every is {self.context_every}, which does not divide its "
            f"batch_length of {self.batch_length}. Choose a divisor.",
        )

    def updates_per_iteration(self, envs: int) -> Fraction:
        """Updates that one step of each of `envs` environments earns, as an exact fraction."""
        ratio = Fraction(self.train_ratio).limit_denominator(1000)
        return envs * ratio / (self.batch_size * self.batch_length)

    def rows_per_env(self, envs: int) -> int:
        """Capacity of each of `envs` rings, a multiple of `context_every`.

        Raises:
          JaxwmError: if a window does not fit into a ring.
        """
        rows = self.capacity // envs // self.context_every * self.context_every
        if rows < self.batch_length + 1:
            raise JaxwmError(
                f"A replay of {self.capacity} rows gives each of {envs} environments {rows}, "
                f"fewer than the {self.batch_length + 1} rows of one window (batch_length + 1). "
                "Raise the capacity, or lower batch_length or the number of environments."
            )
        return rows

    def rhythm(self, envs: int, warmup: int) -> Rhythm:
        """When a run of `envs` environments acts at random and when it learns.

        Args:
          envs: environments of a seed.
          warmup: rows of each environment that the replay needs for its windows.

        Raises:
          JaxwmError: if the credit cannot be counted in 32 bits.
        """
        earned, price = self.updates_per_iteration(envs).as_integer_ratio()
        random, every = -(-self.prefill // envs), max(1, -(-self.train_every // envs))
        require(
            every * earned + price < 2**31,
            f"The replay's train_ratio is {self.train_ratio} and its train_every "
            f"{self.train_every}; with {envs} environments the updates that are due cannot be "
            "counted in 32 bits. Round train_ratio to fewer decimals, or lower train_every.",
        )
        pretrain = self.pretrain if earned else 0
        return Rhythm(random, max(random, warmup), every, pretrain, earned, price)

    def check_newest(self, envs: int) -> None:
        """Refuses settings that do not fit an agent which learns from the newest rows.

        Args:
          envs: environments that fill the replay.

        Raises:
          JaxwmError: with the setting and the value that fits.
        """
        rows = self.batch_length + 1
        wanted = {
            "batch_size": (self.batch_size, {envs}, f"{envs}, the number of environments"),
            "train_ratio": (self.train_ratio, {0, 1}, "1, as each row is trained on once"),
            "context_every": (self.context_every, {1}, "1, as the update reads every memo"),
            "prefill": (self.prefill, {0}, "0, as the policy takes every action"),
            "pretrain": (self.pretrain, {0}, "0, as there is one update for each set of rows"),
            "train_every": (self.train_every, {0}, "0, as batch_length says when to learn"),
        }
        for name, (value, fits, words) in wanted.items():
            require(
                value in fits,
                f"The replay's {name} is {value}, but this agent learns from the newest "
                f"{rows} rows of all {envs} environments. Set {name} to {words}.",
            )
        require(
            self.capacity >= envs * rows,
            f"The replay's capacity is {self.capacity}, but this agent learns from the newest "
            f"{rows} rows (batch_length + 1) of all {envs} environments. Set capacity to "
            f"{envs * rows}.",
        )

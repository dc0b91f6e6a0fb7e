"""Real runs in processes of their own, and what they must be like."""

import sys
from pathlib import Path

from jaxwm import train
from jaxwm.recipes import RunConfig
from jaxwm.run import checkpoint
from jaxwm.run.loop import run as train_run
from tests.faults.damage import bits, holds, steady, train_words

CLI = [sys.executable, "-m", "jaxwm.cli"]


class Truth:
    """A run that nothing has happened to.

    Args:
      config: the run.
      folder: where it goes.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.config = config
        train_run(config, folder, quiet=True)
        self._like = train.build(config).shapes()
        self._state, self._lines = self._last(folder), steady(folder)

    def _last(self, run: Path) -> str:
        told = lambda text: holds(False, text)  # noqa: E731
        return bits(checkpoint.restore(run, self._like, self.config, told))

    def compare(self, run: Path) -> None:
        """Holds that another run has come to the same end, in the same way."""
        holds(steady(run) == self._lines, "its metrics are not those of the undisturbed run")
        holds(self._last(run) == self._state, "its state is not that of the undisturbed run")


def words(config: RunConfig, run: Path) -> list[str]:
    """The command that begins a run, or goes on with it if it has begun."""
    begun = (run / checkpoint.CONFIG).exists()
    return ["resume", str(run)] if begun else train_words(config, run)

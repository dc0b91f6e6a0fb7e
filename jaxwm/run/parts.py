"""The parts of a checkpoint: how the state of a run is divided among its folders.

- `params`: the networks, all that acting needs;
- `rest`: optimiser, statistics, environments, counters, keys;
- `memo`: what the replay keeps beside its rows. Training changes it everywhere, so every checkpoint
  has all of it, in blocks;
- `rows-FIRST-STOP`: rows of the replay, counted from the start of the run. Rows never change, so a
  checkpoint takes over those that an earlier one has.
"""

from typing import Any

import jax

from jaxwm.types import Params

PARAMS, REST, MEMO = "params", "rest", "memo"


def without_params(state: Any) -> Any:
    """A `TrainState` without the parameters of its agent."""
    return state._replace(agent=state.agent._replace(params=()))


def with_params(state: Any, params: Params) -> Any:
    """A `TrainState` with other parameters of its agent."""
    return state._replace(agent=state.agent._replace(params=params))


def rest(state: Any) -> Any:
    """A `TrainState` without parameters and replay."""
    return without_params(state)._replace(buffer=())


def ring_axis(state: Any) -> int:
    """The axis along which the replay's arrays hold rows."""
    return state.buffer.rows.is_first.ndim - 1


def blocks(buffer: Any, written: int) -> tuple[int, range]:
    """How the memos of a replay are cut into blocks.

    Args:
      buffer: the replay.
      written: rows written to each ring so far.

    Returns:
      The size of every block, an eighth of a ring, and where the blocks begin that hold anything.
      All have one size, so that a single program copies them; the last may go over the end and
      start again at the front.
    """
    leaves = jax.tree.leaves(buffer.memo)
    if not leaves:
        return 0, range(0)
    axis = buffer.rows.is_first.ndim - 1
    rows, memos = buffer.rows.is_first.shape[axis], leaves[0].shape[axis]
    size = -(-memos // 8)
    return size, range(0, min(memos, -(-written // (rows // memos))), size)


def piece(first: int, stop: int) -> str:
    """The name of the part with the rows from `first` to before `stop`."""
    return f"rows-{first}-{stop}"


def pieces(replay: dict[str, Any]) -> list[list[int]]:
    """First row and end of each such part, from the manifest's entry about the replay."""
    return [[int(first), int(stop)] for first, stop in replay["pieces"]]

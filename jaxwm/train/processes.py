"""Several processes that train together: how they meet, and what they tell each other.

In a single process every function here returns at once.
"""

import json
import re
import sys
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxwm.config import require, to_dict
from jaxwm.types import JaxwmError


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of several that train together; call it before jax is used.

    SLURM, Open MPI, Kubernetes and Cloud TPU say by themselves who takes part; elsewhere every
    process needs all three arguments.

    Args:
      coordinator: "HOST:PORT" of process 0, where all others can reach it.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      JaxwmError: if nothing says who takes part. If the others do not come, jax ends the process.
    """
    port = re.fullmatch(r".+:(\d+)", "any:1" if coordinator is None else coordinator)
    require(
        port is not None and 0 < int(port[1]) < 2**16,
        f"The coordinator is {coordinator!r}; it should be HOST:PORT, the port 1 to 65535.",
    )
    print("Waiting for the other processes, five minutes at most.", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise JaxwmError(
            f"This process cannot join others ({str(error).splitlines()[0]}). Outside of SLURM, "
            "Open MPI, Kubernetes and Cloud TPU give each process --coordinator HOST:PORT, "
            "--processes COUNT and --process NUMBER (from 0)."
        ) from error


def check_same(config: Any) -> None:
    """Refuses to train in processes that were started with different configurations.

    Raises:
      JaxwmError: in every process, with the number of the first that differs from process 0.
    """
    if jax.process_count() == 1:
        return
    whole = json.dumps(to_dict(config), sort_keys=True).encode()
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(whole)))
    other = int(np.argmax(sums != sums[0]))
    require(
        other == 0,
        f"Process {other} was started with other settings than process 0. Start all with the same "
        "command, except for --process.",
    )


def agree(number: int) -> int:
    """What the first process says, whose clock may differ from those of others."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def most(number: int) -> int:
    """The largest of what all processes say, such as a signal that one of them was sent."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def wait(name: str) -> None:
    """Waits until all processes have come to the point `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Whole arrays as numpy, wherever they lie; all processes must ask for the same."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)

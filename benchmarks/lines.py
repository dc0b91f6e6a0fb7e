"""What benchmarks share: the clock, and lines of JSON that name the machine they are from."""

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from jaxwm import __version__


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall time of each of `repeats` calls, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def machine() -> dict[str, Any]:
    """Hardware, its present load, the date, and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "jaxwm": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def emit(line: dict[str, Any], out: Path | None) -> None:
    """Prints a line of JSON, and appends it to a file if there is one."""
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(text + "\n")

"""What benchmarks share: arguments, the clock, and lines of JSON that name their machine."""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from jaxwm import __version__
from jaxwm.types import JaxwmError


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that says what the module with this docstring does, with `--out`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=_file, help="append the lines to this file too")
    return parser


def _file(text: str) -> Path:
    """A file that can be appended to: known before anything is measured."""
    path = Path(text)
    there = next(x for x in (path, *path.absolute().parents) if x.exists())
    if path.is_dir() or (there != path and not there.is_dir()) or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} is no file that can be written")
    return path


def number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def in_words(main: Callable[[], None]) -> None:
    """Runs a benchmark; what it cannot measure is told in words, with exit status 2."""
    try:
        main()
    except (JaxwmError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


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
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "jaxwm": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, with those of its units that bear on speed."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    units = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(text.split())
    return ", ".join([name[1] if name else platform.machine(), *sorted(units)])


def emit(line: dict[str, Any], out: Path | None) -> None:
    """Prints a line of JSON, and appends it to a file if there is one."""
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

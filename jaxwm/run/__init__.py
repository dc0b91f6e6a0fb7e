"""Runs: train, save, resume, evaluate, and what a run leaves on disk.

`jaxwm.run.run` and `jaxwm.run.resume` are the two entry points. They load on first use, because
the command line needs `lock` and `stop` before it imports jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxwm.run.loop import resume, run

__all__ = ["resume", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from jaxwm.run import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'jaxwm.run' has no attribute {name!r}")

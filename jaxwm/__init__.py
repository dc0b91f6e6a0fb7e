"""Train and study world models in JAX.

`import jaxwm` loads nothing: names and submodules arrive when they are first used.

    policy = jaxwm.load("runs/demo")
    action, state = policy.act(obs)
    action, state = policy.act(obs, state)
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxwm.envs import make
    from jaxwm.policy import load
    from jaxwm.recipes import RunConfig

__version__ = "0.2.0.dev0"
__all__ = ["RunConfig", "__version__", "load", "make"]

_HOMES = {"RunConfig": "jaxwm.recipes", "load": "jaxwm.policy", "make": "jaxwm.envs"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"jaxwm.{name}"):
        return importlib.import_module(f"jaxwm.{name}")
    raise AttributeError(f"module 'jaxwm' has no attribute {name!r}")

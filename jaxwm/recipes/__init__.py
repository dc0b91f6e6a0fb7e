"""Recipes: papers as configurations. A recipe holds numbers and choices, never maths.

`RECIPES` is the only list of them. A recipe of your own joins it from Python:

    from jaxwm.recipes import RECIPES, Recipe
    RECIPES["mine"] = Recipe("mine", Config, agent, run, {"small": "what it is for"})

Recipes load on first use, because the command line lists their names before it imports jax.
"""

import importlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxwm.spaces import nearest

if TYPE_CHECKING:
    from jaxwm.recipes.run_config import RunConfig, agent_of


class Recipe(NamedTuple):
    """One system of the field.

    Attributes:
      name: its key in `RECIPES`.
      config: its configuration, a frozen dataclass whose defaults are the paper's.
      agent: `config, obs_space, action_space, shards=ALONE -> Agent`.
      run: `env, size, variant, preset -> RunConfig`, each a name or None.
      presets: what each preset is for, by name.
    """

    name: str
    config: type
    agent: Callable[..., Any]
    run: Callable[..., Any]
    presets: dict[str, str]


class _Recipes(MutableMapping[str, Recipe]):
    """Recipes by name; those of the library are modules whose `RECIPE` loads on first use."""

    def __init__(self, *names: str):
        self._recipes: dict[str, Recipe | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Recipe:
        recipe = self._recipes[name]
        if recipe is None:
            recipe = importlib.import_module(f"jaxwm.recipes.{name}").RECIPE
            self._recipes[name] = recipe
        return recipe

    def __setitem__(self, name: str, recipe: Recipe) -> None:
        self._recipes[name] = recipe

    def __delitem__(self, name: str) -> None:
        del self._recipes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)


RECIPES = _Recipes("dreamer_v3", "dreamer_v2", "dreamer_v1", "planet", "ppo")


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      JaxwmError: if there is none, with the nearest names.
    """
    if name not in RECIPES:
        raise nearest(name, RECIPES, "recipe")
    return RECIPES[name]


__all__ = ["RECIPES", "Recipe", "RunConfig", "agent_of", "find"]


def __getattr__(name: str) -> Any:
    if name in ("RunConfig", "agent_of"):
        return getattr(importlib.import_module("jaxwm.recipes.run_config"), name)
    raise AttributeError(f"module 'jaxwm.recipes' has no attribute {name!r}")

"""The list of recipes: what stands in it, and how a recipe of one's own joins it."""

import dataclasses
import subprocess
import sys

import pytest

from jaxwm import config as configs
from jaxwm.recipes import RECIPES, Recipe, RunConfig, agent_of, dreamer_v3, find, run_config
from jaxwm.types import Box, Discrete, JaxwmError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_keeps_its_word(name):
    recipe = RECIPES[name]
    assert recipe.name == name and dataclasses.is_dataclass(recipe.config)
    run = recipe.run("toy/Memory", "debug", None, None)
    assert (run.env, run.recipe, run.size) == ("toy/Memory", name, "debug")
    assert isinstance(run.agent, recipe.config)
    for preset, about in recipe.presets.items():
        assert recipe.run(None, None, None, preset).recipe == name and about
    assert configs.from_dict(RunConfig, configs.to_dict(run)) == run


def test_names_are_listed_without_jax():
    code = "import sys; from jaxwm.recipes import RECIPES; print(*RECIPES, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*RECIPES, "False"]


def test_a_recipe_that_does_not_exist_is_told():
    with pytest.raises(JaxwmError, match=r"no recipe called 'dreamer_v9'. Did you mean dreamer_v"):
        find("dreamer_v9")
    data = configs.to_dict(dreamer_v3.config("toy/Memory", "debug"))
    with pytest.raises(JaxwmError, match="no recipe called 'dreamer_v9'"):
        configs.from_dict(RunConfig, data | {"recipe": "dreamer_v9"})
    assert "dreamer_v9" not in RECIPES and RECIPES.get("dreamer_v9") is None


@dataclasses.dataclass(frozen=True)
class Mine:
    """The configuration of a recipe of one's own."""

    rate: float = 0.1
    units: int = 3


def test_a_recipe_of_ones_own_joins_from_python(monkeypatch):
    """Its configuration is what JSON is read as, and its agent the one that a run builds."""
    recipe = Recipe(
        "mine",
        Mine,
        lambda config, obs_space, action_space, shards: ("agent", config, action_space),
        lambda env, size, variant, preset: RunConfig(env, "mine", agent=Mine()),
        {},
    )
    monkeypatch.setitem(RECIPES, "mine", recipe)
    run = find("mine").run("toy/Memory", None, None, None)
    run = dataclasses.replace(run, sweep=("rate=0.1,0.2",))
    assert run.members == 2
    assert configs.from_dict(RunConfig, configs.to_dict(run)) == run
    data = configs.to_dict(run)
    with pytest.raises(JaxwmError, match=r"agent\.unit'. Did you mean agent\.units"):
        configs.from_dict(RunConfig, data | {"agent": {"rate": 1.0, "unit": 3}})
    monkeypatch.undo()
    assert "mine" not in RECIPES


def test_the_agent_of_another_recipe_is_refused():
    with pytest.raises(JaxwmError, match=r"recipe dreamer_v3 is configured by a .*Config, not by"):
        RunConfig("toy/Memory", "dreamer_v3", agent=Mine())


def test_an_agent_is_built_for_the_length_of_its_run(monkeypatch):
    seen = []

    def agent(config, *others):
        seen.append(config.optim.learning_rate)
        return dreamer_v3.agent(config, *others)

    monkeypatch.setitem(RECIPES, "dreamer_v3", dreamer_v3.RECIPE._replace(agent=agent))
    run = dreamer_v3.config(size="debug", preset="cartpole", env="toy/Memory")
    for steps in (16_000, 32_000):
        longer = dataclasses.replace(run, steps=steps)
        assert agent_of(longer, {"x": Box((3,))}, Discrete(2)).model is not None
        assert run_config.agent_of is agent_of
    # 16,000 steps * 64 / (4 * 32) are 8,000 updates.
    assert [rate.updates for rate in seen] == [8_000, 16_000]
    assert run.agent.optim.learning_rate.updates == 0

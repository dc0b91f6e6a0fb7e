"""Presets of Dreamer V1 and V2: those for two cores change numbers, those of the papers none."""

import pytest

from jaxwm.optim import Schedule
from jaxwm.recipes import dreamer_v1, dreamer_v2


@pytest.mark.parametrize(
    "recipe,preset",
    [(dreamer_v1, "dmc"), (dreamer_v2, "atari"), (dreamer_v2, "dmc_vision")],
)
def test_presets_of_the_papers_have_the_numbers_of_their_size(recipe, preset):
    run = recipe.config(preset=preset)
    assert run.agent == recipe.sized(run.size)


def test_presets_for_two_cores_change_what_they_say():
    catch = dreamer_v2.config(preset="catch").agent
    assert (catch.behavior.imagine, catch.behavior.entropy, catch.weights.rec) == (9, 3e-2, 5.0)
    assert catch.policy_optim == dreamer_v2.sized("nano").policy_optim
    pole = dreamer_v2.config(preset="cartpole").agent
    for name in ("model_optim", "policy_optim", "value_optim"):
        rate = getattr(dreamer_v2.sized("nano"), name).learning_rate
        assert getattr(pole, name).learning_rate == Schedule(rate, 0.1 * rate)


def test_small_dreams_stay_small_with_any_preset():
    run = dreamer_v2.config(preset="catch", size="debug")
    assert run.agent.behavior.imagine == dreamer_v2.sized("debug").behavior.imagine

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


def test_presets_of_dreamer_v1_for_two_cores_change_what_they_say():
    nano, reach = dreamer_v1.sized("nano"), dreamer_v1.config(preset="reach").agent
    assert (reach.model.discount, reach.behavior.imagine, reach.weights.kl) == (0.8, 6, 0.1)
    assert reach.model.core == nano.model.core and not reach.model.predict_ends
    assert reach.value_optim.learning_rate == Schedule(1e-3, 1e-4)
    assert dreamer_v1.config(preset="inverted_pendulum").agent.model.predict_ends


def test_small_dreams_stay_small_with_any_preset():
    for recipe, preset in (dreamer_v1, "reach"), (dreamer_v2, "catch"):
        run = recipe.config(preset=preset, size="debug")
        assert run.agent.behavior.imagine == recipe.sized("debug").behavior.imagine

"""Curiosity for any behaviour that dreams: predicted rewards get a bonus where states are new.

    novelty(s) = mean((predictor(s) - target(s))^2)

The target is a fixed random network, which the predictor learns to imitate on replayed states
(random network distillation, arXiv:1810.12894).
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm.agent import joint
from jaxwm.models.heads import Style, head
from jaxwm.optim import laprop, value_at
from jaxwm.recipes import RECIPES, Recipe, dreamer_v3
from jaxwm.run import run
from jaxwm.types import ALONE, Behavior

sg = jax.lax.stop_gradient


class Bonus(NamedTuple):
    """The reward's distribution, as far as the actor-critic reads it."""

    reward: Any
    bonus: jax.Array

    def mean(self):
        return self.reward.mean() + self.bonus


def curious(inner, feature_size, scale):
    """A behaviour like `inner`, for which new states are worth more."""
    net = head(feature_size, 32, 1, 8, Style())
    target = net.init(jax.random.key(0))

    def novelty(params, features):
        error = net.apply(params["novelty"], features) - net.apply(target, features)
        return jnp.mean(jnp.square(error), -1)

    def init(key):
        key_inner, key_net = jax.random.split(key)
        return {"inner": inner.init(key_inner), "novelty": net.init(key_net)}

    def act(params, *given):
        return inner.act(params["inner"], *given)

    def loss(params, state, dreamer, observed, steps, draws):
        features = dreamer.features(observed.latents)
        bonus = lambda features: scale * sg(novelty(params, features))

        def predict(latents, keys=None):
            found = dreamer.predict(latents, keys)
            if "reward" in found:
                found["reward"] = Bonus(found["reward"], bonus(dreamer.features(latents)))
            return found

        losses, state, metrics = inner.loss(
            params["inner"],
            state,
            dreamer._replace(predict=predict),
            observed,
            steps._replace(reward=steps.reward + bonus(features)),
            draws,
        )
        new = novelty(params, sg(features))
        return losses | {"novelty": new}, state, metrics | {"novelty": new.mean()}

    return Behavior(
        init=init,
        initial=lambda params: inner.initial(params["inner"]),
        carry=inner.carry,
        draws=inner.draws,
        act=act,
        loss=loss,
        after=lambda state, params: inner.after(state, params["inner"]),
    )


def curious_agent(config, obs_space, action_space, shards=ALONE):
    plain = dreamer_v3.agent(config, obs_space, action_space, shards)
    latent = config.model.latent
    features = config.model.core.deter + latent.stoch * latent.classes
    behavior = curious(plain.behavior, features, scale=0.1)

    def weight(name, updates):
        return 1.0 if name == "novelty" else value_at(config.weights.of(name), updates)

    return joint(plain.model, behavior, weight, laprop(**vars(config.optim)), shards)


def curious_run(env=None, size=None, variant=None, preset=None):
    config = dreamer_v3.config(env, size, variant, preset)
    return dataclasses.replace(config, recipe="dreamer_v3_curious")


RECIPES["dreamer_v3_curious"] = Recipe(
    "dreamer_v3_curious", dreamer_v3.Config, curious_agent, curious_run, dreamer_v3.PRESETS
)

if __name__ == "__main__":
    config = curious_run("toy/Credit", size="debug", preset="cartpole")
    run(dataclasses.replace(config, steps=800), Path("runs/curious"))

"""Toy environments are solved to their known optimum, from scratch, by the whole program.

`make test-learning` appends each result to the file that the environment variable LEARNING_RESULTS
names.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.lines import emit, machine
from jaxwm import envs, train
from jaxwm.behaviors.actor_critic import ActorCriticConfig, critic
from jaxwm.envs.toy import OPTIMUM, optimal_value
from jaxwm.evaluate.rollout import collect, evaluate
from jaxwm.models.encoders import CodecConfig
from jaxwm.models.gru import BlockGRUConfig
from jaxwm.models.latents import LatentConfig
from jaxwm.optim import OptimConfig, Schedule
from jaxwm.recipes import RunConfig
from jaxwm.recipes.dreamer_v3 import Config, LossWeights, ModelConfig
from jaxwm.replay.config import ReplayConfig

pytestmark = pytest.mark.slow

HORIZON = 20
# Expected return of the uniformly random policy. Observe and Mixed: half of 4. Credit: 1/2.
# Dials: 3 (1/3 + 1/2 + 1/3 + 1/4 + 1/2). Reach and Pixels: from 512 episodes of each.
RANDOM = {
    "Observe": 2.0,
    "Memory": 0.0,
    "Credit": 0.5,
    "Reach": -8.4,
    "Pixels": -0.8,
    "Dials": 5.75,
    "Mixed": 2.0,
}


def config(name: str, updates: int) -> RunConfig:
    """A few thousand parameters and milliseconds per update; the recipe's numbers otherwise."""
    core = BlockGRUConfig(deter=32, hidden=32, blocks=4)
    latent = LatentConfig(stoch=4, classes=4)
    codec = CodecConfig(units=32, layers=1, depth=4, blocks=4)
    behavior = ActorCriticConfig(units=32, layers=1, bins=41, imagine=8, horizon=HORIZON)
    # Small observations and rare rewards count little against the KL of a latent, which starts
    # at a nat: let them count more.
    weights = LossWeights(rec=5.0)
    rate, ratio = 2e-3, 32
    if name == "Memory":
        # Only the reward tells that the cue is worth keeping, and only together with the action.
        core, latent = dataclasses.replace(core, deter=64, hidden=64), LatentConfig(2, 4)
        behavior = dataclasses.replace(behavior, imagine=4, entropy=1e-2, unimix=0.01)
        weights = LossWeights(rec=5.0, reward=100.0)
    if name == "Reach":
        # Close to the optimum a policy that keeps moving is as often short of it.
        weights, rate = LossWeights(rec=5.0, reward=20.0), Schedule(4e-3, 4e-4)
    if name == "Dials":
        latent = LatentConfig(8, 8)
        behavior = dataclasses.replace(behavior, imagine=3, entropy=1e-2)
        weights, rate = LossWeights(rec=20.0, reward=20.0), 4e-3
    if name == "Mixed":
        # Three senses are worth most together: with little entropy some seeds long heed two.
        latent, behavior = LatentConfig(8, 8), dataclasses.replace(behavior, entropy=1e-2)
    if name == "Pixels":
        # Only chance catches a ball at the far edge, before the policy is sure of other things:
        # with four times the updates for a step some seeds never saw it caught.
        latent, ratio = LatentConfig(8, 8), 8
        behavior = dataclasses.replace(behavior, imagine=6, entropy=2e-2)
        weights, rate = LossWeights(rec=2000.0, reward=20.0), 3e-3
    model = ModelConfig(core, latent, codec, units=32, bins=41, horizon=HORIZON)
    optim = OptimConfig(rate, warmup_steps=50)
    agent = Config(model, behavior, weights, optim)
    replay = ReplayConfig(capacity=20_000, batch_size=8, batch_length=16, train_ratio=ratio)
    steps = updates * 128 // ratio
    return RunConfig(f"toy/{name}", "dreamer_v3", agent=agent, envs=8, replay=replay, steps=steps)


def learn(
    name: str, updates: int, solved: Callable[[Any, Any], bool], **options: int
) -> tuple[train.Program, train.TrainState]:
    """Trains for at most so many updates, until two looks in a row find the task solved."""
    run = config(name, updates)
    env = envs.make(run.env, **options)
    program = train.build(run, iterations=run.steps // run.envs // 10, single=env)
    state, before, now = program.init(), False, False
    while int(state.clock.updates) < updates and not (before and now):
        state, _ = program.chunk(state)
        before, now = now, solved(program.agent, state.agent.params)
    return program, state


@pytest.mark.parametrize(
    ("name", "updates", "options"),
    [
        ("Observe", 800, {}),
        ("Memory", 4000, {}),
        ("Credit", 1600, {}),
        ("Reach", 7000, {}),
        ("Pixels", 4000, {"cell": 1}),
        ("Dials", 4000, {}),
        ("Mixed", 2400, {"cell": 1}),
    ],
)
def test_reaches_the_optimum(name, updates, options):
    env = envs.make(f"toy/{name}", **options)
    optimum = OPTIMUM[f"toy/{name}"]
    play = None

    def share(agent, params, seed):
        """How much of the way from the random policy to the optimum is made."""
        nonlocal play
        play = play or jax.jit(lambda params, key: evaluate(agent, params, env, 256, key).mean())
        gained = float(play(params, jax.random.key(seed))) - RANDOM[name]
        return gained / (optimum - RANDOM[name])

    # Learning ends at more than is asked: other episodes, and rounding of another kind of
    # processor, move a return by one or two hundredths.
    program, state = learn(name, updates, lambda *learned: share(*learned, 1) >= 0.925, **options)
    reached = share(program.agent, state.agent.params, 2)
    report(env=f"toy/{name}", optimum=optimum, share_of_optimum=reached, state=state)
    assert reached >= 0.9


def report(state, **found):
    """Appends a result to the file of results, if there is one."""
    out = os.environ.get("LEARNING_RESULTS")
    line = {"test": "learning", **found, "updates": int(state.clock.updates)}
    emit(line | machine(), Path(out) if out else None)


@pytest.mark.parametrize(("name", "updates"), [("Prediction", 600), ("Discount", 600)])
def test_values_are_the_discounted_sums(name, updates):
    program, state = learn(name, updates, lambda *learned: False)
    agent, params = program.agent, state.agent.params
    env = envs.make(f"toy/{name}")
    length = 8 if name == "Prediction" else 5
    steps = collect(agent, params, env, length, jax.random.key(1))
    model = agent.model
    draws = model.draws(jax.random.key(2), (length, 1))
    observed = model.observe(params["model"], model.initial(1), steps, draws)
    features = model.features(observed.latents)
    net = critic(config(name, updates).agent.behavior, features.shape[-1])
    values = np.asarray(net.apply(params["behavior"]["value"], features).mean())[:, 0]
    discount = 1 - 1 / HORIZON
    wanted = [optimal_value(f"toy/{name}", elapsed, discount) for elapsed in range(length)]
    report(env=f"toy/{name}", values=values.tolist(), wanted=wanted, state=state)
    np.testing.assert_allclose(values, wanted, rtol=0.1, atol=0.1)

"""Dreamer V1's actor-critic: targets by hand, where gradients go, and actions of every kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxwm.behaviors.actor_critic_v1 import (
    ActorCriticV1Config,
    Values,
    actor_critic_v1,
    returns_of,
    weights_of,
)
from jaxwm.models.imagine import dreamer
from jaxwm.types import Box, Discrete, JaxwmError
from tests.behaviors import line
from tests.behaviors.line import B, T

H = 3
NUMBER, CHOICE = Box((1,), low=-1.0, high=1.0), Discrete(2)
CONFIG = ActorCriticV1Config(units=8, policy_layers=1, value_layers=1, imagine=H)


def column(*x):
    return jnp.array(x)[:, None]


def test_returns_and_weights_by_hand():
    values = Values(column(1.0, 2.0, 99.0), column(0.5, 0.8, 99.0), column(7.0, 4.0, 10.0))
    # R_2 = r_2 + d_2 v_3 = 2 + 0.8 * 10;  R_1 = r_1 + d_1 (0.5 v_2 + 0.5 R_2) = 1 + 0.5 * 7
    np.testing.assert_allclose(returns_of(values, 0.5), column(4.5, 10.0), rtol=1e-6)
    np.testing.assert_allclose(weights_of(values.discount), column(1.0, 0.5), rtol=1e-6)
    slope = jax.grad(lambda d: weights_of(d).sum())(values.discount)
    np.testing.assert_array_equal(slope, 0.0)


def setup(space=NUMBER, ends=False, config=CONFIG):
    model = line.world(space, ends)
    behavior = actor_critic_v1(config, space, model, 2, 0.9)
    return model, behavior, behavior.init(jax.random.key(0))


def losses(space=NUMBER, ends=False, stored=True):
    """A function of behaviour and model parameters, and both."""
    model, behavior, params = setup(space, ends)
    draws = behavior.draws(jax.random.key(1), (T, B))

    def run(params, world):
        args = dreamer(model, world), line.seen(stored), line.rows(space), draws
        return behavior.loss(params, (), *args)[0]

    return run, params, model.init(jax.random.key(0))


@pytest.mark.parametrize("space", [NUMBER, CHOICE])
def test_losses_teach_their_own_networks_alone(space):
    run, params, world = losses(space)
    for name, other in (("policy", "value"), ("value", "policy")):
        loss = lambda *x, n=name: run(*x)[n].mean()  # noqa: E731
        own, model = jax.jit(jax.grad(loss, (0, 1)))(params, world)
        assert max(jnp.abs(x).max() for x in jax.tree.leaves(own[name])) > 0
        assert all((x == 0).all() for x in jax.tree.leaves((own[other], model)))


def test_the_policy_follows_the_return_through_the_dream():
    # The critic is 0, so a_1 changes R_1 = r_1 + d l r_2 by 1 + 0.9 * 0.95 and R_2 by 1, and a_2
    # changes R_1 by 0.9 * 0.95 and R_2 by 1. Where the noise is 0, da/dmean = 1 - tanh(0)^2 = 1.
    model, behavior, params = setup()
    params = jax.tree.map(jnp.zeros_like, params)
    draws = jax.tree.map(jnp.zeros_like, behavior.draws(jax.random.key(1), (T, B)))
    fixed = dreamer(model, model.init(jax.random.key(0)))

    def loss(bias):
        moved = {
            **params["policy"],
            "action_mean": {**params["policy"]["action_mean"], "bias": bias},
        }
        args = fixed, line.seen(), line.rows(NUMBER), draws
        return behavior.loss({**params, "policy": moved}, (), *args)[0]["policy"].mean()

    # Each of the two returns counts half, the second with the weight 0.9.
    expected = -0.5 * ((1 + 2 * 0.9 * 0.95) + 0.9 * 2)
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(1)), [expected], rtol=1e-5)


@pytest.mark.parametrize(("ends", "count"), [(False, T * B), (True, (T - 1) * B)])
def test_no_dream_starts_from_the_last_row_if_episodes_may_end(ends, count):
    run, params, world = losses(ends=ends)
    assert {x.shape for x in run(params, world).values()} == {(count,)}


def test_a_model_without_ends_has_the_same_discount_everywhere():
    plain, params, world = losses()
    predicted = losses(ends=True)[0](params, world)
    for name, loss in plain(params, world).items():
        np.testing.assert_allclose(loss[: (T - 1) * B], predicted[name], rtol=1e-5)


@pytest.mark.parametrize("ends", [False, True])
def test_models_that_keep_only_the_last_memory_dream_from_there(ends):
    run, params, world = losses(ends=ends, stored=False)
    assert {x.shape for x in run(params, world).values()} == {(B,)}


SPACES = {
    "number": Box((2,), low=-1.0, high=1.0),
    "choice": Discrete(3),
    "mixed": {"turn": Discrete((3, 2), shape=(2,)), "push": Box((2, 2), low=-1.0, high=1.0)},
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("mode", ["explore", "sample", "greedy"])
def test_actions_are_those_of_the_space(name, mode):
    space, model = SPACES[name], line.world(NUMBER)
    behavior = actor_critic_v1(CONFIG, space, model, 2)
    params, latent = behavior.init(jax.random.key(0)), jnp.arange(5.0)
    _, action = jax.jit(
        lambda key: behavior.act(params, dreamer(model, {}), (), latent, latent, key, mode)
    )(jax.random.key(2))
    parts = space.items() if isinstance(space, dict) else [("action", space)]
    chosen = action if isinstance(space, dict) else {"action": action}
    for key, part in parts:
        assert chosen[key].shape == (5, *part.shape) and chosen[key].dtype == part.dtype
        if isinstance(part, Box):
            assert (jnp.abs(chosen[key]) <= 1).all()
        else:
            assert (np.asarray(chosen[key]) < np.asarray(part.classes)).all()


def test_the_greedy_action_is_the_most_likely_of_many():
    # A narrow policy far from the ends: the most likely of 100 draws is near its middle.
    config = dataclasses.replace(CONFIG, init_std=0.1)
    model, behavior, params = setup(config=config)
    params = jax.tree.map(jnp.zeros_like, params)
    latent = jnp.zeros(50)

    def act(mode):
        args = params, dreamer(model, {}), (), latent, latent, jax.random.key(2), mode
        return behavior.act(*args)[1]

    spread = {mode: float(jnp.abs(act(mode)).max()) for mode in ("greedy", "sample", "explore")}
    assert spread["greedy"] < 0.03 < 0.1 < spread["sample"] < 0.45 < spread["explore"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"imagine": 1},
        {"units": 0},
        {"policy_layers": 0},
        {"lambda_": 1.5},
        {"init_std": 0.0},
        {"explore": 1.5},
    ],
)
def test_senseless_numbers_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(JaxwmError, match=f"ActorCriticV1Config.{name} is"):
        ActorCriticV1Config(**wrong)


@pytest.mark.parametrize("space", [NUMBER, CHOICE])
def test_the_policy_learns_to_go_where_the_reward_is(space):
    config = dataclasses.replace(CONFIG, units=16, init_std=1.0)
    model, behavior, params = setup(space, config=config)
    fixed = dreamer(model, model.init(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    def update(carry, key):
        params, opt = carry

        def loss(params):
            args = fixed, line.seen(), line.rows(space), behavior.draws(key, (T, B))
            found = behavior.loss(params, (), *args)[0]
            return found["policy"].mean() + found["value"].mean()

        changes, opt = optimizer.update(jax.grad(loss)(params), opt)
        return (optax.apply_updates(params, changes), opt), None

    with jax.debug_key_reuse(False):
        keys = jax.random.split(jax.random.key(3), 200)
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    latent = jnp.linspace(-1, 1, 9)
    _, action = behavior.act(params, fixed, (), latent, latent, jax.random.key(0), "greedy")
    assert (action > 0.5).all()

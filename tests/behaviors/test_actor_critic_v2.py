"""Dreamer V2's actor-critic: targets by hand, where gradients go, and actions of every kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxwm.behaviors.actor_critic_v2 import (
    ActorCriticV2Config,
    Values,
    actor_critic_v2,
    gradient_of,
    returns_of,
    weights_of,
)
from jaxwm.models.imagine import dreamer
from jaxwm.types import Box, Discrete, JaxwmError
from tests.behaviors import line
from tests.behaviors.line import B, T

H = 3
NUMBER, CHOICE = Box((1,), low=-1.0, high=1.0), Discrete(2)
CONFIG = ActorCriticV2Config(units=8, layers=1, imagine=H, entropy=0.0)


def column(*x):
    return jnp.array(x)[:, None]


def test_returns_and_weights_by_hand():
    reward, discount = column(1.0, 2.0, 3.0), column(0.5, 0.8, 9.0)
    values = Values(reward, discount, column(7.0, 4.0, 10.0), weights_of(discount))
    # R_1 = r_1 + d_1 v_2 = 2 + 0.8 * 10;  R_0 = r_0 + d_0 (0.5 v_1 + 0.5 R_1) = 1 + 0.5 * 7
    np.testing.assert_allclose(returns_of(values, 0.5), column(4.5, 10.0), rtol=1e-6)
    # 1, d_0, d_0 d_1
    np.testing.assert_allclose(values.weight, column(1.0, 0.5, 0.4), rtol=1e-6)
    slope = jax.grad(lambda d: weights_of(d).sum())(discount)
    np.testing.assert_array_equal(slope, 0.0)


def setup(space=NUMBER, ends=False, config=CONFIG, discount=0.9):
    model = line.world(space, ends)
    behavior = actor_critic_v2(config, space, model, 2, discount)
    params = behavior.init(jax.random.key(0))
    return model, behavior, params, behavior.initial(params)


def losses(space=NUMBER, ends=False, config=CONFIG, terminal=None, stored=True):
    """A function of behaviour and model parameters, and both."""
    model, behavior, params, state = setup(space, ends, config)
    draws = behavior.draws(jax.random.key(1), (T, B))

    def run(params, world):
        args = dreamer(model, world), line.seen(stored), line.rows(space, terminal), draws
        return behavior.loss(params, state, *args)[0]

    return run, params, model.init(jax.random.key(0))


@pytest.mark.parametrize("space", [NUMBER, CHOICE])
@pytest.mark.parametrize("gradient", ["dynamics", "reinforce", "both"])
def test_losses_teach_their_own_networks_alone(space, gradient):
    run, params, world = losses(space, config=dataclasses.replace(CONFIG, gradient=gradient))
    for name, other in (("policy", "value"), ("value", "policy")):
        loss = lambda *x, n=name: run(*x)[n].mean()  # noqa: E731
        own, model = jax.jit(jax.grad(loss, (0, 1)))(params, world)
        assert max(jnp.abs(x).max() for x in jax.tree.leaves(own[name])) > 0
        assert all((x == 0).all() for x in jax.tree.leaves((own[other], model)))


def test_the_dynamics_gradient_is_that_of_the_return():
    # The critic is 0, so a_0 changes R_1 = r_1 + d_1 l r_2 by 1 + 0.9 * 0.95 and R_2 = r_2 by 1,
    # a_1 changes R_1 by 0.9 * 0.95 and R_2 by 1. da/dmean = 1, as if nothing was cut off.
    model, behavior, params, state = setup(config=dataclasses.replace(CONFIG, imagine=H))
    value = jax.tree.map(jnp.zeros_like, params["value"])
    state = behavior.initial({"value": value})
    draws = behavior.draws(jax.random.key(1), (T, B))
    fixed = dreamer(model, model.init(jax.random.key(0)))

    def loss(bias):
        policy = jax.tree.map(jnp.zeros_like, params["policy"])
        policy["action_mean"]["bias"] = bias
        args = fixed, line.seen(), line.rows(NUMBER), draws
        return behavior.loss({"policy": policy, "value": value}, state, *args)[0]["policy"].mean()

    slope = jax.grad(loss)(jnp.zeros(1))
    # Each of the two terms counts half, the second with the weight 0.9.
    expected = -0.5 * ((1 + 2 * 0.9 * 0.95) + 0.9 * 2)
    np.testing.assert_allclose(slope, [expected], rtol=1e-5)


def test_both_is_a_mix_of_the_two_others():
    # Choices: their log-density passes no gradient on to the dream.
    grads = {}
    for gradient in ("dynamics", "reinforce", "both"):
        config = dataclasses.replace(CONFIG, gradient=gradient, mix=0.25)
        run, params, world = losses(CHOICE, config=config)
        loss = lambda x, run=run, world=world: run(x, world)["policy"].mean()  # noqa: E731
        grads[gradient] = jax.jit(jax.grad(loss))(params)
    mixed = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, grads["dynamics"], grads["reinforce"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), grads["both"], mixed)


@pytest.mark.parametrize(
    ("space", "expected"),
    [(CHOICE, "reinforce"), (NUMBER, "dynamics"), ({"a": CHOICE, "b": NUMBER}, "dynamics")],
)
def test_the_gradient_is_chosen_by_the_kind_of_action(space, expected):
    assert gradient_of(CONFIG, space) == expected
    assert gradient_of(dataclasses.replace(CONFIG, gradient="both"), space) == "both"


def test_dreams_from_a_terminal_row_count_only_where_they_start():
    terminal = jnp.zeros((T, B), bool).at[1, 0].set(True)
    run, params, world = losses(ends=True, terminal=terminal)
    found = run(params, world)
    other = losses(ends=True)[0](params, world)
    row = 1 * B + 0
    for name in ("policy", "value"):
        changed = np.flatnonzero(np.asarray(found[name] != other[name]))
        assert changed.tolist() == [row], name


def test_a_model_without_ends_has_the_same_discount_everywhere():
    # The world that predicts 0.9 everywhere is the one without the head, but at the start.
    plain, params, world = losses()
    predicted = losses(ends=True)[0](params, world)
    for name, loss in plain(params, world).items():
        np.testing.assert_allclose(loss, predicted[name], rtol=1e-5)


def test_models_that_keep_only_the_last_memory_dream_from_there():
    run, params, world = losses(stored=False)
    assert {name: x.shape for name, x in run(params, world).items()} == {
        "policy": (B,),
        "value": (B,),
    }


def test_the_slow_critic_is_a_copy_of_every_third_update():
    _, behavior, params, state = setup(config=dataclasses.replace(CONFIG, slow_every=3))
    seen = []
    for number in range(1, 6):
        value = jax.tree.map(lambda x, n=number: jnp.full_like(x, n), params["value"])
        state = behavior.after(state, {"value": value})
        seen.append(float(state.slow.params["out"]["bias"][0]))
    assert seen == [1, 1, 1, 4, 4]


SPACES = {
    "number": Box((2,), low=-1.0, high=1.0),
    "choice": Discrete(3),
    "choices": Discrete((3, 2), shape=(2,)),
    "mixed": {"turn": Discrete(3), "push": Box((2, 2), low=-1.0, high=1.0)},
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("mode", ["explore", "sample", "greedy"])
def test_actions_are_those_of_the_space(name, mode):
    space = SPACES[name]
    config = dataclasses.replace(CONFIG, explore=0.5)
    model = line.world(NUMBER)
    behavior = actor_critic_v2(config, space, model, 2)
    params, latent = behavior.init(jax.random.key(0)), jnp.arange(5.0)

    def act(key):
        args = params, dreamer(model, {}), behavior.carry(5), latent, latent, key, mode
        return behavior.act(*args)

    carry, action = jax.jit(act)(jax.random.key(2))
    assert carry == ()
    pairs = (
        [(space, action)]
        if not isinstance(space, dict)
        else [(space[key], action[key]) for key in space]
    )
    for part, chosen in pairs:
        assert chosen.shape == (5, *part.shape) and chosen.dtype == part.dtype
        if isinstance(part, Discrete):
            assert (np.asarray(chosen) < np.asarray(part.classes)).all()
        else:
            assert (jnp.abs(chosen) <= 1).all()
    again = jax.jit(act)(jax.random.key(3))[1]
    same = jax.tree.map(lambda x, y: bool((x == y).all()), action, again)
    if mode == "greedy":
        assert all(jax.tree.leaves(same))
    else:
        assert not all(jax.tree.leaves(same))


def test_noise_of_zero_is_none():
    model, behavior, params, _ = setup()
    latent = jnp.arange(5.0)

    def act(mode):
        args = params, dreamer(model, {}), (), latent, latent, jax.random.key(2), mode
        return behavior.act(*args)[1]

    np.testing.assert_array_equal(act("explore"), act("sample"))


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (Box((2,), "uint8"), "cannot take"),
        ({"mlp": Discrete(2)}, "called mlp, and there already is one"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(space, told):
    with pytest.raises(JaxwmError, match=told):
        actor_critic_v2(CONFIG, space, line.world(NUMBER), 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"imagine": 1},
        {"units": 0},
        {"lambda_": 1.5},
        {"mix": -0.1},
        {"entropy": -1.0},
        {"min_std": 0.0},
        {"slow_every": 0},
        {"slow_rate": 2.0},
        {"explore": -1.0},
    ],
)
def test_senseless_numbers_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(JaxwmError, match=f"ActorCriticV2Config.{name} is"):
        ActorCriticV2Config(**wrong)


@pytest.mark.parametrize("space", [NUMBER, CHOICE])
def test_the_policy_learns_to_go_where_the_reward_is(space):
    config = dataclasses.replace(CONFIG, units=16, slow_every=5)
    model, behavior, params, state = setup(space, config=config)
    fixed = dreamer(model, model.init(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    def update(carry, key):
        params, state, opt = carry

        def loss(params):
            draws = behavior.draws(key, (T, B))
            args = fixed, line.seen(), line.rows(space), draws
            found, after, _ = behavior.loss(params, state, *args)
            return found["policy"].mean() + found["value"].mean(), after

        grads, state = jax.grad(loss, has_aux=True)(params)
        changes, opt = optimizer.update(grads, opt)
        params = optax.apply_updates(params, changes)
        return (params, behavior.after(state, params), opt), None

    with jax.debug_key_reuse(False):
        keys = jax.random.split(jax.random.key(3), 300)
        start = params, state, optimizer.init(params)
        (params, *_), _ = jax.lax.scan(update, start, keys)
    latent = jnp.linspace(-1, 1, 9)
    _, action = behavior.act(params, fixed, (), latent, latent, jax.random.key(0), "greedy")
    assert (action > 0.5).all()

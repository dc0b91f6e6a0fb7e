"""Targets by hand, where gradients go, and actions of every kind."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.behaviors import actor_critic as parts
from jaxwm.behaviors.actor_critic import ActorCriticConfig, State, actor_critic, dream_targets
from jaxwm.models.imagine import dreamer
from jaxwm.numerics import Percentiles, percentiles_init
from jaxwm.optim import SlowState
from jaxwm.types import Box, Discrete, JaxwmError, Observed, Start, Step, WorldModel

F, T, B, H = 3, 4, 2, 2
CONFIG = ActorCriticConfig(units=8, layers=1, bins=11, imagine=H, horizon=10)


class Known(NamedTuple):
    """A distribution of which only the mean is known."""

    value: jax.Array

    def mean(self):
        return self.value


def linear_model() -> WorldModel:
    """A world whose state moves by its parameter; the reward is its first number."""

    def starts(params, observed, key=None):
        flat = observed.latents.reshape(T * B, F)
        return Start(flat, flat, jnp.arange(T * B))

    def step(params, carry, action, draws):
        carry = carry + params["move"] + draws[..., None]
        return carry, carry

    def predict(params, latents, keys=None):
        reward = params["reward"] * latents[..., 0]
        return {"reward": Known(reward), "continue": Known(0.9 + 0.0 * reward)}

    def absent(*args):
        raise NotImplementedError

    return WorldModel(
        init=absent,
        initial=absent,
        draws=lambda key, lead: jnp.zeros(lead),
        observe=absent,
        starts=starts,
        step=step,
        features=lambda latents: latents,
        predict=predict,
        loss=absent,
        pack=absent,
        unpack=absent,
    )


def test_targets_of_two_imagined_steps_by_hand():
    column = lambda *x: jnp.array(x)[:, None]  # noqa: E731
    config = dataclasses.replace(CONFIG, lambda_=0.5, return_rate=1.0)
    reward, cont, value = column(9.0, 1.0, 2.0), column(0.5, 0.8, 0.4), column(1.0, 3.0, 10.0)
    dream, state = dream_targets(config, percentiles_init(), reward, cont, value)
    # R_2 = v_2 = 10
    # R_1 = r_2 + c_2 (0.5 v_2 + 0.5 R_2) = 2 + 0.4 * 10 = 6
    # R_0 = r_1 + c_1 (0.5 v_1 + 0.5 R_1) = 1 + 0.8 * 4.5 = 4.6
    np.testing.assert_allclose(dream.returns, column(4.6, 6.0), rtol=1e-6)
    # w_0 = c_0, w_1 = c_0 c_1
    np.testing.assert_allclose(dream.weight, column(0.5, 0.4), rtol=1e-6)
    # The percentiles 5 and 95 of 4.6 and 6 are 4.67 and 5.93, 1.26 apart; they count at once.
    np.testing.assert_allclose((state.lo, state.hi), (4.67, 5.93), rtol=1e-6)
    np.testing.assert_allclose(dream.scale, 1.26, rtol=1e-5)
    np.testing.assert_allclose(dream.advantage, column(3.6 / 1.26, 3.0 / 1.26), rtol=1e-5)


def test_returns_are_normalised_by_the_range_that_includes_them():
    rng = np.random.default_rng(0)
    reward, value = (jnp.asarray(10 * rng.normal(size=(H + 1, 50)), jnp.float32) for _ in range(2))
    cont = jnp.full((H + 1, 50), 0.9)
    old = Percentiles(jnp.float32(-1.0), jnp.float32(4.0))
    dream, new = dream_targets(CONFIG, old, reward, cont, value)
    lo, hi = np.percentile(dream.returns, [5, 95])
    np.testing.assert_allclose(new, [-0.99 + 0.01 * lo, 3.96 + 0.01 * hi], rtol=1e-5)
    np.testing.assert_allclose(dream.scale, new.hi - new.lo, rtol=1e-6)
    raw = dream.returns - value[:-1]
    np.testing.assert_allclose(dream.advantage, raw / dream.scale, rtol=1e-5)
    # Small returns are never magnified.
    small, _ = dream_targets(CONFIG, percentiles_init(), reward / 100, cont, value / 100)
    assert small.scale == 1.0


def perturbed(params, seed):
    """Parameters away from initialisation, where the critic is zero."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def setting():
    """Spaces, replayed rows, their latents, and the parameters of the linear world."""
    spaces = {"push": Box((2,), low=-1, high=1), "turn": Discrete(3)}
    rng = np.random.default_rng(1)
    flags = np.zeros((T, B), bool)
    is_last, is_terminal = flags.copy(), flags.copy()
    is_last[1] = is_terminal[1, 0] = True
    steps = Step(
        {},
        {},
        jnp.asarray(rng.normal(size=(T, B)), jnp.float32),
        jnp.asarray(np.roll(is_last, 1, 0)),
        jnp.asarray(is_last),
        jnp.asarray(is_terminal),
    )
    latents = jnp.asarray(rng.normal(size=(T, B, F)), jnp.float32)
    model_params = {"move": jnp.float32(0.1), "reward": jnp.float32(2.0)}
    return spaces, steps, latents, model_params


def losses_of(setting, config, params, slow, latents=None, model_params=None):
    spaces, steps, given, model_given = setting
    model = linear_model()
    behavior = actor_critic(config, spaces, model, F)
    latents = given if latents is None else latents
    dreams = dreamer(model, model_given if model_params is None else model_params)
    state = State(percentiles_init(), SlowState(slow, jnp.zeros((), jnp.int32)))
    observed = Observed(latents[-1], latents, latents)
    draws = behavior.draws(jax.random.key(5), (T, B))
    return behavior.loss(params, state, dreams, observed, steps, draws)


@pytest.fixture(scope="module")
def parameters(setting):
    behavior = actor_critic(CONFIG, setting[0], linear_model(), F)
    params = perturbed(behavior.init(jax.random.key(0)), 0)
    return params, perturbed(params["value"], 1)


def test_each_loss_trains_its_own_part(setting, parameters):
    params, slow = parameters
    latents, model_params = setting[2:]

    @jax.jit
    def gradients(*args):
        def means(params, slow, latents, model_params):
            terms, _, _ = losses_of(setting, CONFIG, params, slow, latents, model_params)
            return {name: term.mean() for name, term in terms.items()}

        return jax.jacrev(means, argnums=(0, 1, 2, 3))(*args)

    found = gradients(params, slow, latents, model_params)
    reached = {}
    for name, (own, slow_, latents_, model_) in found.items():
        each = own | {"slow": slow_, "latents": latents_, "model": model_}
        size = lambda x: max(np.abs(g).max() for g in jax.tree.leaves(x))  # noqa: E731
        reached[name] = {part for part, x in each.items() if size(x) > 0}
    # Dreams are not differentiated; replayed rows train the model's latents too.
    assert reached == {
        "policy": {"policy"},
        "value": {"value"},
        "replay_value": {"value", "latents"},
    }


def test_losses_have_one_number_per_row(setting, parameters):
    losses, state, metrics = losses_of(setting, CONFIG, *parameters)
    assert losses["policy"].shape == losses["value"].shape == (T, B)
    assert losses["replay_value"].shape == (T - 1, B)
    # Row 1 ends an episode: what follows belongs to another one.
    assert not losses["replay_value"][1].any() and losses["replay_value"][::2].all()
    assert state.returns.hi > state.returns.lo and all(np.isfinite(x) for x in metrics.values())


def test_the_first_weight_is_predicted_or_true(setting, parameters):
    predicted, _, _ = losses_of(setting, CONFIG, *parameters)
    true_config = dataclasses.replace(CONFIG, start_weight="true")
    true, _, _ = losses_of(setting, true_config, *parameters)
    # The whole dream is weighted by the first state's chance to go on: predicted 0.9
    # everywhere, in truth 1, and 0 at the terminal row.
    for name in ("policy", "value"):
        ratio = np.full((T, B), 1 / 0.9)
        ratio[1, 0] = 0.0
        np.testing.assert_allclose(true[name], predicted[name] * ratio, rtol=1e-4)
    np.testing.assert_allclose(true["replay_value"], predicted["replay_value"], rtol=1e-6)


def test_the_value_loss_pulls_to_returns_and_to_the_slow_critic(setting, parameters):
    params, slow = parameters
    both, _, _ = losses_of(setting, CONFIG, params, slow)
    alone, _, _ = losses_of(
        setting, dataclasses.replace(CONFIG, slow_regularizer=0.0), params, slow
    )
    double = dataclasses.replace(CONFIG, slow_regularizer=2.0)
    twice, _, _ = losses_of(setting, double, params, slow)
    for name in ("value", "replay_value"):
        pull = np.asarray(both[name]) - alone[name]
        np.testing.assert_allclose(
            np.asarray(twice[name]) - alone[name], 2 * pull, rtol=1e-3, atol=1e-5
        )
        assert (pull[::2] > 0).all()
    np.testing.assert_array_equal(both["policy"], alone["policy"])


def act(behavior, params, features, key, mode="explore"):
    """Carry and action at some features, which are the latents of the linear world."""
    dreams = dreamer(linear_model(), {})
    return behavior.act(params, dreams, (), features, features, key, mode)


def test_the_slow_critic_follows_the_critic(setting, parameters):
    behavior = actor_critic(CONFIG, setting[0], linear_model(), F, slow_rate=0.25)
    params, other = parameters
    state = behavior.initial(params)
    assert state.returns == percentiles_init()
    jax.tree.map(np.testing.assert_array_equal, state.slow.params, params["value"])
    moved = behavior.after(state, {"policy": params["policy"], "value": other}).slow.params
    want = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, params["value"], other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), moved, want)


def test_every_random_number_of_a_loss_is_drawn_at_once(setting):
    behavior = actor_critic(CONFIG, setting[0], linear_model(), F)
    draws = behavior.draws(jax.random.key(0), (T, B))
    assert draws.model.shape == (H, T * B)
    shapes = {name: x.shape for name, x in draws.action.items()}
    assert shapes == {"push": (H, T * B, 2), "turn": (H, T * B, 3)}


ACTIONS = {
    "discrete": (Discrete(4), jnp.int32, ()),
    "continuous": (Box((3,), low=-1, high=1), jnp.float32, (3,)),
    "several": (Discrete((2, 5, 3), (3,)), jnp.int32, (3,)),
    "table": (Discrete(3, (2, 2)), jnp.int32, (2, 2)),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_fit_their_space(kind):
    space, dtype, shape = ACTIONS[kind]
    config = dataclasses.replace(CONFIG, unimix=0.5)
    behavior = actor_critic(config, space, linear_model(), F)
    params = perturbed(behavior.init(jax.random.key(0)), 0)
    features = jax.random.normal(jax.random.key(1), (500, F))
    draw = jax.jit(lambda key: act(behavior, params, features, key)[1])
    action = np.asarray(draw(jax.random.key(2)))
    assert action.shape == (500, *shape) and action.dtype == dtype
    np.testing.assert_array_equal(action, draw(jax.random.key(2)))
    assert (action != draw(jax.random.key(3))).any()
    # There is no noise beside the policy's own.
    carry, sampled = act(behavior, params, features, jax.random.key(2), "sample")
    np.testing.assert_allclose(sampled, action, rtol=1e-5, atol=1e-6)
    assert carry == ()
    plan = parts.policy(config, space, F).apply(params["policy"], features)["action"]
    _, best = act(behavior, params, features, jax.random.key(2), "greedy")
    np.testing.assert_array_equal(best, plan.mode())
    if isinstance(space, Discrete):
        classes = np.broadcast_to(space.classes, shape)
        # Every class that exists is chosen, and none that does not.
        for index in np.ndindex(*shape):
            assert set(action[(slice(None), *index)]) == set(range(classes[index]))
    else:
        # The mean lies in -1..1, the draws spread around it.
        mean = plan.mode()
        assert np.abs(mean).max() <= 1 and 0.05 < np.abs(action - mean).mean() < 1
    assert plan.log_prob(jnp.asarray(action)).shape == plan.entropy().shape == (500,)


def test_a_dict_of_one_action_stays_a_dict_whatever_its_name():
    for name in ("action", "turn"):
        behavior = actor_critic(CONFIG, {name: Discrete(2)}, linear_model(), F)
        params = behavior.init(jax.random.key(0))
        for mode in ("explore", "sample", "greedy"):
            _, action = act(behavior, params, jnp.zeros((7, F)), jax.random.key(1), mode)
            assert {key: x.shape for key, x in action.items()} == {name: (7,)}


def test_names_of_actions_that_clash_are_refused():
    for clash in ({"mlp": Discrete(2)}, {"a": Box((1,)), "a_mean": Discrete(2)}):
        words = r"needs an output of the policy's network called (mlp|a_mean), .* Rename"
        with pytest.raises(JaxwmError, match=words):
            actor_critic(CONFIG, clash, linear_model(), F)


def test_named_actions_come_as_a_dict():
    spaces = {"push": Box((2,), low=-1, high=1), "turn": Discrete((2, 3), (2,))}
    behavior = actor_critic(CONFIG, spaces, linear_model(), F)
    params = behavior.init(jax.random.key(0))
    _, action = act(behavior, params, jnp.zeros((7, F)), jax.random.key(1))
    assert {name: (x.shape, str(x.dtype)) for name, x in action.items()} == {
        "push": ((7, 2), "float32"),
        "turn": ((7, 2), "int32"),
    }
    # At the start the policy knows nothing: means near 0, classes equally likely.
    plan = parts.policy(CONFIG, spaces, F).apply(params["policy"], jnp.ones((7, F)))
    assert np.abs(plan["push"].mode()).max() < 0.1
    np.testing.assert_allclose(plan["turn"].entropy(), np.log(2) + np.log(3), atol=0.01)
    assert not parts.critic(CONFIG, F).apply(params["value"], jnp.ones((7, F))).mean().any()


@pytest.mark.parametrize("space", [Box(()), Box((2,), "uint8"), Box((2,), "int32")])
def test_spaces_it_cannot_act_in_are_refused(space):
    with pytest.raises(JaxwmError, match=r"The action 'lever' has the space .* cannot take"):
        actor_critic(CONFIG, {"lever": space}, linear_model(), F)

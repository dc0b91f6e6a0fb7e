"""The recurrent state-space model, on observations and actions of every kind."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.models.imagine import dreamer
from jaxwm.models.latents import categorical
from jaxwm.recipes import dreamer_v3
from jaxwm.types import Box, Discrete, Start
from tests.models.rows import moved, two_episodes

T, B = 6, 2
OBS = {
    "left": Box((8, 8, 3), "uint8", 0, 255),
    "right": Box((8, 8, 1), "uint8", 0, 255),
    "grid": Box((2, 3)),
    "kind": Discrete(3),
    "maybe": Box((2,), missing=True),
    "perhaps": Discrete(4, (2,), missing=True),
}
ACTIONS = {"push": Box((2,), low=-1, high=1), "turn": Discrete((2, 3), (2,))}
CONFIG = dreamer_v3.sized("debug").model
# Every nat counts, so that no loss is clipped and every gradient shows.
CONFIG = dataclasses.replace(CONFIG, latent=dataclasses.replace(CONFIG.latent, free_nats=0.0))


@pytest.fixture(scope="module")
def model():
    made = dreamer_v3.world_model(CONFIG, OBS, ACTIONS)
    return made._replace(
        observe=jax.jit(made.observe), loss=jax.jit(made.loss), init=jax.jit(made.init)
    )


@pytest.fixture(scope="module")
def params(model):
    return moved(model.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def steps():
    """Rows of two episodes, the second from row 4."""
    make = lambda key: two_episodes(OBS, ACTIONS, key, T, B, 4)  # noqa: E731
    return jax.jit(make)(jax.random.key(2))


@pytest.fixture(scope="module")
def draws(model):
    return model.draws(jax.random.key(3), (T, B))


@pytest.fixture(scope="module")
def observed(model, params, steps, draws):
    return model.observe(params, model.initial(B), steps, draws)


def rows(tree, start, stop):
    return jax.tree.map(lambda x: x[start:stop], tree)


def test_a_sequence_at_once_equals_row_by_row(model, params, steps, draws, observed):
    carry = model.initial(B)
    for time in range(T):
        row = rows(steps, time, time + 1)
        found = model.observe(params, carry, row, draws[time : time + 1])
        want = rows(observed.latents, time, time + 1)
        chex.assert_trees_all_close(found.latents, want, atol=1e-5, rtol=0)
        carry = found.carry
        now = jax.tree.map(lambda x, t=time: x[t], observed.carries)
        chex.assert_trees_all_close(carry, now, atol=1e-5, rtol=0)
    chex.assert_trees_all_close(observed.carry, carry, atol=1e-5, rtol=0)


def test_a_dream_of_what_happened_is_what_happened(model, params, steps, observed):
    dreams = dreamer(model, params)
    everything = dreams.starts(observed)
    start = Start(*(jax.tree.map(lambda x: x[:B], x) for x in everything))
    chex.assert_trees_all_equal(start.latent, observed.latents[0])
    actions = rows(steps.action, 1, 4)
    policy = lambda features, action: action  # noqa: E731
    dream = jax.jit(lambda draws: dreams.imagine(start, policy, (draws, actions)))
    # Draws that make the prior choose what the posterior chose: rows 1..3, of one episode.
    chosen = observed.latents[1:4, :, -16:].reshape(3, B, 4, 4)
    found = dream(1e4 * chosen)
    chex.assert_trees_all_equal(found.action, actions)
    dreamt = jnp.concatenate([found.latents, found.last[None]])
    np.testing.assert_allclose(dreamt, observed.latents[:4], atol=1e-5, rtol=0)
    # With other draws, the stochastic states are those of the prior at the dreamt states.
    draws = model.draws(jax.random.key(4), (3, B))
    found = dream(draws)
    dreamt = jnp.concatenate([found.latents[1:], found.last[None]])
    parts = dreamer_v3.parts(CONFIG, OBS, ACTIONS)
    raw = parts.prior.apply(params["prior"], dreamt[..., :16])
    drawn = categorical(CONFIG.latent).sample(raw, draws)
    np.testing.assert_array_equal(dreamt[..., 16:], drawn)
    assert (drawn != observed.latents[1:4, :, 16:]).any()


def test_the_policy_of_a_dream_reads_the_features_of_its_latents(model, params, steps, observed):
    dreams = dreamer(model, params)
    start = dreams.starts(observed)
    turn = jnp.zeros((T * B, 2), jnp.int32)
    policy = lambda features, _: {"push": features[:, 14:16], "turn": turn}  # noqa: E731
    draws = model.draws(jax.random.key(5), (2, T * B)), jnp.zeros((2, 1))
    found = dreams.imagine(start, policy, draws)
    features = model.features(found.latents)
    np.testing.assert_array_equal(found.action["push"], features[..., 14:16])
    np.testing.assert_array_equal(found.latents[0], start.latent)


def test_a_dream_among_many_is_the_same_as_alone(model, params, steps, observed):
    many, length = 300, 3
    everything = dreamer(model, params).starts(observed)
    start = Start(*(jax.tree.map(lambda x: jnp.resize(x, (many, *x.shape[1:])), everything)))
    actions = jax.tree.map(
        lambda x: jnp.resize(x[1:4, None], (length, many, *x.shape[2:])), steps.action
    )
    draws = model.draws(jax.random.key(5), (length, many))
    policy = lambda features, action: action  # noqa: E731
    dream = jax.jit(lambda start, *draws: dreamer(model, params).imagine(start, policy, draws))
    together = dream(start, draws, actions).last
    first = Start(*(jax.tree.map(lambda x: x[:5], start)))
    alone = dream(first, draws[:, :5], jax.tree.map(lambda x: x[:, :5], actions)).last
    np.testing.assert_array_equal(together[:5, 16:], alone[:, 16:])
    np.testing.assert_allclose(together[:5, :16], alone[:, :16], atol=1e-5)


def test_episodes_one_after_the_other_equal_separate_ones(model, params, steps, draws, observed):
    latents = observed.latents
    # The second episode alone: its rows first, then rows that cannot reach back.
    turned = jax.tree.map(lambda x: jnp.roll(x, 2, axis=0), steps)
    turned = turned._replace(is_first=turned.is_first.at[2].set(True))
    alone = model.observe(params, model.initial(B), turned, jnp.roll(draws, 2, axis=0))
    np.testing.assert_allclose(alone.latents[:2], latents[4:], atol=1e-6, rtol=0)
    # Whatever was remembered, even NaN, and whatever the action before: the model forgets it.
    first = steps._replace(is_first=steps.is_first.at[0].set(True))
    fresh = model.observe(params, model.initial(B), first, draws)
    wrong = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.initial(B))
    action = jax.tree.map(lambda x: x.at[0].set(1), steps.action)
    after = model.observe(params, wrong, first._replace(action=action), draws)
    chex.assert_trees_all_equal(fresh, after)
    # Without the flag the memory counts.
    some = jax.tree.map(jnp.ones_like, model.initial(B))
    other = model.observe(params, some, steps, draws)
    assert np.abs(other.latents[0, :, :16] - latents[0, :, :16]).max() > 1e-3
    np.testing.assert_array_equal(other.latents[4:], latents[4:])


def test_what_the_replay_stores_gives_the_memory_back(model, observed):
    carries = jax.tree.map(lambda x: x[2], observed.carries)
    memo = model.pack(carries)
    assert memo.stoch.shape == (B, 4) and memo.stoch.dtype == jnp.uint8
    chex.assert_trees_all_equal(model.unpack(memo, B), carries)
    chex.assert_trees_all_equal(model.pack(observed.carries).stoch[2], memo.stoch)


# Which parts of the model each loss trains, on a first row: there the deterministic state
# depends on nothing drawn before.
SEEN = {"core", "posterior", "encoder"}
TRAINS = {
    "dyn": {"core", "prior"},
    "rep": SEEN,
    "reward": SEEN | {"reward"},
    "continue": SEEN | {"continue"},
    **{f"rec/{name}": SEEN | {"decoder"} for name in OBS},
}


def test_each_loss_trains_its_own_parts(model, params, steps, draws):
    row = jax.tree.map(lambda x: x[4:5], steps)

    @jax.jit
    def gradients(params):
        def losses(params):
            terms, _, _ = model.loss(params, model.initial(B), row, draws[4:5])
            return {name: term.mean() for name, term in terms.items()}

        return jax.jacrev(losses)(params)

    found = gradients(params)
    assert set(found) == set(TRAINS)
    for name, parts in found.items():
        sizes = {
            part: max(np.abs(g).max() for g in jax.tree.leaves(x)) for part, x in parts.items()
        }
        assert {part for part, size in sizes.items() if size > 0} == TRAINS[name], name


def test_seeds_side_by_side_equal_a_loop(model, params, steps, draws, observed):
    other = jax.tree.map(lambda x: 0.9 * x, params)
    both = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    together = jax.vmap(model.observe, in_axes=(0, None, None, None))(
        both, model.initial(B), steps, draws
    )
    alone = model.observe(other, model.initial(B), steps, draws)
    for index, want in enumerate((observed, alone)):
        have = jax.tree.map(lambda x, i=index: x[i], together)
        chex.assert_trees_all_close(have, want, atol=1e-5, rtol=0)


def test_losses_are_one_number_per_row_and_follow_their_rows(model, params, steps, draws, observed):
    losses, found, metrics = model.loss(params, model.initial(B), steps, draws)
    assert set(losses) == set(TRAINS)
    for name, loss in losses.items():
        assert loss.shape == (T, B) and loss.dtype == jnp.float32, name
        assert np.isfinite(loss).all(), name
    chex.assert_trees_all_close(found, observed, atol=1e-5, rtol=0)
    assert (losses["dyn"] >= 0).all()
    # The same divergence; only its gradients differ.
    np.testing.assert_allclose(losses["dyn"], losses["rep"], rtol=1e-5)
    assert all(np.isfinite(x) for x in metrics.values())
    # A row's loss depends on no later row.
    later = steps._replace(reward=steps.reward.at[3].add(1.0))
    changed, _, _ = model.loss(params, model.initial(B), later, draws)
    assert (changed["reward"][3] != losses["reward"][3]).all()
    np.testing.assert_array_equal(changed["reward"][:3], losses["reward"][:3])
    np.testing.assert_array_equal(changed["reward"][4:], losses["reward"][4:])


def test_the_continue_head_learns_the_discounted_probability(model, params, steps, draws):
    # At a predicted probability p the loss is -t log p - (1 - t) log(1 - p), which is least at t.
    # The target t is 1 - 1/333 on rows that continue and 0 on terminal ones.
    losses, found, _ = model.loss(params, model.initial(B), steps, draws)
    predicted = model.predict(params, found.latents, ("continue",))["continue"]
    prob = np.asarray(predicted.mean(), np.float64)
    target = (1 - np.asarray(steps.is_terminal)) * (1 - 1 / 333)
    want = -(target * np.log(prob) + (1 - target) * np.log(1 - prob))
    np.testing.assert_allclose(losses["continue"], want, rtol=1e-4)


def test_missing_observations_cost_nothing_and_say_nothing(model, params, steps, draws):
    obs = steps.obs | {
        "maybe": steps.obs["maybe"].at[1, 0, 0].set(-jnp.inf),
        "perhaps": steps.obs["perhaps"].at[2, 1, 0].set(-1),
    }

    @jax.jit
    def gradients(params, obs):
        def loss(params):
            rows = steps._replace(obs=obs)
            losses, found, _ = model.loss(params, model.initial(B), rows, draws)
            return sum(x.mean() for x in losses.values()), (losses, found)

        return jax.grad(loss, has_aux=True)(params)

    grads, (losses, found) = gradients(params, obs)
    assert losses["rec/maybe"][1, 0] == 0 and losses["rec/perhaps"][2, 1] == 0
    assert (np.asarray(losses["rec/maybe"]) == 0).sum() == 1
    for leaf in jax.tree.leaves((grads, losses, found)):
        assert np.isfinite(leaf).all()
    # What stands beside the missing element does not matter.
    other = obs | {"maybe": obs["maybe"].at[1, 0, 1].set(9.0)}
    chex.assert_trees_all_equal(gradients(params, other)[1], (losses, found))


def test_predictions_have_the_shapes_of_what_they_predict(model, params, observed, steps):
    outputs = model.predict(params, observed.latents)
    assert set(outputs) == {*OBS, "reward", "continue"}
    for name, value in steps.obs.items():
        assert outputs[name].mode().shape == value.shape, name
    assert outputs["reward"].mean().shape == (T, B)
    assert set(model.predict(params, observed.latents, ("reward",))) == {"reward"}
    assert model.features(observed.latents).shape == (T, B, 16 + 4 * 4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(model, params, steps, draws):
    half = dreamer_v3.world_model(CONFIG, OBS, ACTIONS, "bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    losses, found, _ = jax.jit(half.loss)(params, half.initial(B), steps, draws)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    whole, _, _ = model.loss(params, model.initial(B), steps, draws)
    for name, loss in losses.items():
        assert loss.dtype == jnp.float32 and np.isfinite(loss).all(), name
    # Row 0 shares every draw with float32 unless one was within rounding of another.
    np.testing.assert_allclose(losses["rec/left"], whole["rec/left"], rtol=0.1)


def test_a_single_action_is_read_like_one_in_a_dict():
    bare, named = (
        dreamer_v3.world_model(CONFIG, {"x": Box((2,))}, space)
        for space in (Discrete(3), {"action": Discrete(3)})
    )
    params = jax.jit(bare.init)(jax.random.key(0))
    chex.assert_trees_all_equal(params, jax.jit(named.init)(jax.random.key(0)))
    assert params["core"]["in_action"]["kernel"].shape == (3, 8)
    carry, draws = bare.initial(5), bare.draws(jax.random.key(1), (5,))
    action = jnp.array([0, 1, 2, 0, 1])
    step = jax.jit(bare.step)
    found = step(params, carry, action, draws)
    also = jax.jit(named.step)(params, carry, {"action": action}, draws)
    chex.assert_trees_all_equal(found, also)
    # A one-hot vector is the same action, through which gradients flow.
    again = step(params, carry, jax.nn.one_hot(action, 3), draws)
    chex.assert_trees_all_equal(found, again)

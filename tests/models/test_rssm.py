"""What every recurrent state-space model must do, on observations and actions of every kind."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import nets
from jaxwm.models.latents import distribution
from jaxwm.models.world_model import Prior, world_model
from jaxwm.recipes import dreamer_v3
from jaxwm.types import Box, Discrete, Latent, Step, as_dict

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
CONFIG = dreamer_v3.agent("debug").model
# Every nat counts, so that no loss is clipped and every gradient shows.
CONFIG = dataclasses.replace(CONFIG, latent=dataclasses.replace(CONFIG.latent, free_nats=0.0))


def draw(space, key, lead):
    shape = (*lead, *space.shape)
    if isinstance(space, Discrete):
        return jax.random.randint(key, shape, 0, jnp.broadcast_to(jnp.array(space.classes), shape))
    if space.dtype == "uint8":
        return jax.random.randint(key, shape, 0, 256).astype(jnp.uint8)
    return jax.random.normal(key, shape)


@jax.jit
def batch(key):
    """Rows (T, B) of two episodes each, the second from row 4."""
    spaces = OBS | ACTIONS
    keys = dict(zip(spaces, jax.random.split(key, len(spaces)), strict=True))
    values = {name: draw(space, keys[name], (T, B)) for name, space in spaces.items()}
    flags = jnp.zeros((T, B), bool)
    return Step(
        {name: values[name] for name in ACTIONS},
        {name: values[name] for name in OBS},
        values["grid"][..., 0, 0],
        flags.at[4].set(True),
        flags.at[3].set(True),
        flags.at[3, 0].set(True),
    )


@pytest.fixture(scope="module")
def model():
    made = world_model(CONFIG, OBS, ACTIONS)
    return made._replace(
        observe=jax.jit(made.observe), loss=jax.jit(made.loss), init=jax.jit(made.init)
    )


@pytest.fixture(scope="module")
def params(model):
    """Parameters away from initialisation, where some heads are zero."""
    params = model.init(jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    moved = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def steps():
    return batch(jax.random.key(2))


@pytest.fixture(scope="module")
def noise(model):
    return model.noise(jax.random.key(3), (T, B))


@pytest.fixture(scope="module")
def observed(model, params, steps, noise):
    return model.observe(params, model.initial(B), steps, noise)


def test_a_sequence_at_once_equals_step_by_step(model, params, steps, noise, observed):
    carry = model.initial(B)
    for time in range(T):
        row = jax.tree.map(lambda x, t=time: x[t : t + 1], steps)
        latents, logits = model.observe(params, carry, row, noise[time : time + 1])
        now = jax.tree.map(lambda x, t=time: x[t : t + 1], observed)
        chex.assert_trees_all_close((latents, logits), now, atol=1e-5, rtol=0)
        carry = jax.tree.map(lambda x: x[0], latents)


def test_a_dream_of_what_happened_is_what_happened(model, params, steps, observed):
    latents, _ = observed
    # Noise that makes the prior draw what the posterior drew: rows 1..3, of one episode.
    forced = 1e4 * latents.stoch[1:4]
    start = jax.tree.map(lambda x: x[0], latents)
    actions = jax.tree.map(lambda x: x[1:4], steps.action)
    policy = lambda feat, action: (action, feat)  # noqa: E731
    dream = jax.jit(
        lambda start, actions, noise: model.imagine(params, start, policy, noise, actions)
    )
    dreamt, taken, kept = dream(start, actions, forced)
    chex.assert_trees_all_equal(taken, actions)
    chex.assert_trees_all_equal(kept, model.features(dreamt)[:-1])
    chex.assert_trees_all_close(dreamt, jax.tree.map(lambda x: x[:4], latents), atol=1e-5, rtol=0)
    # And with other noise, the draws are those of the prior at the dreamt states.
    free = model.noise(jax.random.key(4), (3, B))
    dreamt, _, _ = dream(start, actions, free)
    logits = nets.call(Prior(CONFIG))(params["prior"], dreamt.deter[1:])
    drawn = distribution(CONFIG.latent, logits).sample_uniform(free)
    np.testing.assert_array_equal(dreamt.stoch[1:], drawn)
    assert (dreamt.stoch[1:] != latents.stoch[1:4]).any()


def test_a_dream_among_many_is_the_same_as_alone(model, params, steps, observed):
    many, length = 2048, 3
    start = jax.tree.map(lambda x: jnp.resize(x[0], (many, *x.shape[2:])), observed[0])
    actions = jax.tree.map(
        lambda x: jnp.resize(x[1:4, None], (length, many, *x.shape[2:])), steps.action
    )
    noise = model.noise(jax.random.key(5), (length, many))
    if jax.default_backend() == "cpu":
        assert nets.spare_columns(many)
    policy = lambda feat, action: (action, None)  # noqa: E731
    dream = jax.jit(lambda *args: model.imagine(params, args[0], policy, *args[1:])[0])
    dreamt = dream(start, noise, actions)
    first = jax.tree.map(lambda x: x[:5], start)
    alone = dream(first, noise[:, :5], jax.tree.map(lambda x: x[:, :5], actions))
    np.testing.assert_array_equal(dreamt.stoch[:, :5], alone.stoch)
    np.testing.assert_allclose(dreamt.deter[:, :5], alone.deter, atol=1e-5)


def test_episodes_one_after_the_other_equal_separate_ones(model, params, steps, noise, observed):
    latents, logits = observed
    # The second episode alone: its rows first, then rows that cannot reach back.
    turned = jax.tree.map(lambda x: jnp.roll(x, 2, axis=0), steps)
    turned = turned._replace(is_first=turned.is_first.at[2].set(True))
    alone = model.observe(params, model.initial(B), turned, jnp.roll(noise, 2, axis=0))
    second = jax.tree.map(lambda x: x[4:], (latents, logits))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:2], alone), second, atol=1e-6, rtol=0)
    # Whatever was remembered, a NaN even, and whatever the action before: it is forgotten.
    first = steps._replace(is_first=steps.is_first.at[0].set(True))
    fresh = model.observe(params, model.initial(B), first, noise)
    wrong = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.initial(B))
    action = jax.tree.map(lambda x: x.at[0].set(1), steps.action)
    after = model.observe(params, wrong, first._replace(action=action), noise)
    chex.assert_trees_all_equal(fresh, after)
    # Without the flag the memory counts.
    some = jax.tree.map(jnp.ones_like, model.initial(B))
    other = model.observe(params, some, steps, noise)
    assert np.abs(other[0].deter[0] - latents.deter[0]).max() > 1e-3
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[4:], other), second)


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


def test_each_loss_trains_its_own_parts(model, params, steps, noise):
    row = jax.tree.map(lambda x: x[4:5], steps)

    @jax.jit
    def gradients(params):
        def losses(params):
            terms, _, _ = model.loss(params, model.initial(B), row, noise[4:5])
            return {name: term.mean() for name, term in terms.items()}

        return jax.jacrev(losses)(params)

    found = gradients(params)
    assert set(found) == set(TRAINS)
    for name, parts in found.items():
        sizes = {
            part: max(np.abs(g).max() for g in jax.tree.leaves(x)) for part, x in parts.items()
        }
        assert {part for part, size in sizes.items() if size > 0} == TRAINS[name], name


def test_seeds_side_by_side_equal_a_loop(model, params, steps, noise, observed):
    other = jax.tree.map(lambda x: 0.9 * x, params)
    both = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    together = jax.vmap(model.observe, in_axes=(0, None, None, None))(
        both, model.initial(B), steps, noise
    )
    alone = model.observe(other, model.initial(B), steps, noise)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], together), observed, atol=1e-5, rtol=0)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], together), alone, atol=1e-5, rtol=0)


def test_losses_are_one_number_per_row_and_follow_their_rows(model, params, steps, noise, observed):
    losses, latents, metrics = model.loss(params, model.initial(B), steps, noise)
    assert set(losses) == set(TRAINS)
    for name, loss in losses.items():
        assert loss.shape == (T, B) and loss.dtype == jnp.float32, name
        assert np.isfinite(loss).all(), name
    chex.assert_trees_all_close(latents, observed[0], atol=1e-5, rtol=0)
    assert (losses["dyn"] >= 0).all()
    np.testing.assert_allclose(losses["dyn"], losses["rep"], rtol=1e-5)  # equal but for gradients
    assert all(np.isfinite(x) for x in metrics.values())
    # A row's loss knows nothing of later rows.
    later = steps._replace(reward=steps.reward.at[3].add(1.0))
    changed, _, _ = model.loss(params, model.initial(B), later, noise)
    assert (changed["reward"][3] != losses["reward"][3]).all()
    np.testing.assert_array_equal(changed["reward"][:3], losses["reward"][:3])
    np.testing.assert_array_equal(changed["reward"][4:], losses["reward"][4:])


def test_the_continue_head_learns_the_discounted_chance_to_go_on(model, params, steps, noise):
    # The soft-label loss is least where the probability is the target: its value there is the
    # entropy of the target, 1 - 1/333 on rows that go on and 0 on terminal ones.
    losses, latents, _ = model.loss(params, model.initial(B), steps, noise)
    prob = np.asarray(model.predict(params, latents, ("continue",))["continue"].mean(), np.float64)
    target = (1 - np.asarray(steps.is_terminal)) * (1 - 1 / 333)
    want = -(target * np.log(prob) + (1 - target) * np.log(1 - prob))
    np.testing.assert_allclose(losses["continue"], want, rtol=1e-4)


def test_missing_observations_cost_nothing_and_say_nothing(model, params, steps, noise):
    obs = steps.obs | {
        "maybe": steps.obs["maybe"].at[1, 0, 0].set(-jnp.inf),
        "perhaps": steps.obs["perhaps"].at[2, 1, 0].set(-1),
    }

    def loss(params, obs):
        losses, latents, _ = model.loss(params, model.initial(B), steps._replace(obs=obs), noise)
        return sum(x.mean() for x in losses.values()), (losses, latents)

    grads, (losses, latents) = jax.jit(jax.grad(loss, has_aux=True))(params, obs)
    assert losses["rec/maybe"][1, 0] == 0 and losses["rec/perhaps"][2, 1] == 0
    assert (np.asarray(losses["rec/maybe"]) == 0).sum() == 1
    for leaf in jax.tree.leaves((grads, losses, latents)):
        assert np.isfinite(leaf).all()
    # What stands beside the missing element does not matter.
    other = obs | {"maybe": obs["maybe"].at[1, 0, 1].set(9.0)}
    chex.assert_trees_all_equal(loss(params, other)[1], loss(params, obs)[1])


def test_predictions_have_the_shapes_of_what_they_predict(model, params, observed, steps):
    outputs = model.predict(params, observed[0])
    assert set(outputs) == {*OBS, "reward", "continue"}
    for name, value in steps.obs.items():
        assert outputs[name].mode().shape == value.shape, name
    assert outputs["reward"].mean().shape == (T, B)
    assert set(model.predict(params, observed[0], ("reward",))) == {"reward"}
    assert model.features(observed[0]).shape == (T, B, 16 + 4 * 4)


def test_half_precision_computes_in_half_and_keeps_parameters_whole(model, params, steps, noise):
    half = world_model(dataclasses.replace(CONFIG, dtype="bfloat16"), OBS, ACTIONS)
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    losses, latents, _ = jax.jit(half.loss)(params, half.initial(B), steps, noise)
    assert latents.deter.dtype == latents.stoch.dtype == jnp.bfloat16
    whole, _, _ = model.loss(params, model.initial(B), steps, noise)
    for name, loss in losses.items():
        assert loss.dtype == jnp.float32 and np.isfinite(loss).all(), name
    # Row 0 shares every draw with float32 unless one was within rounding of another.
    np.testing.assert_allclose(losses["rec/left"], whole["rec/left"], rtol=0.1)


def test_a_single_action_goes_by_the_name_action():
    one = world_model(CONFIG, {"x": Box((2,))}, as_dict(Discrete(3)))
    shapes = jax.eval_shape(one.init, jax.random.key(0))
    assert shapes["core"]["in_action"]["kernel"].shape == (3, 8)
    assert isinstance(one.initial(5), Latent) and one.initial(5).deter.shape == (5, 16)

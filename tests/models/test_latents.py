"""Stochastic states: what samples are, what their KL losses train, and how they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.models.latents import (
    GaussianConfig,
    LatentConfig,
    balanced_kl,
    categorical,
    excess_kl,
    floored_kl,
    gaussian,
)

S, K = 2, 3
CATEGORIES = categorical(LatentConfig(S, K, unimix=0.0, free_nats=0.0))
NORMAL = gaussian(GaussianConfig(stoch=2, min_std=0.5))
SPACES = {"categorical": CATEGORIES, "gaussian": NORMAL}


@pytest.mark.parametrize("name", SPACES)
def test_a_state_is_flat_and_keeps_its_lead(name):
    latent = SPACES[name]
    raw = jax.random.normal(jax.random.key(0), (4, 5, latent.outputs))
    draws = latent.draws(jax.random.key(1), (4, 5))
    state = latent.sample(raw, draws)
    assert state.shape == (4, 5, latent.size) and state.dtype == jnp.float32
    assert latent.entropy(raw).shape == (4, 5)
    np.testing.assert_allclose(latent.divergence(raw, raw), 0, atol=1e-6)
    # What is stored comes back as it was.
    np.testing.assert_array_equal(latent.unpack(latent.pack(state)), state)
    slope = jax.grad(lambda raw: jnp.sum(jnp.sin(latent.sample(raw, draws))))(raw)
    assert (jnp.abs(slope).sum(-1) > 0).all()


def test_categories_by_uniform_and_by_gumbel_draws():
    # Shares 0.2, 0.3, 0.5 and 1, 0, 0.
    raw = jnp.log(jnp.asarray([0.2, 0.3, 0.5, 1.0, 1e-30, 1e-30]))
    state = CATEGORIES.sample(raw, jnp.asarray([0.4, 0.9]))
    np.testing.assert_array_equal(state, [0, 1, 0, 1, 0, 0])
    gumbel = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # 0.2 e > 0.5
    np.testing.assert_array_equal(CATEGORIES.sample(raw, gumbel), [1, 0, 0, 1, 0, 0])
    packed = CATEGORIES.pack(state)
    np.testing.assert_array_equal(packed, [1, 0])
    assert packed.dtype == jnp.uint8
    wide = categorical(LatentConfig(1, 300))
    assert wide.pack(jax.nn.one_hot(jnp.asarray([299]), 300)).dtype == jnp.int32


def test_a_gaussian_by_hand():
    # softplus(0) + 0.5 = log(2) + 0.5.
    raw, std = jnp.asarray([0.3, -1.2, 0.0, 0.0]), np.log(2) + 0.5
    np.testing.assert_allclose(
        NORMAL.sample(raw, jnp.asarray([1.0, -2.0])), [0.3 + std, -1.2 - 2 * std], rtol=1e-6
    )
    entropy = 2 * (np.log(std) + 0.5 * np.log(2 * np.pi * np.e))
    np.testing.assert_allclose(NORMAL.entropy(raw), entropy, rtol=1e-6)
    # Equal deviations: half of the squared distance in units of them.
    other = jnp.asarray([0.3 + std, -1.2, 0.0, 0.0])
    np.testing.assert_allclose(NORMAL.divergence(raw, other), 0.5, rtol=1e-5)


def _gradients(latent, post, prior):
    loss = lambda *raw: latent.kl(*raw)["kl"].mean()  # noqa: E731
    return jax.value_and_grad(loss, (0, 1))(post, prior)


# Two rows whose divergences are 0.5 and 2: distances of one and two standard deviations.
STD = np.float32(np.log(2) + 0.5)
POST = jnp.asarray([[[STD, 0.0, 0.0, 0.0]], [[0.0, 2 * STD, 0.0, 0.0]]])
PRIOR = jnp.zeros((2, 1, 4))


@pytest.mark.parametrize(
    ("form", "free", "value", "trained"),
    [
        (floored_kl, 1.0, 1.25, [True, True]),  # the mean of 0.5 and 2 is above 1
        (floored_kl, 1.5, 1.5, [False, False]),
        (excess_kl, 1.0, 0.5, [False, True]),  # the mean of 0 and 1
        (excess_kl, 0.0, 1.25, [True, True]),
    ],
)
def test_free_nats_of_dreamer_v1_and_planet(form, free, value, trained):
    got, grads = _gradients(form(NORMAL, free), POST, PRIOR)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(jnp.abs(grad).sum((1, 2)) > 0, trained)


@pytest.mark.parametrize(
    ("free", "mean_first", "value", "trained"),
    [
        (0.0, True, 1.25, [True, True]),
        (1.0, True, 1.25, [True, True]),
        (1.0, False, 1.5, [False, True]),  # the mean of 1 and 2
        (1.5, True, 1.5, [False, False]),
    ],
)
def test_the_balanced_kl_trains_the_prior_more(free, mean_first, value, trained):
    latent = balanced_kl(NORMAL, 0.75, free, mean_first)
    got, (post, prior) = _gradients(latent, POST, PRIOR)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_array_equal(jnp.abs(post).sum((1, 2)) > 0, trained)
    # Means pull at each other equally, 3/4 and 1/4 of that are left.
    np.testing.assert_allclose(prior[..., :2], -3 * post[..., :2], rtol=1e-5, atol=1e-7)


def test_dreamer_v3_clips_every_row_and_side():
    latent = categorical(LatentConfig(1, 2, unimix=0.0, free_nats=0.1))
    post, prior = jnp.asarray([[[2.0, 0.0]], [[0.1, 0.0]]]), jnp.zeros((2, 1, 2))
    losses = latent.kl(post, prior)
    divergence = latent.divergence(post, prior)
    assert divergence[0, 0] > 0.1 > divergence[1, 0]
    for name, own, other in (("dyn", 1, 0), ("rep", 0, 1)):
        np.testing.assert_allclose(losses[name], jnp.maximum(divergence, 0.1), rtol=1e-6)
        grads = jax.grad(lambda *raw, n=name: latent.kl(*raw)[n].sum(), (0, 1))(post, prior)
        assert (grads[other] == 0).all()
        np.testing.assert_array_equal(jnp.abs(grads[own]).sum((1, 2)) > 0, [True, False])

"""Encoders and decoders of PlaNet, Dreamer V1 and V2: sizes, order of keys, errors, likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxwm.models import codecs
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.types import Box, Discrete, JaxwmError

SMALL = ClassicCodecConfig(units=8, layers=2, depth=2)
MIXED = {
    "view": Box((32, 32, 3), "uint8"),
    "position": Box((3,)),
    "kind": Discrete(4),
}


def filled(space, batch, seed=0):
    """Random observations."""
    rng = np.random.default_rng(seed)
    obs = {}
    for name, part in space.items():
        shape = (batch, *part.shape)
        if isinstance(part, Discrete):
            obs[name] = jnp.asarray(rng.integers(0, part.width, shape), jnp.int32)
        elif part.dtype == "uint8":
            obs[name] = jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
        else:
            obs[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return obs


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_every_observation_is_encoded_and_predicted_in_its_shape(norm):
    config = ClassicCodecConfig(units=8, layers=2, depth=2, norm=norm)
    encoder = codecs.encoder(config, MIXED)
    decoder = codecs.decoder(config, MIXED, 6, 5)
    obs = filled(MIXED, 3)
    tokens = jax.jit(encoder.apply)(encoder.init(jax.random.key(0)), obs)
    assert tokens.shape == (3, 2 * 2 * 8 + 8)  # 32 -> 15 -> 6 -> 2 with 2, 4, 8 channels
    params = decoder.init(jax.random.key(1))
    raw = jax.jit(decoder.apply)(params, jnp.ones((3, 6)), jnp.ones((3, 5)))
    assert {name: x.shape for name, x in raw.items()} == {
        "view": (3, 32, 32, 3),
        "position": (3, 3),
        "kind": (3, 4),
    }
    for name, space in MIXED.items():
        dist = codecs.observation_dist(space, raw[name])
        assert dist.log_prob(obs[name]).shape == (3,)
        assert dist.mode().shape == obs[name].shape
    kernels = jax.tree_util.tree_leaves_with_path(params)
    assert any("norm" in jax.tree_util.keystr(path) for path, _ in kernels) == (norm == "layer")


def test_images_come_before_vectors_and_keys_are_sorted():
    config = ClassicCodecConfig(units=8, depth=2, vectors="identity")
    space = MIXED | {"angle": Box((2,))}
    encoder = codecs.encoder(config, space)
    params, obs = encoder.init(jax.random.key(0)), filled(space, 2)
    tokens = encoder.apply(params, obs)
    want = [obs["angle"], jax.nn.one_hot(obs["kind"], 4), obs["position"]]
    np.testing.assert_array_equal(tokens[:, -9:], jnp.concatenate(want, -1))
    alone = codecs.encoder(config, {"angle": space["angle"]})
    assert alone.init(jax.random.key(0)) == {}
    np.testing.assert_array_equal(alone.apply({}, {"angle": obs["angle"]}), obs["angle"])


@pytest.mark.parametrize(
    ("size", "smallest", "kernels"),
    [
        ((64, 64), (1, 1), [5, 5, 6, 6]),  # 1 -> 5 -> 13 -> 30 -> 64, as published
        ((5, 5), (1, 1), [5]),
        ((16, 16), (1, 1), [6, 6]),  # 1 -> 6 -> 16
        ((84, 84), (2, 2), [5, 6, 6, 6]),  # 2 -> 7 -> 18 -> 40 -> 84
        ((64, 96), (1, 3), [5, 5, 6, 6]),
        ((128, 128), (1, 1), [5, 5, 5, 6, 6]),
    ],
)
def test_stages_lead_from_the_smallest_map_to_the_image(size, smallest, kernels):
    assert codecs.image_stages(size) == (smallest, kernels)
    sides = list(smallest)
    for kernel in kernels:
        sides = [2 * (side - 1) + kernel for side in sides]
    assert tuple(sides) == size


@pytest.mark.parametrize("side", [5, 8, 10, 21, 40])
def test_small_images_go_through_and_back(side):
    space = {"image": Box((side, side, 1), "uint8")}
    encoder, decoder = codecs.encoder(SMALL, space), codecs.decoder(SMALL, space, 3, 2)
    tokens = encoder.apply(encoder.init(jax.random.key(0)), filled(space, 1))
    assert tokens.shape[-1] > 0
    raw = decoder.apply(decoder.init(jax.random.key(0)), jnp.ones((1, 3)), jnp.ones((1, 2)))
    assert raw["image"].shape == (1, side, side, 1)


@pytest.mark.parametrize("size", [(4, 4), (64, 63), (64, 4)])
def test_images_that_do_not_fit_say_so(size):
    space = {"image": Box((*size, 3), "uint8")}
    with pytest.raises(JaxwmError, match=f"{size[0]}x{size[1]} pixels.*Resize"):
        codecs.encoder(SMALL, space)
    with pytest.raises(JaxwmError, match="Resize"):
        codecs.decoder(SMALL, space, 3, 2)


def test_sizes_below_one_are_refused():
    with pytest.raises(JaxwmError, match="depth"):
        ClassicCodecConfig(depth=0)


def test_likelihoods_are_full_log_densities():
    rng = np.random.default_rng(0)
    mean, x = rng.normal(size=(2, 4, 3)).astype("f4")
    dist = codecs.observation_dist(Box((3,)), jnp.asarray(mean))
    want = stats.norm(mean).logpdf(x).sum(-1)
    np.testing.assert_allclose(dist.log_prob(jnp.asarray(x)), want, rtol=1e-6)
    np.testing.assert_array_equal(dist.sample(seed=jax.random.key(0)), mean)
    scalar = codecs.observation_dist(Box(()), jnp.asarray(mean[:, 0]))
    np.testing.assert_allclose(
        scalar.log_prob(jnp.asarray(x[:, 0])), stats.norm(mean[:, 0]).logpdf(x[:, 0]), rtol=1e-6
    )


def test_images_are_compared_centred():
    image = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
    dist = codecs.observation_dist(Box((1, 3, 1), "uint8"), codecs.centred(image))
    np.testing.assert_allclose(codecs.centred(image).ravel(), [-0.5, -0.3, 0.5], atol=1e-7)
    np.testing.assert_allclose(dist.log_prob(image), [-1.5 * np.log(2 * np.pi)], rtol=1e-6)
    np.testing.assert_allclose(dist.log_prob(codecs.centred(image)), dist.log_prob(image))
    np.testing.assert_array_equal(dist.mode(), image)
    outside = codecs.CentredImage(jnp.full((1, 1, 1, 1), 3.0))
    assert outside.mode().item() == 255


def test_fewer_bits_with_noise_between_the_levels():
    image = jnp.array([0, 7, 8, 255], jnp.uint8)
    # floor(x / 8) / 32 - 0.5, and a noise of one half adds a 64th.
    np.testing.assert_allclose(
        codecs.quantize(image, jnp.full(4, 0.5)),
        np.array([0, 0, 1, 31]) / 32 + 1 / 64 - 0.5,
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        codecs.quantize(image, jnp.zeros(4), bits=8), np.array([0, 7, 8, 255]) / 256 - 0.5
    )
    noise = jnp.linspace(0, 0.999, 256)
    every = jnp.arange(256, dtype=jnp.uint8)
    for bits in (1, 5, 8):
        back = codecs.restore(codecs.quantize(every, noise, bits), bits)
        np.testing.assert_array_equal(back, np.arange(256) >> (8 - bits) << (8 - bits))
    space = Box((1, 1, 2), "uint8")
    shown = codecs.observation_dist(space, jnp.array([[[[-9.0, 9.0]]]]), bits=5).mode()
    np.testing.assert_array_equal(shown.ravel(), [0, 248])

"""Observations of every kind and size through encoder and decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.models.encoders import (
    CodecConfig,
    Decoder,
    Encoder,
    concat_entries,
    concat_size,
    encoder,
    flat_net,
    image_stages,
    observation_dist,
    reconstruction_loss,
    split_spaces,
)
from jaxwm.types import Box, Discrete, JaxwmError, zeros

DETER, STOCH = 16, 12


def codec(convs="pool", mults=(2, 3, 4, 4)):
    return CodecConfig(units=8, layers=1, depth=4, mults=mults, convs=convs, blocks=4)


def shapes(spaces, config):
    """Shapes of the tokens and of the decoder's outputs, without computing anything."""

    def both(key):
        obs = zeros(spaces, (3,))
        encoder, decoder = Encoder(spaces, config), Decoder(spaces, config)
        tokens, _ = encoder.init_with_output(key, obs)
        outputs, _ = decoder.init_with_output(key, jnp.zeros((3, DETER)), jnp.zeros((3, STOCH)))
        return tokens, outputs

    with jax.debug_key_reuse(False):
        tokens, outputs = jax.eval_shape(both, jax.random.key(0))
    return tokens.shape, jax.tree.map(lambda x: x.shape, outputs)


@pytest.mark.parametrize("convs", ["pool", "strided"])
@pytest.mark.parametrize(
    ("size", "smallest"),
    [
        # As many halvings as there are mults (4), or the nearest number that ends in 3..16.
        ((64, 64), (4, 4)),
        ((96, 96), (6, 6)),
        ((80, 80), (5, 5)),
        ((32, 32), (4, 4)),
        ((16, 16), (4, 4)),
        ((64, 96), (4, 6)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_many_sizes(convs, size, smallest, channels):
    # The strided stack spends its first entry at full resolution.
    config = codec(convs, (2, 3, 4, 4) if convs == "pool" else (1, 2, 3, 4, 4))
    space = {"image": Box((*size, channels), "uint8", 0, 255)}
    tokens, outputs = shapes(space, config)
    assert outputs == {"image": (3, *size, channels)}
    stages = image_stages(size, config)
    halvings = len(stages) - (convs == "strided")
    assert (size[0] >> halvings, size[1] >> halvings) == smallest
    assert tokens == (3, smallest[0] * smallest[1] * stages[-1])


def test_stages_take_the_multiples_from_the_front():
    assert image_stages((64, 64), codec()) == [8, 12, 16, 16]
    assert image_stages((16, 16), codec()) == [8, 12]
    assert image_stages((192, 192), codec()) == [8, 12, 16, 16]  # down to 12
    assert image_stages((512, 512), codec()) == [8, 12, 16, 16, 16]  # the last is repeated
    assert image_stages((64, 64), codec("strided", (1, 2, 3, 4, 4))) == [4, 8, 12, 16, 16]


@pytest.mark.parametrize("size", [(50, 50), (7, 7), (64, 50), (64, 512), (2, 2)])
def test_images_that_cannot_be_halved_are_told(size):
    with pytest.raises(JaxwmError, match=f"{size[0]}x{size[1]} pixels cannot be halved"):
        image_stages(size, codec())


def test_images_of_different_sizes_are_told():
    spaces = {"a": Box((64, 64, 3), "uint8"), "b": Box((32, 32, 3), "uint8")}
    with pytest.raises(JaxwmError, match=r"\['a', 'b'\] have different sizes"):
        split_spaces(spaces)


def test_two_images_and_vectors_of_every_kind():
    spaces = {
        "left": Box((16, 16, 3), "uint8", 0, 255),
        "right": Box((16, 16, 1), "uint8", 0, 255),
        "grid": Box((2, 3)),
        "level": Box(()),
        "kind": Discrete(5),
        "cards": Discrete((2, 4), (2,)),
    }
    tokens, outputs = shapes(spaces, codec())
    # The MLP's 8 units, and 4 x 4 pixels of 12 channels, once for both images.
    assert tokens == (3, 8 + 4 * 4 * 12)
    assert outputs == {
        "left": (3, 16, 16, 3),
        "right": (3, 16, 16, 1),
        "grid": (3, 2, 3),
        "level": (3,),
        "kind": (3, 5),
        "cards": (3, 2, 4),
    }


def test_entries_are_concatenated_in_sorted_order():
    spaces = {"b": Box((2, 2)), "c": Discrete((2, 3), (2,)), "a": Discrete(3), "d": Box(())}
    values = {
        "b": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "c": jnp.array([1, 2]),
        "a": jnp.array(1),
        "d": jnp.array(7.0),
    }
    # a: one of 3; b: its four numbers; c: two choices, each of the width of the larger; d.
    want = [0, 1, 0, 10, 20, 30, 40, 0, 1, 0, 0, 0, 1, 70]
    np.testing.assert_array_equal(concat_entries(spaces, values, lambda x: 10 * x), want)
    assert concat_size(spaces) == 14
    batch = {name: jnp.stack([value] * 5) for name, value in values.items()}
    assert concat_entries(spaces, batch).shape == (5, 14)


def test_an_entry_with_a_missing_element_is_zero_as_a_whole():
    spaces = {"n": Box((2,), missing=True), "k": Discrete(2, (2,), missing=True)}
    values = {
        "n": jnp.array([[1.0, 2.0], [1.0, -jnp.inf]]),
        "k": jnp.array([[0, 1], [-1, 1]]),
    }
    want = [[1, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(concat_entries(spaces, values), want)


def test_a_missing_entry_costs_nothing_and_has_no_gradient():
    space = Box((2,), missing=True)
    target = jnp.array([[1.0, 2.0], [1.0, -jnp.inf]])

    def cost(output):
        return reconstruction_loss(space, observation_dist(space, output), target)

    output = jnp.ones((2, 2))
    cost_ = cost(output)
    assert cost_[0] > 0 and cost_[1] == 0
    grad = jax.grad(lambda x: cost(x).sum())(output)
    assert np.isfinite(grad).all() and not grad[1].any() and grad[0].any()
    space = Discrete(3, missing=True)
    loss = reconstruction_loss(
        space, observation_dist(space, jnp.zeros((2, 3))), jnp.array([1, -1])
    )
    np.testing.assert_allclose(loss, [np.log(3), 0], rtol=1e-6)


def test_pixels_are_centred_and_numbers_squashed():
    spaces = {"x": Box((1,))}
    module = Encoder(spaces, codec())
    params = module.init(jax.random.key(0), {"x": jnp.zeros((1, 1))})
    # RMS norm removes the scale of a single number but for its epsilon: only the sign is left.
    far, near = (module.apply(params, {"x": jnp.full((1, 1), x)}) for x in (1e6, 1e3))
    assert np.isfinite(far).all() and np.abs(far - near).max() < 0.01
    image = Encoder({"i": Box((16, 16, 3), "uint8", 0, 255)}, codec())
    middle = jnp.full((1, 16, 16, 3), 255 / 2)
    params = image.init(jax.random.key(0), {"i": middle})
    np.testing.assert_allclose(image.apply(params, {"i": middle}), 0.0, atol=1e-6)


def test_flat_observations_have_no_parameters():
    spaces = {
        "place": Box((2,)),
        "image": Box((1, 2, 1), "uint8", 0, 255),
        "index": Discrete(3),
    }
    net = flat_net(spaces)
    assert net.init(jax.random.key(0)) == {}
    obs = {
        "place": jnp.asarray([[5.0, -7.0]]),
        "image": jnp.asarray([[[[255], [51]]]], jnp.uint8),
        "index": jnp.asarray([1]),
    }
    # Keys in their order: image in 0 to 1, index one-hot, place as it is.
    np.testing.assert_allclose(net.apply({}, obs), [[1, 0.2, 0, 1, 0, 5, -7]], rtol=1e-6)


def test_the_encoder_as_two_functions():
    spaces = {"place": Box((2,))}
    config = CodecConfig(units=4, layers=1)
    net, module = encoder(config, spaces), Encoder(spaces, config)
    params = net.init(jax.random.key(0))
    obs = {"place": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}
    np.testing.assert_array_equal(net.apply(params, obs), module.apply({"params": params}, obs))

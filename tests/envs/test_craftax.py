"""The craftax adapter against the package's own environments, stepped side by side."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.envs import craftax, validate
from jaxwm.envs.wrappers import batch, guard
from jaxwm.types import JaxwmError

# Looked for, not imported: that takes seconds, and the marked tests may be left out.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("craftax") is None, reason="craftax is not installed"
)
CLASSIC = "Craftax-Classic-Pixels-v1"
COUNT = 2


@pytest.fixture(autouse=True)
def lenient():
    """The same keys go to both sides, and craftax promotes ranks."""
    with jax.debug_key_reuse(False), jax.numpy_rank_promotion("allow"):
        yield


def check_contract(env):
    """`validate` with the strictness of all other tests."""
    with jax.debug_key_reuse(True), jax.numpy_rank_promotion("raise"):
        validate(env)


class Pair:
    """The adapter in a guarded batch and the package's environment, each to be compiled once."""

    def __init__(self, name, limit):
        self.limit = limit
        self.env = guard(batch(craftax.make(name, max_timesteps=limit), COUNT))
        self.reset, self.step = jax.jit(self.env.reset), jax.jit(self.env.step)

        from craftax.craftax_env import make_craftax_env_from_name

        raw = make_craftax_env_from_name(name, auto_reset=False)
        params = raw.default_params.replace(max_timesteps=limit)
        self.raw_reset = jax.jit(lambda key: raw.reset_env(key, params))
        self.raw_step = jax.jit(lambda key, state, action: raw.step_env(key, state, action, params))


@pytest.fixture(scope="module")
def classic():
    return Pair(CLASSIC, limit=25)


def same(got, want):
    """Compares a row's observation with the package's, images after scaling and padding."""
    want = np.asarray(want)
    if want.ndim == 1:
        np.testing.assert_allclose(got["vector"], want, rtol=0, atol=1e-6)
        return
    height, width, _ = want.shape
    image = np.pad(255 * want, ((0, -height % 16), (0, -width % 16), (0, 0)))
    assert got["image"].dtype == np.uint8 and got["image"].shape == image.shape
    # Half-way cases are common, and rounding turns either way by the order of the operations.
    assert np.abs(got["image"] - image).max() <= 0.5 + 1e-4


def compare(pair, steps):
    """Steps both with the same keys and random actions; counts cuts and true ends."""
    fan = jax.jit(lambda key: jax.random.split(key, COUNT))
    actions = np.random.default_rng(0).integers(0, pair.env.action_space.classes, (steps, COUNT))
    cuts = ends = 0
    key_reset, key_steps = jax.random.split(jax.random.key(7))
    state, row = jax.device_get(pair.reset(key_reset))
    episodes = [pair.raw_reset(key) for key in fan(key_reset)]
    states = [state for _, state in episodes]
    for b, (obs, _) in enumerate(episodes):
        same({name: value[b] for name, value in row.obs.items()}, obs)
    ended = [False] * COUNT
    for key, action in zip(jax.random.split(key_steps, steps), actions, strict=True):
        state, row = pair.step(state, jnp.asarray(action, jnp.int32), key)
        key_step, key_again = jax.random.split(key)
        keys, keys_again = fan(key_step), fan(key_again)
        row = jax.device_get(row)
        for b in range(COUNT):
            if ended[b]:
                obs, states[b] = pair.raw_reset(keys_again[b])
                want = (0.0, True, False, False)
            else:
                obs, states[b], reward, done, _ = pair.raw_step(keys[b], states[b], int(action[b]))
                cut = bool(done) and int(states[b].timestep) == pair.limit
                cuts, ends = cuts + cut, ends + (bool(done) and not cut)
                want = (float(reward), False, bool(done), bool(done) and not cut)
            got = (row.reward[b], row.is_first[b], row.is_last[b], row.is_terminal[b])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
            same({name: value[b] for name, value in row.obs.items()}, obs)
            ended[b] = want[2]
    assert int(state.fault.count) == 0
    return cuts, ends


def test_rows_equal_the_package_across_time_limits(classic):
    assert compare(classic, 60) == (4, 0)  # two environments, both cut at steps 25 and 51


def test_worlds_differ_by_key(classic):
    _, row = classic.reset(jax.random.key(0))
    _, other = classic.reset(jax.random.key(1))
    first, second = np.asarray(row.obs["image"])
    assert (first != second).any() and (first != other.obs["image"][0]).any()


def ends(pair, **changes):
    """`is_last` and `is_terminal` after one idle step from a new world with these changes."""
    key = jax.random.key(3)
    state, _ = pair.reset(key)
    world = state.env.env
    values = {name: jnp.full_like(getattr(world, name), to) for name, to in changes.items()}
    changed = state.env._replace(env=world.replace(**values))
    _, row = pair.step(state._replace(env=changed), jnp.zeros(COUNT, jnp.int32), key)
    return bool(row.is_last[0]), bool(row.is_terminal[0])


def test_ends_are_told_from_the_limit(classic):
    from craftax.craftax_classic.constants import BlockType

    lava = BlockType.LAVA.value
    assert ends(classic) == (False, False)
    assert ends(classic, player_health=-1) == (True, True)
    assert ends(classic, map=lava) == (True, True)
    assert ends(classic, timestep=classic.limit - 1) == (True, False)
    assert ends(classic, timestep=classic.limit - 1, map=lava) == (True, True)


def test_images_are_padded_to_sides_that_halve(classic):
    space = classic.env.obs_space["image"]
    assert (space.shape, space.dtype) == ((64, 64, 3), "uint8")
    image = np.asarray(classic.reset(jax.random.key(0))[1].obs["image"][0])
    assert image.max() > 200 and image[:63, :63].any(axis=-1).mean() > 0.5
    assert not image[63].any() and not image[:, 63].any()


def test_unknown_names_and_options():
    with pytest.raises(JaxwmError, match=r"Did you mean .*Craftax-Classic-Pixels-v1"):
        craftax.make("Craftax-Classic-Pixel")
    with pytest.raises(JaxwmError, match=r"option of craftax/.* Did you mean max_timesteps"):
        craftax.make("Craftax-Classic-Symbolic-v1", max_timestep=3)


def test_the_contract_holds_in_silence(capfd):
    env = craftax.make(CLASSIC)
    assert env.name == f"craftax/{CLASSIC}" and env.action_space.classes == 17
    check_contract(env)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", craftax.NAMES)
def test_every_environment_equals_the_package_for_long(name):
    check_contract(craftax.make(name))
    pair = Pair(name, limit=300)
    cuts, _ = compare(pair, 1000)
    assert cuts > 0
    assert ends(pair, player_health=-1) == (True, True)
    assert ends(pair, timestep=pair.limit - 1) == (True, False)
    if "Classic" not in name:
        assert ends(pair, boss_progress=100) == (True, True)  # beaten

"""A trained agent in three lines, on numpy arrays."""

import jax
import numpy as np
import pytest

import jaxwm
from jaxwm import policy as policies
from jaxwm import train
from jaxwm.recipes import agent_of, dreamer_v3
from jaxwm.types import Box, Discrete, JaxwmError


@pytest.fixture(scope="module")
def policy(finished):
    return jaxwm.load(finished)


def test_three_lines_play_an_episode(policy):
    action, state = policy.act(np.array(1))
    assert isinstance(action, np.ndarray) and action.shape == () and action in (0, 1)
    actions = []
    for cue in (0, 0, 3):
        action, state = policy.act({"cue": cue}, state)
        actions.append(int(action))
    assert set(actions) <= {0, 1}


def test_a_batch_has_a_leading_axis_and_remembers(policy):
    cues = np.array([1, 2, 1])
    action, state = policy.act(cues)
    assert action.shape == (3,) and action.dtype == np.int32
    assert not state.is_first.any()
    np.testing.assert_array_equal(state.action, action)

    def latent(state, key):
        return policy.act(cues, state._replace(key=jax.random.key(key)))[1].carry.model.core

    # An episode that begins anew forgets: it goes on as a fresh one with the same draws.
    fresh, going = latent(policy.initial(3), 1), latent(state, 1)
    again = latent(state._replace(is_first=~state.is_first), 1)
    np.testing.assert_array_equal(again, fresh)
    assert (going != fresh).any()


def test_the_seed_decides(finished, policy):
    cue = np.ones(64, int)
    same, other = jaxwm.load(finished), jaxwm.load(finished, seed=1)
    np.testing.assert_array_equal(policy.act(cue)[0], same.act(cue)[0])
    assert (policy.act(cue)[0] != other.act(cue)[0]).any()


def test_boxes_are_clipped_and_remembered_as_they_were_drawn():
    config = dreamer_v3.config("toy/Reach", "debug", None, None)
    env = train.make_env(config)
    agent = agent_of(config, env.obs_space, env.action_space)
    params = jax.jit(agent.init)(jax.random.key(0)).params
    obs = {name: np.zeros((64, *x.shape), x.dtype) for name, x in env.obs_space.items()}
    action, state = policies.Policy(agent, params, env).act(obs)
    assert np.abs(state.action).max() > 1
    np.testing.assert_array_equal(action, np.clip(state.action, -1, 1))


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        ({"vector": 1}, "no observation called 'vector'. Known: cue"),
        ({}, "lacks 'cue'"),
        (np.zeros((2, 2), int), r"'cue' has shape (2, 2); it should be (), or that with a batch"),
        (np.zeros((0,), int), "empty batch"),
        (0.5, "is float64; it should be integers"),
        (4, "is 4; it should be 0 to 4 less one"),
    ],
)
def test_an_observation_that_does_not_fit_is_told(policy, obs, words):
    with pytest.raises(JaxwmError) as error:
        policy.act(obs)
    assert words in str(error.value)


def test_a_state_of_another_batch_is_told(policy):
    with pytest.raises(JaxwmError, match="batch of 2 and the state one of 1"):
        policy.act(np.array([1, 2]), policy.initial())
    with pytest.raises(JaxwmError, match="at least one episode, not 0"):
        policy.initial(0)


def test_a_seed_that_was_not_trained_is_told(finished):
    with pytest.raises(JaxwmError, match=r"trained 1 members .* member is 1"):
        jaxwm.load(finished, member=1)


IMAGE, VECTOR = Box((4, 4, 3), "uint8", 0, 255), Box((2,), missing=True)


@pytest.mark.parametrize(
    ("space", "obs", "words"),
    [
        ({"x": VECTOR, "y": VECTOR}, [1.0, 2.0], "bare array, but this agent sees ['x', 'y']"),
        ({"x": VECTOR, "y": VECTOR}, {"x": [1, 2], "y": [[1, 2]]}, "leading axes are"),
        ({"x": IMAGE}, np.zeros((4, 4, 3)), "is float64; an image is uint8"),
        ({"x": VECTOR}, [1.0, np.nan], "has a NaN or an infinity"),
        ({"x": VECTOR}, ["a", "b"], "it should be numbers"),
        ({"x": Discrete((2, 3), (2,))}, [1, 3], "is [1 3]; it should be 0 to (2, 3) less one"),
        ({"x": Discrete(2)}, -1, "is -1"),
    ],
)
def test_every_kind_of_space_is_checked(space, obs, words):
    with pytest.raises(JaxwmError) as error:
        policies._arrays(obs, space)
    assert words in str(error.value)


def test_good_observations_pass_in_the_type_of_their_space():
    arrays, size = policies._arrays(
        {"x": [1, -np.inf], "i": np.zeros((4, 4, 3), np.uint8)}, {"x": VECTOR, "i": IMAGE}
    )
    assert size == 0 and arrays["x"].dtype == np.float32 and arrays["i"].shape == (1, 4, 4, 3)
    arrays, size = policies._arrays(np.array([[1, 2], [0, 2]]), {"x": Discrete((2, 3), (2,))})
    assert size == 2 and arrays["x"].dtype == np.int32

"""`validate` says in words what is wrong with an environment."""

import jax
import jax.numpy as jnp
import pytest

from jaxwm.envs import validate
from jaxwm.types import Box, Discrete, Env, JaxwmError, first, transition

OBS = {"speed": Box((2,))}
ACTION = Discrete(2)


def env(obs_space=OBS, action_space=ACTION, reset=None, step=None, change=lambda row: row) -> Env:
    """A correct environment, but for what is given."""

    def good_reset(key):
        return jnp.zeros(()), first(ACTION, {"speed": jnp.zeros(2)})

    def good_step(state, action, key):
        return state, change(transition(action, {"speed": jnp.zeros(2)}, 0.0, False))

    return Env("mine", obs_space, action_space, reset or good_reset, step or good_step)


def test_a_good_environment_passes():
    validate(env())


def broken_if(state, action, key):
    return (state if state > 0 else -state), None


def growing(state, action, key):
    row = transition(action, {"speed": jnp.zeros(2)}, 0.0, False)
    return jnp.zeros(2), row


def nested(state, action, key):
    return {"x": state}, transition(action, {"speed": jnp.zeros(2)}, 0.0, False)


def obs(value):
    return lambda row: row._replace(obs={"speed": value})


BROKEN = {
    "no observation": (env(obs_space={}), "observation space is empty"),
    "reserved name": (env({"reward": Box((1,))}), "'reward' has a name that rows use"),
    "rank": (env({"speed": Box((1, 1, 1, 1))}), "'speed' has shape .* Use 0 to 3 axes"),
    "dtype": (env({"speed": Box((2,), "int32")}), "'speed' is a Box of int32. Cast it"),
    "bytes": (env({"speed": Box((2,), "uint8")}), "'speed' is uint8 .* means an image"),
    "bounds": (env({"speed": Box((2,), low=1.0, high=0.0)}), "'speed' has low 1.0 above"),
    "bound count": (env({"speed": Box((2,), low=(0.0,))}), "'speed' has 1 bounds for 2"),
    "classes": (env({"speed": Discrete((2, 0), (2,))}), "'speed' has classes"),
    "not a space": (env({"speed": (2,)}), r"'speed' has the space \(2,\). Use jaxwm"),
    "no action": (env(action_space={}), "action space is an empty dict"),
    "integer box action": (
        env(action_space={"push": Box((2, 2, 3), "uint8")}),
        "action 'push' is a Box of uint8. Use float32, or Discrete",
    ),
    "other action": (env(action_space=Box((1,))), "reset returns the action as int32 .* float32"),
    "dict action": (
        env(action_space={"push": ACTION}),
        "reset returns the action .* {'push': Disc",
    ),
    "obs shape": (
        env(change=obs(jnp.zeros(3))),
        r"step returns observation 'speed' as float32 of shape \(3,\), but float32 of shape \(2,\)",
    ),
    "obs dtype": (env(change=obs(jnp.zeros(2, int))), "step returns observation 'speed' as int32"),
    "obs nested": (env(change=obs({"x": jnp.zeros(2)})), "'speed' as {.* one array is expected"),
    "obs keys": (
        env(change=lambda row: row._replace(obs={"sped": jnp.zeros(2)})),
        r"observations \['sped'\], but the space has \['speed'\]",
    ),
    "obs array": (
        env(change=lambda row: row._replace(obs=jnp.zeros(2))),
        "a dict of arrays is expected",
    ),
    "reward": (
        env(change=lambda row: row._replace(reward=jnp.zeros(1))),
        r"the reward as float32 of shape \(1,\)",
    ),
    "flag": (
        env(change=lambda row: row._replace(is_last=jnp.zeros(()))),
        "is_last as float32 .* bool",
    ),
    "state shape": (env(step=growing), r"leaf itself is float32 of shape \(\) after reset"),
    "state structure": (env(step=nested), "structure .* Keep the same fields"),
    "python if": (env(step=broken_if), "step cannot be compiled .* jax functions only"),
    "no step": (env(step=lambda state, action, key: state), "must return a state and a"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_messages(case):
    broken, message = BROKEN[case]
    with pytest.raises(JaxwmError, match=f"(?s)Environment mine: .*{message}"):
        validate(broken)


def test_nothing_is_computed():
    def reset(key):
        jax.debug.callback(lambda: pytest.fail("reset ran"))
        return jnp.zeros(()), first(ACTION, {"speed": jnp.zeros(2)})

    validate(env(reset=reset))

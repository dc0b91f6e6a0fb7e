"""PlaNet's sizes, rhythm and presets, and that its parts act and learn together."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import config as configs
from jaxwm.behaviors.planner import CEMConfig
from jaxwm.recipes import RunConfig, agent_of, planet
from jaxwm.types import Box, Discrete, JaxwmError, Step, Window

IMAGE = {"image": Box((64, 64, 3), "uint8", 0.0, 255.0)}
PUSH = Box((2,), low=-1.0, high=1.0)


def test_the_paper_model_has_the_sizes_of_the_paper():
    agent = planet.agent(planet.sized("paper"), IMAGE, PUSH)
    shapes = jax.eval_shape(agent.init, jax.random.key(0)).params
    count = lambda name: sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["model"][name]))  # noqa: E731
    dense = lambda inputs, outputs: (inputs + 1) * outputs  # noqa: E731
    conv = lambda kernel, inputs, outputs: (kernel**2 * inputs + 1) * outputs  # noqa: E731
    # 64x64 pixels become 2x2 maps of 256 channels: 1024 numbers.
    assert count("encoder") == sum(
        conv(4, *channels) for channels in ((3, 32), (32, 64), (64, 128), (128, 256))
    )
    assert count("core") == dense(30 + 2, 200) + dense(400, 400) + dense(400, 200)
    assert count("prior") == dense(200, 200) + 2 * dense(200, 30)
    assert count("posterior") == dense(200 + 1024, 200) + 2 * dense(200, 30)
    assert count("reward") == dense(230, 300) + 2 * dense(300, 300) + dense(300, 1)
    assert count("decoder") == dense(230, 1024) + sum(
        conv(kernel, *channels)
        for kernel, channels in ((5, (1024, 128)), (5, (128, 64)), (6, (64, 32)), (6, (32, 3)))
    )
    assert shapes["behavior"] == {}


def test_the_rhythm_of_the_paper():
    run = planet.config(preset="cartpole_swingup")
    assert (run.env, run.action_repeat, run.envs) == ("dm_control/cartpole-swingup:image", 8, 1)
    # Episodes of 1000 frames are 125 steps: five random ones, then a hundred updates each.
    rhythm = run.replay.rhythm(run.envs, warmup=0)
    assert (rhythm.random, rhythm.every, rhythm.pretrain) == (625, 125, 100)
    made, credit = {}, 0
    for written in range(1, 1001):
        updates, credit = rhythm.due(written, credit)
        if updates:
            made[written] = updates
    assert made == {625: 100, 750: 100, 875: 100, 1000: 100}


@pytest.mark.parametrize("preset", planet.PRESETS)
def test_every_preset_is_a_run_whose_parts_can_be_overridden(preset, tmp_path):
    run = planet.config(preset=preset)
    assert run.recipe == "planet" and run.size in ("paper", "nano")
    other = planet.config("toy/Memory", "debug", None, preset)
    assert (other.env, other.size) == ("toy/Memory", "debug")
    assert other.agent.model == planet.sized("debug").model
    assert other.agent.behavior == planet.sized("debug").behavior
    configs.write(run, tmp_path / "config.json")
    assert configs.from_dict(RunConfig, configs.read_json(tmp_path / "config.json")) == run


def test_what_does_not_exist_is_refused():
    with pytest.raises(JaxwmError, match="no size of planet called 'huge'"):
        planet.sized("huge")
    with pytest.raises(JaxwmError, match=r"called 'reech'\. Did you mean reach"):
        planet.config(preset="reech")
    with pytest.raises(JaxwmError, match="planet has no variants"):
        planet.config("toy/Reach", variant="head")
    with pytest.raises(JaxwmError, match="Name an environment"):
        planet.config()
    with pytest.raises(JaxwmError, match=r"Set model\.predict_ends to True"):
        planet.Config(behavior=CEMConfig(continues=True))


def window(obs_space, action, seed=0, length=5, batch=2):
    """A window of random rows, in which an episode ends."""
    rng = np.random.default_rng(seed)
    lead = (length + 1, batch)
    obs = {
        name: jnp.asarray(rng.integers(0, 256, (*lead, *space.shape)), space.dtype)
        if space.dtype == "uint8"
        else jnp.asarray(rng.normal(size=(*lead, *space.shape)), jnp.float32)
        for name, space in obs_space.items()
    }
    is_last = np.zeros(lead, bool)
    is_last[2] = True
    steps = Step(
        action=jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), action),
        obs=obs,
        reward=jnp.asarray(rng.normal(size=lead), jnp.float32),
        is_first=jnp.asarray(np.roll(is_last, 1, 0)),
        is_last=jnp.asarray(is_last),
        is_terminal=jnp.asarray(is_last),
    )
    index = jnp.zeros(lead, jnp.int32)
    return Window((), steps, jnp.zeros(batch, jnp.int32), index)


SPACES = {
    "vector": ({"x": Box((3,))}, PUSH, jnp.zeros(2)),
    "image": (IMAGE, Discrete(4), jnp.int32(1)),
    "mixed": (
        {"image": Box((64, 64, 1), "uint8", 0.0, 255.0), "x": Box((2,))},
        {"push": PUSH, "turn": Discrete((2, 3), (2,))},
        {"push": jnp.zeros(2), "turn": jnp.zeros(2, jnp.int32)},
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_it_acts_and_learns_with_every_kind_of_space(name):
    obs_space, action_space, action = SPACES[name]
    config = planet.sized("debug")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, predict_ends=True),
        behavior=dataclasses.replace(config.behavior, continues=True),
    )
    agent = planet.agent(config, obs_space, action_space)
    state = agent.init(jax.random.key(0))
    rows = window(obs_space, action)
    row = jax.tree.map(lambda x: x[0], rows.steps)
    carry, chosen, memo = jax.jit(agent.act)(state.params, agent.initial(2), row, jax.random.key(1))
    assert memo == ()
    assert jax.tree.map(lambda x: (x.shape[1:], x.dtype), chosen) == jax.tree.map(
        lambda x: (x.shape, x.dtype), action
    )
    assert jax.tree.structure(carry) == jax.tree.structure(agent.initial(2))
    after, memo, metrics = jax.jit(agent.update)(state, rows, jax.random.key(2))
    assert memo is None
    assert all(np.isfinite(x) for x in metrics.values())
    assert {"loss/kl", "loss/reward", "loss/continue", "loss/total", "grad_norm"} <= set(metrics)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state.params, after.params)
    assert any(jax.tree.leaves(moved["model"]["encoder"]))
    assert all(jax.tree.leaves(moved["model"]["reward"]))


def test_the_loss_is_the_weighted_sum_of_the_paper():
    obs_space, action_space, action = SPACES["vector"]
    agent = planet.agent(planet.sized("debug"), obs_space, action_space)
    _, _, metrics = jax.jit(agent.update)(
        agent.init(jax.random.key(0)), window(obs_space, action), jax.random.key(2)
    )
    want = metrics["loss/kl"] + metrics["loss/rec/x"] + 10 * metrics["loss/reward"]
    np.testing.assert_allclose(metrics["loss/total"], want, rtol=1e-6)


def test_windows_start_from_nothing():
    """As in the code, no memory is stored: the row before a window does not count."""
    obs_space, action_space, action = SPACES["vector"]
    agent = planet.agent(planet.sized("debug"), obs_space, action_space)
    state, rows = agent.init(jax.random.key(0)), window(obs_space, action)
    update = jax.jit(agent.update)
    one = update(state, rows, jax.random.key(2))[2]
    changed = rows.steps.obs["x"].at[0].add(7.0)
    other = update(
        state, rows._replace(steps=rows.steps._replace(obs={"x": changed})), jax.random.key(2)
    )[2]
    assert one["loss/total"] == other["loss/total"]


def test_a_run_builds_the_agent_of_its_recipe():
    run = planet.config("toy/Reach", "debug")
    agent = agent_of(run, {"x": Box((3,))}, PUSH)
    assert agent.data == "windows" and agent.behavior is not None

"""Whole agents of Dreamer V1 and V2: they act, learn in one program, and take traced numbers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import agent
from jaxwm.behaviors.actor_critic_v1 import ActorCriticV1Config, actor_critic_v1
from jaxwm.behaviors.actor_critic_v2 import ActorCriticV2Config, actor_critic_v2
from jaxwm.config import flatten
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.latents import GaussianConfig, LatentConfig
from jaxwm.models.recurrent import KerasGRUConfig, LayerNormGRUConfig
from jaxwm.optim import AdamConfig, adam_tf, grouped
from jaxwm.recipes import dreamer_v1, dreamer_v2
from jaxwm.recipes.sweep import put
from jaxwm.types import Agent, Box, Discrete, Step, Window, zeros

OBS = {"vector": Box((3,))}
ACTIONS = {"number": Box((2,), low=-1.0, high=1.0), "choice": Discrete(3)}
T, B = 5, 2
CODEC = ClassicCodecConfig(units=8, layers=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a behaviour and the optimisers of both."""

    model: dreamer_v1.ModelConfig | dreamer_v2.ModelConfig
    behavior: ActorCriticV1Config | ActorCriticV2Config
    optim: AdamConfig = AdamConfig(1e-3)
    behavior_optim: AdamConfig = AdamConfig(1e-3, weight_decay=1e-6)


V1 = Config(
    dreamer_v1.ModelConfig(
        core=KerasGRUConfig(deter=8, hidden=8),
        latent=GaussianConfig(stoch=4),
        codec=CODEC,
        units=8,
        free_nats=0.0,
        predict_ends=True,
    ),
    ActorCriticV1Config(units=8, policy_layers=1, value_layers=1, imagine=3),
)
V2 = Config(
    dreamer_v2.ModelConfig(
        core=LayerNormGRUConfig(deter=8, hidden=8),
        latent=LatentConfig(stoch=2, classes=3, unimix=0.0, free_nats=0.0),
        codec=CODEC,
        units=8,
        layers=1,
    ),
    ActorCriticV2Config(units=8, layers=1, imagine=3, gradient="both", slow_every=2),
)


def build(config: Config, action_space) -> Agent:
    """One loss for Dreamer V1; Dreamer V2 steps its model first."""
    model_optimizer = adam_tf(**vars(config.optim))
    other = adam_tf(**vars(config.behavior_optim))
    weights = lambda name, updates: 1.0  # noqa: E731
    recipe = dreamer_v1 if isinstance(config.model, dreamer_v1.ModelConfig) else dreamer_v2
    model = recipe.world_model(config.model, OBS, action_space)
    size = config.model.core.deter + recipe.parts(config.model, OBS, action_space).latent.size
    if recipe is dreamer_v1:
        behavior = actor_critic_v1(
            config.behavior, action_space, model, size, config.model.discount
        )
        groups = {"model": model_optimizer, "behavior/policy": other, "behavior/value": other}
        return agent.joint(model, behavior, weights, grouped(groups))
    behavior = actor_critic_v2(config.behavior, action_space, model, size, config.model.discount)
    parts = grouped({"policy": other, "value": other})
    return agent.in_turn(model, behavior, weights, model_optimizer, parts)


def window(action_space) -> Window:
    rows = (T + 1, B)
    key = jax.random.key(7)
    no = jnp.zeros(rows, bool)
    obs = {"vector": jax.random.normal(key, (*rows, 3))}
    reward = jnp.arange(1.0 * (T + 1) * B).reshape(rows) / 10
    steps = Step(zeros(action_space, rows), obs, reward, no, no, no.at[3, 0].set(True))
    return Window((), steps, jnp.zeros(B, jnp.int32), jnp.zeros(rows, jnp.int32))


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("config", [V1, V2], ids=["dreamer_v1", "dreamer_v2"])
def test_an_agent_learns_and_acts(config, name):
    space = ACTIONS[name]
    whole = build(config, space)
    state = whole.init(jax.random.key(0))
    update = jax.jit(whole.update)
    first = state
    for step in range(3):
        state, memo, metrics = update(state, window(space), jax.random.key(step))
        assert memo is None
        for metric, value in metrics.items():
            assert value.shape == () and np.isfinite(value), metric
    assert {"loss/policy", "loss/value", "loss/kl", "loss/reward", "dream/return"} <= set(metrics)
    # Every network has moved, that of every group.
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        before = first.params
        for part in path:
            before = before[part.key]
        assert (leaf != before).any(), jax.tree_util.keystr(path)
    if config is V2:
        # Copied after the first and the third update.
        chex.assert_trees_all_equal(
            state.rest.behavior.slow.params, state.params["behavior"]["value"]
        )
    row = jax.tree.map(lambda x: x[0], window(space).steps)
    carry = whole.initial(B)
    for mode in ("explore", "sample", "greedy"):
        carry, action, memo = whole.act(state.params, carry, row, jax.random.key(9), mode)
        assert action.shape == (B, *space.shape) and action.dtype == space.dtype
        assert memo == ()


@pytest.mark.parametrize("config", [V1, V2], ids=["dreamer_v1", "dreamer_v2"])
def test_every_number_of_an_agent_can_be_traced(config):
    space = ACTIONS["number"]
    paths = [path for path, value in flatten(config).items() if isinstance(value, float)]
    assert {"behavior.lambda_", "optim.learning_rate", "behavior_optim.clip"} < set(paths)

    def update(values, key):
        whole = build(put(config, values), space)
        state = whole.init(key)
        row = jax.tree.map(lambda x: x[0], window(space).steps)
        for mode in ("explore", "greedy"):
            whole.act(state.params, whole.initial(B), row, key, mode)
        return whole.update(state, window(space), key)[0]

    with jax.debug_key_reuse(False):
        jax.eval_shape(update, dict.fromkeys(paths, jnp.float32(0.5)), jax.random.key(0))

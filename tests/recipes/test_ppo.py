"""The recipe's numbers against the public codes, its sizes and variants; nothing is allocated."""

import dataclasses
import math

import jax
import pytest

from jaxwm import config as configs
from jaxwm.optim import Schedule
from jaxwm.recipes import RunConfig, agent_of, ppo
from jaxwm.types import Box, Discrete, JaxwmError


def shapes(config, obs_space, action_space):
    agent = ppo.agent(config, obs_space, action_space)
    with jax.debug_key_reuse(False):
        return jax.eval_shape(agent.init, jax.random.key(0)).params


def test_small_networks_have_the_parameters_of_cleanrl():
    params = shapes(ppo.sized("small"), {"vector": Box((4,))}, Discrete(2))
    # Two MLPs 4-64-64 with 2 outputs and 1.
    hidden = 4 * 64 + 64 + 64 * 64 + 64
    wanted = 2 * hidden + 64 * 2 + 2 + 64 + 1
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == wanted


def test_images_have_a_shared_encoder():
    image, vector = Box((64, 64, 3), "uint8", 0, 255), Box((4,))
    config = ppo.sized("debug")
    assert "encoder" in shapes(config, {"image": image, "vector": vector}, Discrete(2))
    assert "encoder" not in shapes(config, {"vector": vector}, Discrete(2))
    shared = dataclasses.replace(config, encoder="shared")
    assert "encoder" in shapes(shared, {"vector": vector}, Discrete(2))
    flat = dataclasses.replace(config, encoder="flat")
    params = shapes(flat, {"image": image}, Discrete(2))
    assert "encoder" not in params
    assert params["actor"]["0"]["kernel"].shape == (64 * 64 * 3, 8)


def test_variants_say_what_the_public_codes_do():
    assert ppo.sized("small").ppo.truncation == "bootstrap"
    theirs = {name: ppo.sized("small", name).ppo for name in ("purejaxrl", "cleanrl")}
    assert {x.truncation for x in theirs.values()} == {"terminal"}
    assert theirs["purejaxrl"].normalize_advantage == "population"
    assert theirs["cleanrl"].normalize_advantage == "sample"


@pytest.mark.parametrize(
    ("preset", "envs", "length", "steps", "numbers"),
    [
        # cleanrl, docs/rl-algorithms/ppo.md; purejaxrl, ppo.py
        (
            *("cartpole", 4, 128, 500_000),
            {"epochs": 4, "minibatches": 4, "entropy": 0.01, "learning_rate": Schedule(2.5e-4, 0)},
        ),
        # gymnax-blines, agents/*/ppo.yaml
        ("gymnax_cartpole", 8, 32, 150_000, {"max_grad_norm": 0.5, "learning_rate": 5e-4}),
        ("acrobot", 16, 32, 500_000, {"max_grad_norm": 1.0, "learning_rate": 5e-4}),
        ("catch", 16, 32, 100_000, {"max_grad_norm": 1.0, "entropy": 0.01}),
        ("mountaincar", 16, 32, 250_000, {"epochs": 64, "entropy": 0.003}),
        ("deepsea", 8, 32, 150_000, {"max_grad_norm": 0.5, "epochs": 4}),
        ("minatar", 64, 128, 10_000_000, {"discount": 0.999, "minibatches": 8}),
        # purejaxrl, examples/brax_minatar.ipynb and ppo_continuous_action.py
        ("minatar_purejaxrl", 64, 128, 10_000_000, {"discount": 0.99, "minibatches": 8}),
        ("brax", 2048, 10, 50_000_000, {"minibatches": 32, "entropy": 0.0, "learning_rate": 3e-4}),
        # cleanrl, ppo_continuous_action.py
        ("mujoco", 1, 2048, 1_000_000, {"epochs": 10, "minibatches": 32, "normalize_obs": True}),
    ],
)
def test_presets_have_the_published_numbers(preset, envs, length, steps, numbers):
    run = ppo.config(preset=preset)
    assert (run.envs, run.replay.batch_length, run.steps) == (envs, length, steps)
    assert numbers.items() <= vars(run.agent.ppo).items()
    assert run.agent.ppo.clip == run.agent.ppo.value_clip == 0.2 and run.agent.ppo.lambda_ == 0.95
    run.replay.check_newest(run.envs)


def test_sizes_change_networks_and_nothing_else():
    run = ppo.config(preset="minatar")
    assert run.size == "large" and run.agent.ppo.heads.hidden == (256, 256)
    small = ppo.config(preset="minatar", size="small")
    assert small.agent.ppo.heads.hidden == (64, 64) and small.agent.ppo.heads.act == "relu"
    heads = run.agent.ppo.heads
    assert dataclasses.replace(small.agent.ppo, heads=heads) == run.agent.ppo


def test_a_debug_run_updates_within_a_hundred_steps():
    for preset in (None, *ppo.PRESETS):
        run = ppo.config("toy/Memory", "debug", preset=preset)
        rows = run.envs * (run.replay.batch_length + 1)
        assert rows <= 100 and run.replay.capacity == rows
        assert configs.from_dict(RunConfig, configs.to_dict(run)) == run


def test_the_learning_rate_falls_over_the_whole_run(monkeypatch):
    seen, make = [], ppo.ppo

    def noted(config, *others):
        seen.append(config.learning_rate)
        return make(config, *others)

    monkeypatch.setattr(ppo, "ppo", noted)
    run = ppo.config(preset="cartpole")
    agent_of(run, {"vector": Box((4,))}, Discrete(2))
    agent_of(dataclasses.replace(run, steps=1_000_000), {"vector": Box((4,))}, Discrete(2))
    # 4 environments times 128 rows an update.
    assert [x.updates for x in seen] == [976, 1953]
    assert {(x.start, x.end) for x in seen} == {(2.5e-4, 0.0)}


def test_unknown_names_raise():
    with pytest.raises(JaxwmError, match=r"no preset of ppo called 'catchy'. Did you mean catch"):
        ppo.config(preset="catchy")
    with pytest.raises(JaxwmError, match=r"no size of ppo called 'smal'. Did you mean small"):
        ppo.config("toy/Memory", "smal")
    with pytest.raises(JaxwmError, match=r"no variant of ppo called 'clean'. Did you mean cleanrl"):
        ppo.config("toy/Memory", variant="clean")
    with pytest.raises(JaxwmError, match="Name an environment"):
        ppo.config()

"""The recipe's sizes and variants, against the numbers of the reference; nothing is allocated."""

import dataclasses
import math

import jax
import pytest

from jaxwm import config as configs
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.types import Box, Discrete, JaxwmError

# Parameters of the reference for a vector of 24 numbers with 6 continuous actions, and for
# 64x64 colour images with 6 discrete actions.
PARAMETERS = {
    "size1m": (640_867, 686_456),
    "size12m": (9_738_019, 10_492_616),
    "size25m": (21_782_947, 23_487_016),
    "size50m": (38_612_003, 41_646_984),
    "size100m": (86_622_499, 93_463_624),
    "size200m": (153_769_507, 165_942_536),
    "size400m": (345_473_059, 372_887_176),
}


def count(config, obs_space, action_space):
    agent = dreamer_v3.agent(config, obs_space, action_space)
    with jax.debug_key_reuse(False):
        shapes = jax.eval_shape(agent.init, jax.random.key(0)).params
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size", dreamer_v3.DETER)
def test_sizes_have_the_parameters_of_the_reference(size):
    config = dreamer_v3.sized(size)
    vector, image = PARAMETERS[size]
    assert count(config, {"vector": Box((24,))}, Box((6,), low=-1, high=1)) == vector
    assert count(config, {"image": Box((64, 64, 3), "uint8", 0, 255)}, Discrete(6)) == image


@pytest.mark.parametrize("variant", dreamer_v3.VARIANTS)
@pytest.mark.parametrize("size", ["debug", "nano", "1m", *dreamer_v3.DETER])
def test_every_size_and_variant_is_a_run(size, variant):
    run = dreamer_v3.config("toy/Memory", size, variant)
    assert (run.env, run.size, run.variant) == ("toy/Memory", size, variant)
    assert configs.from_dict(RunConfig, configs.to_dict(run)) == run


@pytest.mark.parametrize("preset", dreamer_v3.PRESETS)
def test_every_preset_is_a_run_whose_parts_can_be_overridden(preset, tmp_path):
    run = dreamer_v3.config(preset=preset)
    assert "/" in run.env and run.size == getattr(dreamer_v3.DOMAINS.get(preset), "size", "nano")
    other = dreamer_v3.config("toy/Memory", "debug", "paper", preset)
    assert (other.env, other.size, other.variant) == ("toy/Memory", "debug", "paper")
    assert other.agent.model == dreamer_v3.sized("debug", "paper").model
    configs.write(run, tmp_path / "config.json")
    assert configs.from_dict(RunConfig, configs.read_json(tmp_path / "config.json")) == run


def test_code_and_paper_differ_as_the_recipe_says():
    lines = configs.differences(dreamer_v3.sized("size12m"), dreamer_v3.sized("size12m", "paper"))
    assert sorted(line.split(":")[0] for line in lines) == [
        "behavior.start_weight",
        "behavior.unimix",
        "model.codec.convs",
        "model.codec.mults",
    ]


def test_without_a_size_it_is_size200m():
    assert dreamer_v3.config("x").agent == dreamer_v3.sized("size200m")


def test_one_number_makes_a_size():
    config = dreamer_v3.sized("size12m")
    deter = config.model.core.deter
    assert deter == 2048
    assert config.model.core.hidden == config.model.units == config.behavior.units == deter // 8
    assert config.model.latent.classes == config.model.codec.depth == deter // 128
    larger = dreamer_v3.sized("size25m")
    assert dataclasses.replace(config, model=larger.model, behavior=larger.behavior) == larger


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dreamer_v3.sized("size12"), "Did you mean size12m"),
        (lambda: dreamer_v3.sized("12m", "peper"), "Did you mean paper"),
        (lambda: dreamer_v3.config("x", preset="cartpol"), "Did you mean cartpole"),
        (lambda: dreamer_v3.config(), "Name an environment with --env"),
    ],
)
def test_what_does_not_exist_is_told(call, words):
    with pytest.raises(JaxwmError, match=words):
        call()


@pytest.mark.parametrize(
    ("preset", "size", "number", "ratio", "steps", "updates"),
    [
        # Updates per environment step: ratio / (16 x 64), as the reference's table has them.
        ("dmc_proprio", "size1m", 16, 1024, 1_100_000, 1),
        ("dmc_vision", "size200m", 16, 256, 1_100_000, 1 / 4),
        ("atari", "size200m", 16, 32, 51_000_000, 1 / 32),
        ("atari100k", "size200m", 1, 256, 110_000, 1 / 4),
        ("crafter", "size200m", 1, 512, 1_100_000, 1 / 2),
        ("bsuite", "size200m", 1, 1024, 100_000, 1),
        ("procgen", "size200m", 16, 64, 110_000_000, 1 / 16),
    ],
)
def test_domains_have_the_numbers_of_the_reference(preset, size, number, ratio, steps, updates):
    run = dreamer_v3.config(preset=preset)
    assert (run.size, run.envs, run.replay.train_ratio, run.steps) == (size, number, ratio, steps)
    assert run.replay.updates_per_iteration(run.envs) == updates * number
    assert run.replay.capacity == min(5_000_000, steps) and run.action_repeat == 1
    assert dreamer_v3.config("playground/WalkerWalk", preset=preset).env == "playground/WalkerWalk"


def test_the_pairs_of_all_two_hot_bins_stay_mirrored_over_shards(monkeypatch):
    """The heads of reward and value, kernel and bias; nothing else has bins."""
    heads = []
    monkeypatch.setattr(
        dreamer_v3, "keep_mirrored", lambda shards, *names: heads.extend(names) or shards
    )
    config = dreamer_v3.sized("debug")
    agent = dreamer_v3.agent(config, {"vector": Box((3,))}, Discrete(2))
    params = jax.eval_shape(agent.init, jax.random.key(0)).params
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape[-1]
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert config.model.bins == config.behavior.bins
    with_bins = {name for name, size in named.items() if size == config.model.bins}
    assert with_bins == {f"{head}/{part}" for head in heads for part in ("kernel", "bias")}
    assert len(with_bins) == 4 and len(heads) == 2  # folding twice would undo it

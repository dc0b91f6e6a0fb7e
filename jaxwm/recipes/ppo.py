"""PPO: Proximal Policy Optimization Algorithms (arXiv:1707.06347), the baseline without a model.

The defaults are the numbers that two public codes share, vwxyzjn/cleanrl (ppo.py) and
luchris429/purejaxrl (ppo.py): small tanh networks, Adam whose rate falls to zero, clipped values.
They treat a time limit like any other end of an episode. The variants differ in:

    |                                        | default    | purejaxrl  | cleanrl  |
    |----------------------------------------|------------|------------|----------|
    | an episode cut short                   | bootstraps | is over    | is over  |
    | standard deviation of the advantages   | population | population | sample   |

Further differences from these codes are in `behaviors.ppo`. Those from
RobertTLange/gymnax-blines, whose numbers some presets have: biases start at 0 instead of uniformly
in 0 to 0.05, and updates use every action, where that code drops one in `length + 1`.
Environment steps include the step from an episode's last row to the first row of the next one.

Command: `jaxwm train ppo --preset cartpole`, which balances the pole for all 500 steps after half a
minute on two CPU cores, most of it compilation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxwm import backend
from jaxwm.behaviors.ppo import PPOConfig, ppo
from jaxwm.behaviors.ppo_networks import HeadsConfig
from jaxwm.config import require
from jaxwm.models import encoders
from jaxwm.models.encoders import CodecConfig
from jaxwm.optim import Schedule
from jaxwm.recipes import Recipe
from jaxwm.recipes.run_config import RunConfig
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import ALONE, ActionSpace, Agent, ObsSpace, Shards, is_image, nearest

NAME = "ppo"


@dataclasses.dataclass(frozen=True)
class Config:
    """PPO: the algorithm and what its networks see.

    Args:
      ppo: the algorithm, the actor and the critic.
      encoder: "flat" gives actor and critic all observations as one vector; "shared" gives both
        the tokens of one encoder, which both train; "auto" is "shared" where there are images.
      codec: the shared encoder; the numbers of decoders are not used.
      dtype: compute type; "auto" is bfloat16 on accelerators that have it, else float32.
    """

    ppo: PPOConfig = PPOConfig()
    encoder: Literal["auto", "flat", "shared"] = "auto"
    codec: CodecConfig = CodecConfig(units=64, layers=1, depth=4)
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"


def agent(
    config: Config,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    shards: Shards = ALONE,
) -> Agent:
    """The agent for one environment's spaces.

    Args:
      config: sizes and hyperparameters.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if the encoder or the actor cannot take the spaces.
    """
    dtype = backend.compute_dtype(config.dtype)
    shared = config.encoder == "shared"
    if config.encoder == "auto":
        shared = any(is_image(space) for space in obs_space.values())
    encoder = encoders.flat_net(obs_space)
    if shared:
        encoder = encoders.encoder(config.codec, obs_space, dtype)
    return ppo(config.ppo, obs_space, action_space, encoder, dtype, shards)


SIZES = ("small", "large", "debug")
VARIANTS = ("default", "purejaxrl", "cleanrl")


def sized(size: str, variant: str = "default") -> Config:
    """The configuration of one size and variant.

    Args:
      size: "small" has two layers of 64 units and "large" two of 256; "debug" compiles in seconds
        and learns little.
      variant: see the table above.

    Raises:
      JaxwmError: if there is no such size or variant.
    """
    if size not in SIZES:
        raise nearest(size, SIZES, "size of ppo")
    if variant not in VARIANTS:
        raise nearest(variant, VARIANTS, "variant of ppo")
    algorithm = PPOConfig(
        learning_rate=Schedule(2.5e-4, 0.0),
        truncation="bootstrap" if variant == "default" else "terminal",
        normalize_advantage="sample" if variant == "cleanrl" else "population",
    )
    if size == "debug":
        heads = HeadsConfig((8,))
        algorithm = dataclasses.replace(algorithm, heads=heads, epochs=2, minibatches=2)
        return Config(algorithm, codec=CodecConfig(units=8, layers=1, depth=2, blocks=2))
    if size == "large":
        algorithm = dataclasses.replace(algorithm, heads=HeadsConfig((256, 256)))
        return Config(algorithm, codec=CodecConfig(units=256, layers=2, depth=32))
    return Config(algorithm)


class Setting(NamedTuple):
    """A published run, or one for two CPU cores.

    Attributes:
      env: the environment; --env takes another one.
      steps: environment steps of the run, over all environments.
      envs: environments.
      length: rows T of each environment between two updates.
      size: see `sized`.
      variant: see `sized`.
      about: what it is, and what the return can be held against.
      changes: entries of `PPOConfig` that differ from the defaults.
      repeat: times each action is repeated.
    """

    env: str
    steps: int
    envs: int
    length: int
    size: str
    variant: str
    about: str
    changes: Mapping[str, Any]
    repeat: int = 1


_BLINES = {
    "heads": HeadsConfig(act="relu", kernel_init="truncated_normal"),
    "learning_rate": 5e-4,
}
# Episodes are cut at 1000 steps (Freeway: 2500) and nothing is sticky: not the original MinAtar.
_MINATAR = {
    "heads": HeadsConfig((256, 256), act="relu", kernel_init="truncated_normal"),
    "learning_rate": 5e-4,
    "discount": 0.999,
    "minibatches": 8,
}
_CONTINUOUS = {
    "learning_rate": Schedule(3e-4, 0.0),
    "entropy": 0.0,
    "normalize_obs": True,
    "normalize_reward": True,
}
SETTINGS = {
    "cartpole": Setting(
        *("gymnax/CartPole-v1", 500_000, 4, 128, "small", "purejaxrl"),
        "as in cleanrl and purejaxrl, seconds on two CPU cores (cleanrl: 490 +- 6; with --env "
        "gymnax/Acrobot-v1 -86 +- 1)",
        {},
    ),
    "gymnax_cartpole": Setting(
        *("gymnax/CartPole-v1", 150_000, 8, 32, "small", "purejaxrl"),
        "the numbers of gymnax-blines (500 at 96,000 steps), also of other small tasks of bsuite",
        _BLINES,
    ),
    "acrobot": Setting(
        *("gymnax/Acrobot-v1", 500_000, 16, 32, "small", "purejaxrl"),
        "gymnax-blines (-79 at 250,000 steps)",
        _BLINES | {"max_grad_norm": 1.0},
    ),
    "catch": Setting(
        *("gymnax/Catch-bsuite", 100_000, 16, 32, "small", "purejaxrl"),
        "gymnax-blines (1 at 56,000 steps)",
        _BLINES | {"max_grad_norm": 1.0},
    ),
    "mountaincar": Setting(
        *("gymnax/MountainCar-v0", 250_000, 16, 32, "small", "purejaxrl"),
        "gymnax-blines (-118 at 240,000 steps)",
        # The code counts gradient steps: 5 % of 250,000, at 256 an update.
        _BLINES
        | {
            "max_grad_norm": 1.0,
            "epochs": 64,
            "entropy": 0.003,
            "learning_rate": Schedule(5e-3, 5e-4, updates=49),
        },
    ),
    "deepsea": Setting(
        *("gymnax/DeepSea-bsuite", 150_000, 8, 32, "small", "purejaxrl"),
        "gymnax-blines (0: it takes luck to find the reward)",
        _BLINES,
    ),
    "minatar": Setting(
        *("gymnax/Breakout-MinAtar", 10_000_000, 64, 128, "large", "purejaxrl"),
        "gymnax-blines, with --env also Asterix, Freeway and SpaceInvaders (23, 15, 59, 132)",
        _MINATAR,
    ),
    "minatar_purejaxrl": Setting(
        *("gymnax/SpaceInvaders-MinAtar", 10_000_000, 64, 128, "small", "purejaxrl"),
        "the numbers of purejaxrl's notebook, ten times the learning rate",
        {
            "heads": HeadsConfig(act="relu"),
            "learning_rate": Schedule(5e-3, 0.0),
            "minibatches": 8,
        },
    ),
    "pixels": Setting(
        *("toy/Pixels", 30_000, 16, 32, "small", "default"),
        "64x64 colour frames, minutes on two CPU cores (the optimum is 1)",
        {"learning_rate": 1e-3},
    ),
    "pendulum": Setting(
        *("brax/inverted_pendulum", 500_000, 16, 64, "small", "default"),
        "continuous actions, minutes on two CPU cores",
        _CONTINUOUS | {"learning_rate": Schedule(1e-3, 0.0), "epochs": 10, "minibatches": 8},
        repeat=2,
    ),
    "brax": Setting(
        *("brax/hopper", 50_000_000, 2048, 10, "large", "purejaxrl"),
        "the numbers of purejaxrl's ppo_continuous_action.py, for accelerators",
        _CONTINUOUS | {"learning_rate": 3e-4, "minibatches": 32},
    ),
    "mujoco": Setting(
        *("gymnasium/HalfCheetah-v5", 1_000_000, 1, 2048, "small", "cleanrl"),
        "the numbers of cleanrl's ppo_continuous_action.py (HalfCheetah-v4: 1443 +- 46)",
        _CONTINUOUS | {"epochs": 10, "minibatches": 32},
    ),
}
PRESETS = {name: setting.about for name, setting in SETTINGS.items()}


def config(
    env: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """A run of PPO.

    Args:
      env: name of the environment; None for the preset's.
      size: see `sized`; None for the preset's, or "small".
      variant: see `sized`; None for the preset's, or "default".
      preset: one of `PRESETS`; None for the numbers that cleanrl and purejaxrl share.

    Raises:
      JaxwmError: if there is no such size, variant or preset, or no environment was named.
    """
    if preset is not None and preset not in SETTINGS:
        raise nearest(preset, SETTINGS, "preset of ppo")
    setting = SETTINGS[preset] if preset else None
    if setting is None:
        require(env is not None, "Name an environment with --env, or a preset with --preset.")
        setting = Setting(str(env), 1_000_000, 4, 128, "small", "default", "", {})
    size, variant = size or setting.size, variant or setting.variant
    return _run(setting, env or setting.env, sized(size, variant), size, variant)


def _run(setting: Setting, env: str, chosen: Config, size: str, variant: str) -> RunConfig:
    """A run with the numbers of a setting, and networks of a size."""
    changes, envs, length = dict(setting.changes), setting.envs, setting.length
    # The size decides how large the networks are, the setting everything else.
    heads = changes.pop("heads", HeadsConfig())
    heads = dataclasses.replace(heads, hidden=chosen.ppo.heads.hidden)
    # At least two updates per line of metrics; presets have fifty lines.
    lines = max(setting.steps // 50, 2 * envs * length) if setting.about else 2 * envs * length
    if size == "debug":
        envs, length, lines = min(envs, 4), min(length, 16), 256
        changes = {name: x for name, x in changes.items() if name not in ("epochs", "minibatches")}
    algorithm = dataclasses.replace(chosen.ppo, heads=heads, **changes)
    return RunConfig(
        env=env,
        recipe=NAME,
        size=size,
        variant=variant,
        agent=dataclasses.replace(chosen, ppo=algorithm),
        envs=envs,
        steps=setting.steps,
        action_repeat=setting.repeat,
        replay=ReplayConfig(
            capacity=envs * (length + 1),
            batch_size=envs,
            batch_length=length,
            train_ratio=1.0,
            online=False,
        ),
        log_every=lines,
        save_every=setting.steps // 4,
    )


RECIPE = Recipe(NAME, Config, agent, config, PRESETS)

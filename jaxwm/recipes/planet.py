"""PlaNet: Learning Latent Dynamics for Planning from Pixels (arXiv:1811.04551).

A recurrent state-space model with a Gaussian state learns to predict images and rewards. There is
no policy and no value function: at every step the agent plans in the model with the cross-entropy
method. The defaults follow the authors' code (github.com/google-research/planet).

    presets                          | environment         | planner
    ---------------------------------|---------------------|------------------------------
    cartpole_swingup, ..., as below  | 64x64 images        | 1000 candidates x 10 iterations
    reach, pendulum, balance         | vectors, two cores  | fewer

Deviations from the code: training sequences may cross the ends of episodes, where the memory is
reset. Latent overshooting, which the code leaves off, is not implemented. Additions: vector
observations, discrete actions, several environments at once, and an optional continue head for
tasks that can fail (`model.predict_ends`, and `behavior.continues` for the planner).

Command: `jaxwm train planet --preset reach`.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

from jaxwm import backend
from jaxwm.agent import joint
from jaxwm.behaviors.planner import CEMConfig, planner
from jaxwm.config import at_least, require
from jaxwm.models import codecs, recurrent
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.encoders import concat_size, token_size
from jaxwm.models.heads import Style, head, normal_reward, posterior, soft_continue
from jaxwm.models.latents import GaussianConfig, excess_kl, gaussian
from jaxwm.models.recurrent import PlanetGRUConfig
from jaxwm.models.rssm import Parts, rssm
from jaxwm.optim import AdamConfig, Number, adam_tf, numbers_at_least, square_sums, value_at
from jaxwm.recipes import RunConfig
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import (
    ALONE,
    ActionSpace,
    Agent,
    CoreConstructor,
    ObsSpace,
    Shards,
    WorldModel,
    as_dict,
    nearest,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The world model.

    Args:
      core: the recurrent core; its `hidden` is also the width of prior and posterior.
      latent: the Gaussian latent.
      free_nats: KL of a row below which it is not trained, in nats.
      codec: encoder and decoder.
      units: width of the reward head, and of the continue head if there is one.
      layers: hidden layers of these heads.
      bits: bits of the images' pixels, in 1..8.
      clip_reward: how rewards are clipped before the model learns them.
      predict_ends: whether there is a continue head. The paper's tasks never end early, and its
        model has none.
    """

    core: PlanetGRUConfig = PlanetGRUConfig()
    latent: GaussianConfig = GaussianConfig()
    free_nats: float = 3.0
    codec: ClassicCodecConfig = ClassicCodecConfig(300, 3, 32, act="relu", conv_act="relu")
    units: int = 300
    layers: int = 3
    bits: int = 5
    clip_reward: Literal["none", "tanh"] = "none"
    predict_ends: bool = False

    def __post_init__(self):
        at_least(self, 1, "units", "layers")
        at_least(self, 0, "free_nats")
        require(1 <= self.bits <= 8, f"ModelConfig.bits is {self.bits}; it must lie in 1 to 8.")


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the total; "rec" is that of every observation key."""

    rec: Number = 1.0
    reward: Number = 10.0
    kl: Number = 1.0
    cont: Number = 10.0

    def __post_init__(self):
        numbers_at_least(self, 0, *(field.name for field in dataclasses.fields(self)))

    def of(self, name: str) -> Number:
        """The weight of the loss `name`."""
        return getattr(self, {"continue": "cont"}.get(name, name.split("/")[0]))


@dataclasses.dataclass(frozen=True)
class Config:
    """PlaNet: world model, planner, weights of the losses and optimiser.

    Args:
      model: the world model.
      behavior: the planner.
      weights: weights of the losses.
      optim: the optimiser.
      dtype: compute type; "auto" is bfloat16 on accelerators that have it, else float32.
    """

    model: ModelConfig = ModelConfig()
    behavior: CEMConfig = CEMConfig()
    weights: LossWeights = LossWeights()
    optim: AdamConfig = AdamConfig(learning_rate=1e-3, clip=1000.0, weight_decay=0.0, eps=1e-4)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        require(
            self.model.predict_ends or not self.behavior.continues,
            "behavior.continues makes the planner ask the model whether the episode goes on, but "
            "the model has no head for it. Set model.predict_ends to True, or behavior.continues "
            "to False.",
        )


def agent(
    config: Config,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    shards: Shards = ALONE,
    core: CoreConstructor = recurrent.core,
) -> Agent:
    """The agent for one environment's spaces.

    Args:
      config: sizes and hyperparameters.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      shards: how the shards of the training meet, if it is divided.
      core: the recurrent memory, as a constructor like `recurrent.core`.

    Raises:
      JaxwmError: if the model or the planner cannot take the spaces.
    """
    dtype = backend.compute_dtype(config.dtype)
    model = world_model(config.model, obs_space, action_space, dtype, core)
    behavior = planner(config.behavior, action_space)
    optimizer = adam_tf(
        **vars(config.optim), square_sums=lambda tree: shards.sum_parts(square_sums(tree))
    )
    weights = lambda name, updates: value_at(config.weights.of(name), updates)  # noqa: E731
    return joint(model, behavior, weights, optimizer, shards)


def parts(
    config: ModelConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    dtype: str = "float32",
    core: CoreConstructor = recurrent.core,
) -> Parts:
    """The networks of the world model.

    Args:
      config: sizes.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      dtype: compute type.
      core: the recurrent memory, as a constructor like `recurrent.core`.

    Raises:
      JaxwmError: if images do not fit the convolutions.
    """
    style = Style(dtype, "none", "relu", "glorot")
    latent = excess_kl(gaussian(config.latent), config.free_nats)
    deter, hidden = config.core.deter, config.core.hidden
    encoder = codecs.encoder(config.codec, obs_space, dtype)
    tokens = token_size(encoder, obs_space)
    moments = {"mean": latent.size, "std": latent.size}
    sizes = deter + latent.size, config.units, config.layers, 1
    heads = {"reward": normal_reward(head(*sizes, style), config.clip_reward)}
    if config.predict_ends:
        heads["continue"] = soft_continue(head(*sizes, style), 1.0)
    return Parts(
        encoder=encoder,
        core=core(config.core, latent.size, concat_size(as_dict(action_space)), dtype),
        latent=latent,
        posterior=posterior(deter, tokens, hidden, moments, style),
        prior=head(deter, hidden, 1, moments, style),
        decoder=codecs.decoder(config.codec, obs_space, deter, latent.size, dtype),
        observation=functools.partial(codecs.observation_dist, bits=config.bits),
        heads=heads,
        order="zh",
        stored=False,
    )


def world_model(
    config: ModelConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    dtype: str = "float32",
    core: CoreConstructor = recurrent.core,
) -> WorldModel:
    """The world model, which sees images of `config.bits`; arguments as in `parts`."""
    networks = parts(config, obs_space, action_space, dtype, core)
    model = rssm(networks, obs_space, action_space, dtype)
    return codecs.quantized(model, obs_space, config.bits)


SIZES = ("paper", "nano", "debug")


def sized(size: str) -> Config:
    """The configuration of one size.

    Args:
      size: "paper"; "nano", which two CPU cores train and plan with; "debug", which compiles in
        seconds and learns little.

    Raises:
      JaxwmError: if there is no such size.
    """
    if size == "paper":
        return Config()
    if size == "nano":
        model = ModelConfig(
            core=PlanetGRUConfig(deter=64, hidden=64),
            latent=GaussianConfig(stoch=8),
            codec=ClassicCodecConfig(64, 2, 8, act="relu", conv_act="relu"),
            units=64,
            layers=2,
        )
        return Config(model=model, behavior=CEMConfig(iterations=5, candidates=150, elites=15))
    if size == "debug":
        model = ModelConfig(
            core=PlanetGRUConfig(deter=8, hidden=8),
            latent=GaussianConfig(stoch=4),
            codec=ClassicCodecConfig(8, 1, 2, act="relu", conv_act="relu"),
            units=8,
            layers=1,
        )
        planner = CEMConfig(horizon=4, iterations=2, candidates=10, elites=3)
        return Config(model=model, behavior=planner)
    raise nearest(size, SIZES, "size of planet")


class Task(NamedTuple):
    """A task of the paper.

    Attributes:
      env: the environment.
      repeat: times each action is repeated; an episode of 1000 frames has 1000 / repeat steps.
    """

    env: str
    repeat: int


# scripts/tasks.py of the code.
TASKS = {
    "cartpole_balance": Task("dm_control/cartpole-balance:image", 8),
    "cartpole_swingup": Task("dm_control/cartpole-swingup:image", 8),
    "reacher_easy": Task("dm_control/reacher-easy:image", 4),
    "cheetah_run": Task("dm_control/cheetah-run:image", 4),
    "finger_spin": Task("dm_control/finger-spin:image", 2),
    "cup_catch": Task("dm_control/ball_in_cup-catch:image", 4),
    "walker_walk": Task("dm_control/walker-walk:image", 2),
}
PRESETS = {
    "reach": "toy/Reach, a point in the plane, minutes on two CPU cores",
    "pendulum": "gymnax/Pendulum-v1 on two CPU cores",
    "balance": "playground/CartpoleBalance on two CPU cores",
    **{name: f"{task.env}, as in the paper" for name, task in TASKS.items()},
}


def config(
    env: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """A run of PlaNet, with the paper's numbers unless a preset says otherwise.

    Args:
      env: name of the environment; None for the preset's.
      size: see `sized`; None for the preset's, or "paper".
      variant: None or "paper": there is only one.
      preset: one of `PRESETS`; None for the paper's numbers without an action repeat.

    Raises:
      JaxwmError: if there is no such size, variant or preset, or no environment was named.
    """
    if variant not in (None, "paper"):
        raise nearest(variant, ["paper"], "variant of planet")
    if preset is not None and preset not in PRESETS:
        raise nearest(preset, PRESETS, "preset of planet")
    if preset in TASKS:
        task = TASKS[preset]
        return _run(env or task.env, size or "paper", task.repeat, 1000 // task.repeat, 1000)
    if preset is None:
        require(env is not None, "Name an environment with --env, or a preset with --preset.")
        return _run(str(env), size or "paper", 1, 1000, 1000)
    return _small(preset, env, size or "nano")


def _run(env: str, size: str, repeat: int, length: int, episodes: int) -> RunConfig:
    """The rhythm of the paper: five random episodes, then 100 updates before each further one.

    Args:
      env: the environment.
      size: see `sized`.
      repeat: times each action is repeated.
      length: steps of an episode after the repeat.
      episodes: episodes of the run.
    """
    batch, window, updates = 50, 50, 100
    return RunConfig(
        env=env,
        recipe="planet",
        size=size,
        variant="paper",
        agent=sized(size),
        envs=1,
        steps=episodes * length,
        action_repeat=repeat,
        replay=ReplayConfig(
            capacity=episodes * length,
            batch_size=batch,
            batch_length=window,
            train_ratio=updates * batch * window / length,
            online=False,
            prefill=5 * length,
            train_every=length,
            pretrain=updates,
        ),
        eval_episodes=10,
        log_every=length,
        save_every=10 * length,
    )


def _small(preset: str | None, env: str | None, size: str) -> RunConfig:
    """A run on two CPU cores, on vectors."""
    base = RunConfig(
        env=env or "toy/Reach",
        recipe="planet",
        size=size,
        variant="paper",
        agent=_weighed(sized(size), rec=30.0, reward=100.0),
        envs=4,
        steps=4_000,
        replay=ReplayConfig(
            capacity=100_000,
            batch_size=16,
            batch_length=8,
            train_ratio=64,
            online=False,
            prefill=160,
            train_every=32,
            pretrain=100,
        ),
        log_every=400,
        save_every=2_000,
    )
    return base


def _weighed(config: Config, rec: float, reward: float) -> Config:
    weights = dataclasses.replace(config.weights, rec=rec, reward=reward)
    return dataclasses.replace(config, weights=weights)

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
from typing import Any, Literal, NamedTuple

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
from jaxwm.numerics import Scalar
from jaxwm.optim import AdamConfig, Number, adam_tf, numbers_at_least, square_sums, value_at
from jaxwm.recipes import Recipe
from jaxwm.recipes.run_config import RunConfig
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

    def of(self, name: str) -> Number | Scalar:
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


NAME = "planet"
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
            free_nats=0.0,  # four numbers hardly ever hold three nats
            codec=ClassicCodecConfig(8, 1, 2, act="relu", conv_act="relu"),
            units=8,
            layers=1,
        )
        planner = CEMConfig(horizon=4, iterations=2, candidates=10, elites=3)
        return Config(model=model, behavior=planner)
    raise nearest(size, SIZES, "size of planet")


class Setting(NamedTuple):
    """An environment and the numbers for it.

    Attributes:
      env: the environment; --env takes another one.
      about: what it is for.
      repeat: times each action is repeated.
      length: steps of an episode, after the repeat.
      episodes: episodes of a run, over all environments.
      envs: environments.
      size: see `sized`.
      batch: sequences of an update.
      window: rows of a sequence.
      updates: updates between two episodes of every environment.
      rec: weight of the observations' losses.
      reward: weight of the reward's loss.
      planner: hyperparameters of the planner at this size; None for those of the size.
    """

    env: str
    about: str
    repeat: int = 1
    length: int = 1000
    episodes: int = 1000
    envs: int = 1
    size: str = "paper"
    batch: int = 50
    window: int = 50
    updates: int = 100
    rec: float = 1.0
    reward: float = 10.0
    planner: CEMConfig | None = None


def _task(env: str, repeat: int) -> Setting:
    """A task of the paper: episodes of 1000 frames, seen as images."""
    return Setting(f"dm_control/{env}:image", "as in the paper", repeat, 1000 // repeat)


def _small(env: str, about: str, planner: CEMConfig, **changes: Any) -> Setting:
    """Vectors on two CPU cores.

    The losses of a few numbers weigh more than in the paper: there an image has 12,288 of them
    against the same KL.
    """
    return Setting(env, about, envs=4, size="nano", batch=16, planner=planner, **changes)


SETTINGS = {
    "reach": _small(
        "toy/Reach",
        "a point in the plane, two minutes on two CPU cores (best possible return -1.5)",
        CEMConfig(horizon=6, iterations=8, candidates=200, elites=20),
        **{"length": 8, "episodes": 400, "window": 8, "updates": 16, "rec": 300.0, "reward": 1e3},
    ),
    "pendulum": _small(
        "gymnax/Pendulum-v1",
        "swing-up with a dense reward, a minute on two CPU cores (best known return -130)",
        CEMConfig(horizon=6, iterations=5, candidates=100, elites=10),
        **{"repeat": 4, "length": 50, "episodes": 200, "window": 16, "updates": 100},
        **{"rec": 100.0, "reward": 30.0},
    ),
    "balance": _small(
        "playground/CartpoleBalance",
        "a task of the paper as vectors, on two CPU cores",
        CEMConfig(iterations=5, candidates=200, elites=20),
        **{"repeat": 8, "length": 125, "episodes": 100, "window": 20, "updates": 500},
        **{"rec": 300.0, "reward": 300.0},
    ),
    # scripts/tasks.py of the code.
    "cartpole_balance": _task("cartpole-balance", 8),
    "cartpole_swingup": _task("cartpole-swingup", 8),
    "reacher_easy": _task("reacher-easy", 4),
    "cheetah_run": _task("cheetah-run", 4),
    "finger_spin": _task("finger-spin", 2),
    "cup_catch": _task("ball_in_cup-catch", 4),
    "walker_walk": _task("walker-walk", 2),
}
PRESETS = {name: f"{setting.env}: {setting.about}" for name, setting in SETTINGS.items()}


def config(
    env: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """A run of PlaNet.

    Args:
      env: name of the environment; None for the preset's.
      size: see `sized`; None for the preset's, or "paper".
      variant: None: there is only one.
      preset: one of `PRESETS`; None for the paper's numbers, with actions that are not repeated.

    Raises:
      JaxwmError: if there is no such size, variant or preset, or no environment was named.
    """
    require(
        not variant,
        f"The recipe planet has no variants, but the variant {variant!r} was asked for.",
    )
    if preset is not None and preset not in SETTINGS:
        raise nearest(preset, SETTINGS, "preset of planet")
    if preset is None:
        require(env is not None, "Name an environment with --env, or a preset with --preset.")
        setting = Setting(str(env), "")
    else:
        setting = SETTINGS[preset]
    size = size or setting.size
    if size == "debug":
        # Learns after few steps, too.
        setting = setting._replace(length=8, envs=2, batch=4, window=8, updates=2)
    chosen = sized(size)
    planner = setting.planner if size == setting.size else None
    agent = dataclasses.replace(
        chosen,
        behavior=planner or chosen.behavior,
        weights=LossWeights(setting.rec, setting.reward),
    )
    return _run(setting, env or setting.env, size, agent)


def _run(setting: Setting, env: str, size: str, agent: Config) -> RunConfig:
    """Five random episodes, then updates before each further episode of every environment."""
    block = setting.envs * setting.length
    steps = setting.episodes * setting.length
    return RunConfig(
        env=env,
        recipe=NAME,
        size=size,
        agent=agent,
        envs=setting.envs,
        steps=steps,
        action_repeat=setting.repeat,
        replay=ReplayConfig(
            capacity=max(steps, 10_000),
            batch_size=setting.batch,
            batch_length=setting.window,
            train_ratio=setting.updates * setting.batch * setting.window / block,
            online=False,
            prefill=5 * setting.length,
            train_every=block,
            pretrain=setting.updates,
        ),
        eval_episodes=20,
        log_every=max(steps // 50, block),
        save_every=max(steps // 4, block),
    )


RECIPE = Recipe(NAME, Config, agent, config, PRESETS)

"""Dreamer V1: Dream to Control (arXiv:1912.01603).

The world model is an RSSM with Gaussian latents and a Keras GRU. The policy maximises the return of
its dreams by gradients through the dynamics. The defaults are those of the authors' code
(github.com/danijar/dreamer) for the DeepMind Control Suite.

Differences from the code: every row draws its own latent noise, where the code shares one vector
between the rows of a step; sequences may cross the ends of episodes, where the memory is reset;
float32 instead of mixed precision.

Command: `jaxwm train dreamer_v1 --preset reach`.
"""

import dataclasses
from typing import Literal, NamedTuple

from jaxwm import backend
from jaxwm.agent import joint
from jaxwm.behaviors.actor_critic_v1 import ActorCriticV1Config, actor_critic_v1
from jaxwm.config import at_least, changed, require, share
from jaxwm.models import codecs
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.encoders import concat_size, token_size
from jaxwm.models.heads import Style, head, normal_reward, posterior, soft_continue
from jaxwm.models.latents import GaussianConfig, floored_kl, gaussian
from jaxwm.models.recurrent import KerasGRUConfig, core
from jaxwm.models.rssm import Parts, rssm
from jaxwm.numerics import Scalar
from jaxwm.optim import (
    AdamConfig,
    Number,
    adam_tf,
    annealed,
    grouped,
    numbers_at_least,
    square_sums,
    value_at,
)
from jaxwm.recipes import Recipe
from jaxwm.recipes.run_config import RunConfig
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import (
    ALONE,
    ActionSpace,
    Agent,
    ObsSpace,
    Params,
    Shards,
    WorldModel,
    as_dict,
    nearest,
)

NAME = "dreamer_v1"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The world model.

    Args:
      core: the recurrent core; its `hidden` is also the width of prior and posterior.
      latent: the Gaussian latent.
      free_nats: mean KL below which it is not trained, in nats per time step.
      codec: encoder and decoder.
      units: width of the reward and continue heads.
      reward_layers: hidden layers of the reward head.
      continue_layers: hidden layers of the continue head.
      discount: discount of one step, in [0, 1].
      predict_ends: whether there is a continue head. Without it every step continues.
      clip_reward: how rewards are clipped before the model learns them.
    """

    core: KerasGRUConfig = KerasGRUConfig()
    latent: GaussianConfig = GaussianConfig()
    free_nats: float = 3.0
    codec: ClassicCodecConfig = ClassicCodecConfig(layers=3, depth=32, conv_act="relu")
    units: int = 400
    reward_layers: int = 2
    continue_layers: int = 3
    discount: float = 0.99
    predict_ends: bool = False
    clip_reward: Literal["none", "tanh"] = "none"

    def __post_init__(self):
        at_least(self, 1, "units", "reward_layers", "continue_layers")
        at_least(self, 0, "free_nats")
        share(self, "discount")


def parts(
    config: ModelConfig, obs_space: ObsSpace, action_space: ActionSpace, dtype: str = "float32"
) -> Parts:
    """The networks of the world model.

    Args:
      config: sizes.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      dtype: compute type.

    Raises:
      JaxwmError: if images do not fit the convolutions.
    """
    style = Style(dtype, "none", "elu", "glorot")
    latent = floored_kl(gaussian(config.latent), config.free_nats)
    deter, hidden, features = config.core.deter, config.core.hidden, config.core.deter + latent.size
    encoder = codecs.encoder(config.codec, obs_space, dtype)
    tokens = token_size(encoder, obs_space)
    reward = head(features, config.units, config.reward_layers, 1, style)
    heads = {"reward": normal_reward(reward, config.clip_reward)}
    if config.predict_ends:
        net = head(features, config.units, config.continue_layers, 1, style)
        heads["continue"] = soft_continue(net, config.discount)
    return Parts(
        encoder=encoder,
        core=core(config.core, latent.size, concat_size(as_dict(action_space)), dtype),
        latent=latent,
        posterior=posterior(deter, tokens, hidden, latent.outputs, style),
        prior=head(deter, hidden, 1, latent.outputs, style),
        decoder=codecs.decoder(config.codec, obs_space, deter, latent.size, dtype),
        observation=codecs.observation_dist,
        heads=heads,
        order="zh",
        stored=False,
    )


def world_model(
    config: ModelConfig, obs_space: ObsSpace, action_space: ActionSpace, dtype: str = "float32"
) -> WorldModel:
    """The world model; arguments as in `parts`."""
    return rssm(parts(config, obs_space, action_space, dtype), obs_space, action_space, dtype)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the total; "rec" is that of every observation key."""

    rec: Number = 1.0
    reward: Number = 1.0
    cont: Number = 10.0
    kl: Number = 1.0
    policy: Number = 1.0
    value: Number = 1.0

    def __post_init__(self):
        numbers_at_least(self, 0, *(field.name for field in dataclasses.fields(self)))

    def of(self, name: str) -> Number | Scalar:
        """The weight of the loss `name`."""
        return getattr(self, {"continue": "cont"}.get(name, name.split("/")[0]))


@dataclasses.dataclass(frozen=True)
class Config:
    """Dreamer V1: world model, behaviour, weights of the losses and three optimisers.

    Args:
      model: the world model.
      behavior: the imagined actor-critic.
      weights: weights of the losses.
      model_optim: the model's optimiser.
      policy_optim: the policy's optimiser.
      value_optim: the critic's optimiser.
      dtype: compute type; "auto" is bfloat16 on accelerators that have it, else float32.
    """

    model: ModelConfig = ModelConfig()
    behavior: ActorCriticV1Config = ActorCriticV1Config()
    weights: LossWeights = LossWeights()
    model_optim: AdamConfig = AdamConfig(6e-4, eps=1e-7)
    policy_optim: AdamConfig = AdamConfig(8e-5, eps=1e-7)
    value_optim: AdamConfig = AdamConfig(8e-5, eps=1e-7)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def agent(
    config: Config, obs_space: ObsSpace, action_space: ActionSpace, shards: Shards = ALONE
) -> Agent:
    """The agent for one environment's spaces.

    Args:
      config: sizes and hyperparameters.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      shards: how the shards of the training meet, if it is divided.

    Raises:
      JaxwmError: if the model or the behaviour cannot take the spaces.
    """
    dtype = backend.compute_dtype(config.dtype)
    model = world_model(config.model, obs_space, action_space, dtype)
    features = config.model.core.deter + config.model.latent.stoch
    behavior = actor_critic_v1(
        config.behavior, action_space, model, features, config.model.discount, dtype
    )

    def squares(tree: Params) -> Params:
        return shards.sum_parts(square_sums(tree))

    optimizer = grouped(
        {
            "model": adam_tf(**vars(config.model_optim), square_sums=squares),
            "behavior/policy": adam_tf(**vars(config.policy_optim), square_sums=squares),
            "behavior/value": adam_tf(**vars(config.value_optim), square_sums=squares),
        }
    )
    weights = lambda name, updates: value_at(config.weights.of(name), updates)  # noqa: E731
    return joint(model, behavior, weights, optimizer, shards)


SIZES = ("dmc", "nano", "debug")


def sized(size: str) -> Config:
    """The configuration of one size.

    Args:
      size: "dmc" as in the code; "nano", which two CPU cores train; "debug", which compiles in
        seconds and learns little.

    Raises:
      JaxwmError: if there is no such size.
    """
    if size == "dmc":
        return Config()
    if size == "nano":
        return _thin(deter=64, stoch=8, units=64, depth=8, layers=2, imagine=15)
    if size == "debug":
        return _thin(deter=8, stoch=4, units=8, depth=2, layers=1, imagine=4)
    raise nearest(size, SIZES, "size of dreamer_v1")


def _thin(deter: int, stoch: int, units: int, depth: int, layers: int, imagine: int) -> Config:
    """Small networks, which take and need larger steps."""
    model = ModelConfig(
        core=KerasGRUConfig(deter, deter),
        latent=GaussianConfig(stoch),
        free_nats=1.0,
        codec=ClassicCodecConfig(units, layers, depth, conv_act="relu"),
        units=units,
        reward_layers=layers,
        continue_layers=layers,
    )
    return Config(
        model=model,
        behavior=ActorCriticV1Config(units, layers, layers, imagine),
        model_optim=AdamConfig(1e-3, eps=1e-7),
        policy_optim=AdamConfig(3e-4, eps=1e-7),
        value_optim=AdamConfig(1e-3, eps=1e-7),
    )


class Setting(NamedTuple):
    """An environment and the numbers for it.

    Attributes:
      env: the environment; --env takes another one.
      about: what it is for.
      ends: whether the model predicts ends.
      size: see `sized`.
      envs: environments.
      steps: environment steps of a run.
      repeat: times each action is repeated.
      block: steps between two blocks of updates.
      updates: updates of a block.
      batch: sequences of an update.
      window: rows of a sequence.
      imagine: steps of each dream; None for the size's.
      rec: weight of the reconstruction; None for the size's.
      kl: weight of the KL; None for the size's.
      discount: discount of one step; None for the size's.
      policy_rate: learning rate of the policy; None for the size's.
      anneal: whether the learning rates fall linearly, to a tenth at the end of the run.
    """

    env: str
    about: str
    ends: bool = False
    size: str = "nano"
    envs: int = 4
    steps: int = 20_000
    repeat: int = 1
    block: int = 200
    updates: int = 100
    batch: int = 4
    window: int = 32
    imagine: int | None = None
    rec: float | None = None
    kl: float | None = None
    discount: float | None = None
    policy_rate: float | None = None
    anneal: bool = False


SETTINGS = {
    # Dreams go on after the last step of an episode, where nothing teaches the critic: a small
    # discount keeps its guesses there from growing without end.
    "reach": Setting(
        "toy/Reach",
        "a point in the plane, learnt in minutes on two CPU cores",
        steps=8_000,
        batch=16,
        window=8,
        imagine=6,
        rec=10.0,
        kl=0.1,
        discount=0.8,
        anneal=True,
    ),
    # A discount of 0.98 learnt nothing in that time, and a faster policy learnt with fewer seeds.
    # Three of five seeds learn.
    "pendulum": Setting(
        "gymnax/Pendulum-v1",
        "swing-up, on two CPU cores",
        steps=10_000,
        repeat=2,
        rec=10.0,
        kl=0.1,
        discount=0.95,
        policy_rate=1e-4,
        anneal=True,
    ),
    # A pole leans by hundredths: what is so small in squares must count against the KL.
    "inverted_pendulum": Setting(
        "brax/inverted_pendulum",
        "a task that ends, learnt in minutes on two CPU cores",
        ends=True,
        steps=14_000,
        repeat=2,
        rec=10.0,
        kl=0.1,
        anneal=True,
    ),
    "pixels": Setting(
        "toy/Pixels",
        "64x64 colour frames, on two CPU cores",
        ends=True,
        envs=8,
        steps=5_000,
        batch=8,
        window=8,
        imagine=7,
    ),
    # The code counts frames: 1000 of them, or 500 steps, between two blocks of 100 updates.
    "dmc": Setting(
        *("dm_control/walker-walk:image", "DeepMind Control as in the code", False, "dmc"),
        *(1, 1_000_000, 2, 500, 100, 50, 50),
    ),
}
PRESETS = {name: f"{setting.env}: {setting.about}" for name, setting in SETTINGS.items()}


def config(
    env: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """A run of Dreamer V1.

    Args:
      env: name of the environment; None for the preset's.
      size: see `sized`; None for the preset's, or "dmc".
      variant: None: there is only one.
      preset: one of `PRESETS`; None for the numbers of the DeepMind Control Suite.

    Raises:
      JaxwmError: if there is no such size, variant or preset, or no environment was named.
    """
    require(
        not variant,
        f"The recipe dreamer_v1 has no variants, but the variant {variant!r} was asked for.",
    )
    if preset is not None and preset not in SETTINGS:
        raise nearest(preset, SETTINGS, "preset of dreamer_v1")
    require(
        env is not None or preset is not None,
        "Name an environment with --env, or a preset with --preset.",
    )
    setting = SETTINGS[preset or "dmc"]
    size = size or setting.size
    if size == "debug":  # learns after few steps, too
        setting = setting._replace(envs=2, block=8, updates=2, batch=2, window=6, imagine=None)
    rows = setting.updates * setting.batch * setting.window
    return RunConfig(
        env=env or setting.env,
        recipe=NAME,
        size=size,
        agent=_tuned(sized(size), setting),
        envs=setting.envs,
        steps=setting.steps,
        action_repeat=setting.repeat,
        replay=ReplayConfig(
            capacity=setting.steps,
            batch_size=setting.batch,
            batch_length=setting.window,
            train_ratio=rows / setting.block,
            online=False,
            prefill=5 * setting.block,
            train_every=setting.block,
            pretrain=setting.updates,
        ),
        save_every=max(setting.steps // 4, setting.block),
    )


def _tuned(agent: Config, setting: Setting) -> Config:
    """An agent with those numbers that a setting changes."""
    agent = changed(
        agent,
        model=changed(agent.model, discount=setting.discount, predict_ends=setting.ends or None),
        behavior=changed(agent.behavior, imagine=setting.imagine),
        weights=changed(agent.weights, rec=setting.rec, kl=setting.kl),
        policy_optim=changed(agent.policy_optim, learning_rate=setting.policy_rate),
    )
    optims = ("model_optim", "policy_optim", "value_optim") if setting.anneal else ()
    return annealed(agent, *optims)


RECIPE = Recipe(NAME, Config, agent, config, PRESETS)

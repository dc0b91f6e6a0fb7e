"""Dreamer V2: Mastering Atari with Discrete World Models (arXiv:2010.02193).

The world model is an RSSM with categorical latents, a layer-norm GRU and a balanced KL. Policy and
critic learn in its dreams: by the score function where actions are discrete, through the dynamics
where they are continuous. The defaults are those of the authors' code for Atari
(github.com/danijar/dreamerv2); the size "dmc" has those for the DeepMind Control Suite.

Differences from the code: sequences are sampled uniformly, and episode ends get no priority; vector
observations are concatenated in the order of their names; float32 instead of mixed precision.

Command: `jaxwm train dreamer_v2 --preset catch`.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

from jaxwm import backend
from jaxwm.agent import in_turn
from jaxwm.behaviors.actor_critic_v2 import ActorCriticV2Config, actor_critic_v2
from jaxwm.config import at_least, changed, require, share
from jaxwm.models import codecs
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.encoders import concat_size, token_size
from jaxwm.models.heads import Style, head, normal_reward, posterior, soft_continue
from jaxwm.models.latents import LatentConfig, balanced_kl, categorical
from jaxwm.models.recurrent import LayerNormGRUConfig, core
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

NAME = "dreamer_v2"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The world model.

    Args:
      core: the recurrent core; its `hidden` is also the width of prior and posterior.
      latent: the categorical latent; Dreamer V2 mixes no uniform distribution in.
      kl_balance: share of the KL that trains the prior, in [0, 1].
      codec: encoder and decoder.
      units: width of the reward and continue heads.
      layers: hidden layers of these heads.
      norm: "layer" puts a LayerNorm before the activations of heads, prior and posterior.
      discount: discount of one step, in [0, 1].
      predict_ends: whether there is a continue head. Without it every step continues.
      clip_reward: how rewards are clipped before the model learns them.
    """

    core: LayerNormGRUConfig = LayerNormGRUConfig(600, 600)
    latent: LatentConfig = LatentConfig(stoch=32, classes=32, unimix=0.0, free_nats=0.0)
    kl_balance: float = 0.8
    codec: ClassicCodecConfig = ClassicCodecConfig()
    units: int = 400
    layers: int = 4
    norm: Literal["none", "layer"] = "none"
    discount: float = 0.999
    predict_ends: bool = True
    clip_reward: Literal["none", "tanh", "sign"] = "tanh"

    def __post_init__(self):
        at_least(self, 1, "units", "layers")
        share(self, "kl_balance", "discount")


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
    style = Style(dtype, config.norm, "elu", "glorot")
    latent = balanced_kl(categorical(config.latent), config.kl_balance, config.latent.free_nats)
    deter, hidden, features = config.core.deter, config.core.hidden, config.core.deter + latent.size
    encoder = codecs.encoder(config.codec, obs_space, dtype)
    tokens = token_size(encoder, obs_space)
    net = lambda: head(features, config.units, config.layers, 1, style)  # noqa: E731
    heads = {"reward": normal_reward(net(), config.clip_reward)}
    if config.predict_ends:
        heads["continue"] = soft_continue(net(), config.discount)
    return Parts(
        encoder=encoder,
        core=core(config.core, latent.size, concat_size(as_dict(action_space)), dtype),
        latent=latent,
        posterior=posterior(deter, tokens, hidden, latent.outputs, style),
        prior=head(deter, hidden, 1, latent.outputs, style, name="logits"),
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
    cont: Number = 5.0
    kl: Number = 0.1
    policy: Number = 1.0
    value: Number = 1.0

    def __post_init__(self):
        numbers_at_least(self, 0, *(field.name for field in dataclasses.fields(self)))

    def of(self, name: str) -> Number | Scalar:
        """The weight of the loss `name`."""
        return getattr(self, {"continue": "cont"}.get(name, name.split("/")[0]))


@dataclasses.dataclass(frozen=True)
class Config:
    """Dreamer V2: world model, behaviour, weights of the losses and three optimisers.

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
    behavior: ActorCriticV2Config = ActorCriticV2Config()
    weights: LossWeights = LossWeights()
    model_optim: AdamConfig = AdamConfig(2e-4, weight_decay=1e-6)
    policy_optim: AdamConfig = AdamConfig(4e-5, weight_decay=1e-6)
    value_optim: AdamConfig = AdamConfig(1e-4, weight_decay=1e-6)
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
    latent = config.model.latent
    features = config.model.core.deter + latent.stoch * latent.classes
    behavior = actor_critic_v2(
        config.behavior, action_space, model, features, config.model.discount, dtype
    )

    def squares(tree: Params) -> Params:
        return shards.sum_parts(square_sums(tree))

    actors = grouped(
        {
            "policy": adam_tf(**vars(config.policy_optim), square_sums=squares),
            "value": adam_tf(**vars(config.value_optim), square_sums=squares),
        }
    )
    learner = adam_tf(**vars(config.model_optim), square_sums=squares)
    weights = lambda name, updates: value_at(config.weights.of(name), updates)  # noqa: E731
    return in_turn(model, behavior, weights, learner, actors, shards)


SIZES = ("atari", "dmc", "nano", "debug")


def sized(size: str) -> Config:
    """The configuration of one size.

    Args:
      size: "atari" and "dmc" as in the code; "nano", which two CPU cores train; "debug", which
        compiles in seconds and learns little.

    Raises:
      JaxwmError: if there is no such size.
    """
    if size == "atari":
        return Config()
    if size == "dmc":
        latent = LatentConfig(stoch=32, classes=32, unimix=0.0, free_nats=1.0)
        model = ModelConfig(
            core=LayerNormGRUConfig(200, 200),
            latent=latent,
            discount=0.99,
            predict_ends=False,
            clip_reward="none",
        )
        return Config(
            model=model,
            behavior=ActorCriticV2Config(entropy=1e-4),
            weights=LossWeights(kl=1.0),
            model_optim=AdamConfig(3e-4, weight_decay=1e-6),
            policy_optim=AdamConfig(8e-5, weight_decay=1e-6),
            value_optim=AdamConfig(8e-5, weight_decay=1e-6),
        )
    if size == "nano":
        return _thin(deter=64, stoch=8, classes=8, units=64, depth=8, layers=2, imagine=15)
    if size == "debug":
        return _thin(deter=8, stoch=4, classes=4, units=8, depth=2, layers=1, imagine=4)
    raise nearest(size, SIZES, "size of dreamer_v2")


def _thin(
    deter: int, stoch: int, classes: int, units: int, depth: int, layers: int, imagine: int
) -> Config:
    """Small networks, which take and need larger steps."""
    model = ModelConfig(
        core=LayerNormGRUConfig(deter, deter),
        latent=LatentConfig(stoch, classes, unimix=0.0, free_nats=0.0),
        codec=ClassicCodecConfig(units, layers, depth),
        units=units,
        layers=layers,
        discount=0.99,
        clip_reward="none",
    )
    return Config(
        model=model,
        behavior=ActorCriticV2Config(units=units, layers=layers, imagine=imagine),
        model_optim=AdamConfig(1e-3, weight_decay=1e-6),
        policy_optim=AdamConfig(3e-4, weight_decay=1e-6),
        value_optim=AdamConfig(1e-3, weight_decay=1e-6),
    )


class Setting(NamedTuple):
    """An environment and the numbers for it.

    Attributes:
      env: the environment; --env takes another one.
      about: what it is for.
      size: see `sized`.
      envs: environments.
      steps: environment steps of a run.
      repeat: times each action is repeated.
      prefill: steps with random actions before learning begins.
      batch: sequences of an update.
      window: rows of a sequence.
      train_ratio: rows trained on per environment step.
      imagine: steps of each dream; None for the size's.
      rec: weight of the reconstruction; None for the size's.
      entropy: weight of the policy's entropy; None for the size's.
      explore: noise on actions in training; None for the size's.
      anneal: whether the learning rates fall linearly, to a tenth at the end of the run.
    """

    env: str
    about: str
    size: str = "nano"
    envs: int = 8
    steps: int = 20_000
    repeat: int = 1
    prefill: int = 1_000
    batch: int = 8
    window: int = 16
    train_ratio: float = 64.0
    imagine: int | None = None
    rec: float | None = None
    entropy: float | None = None
    explore: float | None = None
    anneal: bool = False


SETTINGS = {
    # A ball is two numbers of fifty, and a pole leans by hundredths: what is so small in squares
    # must count against the KL. A pull towards random actions keeps the policy for Catch from
    # settling before the model sees the ball.
    "catch": Setting(
        "gymnax/Catch-bsuite",
        "a grid as observation, learnt in minutes on two CPU cores",
        steps=15_000,
        imagine=9,
        rec=5.0,
        entropy=3e-2,
    ),
    # A long balance needs a policy at rest: the learning rates fall.
    "cartpole": Setting(
        "gymnax/CartPole-v1",
        "the pole, learnt in minutes on two CPU cores",
        batch=4,
        window=32,
        rec=10.0,
        anneal=True,
    ),
    # Noise as in Dreamer V1. Four of five seeds learn with it, and without.
    "pendulum": Setting(
        "brax/inverted_pendulum",
        "continuous actions, on two CPU cores",
        steps=14_000,
        repeat=2,
        batch=4,
        window=32,
        rec=10.0,
        entropy=1e-4,
        explore=0.3,
        anneal=True,
    ),
    # The environment repeats actions itself: one update per 16 steps, each of 16 x 50 rows.
    "atari": Setting(
        *("atari/Pong", "Atari as in the code", "atari", 1, 50_000_000, 1, 50_000, 16, 50, 50.0)
    ),
    "dmc_vision": Setting(
        *("dm_control/walker-walk:image", "DeepMind Control as in the code", "dmc"),
        *(1, 1_000_000, 2, 1_000, 16, 50, 160.0),
    ),
}
PRESETS = {name: f"{setting.env}: {setting.about}" for name, setting in SETTINGS.items()}


def config(
    env: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """A run of Dreamer V2.

    Args:
      env: name of the environment; None for the preset's.
      size: see `sized`; None for the preset's, or "atari".
      variant: None: there is only one.
      preset: one of `PRESETS`; None for the numbers of Atari.

    Raises:
      JaxwmError: if there is no such size, variant or preset, or no environment was named.
    """
    require(
        not variant,
        f"The recipe dreamer_v2 has no variants, but the variant {variant!r} was asked for.",
    )
    if preset is not None and preset not in SETTINGS:
        raise nearest(preset, SETTINGS, "preset of dreamer_v2")
    require(
        env is not None or preset is not None,
        "Name an environment with --env, or a preset with --preset.",
    )
    setting = SETTINGS[preset or "atari"]
    size = size or setting.size
    if size == "debug":  # learns after few steps, too
        setting = setting._replace(envs=2, prefill=0, batch=2, window=6, imagine=None)
    changes: dict[str, Any] = {} if setting.size != "nano" else {"save_every": setting.steps // 4}
    return RunConfig(
        env=env or setting.env,
        recipe=NAME,
        size=size,
        agent=_tuned(sized(size), setting),
        envs=setting.envs,
        steps=setting.steps,
        action_repeat=setting.repeat,
        replay=ReplayConfig(
            capacity=min(setting.steps, 2_000_000),
            batch_size=setting.batch,
            batch_length=setting.window,
            train_ratio=setting.train_ratio,
            online=False,
            prefill=setting.prefill,
        ),
        **changes,
    )


def _tuned(agent: Config, setting: Setting) -> Config:
    """An agent with those numbers that a setting changes."""
    agent = changed(
        agent,
        behavior=changed(
            agent.behavior,
            imagine=setting.imagine,
            entropy=setting.entropy,
            explore=setting.explore,
        ),
        weights=changed(agent.weights, rec=setting.rec),
    )
    optims = ("model_optim", "policy_optim", "value_optim") if setting.anneal else ()
    return annealed(agent, *optims)


RECIPE = Recipe(NAME, Config, agent, config, PRESETS)

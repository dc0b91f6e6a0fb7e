"""DreamerV3: Mastering Diverse Domains through World Models (arXiv:2301.04104, Nature 640:647).

The defaults follow the authors' public code in its latest state, which the variant "head"
names; the variant "paper" is the code as of the second version of the paper. They differ in:

    |                                   | head                         | paper                |
    |-----------------------------------|------------------------------|----------------------|
    | image convolutions                | full resolution, then pooled | strided              |
    | uniform share, discrete policies  | 0                            | 0.01                 |
    | weight of the first dreamed state | predicted continue           | true 1 - is_terminal |

Deviations from both: latents are stored as class indices; vectors of uint8 are numbers, not
classes; time limits never count as terminal.

Command: `jaxwm train dreamer_v3 --preset cartpole`, which learns to balance the pole for all 500
steps in minutes on two CPU cores.
"""

import dataclasses
from typing import Literal, NamedTuple

from jaxwm import backend, dists
from jaxwm.agent import joint
from jaxwm.behaviors.actor_critic import ActorCriticConfig, actor_critic
from jaxwm.config import at_least, require, share
from jaxwm.models import encoders
from jaxwm.models.encoders import CodecConfig, concat_size, token_size
from jaxwm.models.gru import BlockGRUConfig, block_gru
from jaxwm.models.heads import Style, head, posterior
from jaxwm.models.latents import LatentConfig, categorical
from jaxwm.models.rssm import Head, Parts, rssm
from jaxwm.numerics import Scalar, keep_mirrored, symexp_bins
from jaxwm.optim import (
    Number,
    OptimConfig,
    Schedule,
    laprop,
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
    CoreConstructor,
    ObsSpace,
    Shards,
    WorldModel,
    as_dict,
    nearest,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the world model.

    Args:
      core: the recurrent core.
      latent: the stochastic latent.
      codec: encoder and decoder.
      units: width of the reward and continue heads (one layer each).
      bins: bins of the two-hot reward head.
      horizon: discount horizon in steps; the continue head learns (1 - 1/horizon) * continue.
      recompute: whether gradients compute encoder and decoder again, some rows at a time, instead
        of keeping their activations. Images then take much less memory and a little more time.
    """

    core: BlockGRUConfig = BlockGRUConfig()
    latent: LatentConfig = LatentConfig()
    codec: CodecConfig = CodecConfig()
    units: int = 1024
    bins: int = 255
    horizon: int = 333
    recompute: bool = False

    def __post_init__(self):
        at_least(self, 1, "units", "horizon")
        at_least(self, 3, "bins")
        require(
            self.core.deter % self.codec.blocks == 0,
            f"CodecConfig.blocks is {self.codec.blocks}; it must divide the deterministic state "
            f"of {self.core.deter}.",
        )


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the total; "rec" is that of every observation key."""

    rec: Number = 1.0
    reward: Number = 1.0
    cont: Number = 1.0
    dyn: Number = 1.0
    rep: Number = 0.1
    policy: Number = 1.0
    value: Number = 1.0
    replay_value: Number = 0.3

    def __post_init__(self):
        numbers_at_least(self, 0, *(field.name for field in dataclasses.fields(self)))

    def of(self, name: str) -> Number | Scalar:
        """The weight of the loss `name`."""
        return getattr(self, {"continue": "cont"}.get(name, name.split("/")[0]))


@dataclasses.dataclass(frozen=True)
class Config:
    """DreamerV3: world model, behaviour, weights of the losses and optimiser.

    Args:
      model: the world model.
      behavior: the imagined actor-critic.
      weights: weights of the losses.
      optim: the optimiser.
      slow_rate: share of the critic that its slow copy takes over after each update.
      dtype: compute type; "auto" is bfloat16 on accelerators that have it, else float32.
    """

    model: ModelConfig = ModelConfig()
    behavior: ActorCriticConfig = ActorCriticConfig()
    weights: LossWeights = LossWeights()
    optim: OptimConfig = OptimConfig()
    slow_rate: float = 0.02
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        share(self, "slow_rate")


def agent(
    config: Config,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    shards: Shards = ALONE,
    core: CoreConstructor = block_gru,
) -> Agent:
    """The agent for one environment's spaces.

    Args:
      config: sizes and hyperparameters.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      shards: how the shards of the training meet, if it is divided.
      core: the recurrent memory, as a constructor like `block_gru`.

    Raises:
      JaxwmError: if the model or the behaviour cannot take the spaces.
    """
    dtype = backend.compute_dtype(config.dtype)
    shards = keep_mirrored(shards, "model/reward/out", "behavior/value/out")
    model = world_model(config.model, obs_space, action_space, dtype, core)
    features = config.model.core.deter + config.model.latent.stoch * config.model.latent.classes
    behavior = actor_critic(
        config.behavior,
        action_space,
        model,
        features,
        dtype,
        config.slow_rate,
        shards.all_gather,
    )
    optimizer = laprop(
        **vars(config.optim),
        square_sums=lambda tree: shards.sum_parts(square_sums(tree)),
    )
    weights = lambda name, updates: value_at(config.weights.of(name), updates)  # noqa: E731
    return joint(model, behavior, weights, optimizer, shards)


def parts(
    config: ModelConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    dtype: str = "float32",
    core: CoreConstructor = block_gru,
) -> Parts:
    """The networks of the world model.

    Args:
      config: sizes.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      dtype: compute type.
      core: the recurrent memory, as a constructor like `block_gru`.

    Raises:
      JaxwmError: if images cannot be halved to 3..16 pixels or differ in size, or the decoder's
        blocks do not divide the channels of their last stage.
    """
    style, latent = Style(dtype), categorical(config.latent)
    deter, units = config.core.deter, config.core.hidden
    features, bins = deter + latent.size, symexp_bins(config.bins)
    encoder = encoders.encoder(config.codec, obs_space, dtype)
    tokens = token_size(encoder, obs_space)
    decoder = encoders.decoder(config.codec, obs_space, deter, latent.size, dtype)
    if config.recompute:
        encoder, decoder = encoders.recomputed(encoder), encoders.recomputed(decoder)
    alive = 1.0 - 1.0 / config.horizon
    reward = Head(
        net=head(features, config.units, 1, config.bins, style, scale=0.0),
        dist=lambda raw: dists.TwoHot(raw, bins),
        target=lambda steps: steps.reward,
    )
    cont = Head(
        net=head(features, config.units, 1, 1, style),
        dist=lambda raw: dists.SoftBernoulli(raw[..., 0]),
        target=lambda steps: alive * (1.0 - steps.is_terminal),
    )
    return Parts(
        encoder=encoder,
        core=core(config.core, latent.size, concat_size(as_dict(action_space)), dtype),
        latent=latent,
        posterior=posterior(deter, tokens, units, latent.outputs, style),
        prior=head(deter, units, 2, latent.outputs, style, name="logits"),
        decoder=decoder,
        observation=encoders.observation_dist,
        heads={"reward": reward, "continue": cont},
    )


def world_model(
    config: ModelConfig,
    obs_space: ObsSpace,
    action_space: ActionSpace,
    dtype: str = "float32",
    core: CoreConstructor = block_gru,
) -> WorldModel:
    """The world model; arguments as in `parts`."""
    networks = parts(config, obs_space, action_space, dtype, core)
    return rssm(networks, obs_space, action_space, dtype)


NAME = "dreamer_v3"
# The one knob of the paper's sizes is the deterministic state; everything else follows.
DETER = {
    "size1m": 512,
    "size12m": 2048,
    "size25m": 3072,
    "size50m": 4096,
    "size100m": 6144,
    "size200m": 8192,
    "size400m": 12288,
}
VARIANTS = ("head", "paper")


def sized(size: str, variant: str = "head") -> Config:
    """The configuration of one size and variant.

    Args:
      size: "size1m" to "size400m" as in the paper; "nano", good for two CPU cores; "debug",
        which compiles in seconds and learns little.
      variant: "head" or "paper".

    Raises:
      JaxwmError: if there is no such size or variant.
    """
    if variant not in VARIANTS:
        raise nearest(variant, VARIANTS, "variant of dreamer_v3")
    if size == "debug":
        config = _agent(deter=16, hidden=8, stoch=4, classes=4, units=16, depth=2, blocks=4)
        return _variant(_thin(config, layers=1, bins=41, imagine=5), variant)
    if size == "nano":
        config = _agent(deter=128, hidden=64, stoch=8, classes=8, units=64, depth=4, blocks=4)
        return _variant(_thin(config, layers=2, bins=127, imagine=15), variant)
    size = size if size in DETER else f"size{size}"
    if size not in DETER:
        raise nearest(size.removeprefix("size"), ["debug", "nano", *DETER], "size of dreamer_v3")
    deter = DETER[size]
    units, depth = deter // 8, deter // 128
    config = _agent(deter, hidden=units, stoch=32, classes=depth, units=units, depth=depth)
    return _variant(config, variant)


class Domain(NamedTuple):
    """A domain of the paper as the reference's latest configuration has it.

    Attributes:
      env: an environment of the domain; --env takes another one.
      size: size of the agent.
      envs: environments.
      train_ratio: rows trained on per environment step.
      steps: environment steps (decisions of the agent) of a run.
      about: what it is, and what the numbers can be held against.
    """

    env: str
    size: str
    envs: int
    train_ratio: float
    steps: int
    about: str


# Actions are repeated by the environments themselves, if at all (Atari: 4 frames).
DOMAINS = {
    "dmc_proprio": Domain(
        *("dm_control/walker-walk", "size1m", 16, 1024, 1_100_000),
        "DeepMind Control from vectors (jaxwm compare)",
    ),
    "dmc_vision": Domain(
        *("dm_control/walker-walk:image", "size200m", 16, 256, 1_100_000),
        "DeepMind Control from 64x64 images (jaxwm compare)",
    ),
    "atari": Domain(
        *("atari/Pong", "size200m", 16, 32, 51_000_000),
        "Atari, sticky actions, 200M frames (jaxwm compare)",
    ),
    "atari100k": Domain(
        *("atari/Pong:100k", "size200m", 1, 256, 110_000),
        "Atari, 400K frames (jaxwm compare)",
    ),
    "crafter": Domain(
        *("crafter/reward", "size200m", 1, 512, 1_100_000),
        "Crafter; craftax/Craftax-Classic-Pixels-v1 on the device",
    ),
    "bsuite": Domain(
        *("gymnax/MemoryChain-bsuite", "size200m", 1, 1024, 100_000),
        "those families of bsuite that gymnax has; the length is ours",
    ),
    "minatar": Domain(
        *("gymnax/Breakout-MinAtar", "size12m", 16, 64, 5_000_000),
        "small Atari games on the device; not in the paper, the numbers are ours",
    ),
    "procgen": Domain(
        *("envpool/CoinrunHard-v0", "size200m", 16, 64, 110_000_000),
        "ProcGen (jaxwm compare --task); needs Qt5, and frames are 64x64 instead of 96x96",
    ),
}
# What each preset is for; the numbers are in `config` and in `DOMAINS`.
PRESETS = {
    "cartpole": "gymnax/CartPole-v1 on two CPU cores, minutes (the demo)",
    "catch": "gymnax/Catch-bsuite, a grid as observation, minutes on two CPU cores",
    "pixels": "toy/Pixels, 64x64 colour frames on two CPU cores",
    "pendulum": "brax/inverted_pendulum, continuous actions on two CPU cores",
    **{name: domain.about for name, domain in DOMAINS.items()},
}


def config(
    env: str | None = None,
    size: str | None = None,
    variant: str | None = None,
    preset: str | None = None,
) -> RunConfig:
    """A run of DreamerV3, with the reference's numbers unless a preset says otherwise.

    Args:
      env: name of the environment; None for the preset's.
      size: see `sized`; None for the preset's, or size200m as in the reference.
      variant: see `sized`; None for "head".
      preset: one of `PRESETS`; None for the reference's numbers.

    Raises:
      JaxwmError: if there is no such size, variant or preset, or no environment was named.
    """
    if preset is not None and preset not in PRESETS:
        raise nearest(preset, PRESETS, "preset of dreamer_v3")
    if preset is None:
        require(env is not None, "Name an environment with --env, or a preset with --preset.")
        size, variant = size or "size200m", variant or "head"
        return RunConfig(
            env=str(env), recipe=NAME, size=size, variant=variant, agent=sized(size, variant)
        )
    if preset in DOMAINS:
        return _of_domain(DOMAINS[preset], env, size, variant or "head")
    base = RunConfig(
        env=env or "gymnax/CartPole-v1",
        recipe=NAME,
        size=size or "nano",
        variant=variant or "head",
        agent=sized(size or "nano", variant or "head"),
        envs=8,
        steps=16_000,
        # Small batches: two cores make four times the updates of 16 windows, which teaches more.
        replay=ReplayConfig(capacity=100_000, batch_size=4, batch_length=32, train_ratio=64),
        log_every=400,
        save_every=8_000,
    )
    if preset == "pixels":
        base = _short(base, env or "toy/Pixels", steps=4_000, train_ratio=32)
        replay = dataclasses.replace(base.replay, capacity=20_000, batch_size=8)
        return dataclasses.replace(base, replay=replay, log_every=160, save_every=2_000)
    # A pole leans by hundredths, a ball is two numbers of fifty: what is so small in squares must
    # count against the KL, which starts at a nat.
    if preset == "catch":
        # Episodes last nine steps: short dreams and windows.
        base = _short(base, env or "gymnax/Catch-bsuite", steps=8_000, train_ratio=64)
        return _weigh_observations(base, 5.0)
    if preset == "pendulum":
        env = env or "brax/inverted_pendulum"
        base = dataclasses.replace(base, env=env, steps=20_000, action_repeat=2)
    if preset == "cartpole":
        # Once the pole stands, returns differ by little of their spread: a larger pull towards
        # random actions would let the cart drift away.
        base = _weigh_entropy(base, 3e-5)
    # A long balance needs a policy at rest.
    return _anneal(_weigh_observations(base, 10.0))


def _of_domain(domain: Domain, env: str | None, size: str | None, variant: str) -> RunConfig:
    """A run in a domain of the paper."""
    size = size or domain.size
    # A replay larger than the run would only take memory.
    capacity = min(ReplayConfig().capacity, domain.steps)
    return RunConfig(
        env=env or domain.env,
        recipe=NAME,
        size=size,
        variant=variant,
        agent=sized(size, variant),
        envs=domain.envs,
        steps=domain.steps,
        replay=ReplayConfig(capacity=capacity, train_ratio=domain.train_ratio),
    )


def _anneal(config: RunConfig) -> RunConfig:
    """A run whose learning rate falls linearly, to a tenth at its end."""
    rate = config.agent.optim.learning_rate
    optim = dataclasses.replace(config.agent.optim, learning_rate=Schedule(rate, 0.1 * rate))
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, optim=optim))


def _weigh_observations(config: RunConfig, weight: float) -> RunConfig:
    """A run with another weight on the reconstruction of observations."""
    weights = dataclasses.replace(config.agent.weights, rec=weight)
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, weights=weights))


def _weigh_entropy(config: RunConfig, entropy: float) -> RunConfig:
    """A run with another weight on the entropy of the policy."""
    behavior = dataclasses.replace(config.agent.behavior, entropy=entropy)
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, behavior=behavior))


def _short(config: RunConfig, env: str, steps: int, train_ratio: float) -> RunConfig:
    """A run in an environment with episodes of some ten steps."""
    behavior = dataclasses.replace(config.agent.behavior, imagine=8)
    return dataclasses.replace(
        config,
        env=env,
        steps=steps,
        agent=dataclasses.replace(config.agent, behavior=behavior),
        replay=dataclasses.replace(config.replay, batch_length=16, train_ratio=train_ratio),
    )


def _agent(
    deter: int, hidden: int, stoch: int, classes: int, units: int, depth: int, blocks: int = 8
) -> Config:
    return Config(
        model=ModelConfig(
            core=BlockGRUConfig(deter, hidden, blocks),
            latent=LatentConfig(stoch, classes),
            codec=CodecConfig(units, depth=depth, blocks=blocks),
            units=units,
        ),
        behavior=ActorCriticConfig(units),
    )


def _thin(config: Config, layers: int, bins: int, imagine: int) -> Config:
    codec = dataclasses.replace(config.model.codec, layers=layers)
    model = dataclasses.replace(config.model, codec=codec, bins=bins)
    behavior = dataclasses.replace(config.behavior, layers=layers, bins=bins, imagine=imagine)
    # Small networks and short runs take, and need, larger steps.
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=100)
    return dataclasses.replace(config, model=model, behavior=behavior, optim=optim)


def _variant(config: Config, variant: str) -> Config:
    paper = variant == "paper"
    codec = dataclasses.replace(
        config.model.codec,
        convs="strided" if paper else "pool",
        mults=(1, 2, 3, 4, 4) if paper else (2, 3, 4, 4),
    )
    behavior = dataclasses.replace(
        config.behavior,
        unimix=0.01 if paper else 0.0,
        start_weight="true" if paper else "predicted",
    )
    model = dataclasses.replace(config.model, codec=codec)
    return dataclasses.replace(config, model=model, behavior=behavior)


RECIPE = Recipe(NAME, Config, agent, config, PRESETS)

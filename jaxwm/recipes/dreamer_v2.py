"""Dreamer V2: Mastering Atari with Discrete World Models (arXiv:2010.02193).

The world model is an RSSM with categorical latents, a layer-norm GRU and a balanced KL. The
defaults are those of the authors' code (github.com/danijar/dreamerv2) for Atari.
"""

import dataclasses
from typing import Literal

from jaxwm.config import at_least, share
from jaxwm.models import codecs
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.encoders import concat_size, token_size
from jaxwm.models.heads import Style, head, normal_reward, posterior, soft_continue
from jaxwm.models.latents import LatentConfig, balanced_kl, categorical
from jaxwm.models.recurrent import LayerNormGRUConfig, core
from jaxwm.models.rssm import Parts, rssm
from jaxwm.types import ActionSpace, ObsSpace, WorldModel, as_dict


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

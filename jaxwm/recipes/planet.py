"""PlaNet: Learning Latent Dynamics for Planning from Pixels (arXiv:1811.04551).

The world model is an RSSM with Gaussian latents and a GRU that resets its state before the
candidate's product. It sees images of five bits. The defaults are those of the authors' code
(github.com/google-research/planet).
"""

import dataclasses
import functools
from typing import Literal

from jaxwm.config import at_least, require
from jaxwm.models import codecs
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.encoders import concat_size, token_size
from jaxwm.models.heads import Style, head, normal_reward, posterior
from jaxwm.models.latents import GaussianConfig, excess_kl, gaussian
from jaxwm.models.recurrent import PlanetGRUConfig, core
from jaxwm.models.rssm import Parts, rssm
from jaxwm.types import ActionSpace, ObsSpace, WorldModel, as_dict


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The world model.

    Args:
      core: the recurrent core; its `hidden` is also the width of prior and posterior.
      latent: the Gaussian latent.
      free_nats: KL of a row below which it is not trained, in nats.
      codec: encoder and decoder.
      units: width of the reward head.
      layers: hidden layers of the reward head.
      bits: bits of the images' pixels, in 1..8.
      clip_reward: how rewards are clipped before the model learns them.
    """

    core: PlanetGRUConfig = PlanetGRUConfig()
    latent: GaussianConfig = GaussianConfig()
    free_nats: float = 3.0
    codec: ClassicCodecConfig = ClassicCodecConfig(300, 3, 32, act="relu", conv_act="relu")
    units: int = 300
    layers: int = 3
    bits: int = 5
    clip_reward: Literal["none", "tanh"] = "none"

    def __post_init__(self):
        at_least(self, 1, "units", "layers")
        at_least(self, 0, "free_nats")
        require(1 <= self.bits <= 8, f"ModelConfig.bits is {self.bits}; it must lie in 1 to 8.")


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
    style = Style(dtype, "none", "relu", "glorot")
    latent = excess_kl(gaussian(config.latent), config.free_nats)
    deter, hidden = config.core.deter, config.core.hidden
    encoder = codecs.encoder(config.codec, obs_space, dtype)
    tokens = token_size(encoder, obs_space)
    moments = {"mean": latent.size, "std": latent.size}
    reward = head(deter + latent.size, config.units, config.layers, 1, style)
    return Parts(
        encoder=encoder,
        core=core(config.core, latent.size, concat_size(as_dict(action_space)), dtype),
        latent=latent,
        posterior=posterior(deter, tokens, hidden, moments, style),
        prior=head(deter, hidden, 1, moments, style),
        decoder=codecs.decoder(config.codec, obs_space, deter, latent.size, dtype),
        observation=functools.partial(codecs.observation_dist, bits=config.bits),
        heads={"reward": normal_reward(reward, config.clip_reward)},
        order="zh",
        stored=False,
    )


def world_model(
    config: ModelConfig, obs_space: ObsSpace, action_space: ActionSpace, dtype: str = "float32"
) -> WorldModel:
    """The world model, which sees images of `config.bits`; arguments as in `parts`."""
    model = rssm(parts(config, obs_space, action_space, dtype), obs_space, action_space, dtype)
    return codecs.quantized(model, obs_space, config.bits)

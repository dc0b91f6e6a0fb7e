"""Dreamer V1: Dream to Control (arXiv:1912.01603).

The world model is an RSSM with Gaussian latents and a Keras GRU. The defaults are those of the
authors' code (github.com/danijar/dreamer) for the DeepMind Control Suite.
"""

import dataclasses
from typing import Literal

from jaxwm.config import at_least, share
from jaxwm.models import codecs
from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.encoders import concat_size, token_size
from jaxwm.models.heads import Style, head, normal_reward, posterior, soft_continue
from jaxwm.models.latents import GaussianConfig, floored_kl, gaussian
from jaxwm.models.recurrent import KerasGRUConfig, core
from jaxwm.models.rssm import Parts, rssm
from jaxwm.types import ActionSpace, ObsSpace, WorldModel, as_dict


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

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

Command: `jaxwm train dreamer_v3 --preset cartpole`.
"""

import dataclasses

from jaxwm.agent import AgentConfig
from jaxwm.behaviors.actor_critic import ActorCriticConfig
from jaxwm.models.encoders import CodecConfig
from jaxwm.models.gru import BlockGRUConfig
from jaxwm.models.latents import LatentConfig
from jaxwm.models.world_model import WorldModelConfig
from jaxwm.optim import OptimConfig
from jaxwm.recipes import RunConfig
from jaxwm.replay import ReplayConfig
from jaxwm.types import nearest

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


def agent(size: str, variant: str = "head") -> AgentConfig:
    """The agent of one size and variant.

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


def config(env: str, size: str = "size200m", variant: str = "head") -> RunConfig:
    """A run of DreamerV3 in `env` with the reference's numbers.

    Args:
      env: name of the environment.
      size: see `agent`.
      variant: see `agent`.

    Raises:
      JaxwmError: if there is no such size or variant.
    """
    return RunConfig(env=env, size=size, variant=variant, agent=agent(size, variant))


def _agent(
    deter: int, hidden: int, stoch: int, classes: int, units: int, depth: int, blocks: int = 8
) -> AgentConfig:
    return AgentConfig(
        model=WorldModelConfig(
            core=BlockGRUConfig(deter, hidden, blocks),
            latent=LatentConfig(stoch, classes),
            codec=CodecConfig(units, depth=depth, blocks=blocks),
            units=units,
        ),
        behavior=ActorCriticConfig(units),
    )


def _thin(config: AgentConfig, layers: int, bins: int, imagine: int) -> AgentConfig:
    codec = dataclasses.replace(config.model.codec, layers=layers)
    model = dataclasses.replace(config.model, codec=codec, bins=bins)
    behavior = dataclasses.replace(config.behavior, layers=layers, bins=bins, imagine=imagine)
    return dataclasses.replace(config, model=model, behavior=behavior)


def _variant(config: AgentConfig, variant: str) -> AgentConfig:
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

"""What the recorded batches of PlaNet and Dreamer V1 have in common: Gaussian latents."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.models.latents import GaussianConfig, moments
from tests.parity.world import World


def compare_states(case: World, ours: Mapping[str, Any], deter: str, stoch: str, std: str) -> None:
    """Statistics and samples of posterior and prior.

    Args:
      case: the batch.
      ours: from `World.compute`.
      deter: how the arrays call deterministic states.
      stoch: how they call samples.
      std: how they call standard deviations.
    """
    recorded = case.recorded
    recorded.compare("out/rssm/feat", ours["feat"])
    recorded.compare(f"out/rssm/{deter}", ours["deter"])
    recorded.compare("out/rssm/kl", ours["kl"])
    for side, sample in (("post", "stoch"), ("prior", "prior_stoch")):
        mean, deviation = moments(GaussianConfig(), ours[side])
        recorded.compare(f"out/rssm/{side}_mean", mean)
        recorded.compare(f"out/rssm/{side}_{std}", deviation)
        recorded.compare(f"out/rssm/{side}_{stoch}", ours[sample])


def one_row(case: World, time: int, action: Any, images: bool = False) -> tuple[Any, Any]:
    """Row `time` of the first sequence, reached by an action (1, A), and its image noise."""
    row = jax.tree.map(lambda x: x[time, :1], case.steps)
    noise = {key: x[time, :1] for key, x in case.images.items()} if images else {}
    return row._replace(action=jnp.asarray(action)), noise

"""Layers, latents and preprocessing of PlaNet, against tables recorded from its code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.models.codecs import quantize, restore
from jaxwm.models.latents import excess_kl
from jaxwm.models.recurrent import PlanetGRU
from tests.parity.common import Check, Recorded
from tests.parity.layers import gaussian_kl, shared_checks, unit_normal


def planet_gru(recorded: dict[str, Any]) -> dict[str, Any]:
    """Our parameters of the GRU."""
    recorded = {name: jnp.asarray(x) for name, x in recorded.items()}
    return {
        "gates": {"kernel": recorded["w_ru"], "bias": recorded["b_ru"]},
        "candidate": {"kernel": recorded["w_c"], "bias": recorded["b_c"]},
    }


def fresh_biases(recorded: Recorded) -> None:
    """Biases of one at the gates, of zero at the candidate."""
    deter = recorded.shape("gru/init/b_c")[0]
    x, h = jnp.zeros((1, 3)), jnp.zeros((1, deter))
    params = PlanetGRU(3, deter).init(jax.random.key(0), x, h)["params"]
    recorded.compare("gru/init/b_ru", params["gates"]["bias"])
    recorded.compare("gru/init/b_c", params["candidate"]["bias"])


def preprocess(recorded: Recorded) -> None:
    """Images of fewer bits, and the way back to pixels."""
    image = jnp.asarray(recorded["preprocess/image"])
    for bits in map(int, recorded.groups(r"preprocess/bits(\d+)/noise")):
        noise = jnp.asarray(recorded[f"preprocess/bits{bits}/noise"])
        less = quantize(image, noise, bits)
        back = restore(less, bits)
        recorded.compare(f"preprocess/bits{bits}/out", less)
        recorded.compare(f"preprocess/bits{bits}/post_uint8", back)
        recorded.compare(f"preprocess/bits{bits}/post_float", back / 256)


CHECKS = [
    *shared_checks(PlanetGRU, planet_gru, jax.nn.relu),
    Check("fresh_biases", r"gru/init/b_ru", fresh_biases),
    Check("preprocess", r"preprocess/image", preprocess),
    Check("kl", r"kl/post_stddev", gaussian_kl(excess_kl, "stddev")),
    Check("normal", r"normal/mean", functools.partial(unit_normal, prefix="normal")),
]

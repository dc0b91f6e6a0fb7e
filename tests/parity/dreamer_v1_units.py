"""Layers, latents and preprocessing of Dreamer V1, against tables recorded from its code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.models.codecs import centred
from jaxwm.models.heads import CLIPS
from jaxwm.models.latents import floored_kl
from jaxwm.models.recurrent import KerasGRU
from tests.parity.common import Check, Recorded
from tests.parity.layers import compare_uniform, gaussian_kl, shared_checks


def keras_gru(recorded: dict[str, Any]) -> dict[str, Any]:
    """Our parameters of the GRU: row 0 of the recorded bias belongs to x, row 1 to h."""
    recorded = {name: jnp.asarray(x) for name, x in recorded.items()}
    bias = recorded["bias"]
    return {
        "input": {"kernel": recorded["kernel"], "bias": bias[0]},
        "recurrent": {"kernel": recorded["recurrent_kernel"], "bias": bias[1]},
    }


def fresh_gru(recorded: Recorded) -> None:
    """Initial kernels and biases; their sizes are those whose Glorot limit fits the numbers."""
    *_, high, count = recorded["init/gru/kernel_stats"]
    product = round(count / 3)
    pairs = [(product // deter, deter) for deter in range(1, product + 1) if product % deter == 0]
    limits = {(6 / (hidden + 3 * deter)) ** 0.5: (hidden, deter) for hidden, deter in pairs}
    hidden, deter = limits[min(limit for limit in limits if limit >= high)]
    x, h = jnp.zeros((1, hidden)), jnp.zeros((1, deter))
    params = KerasGRU(hidden, deter).init(jax.random.key(0), x, h)["params"]
    kernel = np.asarray(params["input"]["kernel"], np.float64)
    compare_uniform(recorded, "init/gru/kernel_stats", kernel)
    rows = np.asarray(params["recurrent"]["kernel"], np.float64)
    error = np.abs(rows @ rows.T - np.eye(deter)).max()
    recorded.at_most("init/gru/recurrent_row_gram_error", error, 1e-5)
    recorded.compare("init/gru/bias_absmax", max(np.abs(p["bias"]).max() for p in params.values()))


def preprocess(recorded: Recorded) -> None:
    """Centred images and clipped rewards."""
    for clip in recorded.groups(r"preprocess/(\w+)/in/reward"):
        part = lambda name, clip=clip: f"preprocess/{clip}/{name}"  # noqa: E731
        image, reward = (jnp.asarray(recorded[part(f"in/{name}")]) for name in ("image", "reward"))
        recorded.compare(part("out/image"), centred(image))
        recorded.compare(part("out/reward"), CLIPS[clip](reward))


CHECKS = [
    *shared_checks(KerasGRU, keras_gru, jax.nn.relu),
    Check("fresh_gru", r"init/gru/kernel_stats", fresh_gru),
    Check("preprocess", r"preprocess/\w+/in/reward", preprocess),
    Check("kl", r"kl/post_std", gaussian_kl(floored_kl, "std")),
]

"""Dreamer V2's core with a Gaussian latent: one recorded observation step in three settings."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.models.heads import Style, head, posterior
from jaxwm.models.latents import GaussianConfig, balanced_kl, gaussian, moments
from jaxwm.models.recurrent import LayerNormGRUConfig, core
from tests.parity.common import Check, Recorded, nested
from tests.parity.dreamer_v2_world import path_of

# Which standard deviation belongs to which arrays.
STDS = {"gauss": "sigmoid2", "gauss_ln": "softplus", "gauss_sig": "sigmoid"}


class Step:
    """The networks of one setting, of the recorded sizes, and the step's inputs."""

    def __init__(self, recorded: Recorded, name: str):
        self.given = {key: jnp.asarray(x) for key, x in recorded.flat(f"{name}/in/").items()}
        self.noise = {key: jnp.asarray(x) for key, x in recorded.flat(f"{name}/noise/").items()}
        self.weights = jnp.asarray(recorded[f"{name}/w"])
        deter, stoch = (self.given[key].shape[-1] for key in ("deter", "stoch"))
        hidden = recorded.shape(f"{name}/params/img_in/bias")[0]
        norm = "layer" if f"{name}/params/img_in_norm/gamma" in recorded else "none"
        style = Style("float32", norm, "elu", "glorot")
        self.config = GaussianConfig(stoch, std=STDS[name])
        self.latent = balanced_kl(gaussian(self.config), balance=0.8, free_nats=0.0)
        sizes = LayerNormGRUConfig(deter, hidden, norm=norm)
        self.core = core(sizes, stoch, self.given["action"].shape[-1])
        self.prior = head(deter, hidden, 1, 2 * stoch, style, name="logits")
        tokens = self.given["embed"].shape[-1]
        self.posterior = posterior(deter, tokens, hidden, 2 * stoch, style)

    def __call__(self, flat: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss that was recorded, and every result by its recorded name."""
        params = nested({f"rssm/{key}": x for key, x in flat.items()}, path_of)
        given, is_first = self.given, self.given["is_first"]
        keep = ~is_first[:, None]
        embedded = self.core.embed(params["core"], given["action"] * keep)
        stoch = given["stoch"] * keep
        deter = self.core.step(params["core"], given["deter"], stoch, embedded, is_first)
        tokens = self.posterior.embed(params["posterior"], given["embed"])
        raw = {
            "prior": self.prior.apply(params["prior"], deter),
            "post": self.posterior.apply(params["posterior"], deter, tokens),
        }
        results: dict[str, Any] = {"kl": self.latent.divergence(raw["post"], raw["prior"])}
        for side, x in raw.items():
            results[f"{side}_mean"], results[f"{side}_std"] = moments(self.config, x)
            results[f"{side}_stoch"] = self.latent.sample(x, self.noise[side])
            results[f"{side}_deter"] = deter
        kl = self.latent.kl(raw["post"], raw["prior"])["kl"]
        results["loss"] = kl.mean() + jnp.sum(self.weights * results["post_stoch"])
        return results["loss"], results


def step(recorded: Recorded) -> None:
    """Every setting, with the gradient of its loss."""
    for name in recorded.groups(r"(\w+)/in/embed"):
        one = Step(recorded, name)
        params = recorded.flat(f"{name}/params/")
        (_, results), grads = jax.jit(jax.value_and_grad(one, has_aux=True))(params)
        for key, result in results.items():
            recorded.compare(f"{name}/out/{key}", result)
        for key, grad in grads.items():
            recorded.compare(f"{name}/grad/{key}", grad)


CHECKS = [Check("gaussian_core", r"gauss\w*/in/embed", step)]

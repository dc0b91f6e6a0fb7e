"""Layers, latents and preprocessing of Dreamer V2, against tables recorded from its code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm.models.codecs import centred
from jaxwm.models.heads import CLIPS, soft_continue
from jaxwm.models.latents import LatentConfig, LatentSpace, balanced_kl, categorical
from jaxwm.models.recurrent import LayerNormGRU
from jaxwm.types import Net, Step
from tests.parity.common import Check, Recorded, nested, renamed
from tests.parity.layers import GAUSSIAN, layer_norm, raw, shared_checks, unit_normal

GRU = renamed(
    (
        (r"dense/(kernel|bias)", r"gates/\1"),
        (r"norm/gamma", r"norm/scale"),
        (r"norm/beta", r"norm/bias"),
    )
)


def preprocess(recorded: Recorded) -> None:
    """Centred images, numbers as floats, clipped rewards, targets of the discount head."""
    for clip in recorded.groups(r"preprocess/(\w+)/in/reward"):
        root = f"preprocess/{clip}/"
        values = {name: jnp.asarray(x) for name, x in recorded.flat(f"{root}in/").items()}
        for name, x in values.items():
            if name == "reward":
                ours = CLIPS[{"identity": "none"}.get(clip, clip)](x)
            else:
                numbers = x if x.dtype == bool else x.astype(jnp.float32)
                ours = centred(x) if x.dtype == jnp.uint8 else numbers
            recorded.compare(f"{root}out/{name}", ours)
        discount = float(recorded.peek(f"{root}out/discount").max())
        head = soft_continue(Net(lambda key: (), lambda params, x: x), discount)
        nothing = jnp.zeros_like(values["reward"])
        steps = Step((), {}, values["reward"], nothing, nothing, values["is_terminal"])
        recorded.compare(f"{root}out/discount", head.target(steps))


def kl(recorded: Recorded) -> None:
    """The balanced KL in all its settings, with gradients, of categories and of Gaussians."""
    for kind in recorded.groups(r"kl/(\w+)/post_\w+"):
        parts = ("logit",) if kind == "cat" else ("mean", "std")
        names = [f"{side}_{part}" for side in ("post", "prior") for part in parts]
        inputs = [jnp.asarray(recorded[f"kl/{kind}/{name}"]) for name in names]
        latent, make = GAUSSIAN, raw
        if kind == "cat":
            stoch, classes = inputs[0].shape[-2:]
            latent = categorical(LatentConfig(stoch, classes, unimix=0.0))
            make = lambda logits: logits.reshape(*logits.shape[:-2], -1)  # noqa: E731
        for variant in recorded.groups(rf"kl/{kind}/(v\d+)/loss"):
            _kl_variant(recorded, f"kl/{kind}/{variant}/", latent, make, names, inputs)


def _kl_variant(
    recorded: Recorded, root: str, latent: LatentSpace, make: Any, names: list[str], inputs: Any
) -> None:
    forward, mean_first = bool(recorded[f"{root}forward"]), bool(recorded[f"{root}free_avg"])
    balance, free = (recorded.number(f"{root}{name}") for name in ("balance", "free"))
    half = len(inputs) // 2

    def loss(*moments: Any) -> tuple[Any, Any]:
        post, prior = make(*moments[:half]), make(*moments[half:])
        form = balanced_kl(latent, balance, free, mean_first, forward)
        left, right = (prior, post) if forward else (post, prior)
        return form.kl(post, prior)["kl"].mean(), latent.divergence(left, right)

    order = tuple(range(len(inputs)))
    (value, rows), grads = jax.value_and_grad(loss, order, has_aux=True)(*inputs)
    recorded.compare(f"{root}loss", value)
    recorded.compare(f"{root}value", rows)
    for name, grad in zip(names, grads, strict=True):
        recorded.compare(f"{root}grad_{name}", grad)


CHECKS = [
    *shared_checks(LayerNormGRU, lambda flat: nested(flat, GRU), lambda x: x),
    Check("layer_norm", r"layernorm/x", layer_norm),
    Check("preprocess", r"preprocess/\w+/in/reward", preprocess),
    Check("kl", r"kl/\w+/v\d+/loss", kl),
    Check("mse", r"dist/mse/mean", functools.partial(unit_normal, prefix="dist/mse")),
]

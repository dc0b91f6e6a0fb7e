"""Checks of layers and formulas that several systems share; see the modules of the systems."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import dists, nets
from jaxwm.models.latents import GaussianConfig, gaussian
from jaxwm.nets import initializer
from tests.parity.common import Check, Recorded


def cell(
    module: Callable[..., Any], tree: Callable[[dict[str, Any]], Any]
) -> Callable[[Recorded], None]:
    """A check of `gru/*`: one step, and the gradient of sum(w * out).

    Args:
      module: the GRU, from `hidden` and `deter`.
      tree: our parameters from the recorded ones by name.
    """

    def check(recorded: Recorded) -> None:
        x, h, w = (jnp.asarray(recorded[f"gru/{name}"]) for name in "xhw")
        params = jax.tree.map(jnp.asarray, recorded.flat("gru/params/"))
        apply = nets.call(module(hidden=x.shape[-1], deter=h.shape[-1]))
        recorded.compare("gru/out", apply(tree(params), x, h))

        def loss(params: Any, x: Any, h: Any) -> Any:
            return jnp.sum(w * apply(tree(params), x, h))

        grad_params, grad_x, grad_h = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, h)
        recorded.compare("gru/grad/x", grad_x)
        recorded.compare("gru/grad/h", grad_h)
        for name, grad in grad_params.items():
            recorded.compare(f"gru/grad/params/{name}", grad)

    return check


def convolutions(act: Callable[[Any], Any]) -> Callable[[Recorded], None]:
    """A check of single convolutions (`conv*`, with `act`) and transposed ones (`convt*`)."""

    def check(recorded: Recorded) -> None:
        for name in recorded.groups(r"(convt?\d*)/kernel"):
            x = jnp.asarray(recorded[f"{name}/x"])
            params = recorded.tree(f"{name}/")
            del params["out"], params["x"]
            size, _, *channels = params["kernel"].shape
            if name.startswith("convt"):
                layer = nets.ValidConvTranspose(channels[1], channels[0], size)
                out = nets.call(layer)(params, x)
            else:
                layer = nets.ValidConv(*channels, kernel=size)
                out = act(nets.call(layer)(params, x))
            recorded.compare(f"{name}/out", out)

    return check


def initialisers(recorded: Recorded) -> None:
    """The distribution of fresh kernels, and zero biases."""
    for name in recorded.groups(r"init/(\w+)/kernel_shape"):
        shape = tuple(recorded[f"init/{name}/kernel_shape"].tolist())
        transposed = name.startswith("convt")
        axes = {"in_axis": -1, "out_axis": -2} if transposed else {}
        kernel = initializer("glorot", 0, **axes)(jax.random.key(0), shape, jnp.float32)
        compare_uniform(recorded, f"init/{name}/stats", np.asarray(kernel, np.float64))
        recorded.compare(f"init/{name}/bias_absmax", 0.0)


def compare_uniform(recorded: Recorded, name: str, kernel: np.ndarray) -> None:
    """Recorded [mean, std, min, max, count] of a uniform kernel, against another draw of it."""
    mean, std, low, high, count = recorded[name]
    recorded.compared.add(name)
    if kernel.size != count:
        recorded.wrong.append(f"{name}: {kernel.size} entries, recorded {count:.0f}")
    # Both are single draws: means err by std / sqrt(count), extremes fall short by some width / n.
    error = 6 * std / np.sqrt(count)
    ours = kernel.mean(), kernel.std(), kernel.min(), kernel.max()
    extreme = 30 * 2 * high / count
    for have, want, allowed in zip(
        ours, (mean, std, low, high), (error, error, extreme, extreme), strict=True
    ):
        if abs(have - want) > allowed:
            recorded.wrong.append(f"{name}: {ours}, recorded {(mean, std, low, high)}")


def layer_norm(recorded: Recorded) -> None:
    x = jnp.asarray(recorded["layernorm/x"])
    scale, bias = (jnp.asarray(recorded[f"layernorm/{name}"]) for name in ("gamma", "beta"))
    layer = nets.LayerNorm(x.shape[-1])
    recorded.compare("layernorm/out", nets.call(layer)({"scale": scale, "bias": bias}, x))


def unit_normal(recorded: Recorded, prefix: str) -> None:
    """The log-density of a normal of variance one, summed over the last axis."""
    mean, target = (jnp.asarray(recorded[f"{prefix}/{name}"]) for name in ("mean", "target"))
    dist = dists.UnitNormal(mean, event_ndims=1)
    recorded.compare(f"{prefix}/logprob", dist.log_prob(target))


# A floor below any recorded deviation, so that every one of them can be made.
GAUSSIAN = gaussian(GaussianConfig(min_std=1e-4))


def raw(mean: Any, std: Any) -> Any:
    """What a network outputs for these moments of `GAUSSIAN`: [mean, x], std = softplus(x) + 1e-4.

    Gradients pass through, so those of a loss in mean and std can be compared.
    """
    return jnp.concatenate([mean, jnp.log(jnp.expm1(std - 1e-4))], -1)


def gaussian_kl(form: Callable[..., Any], std: str) -> Callable[[Recorded], None]:
    """A check of `kl/*`: the divergence of every row, and losses with their gradients.

    Args:
      form: the loss, from a latent and its free nats.
      std: how the arrays call standard deviations.
    """
    names = [f"{side}_{part}" for side in ("post", "prior") for part in ("mean", std)]

    def check(recorded: Recorded) -> None:
        inputs = [jnp.asarray(recorded[f"kl/{name}"]) for name in names]
        row = GAUSSIAN.divergence(raw(*inputs[:2]), raw(*inputs[2:]))
        recorded.compare("kl/value", row)
        for which in recorded.groups(r"kl/(none|free[\d.]+)/loss"):
            if which == "none":
                kl = GAUSSIAN.kl
            else:
                kl = form(GAUSSIAN, float(which.removeprefix("free"))).kl

            def loss(*moments: Any, kl: Any = kl) -> Any:
                return kl(raw(*moments[:2]), raw(*moments[2:]))["kl"].mean()

            value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*inputs)
            recorded.compare(f"kl/{which}/loss", value)
            for name, grad in zip(names, grads, strict=True):
                recorded.compare(f"kl/{which}/grad_{name}", grad)

    return check


def shared_checks(module: Any, tree: Callable[[dict[str, Any]], Any], act: Any) -> list[Check]:
    """The checks that the units of every system can have."""
    return [
        Check("gru", r"gru/x", cell(module, tree)),
        Check("convolutions", r"conv\w*/kernel", convolutions(act)),
        Check("initialisers", r"init/\w+/kernel_shape", initialisers),
    ]

"""Distributions of actions and exploration of Dreamer V2, against recorded tables."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxwm import dists
from jaxwm.behaviors.explore import add_normal, mix_uniform
from tests.parity.common import Check, Recorded


def _trunc_normal(mean: Any, std: Any, init: float, implicit: bool = False) -> Any:
    return dists.TruncatedNormal.from_raw(mean, std, shift=init, implicit=implicit)


def _tanh_normal(mean: Any, std: Any, init: float) -> Any:
    return dists.TanhNormal(5 * jnp.tanh(mean / 5), jax.nn.softplus(std + init) + 0.1)


def _normal(mean: Any, std: Any, init: float) -> Any:
    return dists.Normal(mean, std)


KINDS = {"trunc_normal": _trunc_normal, "tanh_normal": _tanh_normal, "normal": _normal}


def continuous(recorded: Recorded) -> None:
    """Moments, samples, densities, entropies and modes, with gradients in the network's output."""
    for kind, make in KINDS.items():
        for init in recorded.groups(rf"dist/{kind}/init([\d.]+)/raw"):
            dist = functools.partial(make, init=float(init))
            compare_continuous(recorded, f"dist/{kind}/init{init}/", dist)


def compare_continuous(
    recorded: Recorded, root: str, make: Callable[..., Any], single: bool = False
) -> None:
    """Compares a distribution of continuous actions.

    Args:
      recorded: the file.
      root: where its arrays are.
      make: the distribution from [mean part, std part] of a network's output.
      single: whether the mode of one row alone is recorded too.
    """
    raw, noise, event, w = (
        jnp.asarray(recorded[root + name]) for name in ("raw", "noise", "event", "w")
    )
    rows = jnp.arange(1.0, 1 + len(raw))
    dist = lambda raw: make(*jnp.split(raw, 2, -1))  # noqa: E731
    normal = getattr(dist(raw), "normal", dist(raw))
    for name, ours in (("loc", normal.loc), ("mean", normal.loc)):
        if root + name in recorded:
            recorded.compare(root + name, ours)
    for name in ("scale", "std"):
        if root + name in recorded:
            recorded.compare(root + name, normal.scale)

    def entropy(raw: Any) -> Any:
        if f"{root}noise_entropy" in recorded:
            return dist(raw).entropy_noise(jnp.asarray(recorded[f"{root}noise_entropy"]))
        return dist(raw).entropy()

    for name, function, weight in (
        ("sample", lambda raw: dist(raw).sample_noise(noise), w),
        ("logprob", lambda raw: dist(raw).log_prob(event), rows),
        ("entropy", entropy, rows),
    ):
        recorded.compare(root + name, function(raw))
        grad = jax.grad(lambda raw, f=function, w=weight: jnp.sum(w * f(raw)))(raw)
        recorded.compare(f"{root}grad_{name}", grad)
    if f"{root}grad_sample_implicit" in recorded:
        exact = lambda raw: make(*jnp.split(raw, 2, -1), implicit=True)  # noqa: E731
        recorded.compare(f"{root}sample", exact(raw).sample_noise(noise))
        grad = jax.grad(lambda raw: jnp.sum(w * exact(raw).sample_noise(noise)))(raw)
        recorded.compare(f"{root}grad_sample_implicit", grad)
    _compare_mode(recorded, root, dist(raw))
    if single:
        draws = jnp.asarray(recorded[f"{root}single/noise_mode"])
        recorded.compare(f"{root}single/mode", dist(raw[:1]).mode_noise(draws))


def _compare_mode(recorded: Recorded, root: str, dist: Any) -> None:
    if f"{root}noise_mode" not in recorded:
        return recorded.compare(f"{root}mode", dist.mode())
    # The original uses the index of its first row for all of them.
    draws = jnp.asarray(recorded[f"{root}noise_mode"])
    first = draws[dist.most_likely(draws)[0]]
    return recorded.compare(f"{root}mode", dist.sample_noise(first))


def one_hot(recorded: Recorded, root: str = "dist/onehot/") -> None:
    """Straight-through one-hot actions, with the gradients that are recorded."""
    logits, noise, w = (jnp.asarray(recorded[root + name]) for name in ("logits", "noise", "w"))
    rows = jnp.arange(1.0, 1 + len(logits))
    sample = dists.OneHotAction(logits).sample_noise(noise)
    recorded.compare(f"{root}sample", sample)
    recorded.compare(f"{root}mode", dists.OneHotAction(logits).mode())

    def log_prob(logits: Any) -> Any:
        # The sample depends on the logits, but its density does not pass that on.
        dist = dists.OneHotAction(logits)
        return dist.log_prob(dist.sample_noise(noise))

    for name, function, weight in (
        ("sample", lambda x: dists.OneHotAction(x).sample_noise(noise), w),
        ("entropy", lambda x: dists.OneHotAction(x).entropy(), rows),
        ("logprob_sample", log_prob, rows),
    ):
        if name != "sample":
            recorded.compare(root + name, function(logits))
        if f"{root}grad_{name}" in recorded:
            grad = jax.grad(lambda x, f=function, w=weight: jnp.sum(w * f(x)))(logits)
            recorded.compare(f"{root}grad_{name}", grad)
    if f"{root}kl" in recorded:
        other = jnp.asarray(recorded[f"{root}logits2"])
        group = lambda x: dists.OneHot(x[:, None])  # noqa: E731
        kl = lambda x, y: group(x).kl_divergence(group(y))  # noqa: E731
        recorded.compare(f"{root}kl", kl(logits, other))
        grads = jax.grad(lambda x, y: jnp.sum(rows * kl(x, y)), (0, 1))(logits, other)
        recorded.compare(f"{root}grad_kl_logits", grads[0])
        recorded.compare(f"{root}grad_kl_logits2", grads[1])


def binary(recorded: Recorded) -> None:
    """The discount head's distribution."""
    logit, target = (jnp.asarray(recorded[f"dist/binary/{name}"]) for name in ("logit", "target"))
    dist = dists.SoftBernoulli(logit)
    recorded.compare("dist/binary/logprob", dist.log_prob(target))
    recorded.compare("dist/binary/mean", dist.mean())


def exploration(recorded: Recorded) -> None:
    """Noise of 0.3 on numbers and on choices."""
    for kind, function in (("cont", add_normal), ("disc", mix_uniform)):
        root = f"action_noise/{kind}/"
        action, noise = (jnp.asarray(recorded[root + name]) for name in ("in", "noise"))
        recorded.compare(f"{root}out", function(action, noise, 0.3))


CHECKS = [
    Check("continuous_actions", r"dist/\w+/init[\d.]+/raw", continuous),
    Check("one_hot_actions", r"dist/onehot/logits", one_hot),
    Check("binary", r"dist/binary/logit", binary),
    Check("exploration", r"action_noise/cont/in", exploration),
]

UNUSED = {
    r"streamnorm/.*": "a normaliser of rewards that no published configuration switches on",
}

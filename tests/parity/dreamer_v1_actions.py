"""Distributions of actions and exploration of Dreamer V1, against recorded tables."""

import functools

import jax.numpy as jnp

from jaxwm import dists
from jaxwm.behaviors.explore import add_normal, epsilon_greedy
from tests.parity.common import Check, Recorded
from tests.parity.dreamer_v2_actions import compare_continuous, one_hot


def continuous(recorded: Recorded) -> None:
    """Squashed normals of several initial standard deviations."""
    for init in recorded.groups(r"tanh_normal/init([\d.]+)/raw"):
        make = functools.partial(dists.TanhNormal.from_raw, init_std=float(init))
        compare_continuous(recorded, f"tanh_normal/init{init}/", make, single=True)


def tanh(recorded: Recorded) -> None:
    """The inverse tanh, also at and beyond 1, and the stretching of the density."""
    y, x = (jnp.asarray(recorded[f"tanh_bijector/{name}"]) for name in "yx")
    unit = dists.TanhNormal(jnp.zeros(()), jnp.ones(()), event_ndims=0)
    recorded.compare("tanh_bijector/inverse", unit.before(y))
    recorded.compare("tanh_bijector/fldj", unit.stretch(x))


def exploration(recorded: Recorded) -> None:
    """Normal noise of 0.3 on numbers, random choices with probability 0.4."""
    for row in recorded.groups(r"explore/additive_gaussian/(row\d+)/\w+"):
        root = f"explore/additive_gaussian/{row}/"
        action, noise = (jnp.asarray(recorded[root + name]) for name in ("in", "noise"))
        recorded.compare(f"{root}out", add_normal(action, noise, 0.3))
    for row in recorded.groups(r"explore/epsilon_greedy/(row\d+)/\w+"):
        root = f"explore/epsilon_greedy/{row}/"
        names = ("in", "noise_gate", "noise_class")
        action, gate, classes = (jnp.asarray(recorded[root + name]) for name in names)
        recorded.compare(f"{root}out", epsilon_greedy(action, gate, classes, 0.4))


CHECKS = [
    Check("continuous_actions", r"tanh_normal/init[\d.]+/raw", continuous),
    Check("tanh", r"tanh_bijector/y", tanh),
    Check("one_hot_actions", r"onehot/logits", functools.partial(one_hot, root="onehot/")),
    Check("exploration", r"explore/\w+/row\d+/\w+", exploration),
]

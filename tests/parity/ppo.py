"""PPO beside recorded arrays: advantages, losses, gradients and optimiser steps.

Every array is compared twice, in float64 and in float32. Sizes, depths, constants and the number
of cases are read off the file.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.behaviors import ppo
from jaxwm.models.encoders import flat_net
from jaxwm.returns import generalized_advantage
from jaxwm.types import Box, Discrete
from tests.parity.common import Check, Recorded

# Compute type: largest errors of losses and all else, and of gradients and parameters.
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-4)}
# Recorded name: what we call it.
KINDS = {"biased": "population", "unbiased": "sample", "none": "none"}
EACH = {"ratio": "ratio", "pg_each": "policy", "v_each": "value"}
MEANS = {
    "pg_loss": "loss/policy",
    "v_loss": "loss/value",
    "total": "loss/total",
    "entropy": "policy/entropy",
    "approx_kl": "policy/kl",
    "approx_kl_old": "policy/kl_old",
    "clipfrac": "policy/clipped",
}


def in_both_types(check: Callable[[Recorded, str, str], None]) -> Callable[[Recorded], None]:
    """A check of every case of a file, in float64 and in float32."""

    def checked(recorded: Recorded) -> None:
        for case in recorded.groups(r"([^/]+)/const"):
            with jax.enable_x64(True):
                check(recorded, case, "float64")
            check(recorded, case, "float32")

    return checked


class Case:
    """One case of a file: the hyperparameters, networks and minibatch recorded in it."""

    def __init__(self, recorded: Recorded, name: str, dtype: str):
        self.recorded, self.name, self.dtype = recorded, name, dtype
        constants = map(float, recorded[f"{name}/const"])
        discount, lambda_, clip, value_clip, value, entropy, max_norm, rate = constants
        self.config = ppo.PPOConfig(
            heads=ppo.HeadsConfig(self._hidden()),
            discount=discount,
            lambda_=lambda_,
            clip=clip,
            value_clip=value_clip,
            value=value,
            entropy=entropy,
            max_grad_norm=max_norm,
            learning_rate=rate,
        )
        self.batch = self._batch()
        self.discrete = f"{name}/params/log_std" not in recorded
        outputs = recorded.shape(self._kernels("actor")[-1])[1]
        action = Discrete(outputs) if self.discrete else Box((outputs,))
        spaces = {"obs": Box(self.batch.obs["obs"].shape[1:])}
        self.networks = ppo.actor_and_critic(
            self.config.heads, spaces, action, flat_net(spaces), self.dtype
        )
        self.params = self.as_params(f"{name}/params/", recorded.__getitem__)

    def array(self, value: Any) -> jax.Array:
        """A recorded array; numbers in the compute type."""
        value = np.asarray(value)
        return jnp.asarray(value, self.dtype if value.dtype.kind == "f" else jnp.int32)

    def compare(self, name: str, ours: Any, scale: Any = 0.0) -> None:
        """Compares a loss, a measure or what an action contributes to one.

        Args:
          name: of the recorded array.
          ours: what we compute.
          scale: typical size of the terms of which the array is the sum. In float32 an error
            counts relative to it where the terms nearly cancel, as the losses of the policy do.
        """
        tolerance, recorded = TOLERANCES[self.dtype][0], self.recorded
        if self.dtype == "float32":
            largest = np.abs(recorded.peek(name)).max()
            tolerance *= max(1.0, float(scale) / max(largest, 1e-12))
        recorded.compare(name, ours, tolerance)

    def as_params(self, prefix: str, value_of: Callable[[str], Any]) -> dict[str, Any]:
        """Our tree of parameters, of the arrays under a prefix."""
        tree: dict[str, Any] = {}
        for name in self.recorded.names(prefix + ".*"):
            *path, leaf = name.removeprefix(prefix).split("/")
            path, leaf = (["log_std"], "action") if leaf == "log_std" else (path, leaf)
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = self.array(value_of(name))
        return tree

    def compare_params(self, prefix: str, ours: Any) -> None:
        """Compares gradients or parameters with the arrays under a prefix."""
        for name in self.recorded.names(prefix + ".*"):
            path = name.removeprefix(prefix)
            leaf = ours
            for part in ("log_std/action" if path == "log_std" else path).split("/"):
                leaf = leaf[part]
            self.recorded.compare(name, leaf, TOLERANCES[self.dtype][1])

    def _kernels(self, part: str) -> list[str]:
        names = self.recorded.names(rf"{self.name}/params/{part}/\d+/kernel")
        return sorted(names, key=lambda name: int(name.split("/")[-2]))

    def _hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers; actor and critic have the same."""
        widths = {
            part: tuple(self.recorded.shape(name)[1] for name in self._kernels(part)[:-1])
            for part in ("actor", "critic")
        }
        assert widths["actor"] == widths["critic"], widths
        return widths["actor"]

    def _batch(self) -> ppo.Batch:
        names = {
            "log_prob": "logp",
            "value": "value",
            "advantage": "adv",
            "target": "target",
            "action": "action",
        }
        arrays = {
            name: self.array(self.recorded[f"{self.name}/batch/{theirs}"])
            for name, theirs in names.items()
        }
        obs = {"obs": self.array(self.recorded[f"{self.name}/batch/obs"])}
        return ppo.Batch(obs=obs, weight=jnp.ones_like(arrays["value"]), **arrays)


@in_both_types
def advantages(recorded: Recorded, name: str, dtype: str) -> None:
    """Advantages and targets of the library's rows.

    A recorded step holds what was before and after an action, and environments begin their next
    episode within the step that ends one. As rows an episode has a last one of its own, so that
    environments have different numbers of rows: first rows that lead to nothing fill them up.
    """
    prefix = f"{name}/gae/"
    inputs = ("reward", "value", "done", "terminated", "next_value_true")
    arrays = {key: recorded[prefix + key] for key in inputs}
    discount, lambda_ = map(float, recorded[f"{name}/const"][:2])
    after = np.concatenate([arrays["value"][1:], recorded[f"{prefix}last_value"][None]])
    # A step ends for good or is cut short, and not both.
    np.testing.assert_array_equal(
        arrays["done"], arrays["terminated"] + recorded[f"{prefix}truncated"]
    )
    columns = []
    for env in range(after.shape[1]):
        own = {key: value[:, env] for key, value in arrays.items()}
        rows = [(0.0, True, False, False, own["value"][0])]
        for t, reward in enumerate(own["reward"]):
            if own["done"][t]:
                rows.append(
                    (reward, False, True, own["terminated"][t] > 0, own["next_value_true"][t])
                )
                rows.append((0.0, True, False, False, after[t, env]))
            else:
                rows.append((reward, False, False, False, after[t, env]))
        columns.append(rows)
    length = max(map(len, columns))
    filled = [[(0.0, True, False, False, 0.0)] * (length - len(rows)) + rows for rows in columns]
    reward, *flags, value = (np.array(field).T for field in zip(*map(_fields, filled), strict=True))
    given = jnp.asarray(reward, dtype), *map(jnp.asarray, flags), jnp.asarray(value, dtype)
    for truncation, recorded_name in (
        ("terminal", "advantage"),
        ("bootstrap", "advantage_bootstrap_truncation"),
    ):
        each = jax.vmap(
            lambda *rows, how=truncation: generalized_advantage(*rows, discount, lambda_, how),
            in_axes=1,
            out_axes=1,
        )
        found, weight = map(np.asarray, jax.jit(each)(*given))
        assert not found[weight == 0].any()
        ours = np.stack([x[w > 0] for x, w in zip(found.T, weight.T, strict=True)], 1)
        tolerance = TOLERANCES[dtype][0]
        recorded.compare(prefix + recorded_name, ours, tolerance)
        if truncation == "terminal":
            recorded.compare(f"{prefix}target", ours + arrays["value"].astype(dtype), tolerance)
            recorded.compare(f"{name}/batch/adv", ours.reshape(-1), tolerance)


def _fields(rows: list[tuple]) -> tuple[tuple, ...]:
    return tuple(zip(*rows, strict=True))


@in_both_types
def losses(recorded: Recorded, name: str, dtype: str) -> None:
    """Losses and gradients of the minibatch, with each way to normalise advantages."""
    case = Case(recorded, name, dtype)
    batch, config = case.batch, case.config
    for group, kind in KINDS.items():
        prefix = f"{name}/{group}/"
        if not recorded.names(prefix + ".*"):
            continue
        advantage = ppo.normalized(batch.advantage, batch.weight, kind)
        policy, values = case.networks.apply(case.params, batch.obs)
        log_prob = policy["action"].log_prob(batch.action)
        each = ppo.clipped_losses(
            log_prob, values, advantage, batch, config.clip, config.value_clip
        )

        def loss(params, advantage=advantage):
            count = batch.weight.sum()
            return ppo.objective(
                ppo.numbers_at(config, 0), case.networks, params, batch, advantage, count
            )

        gradient, means = jax.jit(jax.grad(loss, has_aux=True))(case.params)
        ours = {
            "logp_new": log_prob,
            "value_new": values,
            "entropy_each": policy["action"].entropy(),
            "adv_normalised": advantage,
            **{theirs: each[ours] for theirs, ours in EACH.items()},
            **{theirs: means[ours] for theirs, ours in MEANS.items()},
        }
        # Probabilities and ratios are of the order of 1, and so are their logarithms.
        scales = dict.fromkeys(("logp_new", "entropy_each", "entropy"), 1.0)
        scales |= dict.fromkeys(("approx_kl", "approx_kl_old"), 1.0)
        scales |= dict.fromkeys(("pg_loss", "total"), jnp.abs(each["policy"]).mean())
        for theirs, array in ours.items():
            case.compare(prefix + theirs, array, scales.get(theirs, 0.0))
        if f"{prefix}total_float32" in recorded and dtype == "float32":
            case.compare(f"{prefix}total_float32", means["loss/total"], scales["total"])
        norm = ppo.optim.global_norm(gradient)
        recorded.compare(f"{prefix}grad_norm", norm, TOLERANCES[dtype][1])
        case.compare_params(f"{prefix}grad/", gradient)


@in_both_types
def updates(recorded: Recorded, name: str, dtype: str) -> None:
    """Parameters after each of several steps on the same minibatch."""
    case = Case(recorded, name, dtype)
    optimizer = ppo.optim.clipped_adam(case.config.max_grad_norm, case.config.eps)
    numbers = ppo.numbers_at(case.config, 0)
    step = jax.jit(ppo.gradient_step(case.config, numbers, case.networks, optimizer, case.batch))
    rows = jnp.arange(case.batch.weight.shape[0])
    learner = case.params, optimizer.init(case.params)
    for group in recorded.groups(rf"{name}/(update\d+)/.*"):
        learner, _ = step(learner, rows, jnp.ones(rows.shape, bool))
        case.compare_params(f"{name}/{group}/", learner[0])


CHECKS = [
    Check("advantages", r"[^/]+/gae/advantage", advantages),
    Check("losses", r"[^/]+/batch/logp", losses),
    Check("updates", r"[^/]+/update1/.*", updates),
]

"""Updates that are not finite are watched for, refused and counted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.train.learn import watch, watched
from jaxwm.train.state import Account, Health


def account(metrics, taken=2.0):
    return Account(jnp.float32(taken), jax.tree.map(jnp.float32, metrics))


def healthy():
    zero = jnp.int32(0)
    return Health(zero, zero, zero)


def test_all_losses_and_norms_of_gradients_are_watched_whatever_an_agent_has():
    names = ["loss/total", "grad_norm/model", "loss/b", "dream/loss", "loss/a", "grad_norm"]
    assert watched(dict.fromkeys(names)) == ["loss/a", "loss/b", "grad_norm", "grad_norm/model"]
    assert watched({"fitness": 0}) == []


def test_updates_that_are_not_finite_are_watched_as_by_hand():
    nan = jnp.nan
    good = {"loss/a": 1.0, "loss/b": 2.0, "loss/total": 3.0, "grad_norm": 4.0, "other": nan}
    good = jax.tree.map(jnp.float32, good)
    bad = good | {"loss/b": jnp.float32(jnp.inf), "grad_norm": jnp.float32(nan)}
    before = account({**good, "other": 0.0})
    # The seventh update is bad: of a, b and grad_norm the second is its first bad term.
    taken, after, health = watch(bad, before, healthy(), jnp.int32(6), "abort")
    assert not taken and health == (1, 7, 1)
    chex.assert_trees_all_equal(after, before)
    # A good one after it is taken only by who goes on.
    taken, after, same = watch(good, before, health, jnp.int32(7), "abort")
    assert not taken and same == health and after.taken == 2
    taken, after, same = watch(good, before, health, jnp.int32(7), "skip")
    assert taken and same == health and after.taken == 3 and after.sums["loss/b"] == 4
    taken, _, health = watch(bad, before, health, jnp.int32(8), "skip")
    assert not taken and health == (2, 7, 1)


def test_an_agent_that_reports_no_loss_is_always_taken():
    taken, after, health = watch(
        {"fitness": jnp.float32(3)}, account({"fitness": 1.0}), healthy(), jnp.int32(0), "abort"
    )
    assert taken and health.refused == 0 and after.sums["fitness"] == 4


def test_one_of_several_gradients_is_named():
    metrics = {"grad_norm/model": jnp.float32(1), "grad_norm/policy": jnp.float32(np.nan)}
    taken, _, health = watch(metrics, account(metrics), healthy(), jnp.int32(0), "abort")
    assert not taken and watched(metrics)[int(health.term)] == "grad_norm/policy"

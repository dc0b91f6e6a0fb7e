"""Checks of optimisers, schedules and returns that several systems share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxwm.optim import adam_tf, global_norm
from jaxwm.returns import lambda_return
from tests.parity.common import Recorded

# How often a float32 step may round: parameters move by a learning rate, a thousandth of them.
STEPS = 1e-6


def optimizers(eps: float | None = None, decays: bool = True) -> Any:
    """A check of `opt/NAME`: parameters after every step, and norms of the gradients.

    Args:
      eps: the epsilon where none is recorded.
      decays: whether a recorded weight decay has an effect.
    """

    def check(recorded: Recorded) -> None:
        for name in recorded.groups(r"opt/(\w+)/lr"):
            root = f"opt/{name}/"
            decay = recorded.number(f"{root}wd") if f"{root}wd" in recorded else 0.0
            optimizer = adam_tf(
                recorded.number(f"{root}lr"),
                recorded.number(f"{root}clip"),
                decay if decays else 0.0,
                eps=recorded.number(f"{root}eps") if eps is None else eps,
            )
            _follow(recorded, root, optimizer)

    return check


def _follow(recorded: Recorded, root: str, optimizer: optax.GradientTransformation) -> None:
    params = recorded.tree(f"{root}params0/")
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for step in sorted(int(x) for x in recorded.groups(rf"{root}grad(\d+)/.*")):
        grads = recorded.tree(f"{root}grad{step}/")
        recorded.compare(f"{root}norm{step}", global_norm(grads))
        before = params
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in params:
            full = f"{root}params{step}/{name}"
            recorded.compare(full, params[name], STEPS)
            # What a step changes is small beside the parameters: it is compared by itself.
            want = recorded.peek(full) - recorded.peek(f"{root}params{step - 1}/{name}")
            moved = params[name] - before[name]
            if abs(moved - want).max() > 2e-4 * abs(want).max() + 2e-7 * abs(before[name]).max():
                recorded.wrong.append(f"{full}: moved by another amount")


def lambda_returns(recorded: Recorded) -> None:
    """`lambda/*`: the return of every state, and its gradients."""
    names = ("reward", "value", "pcont", "bootstrap")
    inputs = [jnp.asarray(recorded[f"lambda/{name}"]) for name in names]

    def returns(lambda_: float, reward: Any, value: Any, pcont: Any, last: Any) -> Any:
        following = jnp.concatenate([value[1:], last[None]])
        columns = jax.vmap(functools.partial(lambda_return, lambda_=lambda_), 1, 1)
        return columns(reward, pcont, following)

    for which in recorded.groups(r"lambda/l([\d.]+)/out"):
        follow = functools.partial(returns, float(which))
        recorded.compare(f"lambda/l{which}/out", follow(*inputs))
        weights = jnp.asarray(recorded["lambda/w"])
        loss = lambda *x, follow=follow, w=weights: jnp.sum(w * follow(*x))  # noqa: E731
        grads = jax.grad(loss, (0, 1, 2, 3))(*inputs)
        for name, grad in zip(names, grads, strict=True):
            recorded.compare(f"lambda/l{which}/grad_{name}", grad)
    if "lambda/const/out" in recorded:
        reward, value, pcont, last = inputs
        constant = returns(0.95, reward, value, jnp.full_like(pcont, 0.9), jnp.zeros_like(last))
        recorded.compare("lambda/const/out", constant)

"""The actor-critic of Dreamer V1 on recorded dreams: states, returns, gradients and actions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.behaviors.actor_critic_v1 import (
    ActDraws,
    ActorCriticV1,
    ActorCriticV1Config,
    Draws,
    critic_v1,
    policy_v1,
    returns_of,
    weights_of,
)
from jaxwm.models.latents import GaussianConfig, moments
from tests.parity.common import Check, Recorded, nested, renamed
from tests.parity.dreamer_v1_world import world
from tests.parity.dreams import observed, our_rows, shifted, their_rows
from tests.parity.world import action_space, count

NETS = {"actor": "policy", "value": "value"}
layer = renamed(
    (
        (r"actor/h(\d+)/(\w+)", r"policy/mlp/linear\1/\2"),
        (r"actor/hout/(\w+)", r"policy/action/\1"),
        (r"value/h(\d+)/(\w+)", r"value/mlp/linear\1/\2"),
        (r"value/hout/(\w+)", r"value/out/\1"),
    )
)


class Case:
    """Our behaviour with the parameters, states and noise of a file."""

    def __init__(self, recorded: Recorded):
        self.recorded, self.world = recorded, world(recorded)
        self.continuous = recorded.text("cfg/action_dist") == "tanh_normal"
        self.flat = {
            name: jnp.asarray(x)
            for name, x in recorded.flat("params/").items()
            if name.split("/")[0] in NETS
        }
        self.model = jax.tree.map(jnp.asarray, self.world.tree(self.world.params))
        self.observed = observed(self.world, "out/rssm/post_stoch")
        horizon, self.batch = recorded.shape("noise/act")[0], self.world.batch
        self.draws = Draws(
            our_rows(recorded["noise/prior"], self.batch),
            {"action": our_rows(recorded["noise/act"], self.batch)},
        )
        assert horizon == recorded.number("cfg/horizon")
        config = ActorCriticV1Config(
            units=recorded.shape("params/actor/h0/bias")[0],
            policy_layers=count(recorded, r"params/actor/h\d+/kernel"),
            value_layers=count(recorded, r"params/value/h\d+/kernel"),
            imagine=horizon,
            lambda_=recorded.number("cfg/disclam"),
            init_std=recorded.number("cfg/action_init_std"),
            explore=recorded.number("cfg/expl_amount"),
        )
        kind = "additive_gaussian" if self.continuous else "epsilon_greedy"
        assert recorded.text("cfg/expl") == kind
        space = action_space(recorded, not self.continuous)
        features = self.observed.latents.shape[-1]
        self.behavior = ActorCriticV1(
            config,
            space,
            self.world.model,
            recorded.number("cfg/discount"),
            policy_v1(config, space, features),
            critic_v1(config, features),
        )
        self.no_shift = jnp.zeros_like(self.draws.action["action"])

    def tree(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Our parameters. The recorded output [mean, std] of the policy is two layers of ours."""
        ours = nested(flat, layer)
        if self.continuous:
            whole = ours["policy"].pop("action")
            halves = {name: jnp.split(x, 2, -1) for name, x in whole.items()}
            for index, part in enumerate(("mean", "std")):
                ours["policy"][f"action_{part}"] = {k: x[index] for k, x in halves.items()}
        return ours


def dreams(recorded: Recorded) -> None:
    """Imagined states, actions, predictions and returns."""
    case = Case(recorded)
    behavior, parts = case.behavior, case.world.parts
    model = shifted(case.world, case.model, case.no_shift)

    @jax.jit
    def run(flat: Mapping[str, Any]) -> dict[str, Any]:
        params = case.tree(flat)
        dream = behavior.dream(params, model, case.observed, case.draws)
        states = behavior.reached(dream)
        values = behavior.judge(params, model, states)
        stoch, deter = jnp.split(states, [parts.latent.size], -1)
        mean, std = moments(GaussianConfig(), parts.prior.apply(case.model["prior"], deter))
        found = {
            "mean": mean,
            "std": std,
            "stoch": stoch,
            "deter": deter,
            "action": dream.action["action"],
            "reward": values.reward,
            "value": values.value,
            "pcont": values.discount,
            "return": returns_of(values, behavior.config.lambda_),
            "discount": weights_of(values.discount),
        }
        dist = behavior.policy.apply(params["policy"], states)["action"]
        if case.continuous:
            return found | {"actor_mean": dist.normal.loc, "actor_std": dist.normal.scale}
        return found | {"actor_logits": dist.choice.logprobs}

    ours = {name: np.asarray(their_rows(x, case.batch)) for name, x in run(case.flat).items()}
    for name in recorded.groups(r"out/img/(\w+)"):
        want, value = recorded.peek(f"out/img/{name}"), ours[name]
        if name == "actor_logits":  # known up to a constant of each row
            value = value - value.mean(-1, keepdims=True) + want.mean(-1, keepdims=True)
        recorded.compare(f"out/img/{name}", value)


def losses(recorded: Recorded) -> None:
    """Losses and gradients, that with respect to the actions included."""
    case = Case(recorded)

    def total(flat: Mapping[str, Any], shift: Any) -> Any:
        model = shifted(case.world, case.model, shift)
        losses, _, _ = case.behavior.loss(
            case.tree(flat), (), model, case.observed, case.world.steps, case.draws
        )
        policy, value = losses["policy"].mean(), losses["value"].mean()
        # The critic's loss does not depend on the policy, nor the other way round.
        return policy + value, (policy, value)

    grad = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (grads, by_action), (policy, value) = grad(case.flat, case.no_shift)
    recorded.compare("out/loss/actor", policy)
    recorded.compare("out/loss/value", value)
    for name, x in grads.items():
        recorded.compare(f"grad/{name}", x)
    recorded.compare("grad_img/action", their_rows(by_action, case.batch))


def actions(recorded: Recorded) -> None:
    """Actions while acting: two explored ones, then the most likely one."""
    case = Case(recorded)
    for index in recorded.groups(r"act/(\d+)/action"):
        root = f"act/{index}/"
        stoch, deter = (jnp.asarray(recorded[root + x]) for x in ("stoch", "deter"))
        plan = case.behavior.policy.apply(
            case.tree(case.flat)["policy"], jnp.concatenate([stoch, deter], -1)
        )
        noise = {name: jnp.asarray(x) for name, x in recorded.flat(f"{root}noise_").items()}
        explored = noise.get("expl")
        if "expl_gate" in noise:
            explored = noise["expl_gate"], noise["expl_class"]
        draws = ActDraws(
            {"action": noise.get("act")}, {"action": explored}, {"action": noise.get("mode")}
        )
        mode = "explore" if "act" in noise else "greedy"
        action = case.behavior.choose(plan, draws, mode)
        recorded.compare(f"{root}action", action["action"])


MARKER = r"params/value/hout/kernel"
CHECKS = [
    Check("dreams", MARKER, dreams),
    Check("behavior", MARKER, losses),
    Check("actions", MARKER, actions),
]
UNUSED = {r"cfg/pcont_scale": "the weight of a head that only some files have"}

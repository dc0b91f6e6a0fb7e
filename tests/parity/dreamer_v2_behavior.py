"""The actor-critic of Dreamer V2 on recorded dreams: states, targets, gradients and actions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.behaviors import policies
from jaxwm.behaviors.actor_critic_v2 import (
    ActDraws,
    ActorCriticV2,
    ActorCriticV2Config,
    Draws,
    State,
    critic_v2,
    policy_v2,
    returns_of,
)
from jaxwm.optim import SlowState, slow_copy
from tests.parity.common import Check, Recorded, nested, pick, renamed
from tests.parity.dreamer_v2_world import world
from tests.parity.dreams import observed, our_rows, shifted, their_rows, whole
from tests.parity.world import action_space, count

LEAVES = {"kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias"}
NETS = {"actor": "policy", "critic": "value", "slow": "slow"}


def path_of(continuous: bool) -> Any:
    """Our paths of recorded parameters of actor, critic and slow critic."""
    mean = "action_mean" if continuous else "action"
    layer = renamed(
        (
            (r"(\w+)/dense(\d+)", r"\1/mlp/linear\2"),
            (r"(\w+)/norm(\d+)", r"\1/mlp/norm\2"),
            (r"(actor)/out", rf"\1/{mean}"),
            (r"(actor)/std", r"\1/action_std"),
            (r"(critic|slow)/out", r"\1/out"),
        )
    )

    def path(name: str) -> str:
        place, _, leaf = name.rpartition("/")
        net, _, rest = layer(place).partition("/")
        return f"{NETS[net]}/{rest}/{LEAVES[leaf]}"

    return path


class Case:
    """Our behaviour with the parameters, states and noise of a file."""

    def __init__(self, recorded: Recorded):
        self.recorded, self.world = recorded, world(recorded)
        self.continuous = recorded.text("cfg/actor_dist") == "trunc_normal"
        self.path_of = path_of(self.continuous)
        flat = {
            name: jnp.asarray(x)
            for name, x in recorded.flat("params/").items()
            if name.split("/")[0] in NETS
        }
        self.tree = nested(flat, self.path_of)
        self.model = jax.tree.map(jnp.asarray, self.world.tree(self.world.params))
        self.observed = observed(self.world, "out/rssm/stoch")
        horizon, self.batch = recorded.shape("noise/act")[0], self.world.batch
        self.draws = Draws(
            our_rows(recorded["noise/prior"], self.batch),
            {"action": our_rows(recorded["noise/act"], self.batch)},
        )
        self.config = ActorCriticV2Config(
            units=recorded.shape("params/actor/dense0/bias")[0],
            layers=count(recorded, r"params/actor/dense\d+/kernel"),
            norm=recorded.text("cfg/norm"),
            imagine=horizon,
            lambda_=recorded.number("cfg/discount_lambda"),
            entropy=recorded.number("cfg/actor_ent"),
            gradient=recorded.text("cfg/actor_grad"),
            mix=recorded.number("cfg/actor_grad_mix"),
        )
        assert horizon == recorded.number("cfg/imag_horizon")

    def behavior(self, **changes: Any) -> ActorCriticV2:
        config = dataclasses.replace(self.config, **changes)
        latents = self.observed.latents.shape[-1]
        space = action_space(self.recorded, not self.continuous)
        return ActorCriticV2(
            config,
            space,
            self.world.model,
            self.recorded.number("cfg/discount"),
            policy_v2(config, space, latents),
            critic_v2(config, latents),
            slow_copy(1.0, 100),
        )

    def losses(self, behavior: ActorCriticV2, params: Any, shift: Any, **options: Any) -> Any:
        """Policy loss, critic loss and metrics, where actions are shifted."""
        dreams = shifted(self.world, self.model, shift, **options)
        losses, _, metrics = behavior.loss(
            params, self.state(), dreams, self.observed, self.world.steps, self.draws
        )
        return losses["policy"].mean(), losses["value"].mean(), metrics

    def state(self) -> State:
        return State(SlowState(self.tree["slow"], jnp.zeros((), jnp.int32)))

    @property
    def params(self) -> Mapping[str, Any]:
        return {"policy": self.tree["policy"], "value": self.tree["value"]}

    def no_shift(self) -> Any:
        return jnp.zeros_like(self.draws.action["action"])

    def compare_gradient(self, prefix: str, nets: tuple[str, ...], grads: Any) -> None:
        for net in nets:
            for name in self.recorded.names(rf"{prefix}/{net}/.*"):
                place = self.path_of(name.removeprefix(f"{prefix}/"))
                self.recorded.compare(name, pick(grads, place))


def dreams(recorded: Recorded) -> None:
    """Imagined states, actions, predictions and targets."""
    case = Case(recorded)
    behavior = case.behavior()
    world_model = shifted(case.world, case.model, case.no_shift())

    @jax.jit
    def run(params: Any) -> dict[str, Any]:
        start = world_model.starts(case.observed)
        dream = behavior.dream(params, world_model, start, case.draws)
        terminal = case.world.steps.is_terminal.reshape(-1)[start.index]
        values = behavior.judge(case.state(), world_model, dream, terminal)
        states = whole(dream)
        plan = behavior.policy.apply(params["policy"], states)
        parts = case.world.parts
        stoch, deter = jnp.split(states, [parts.latent.size], -1)
        early = behavior.policy.apply(params["policy"], states[:-1])
        found = {
            "stoch": stoch,
            "deter": deter,
            "logit": parts.prior.apply(case.model["prior"], deter),
            "action": dream.action["action"],
            "entropy": policies.entropy(plan),
            "logprob": policies.log_prob(early, dream.action),
            "critic": behavior.critic.apply(params["value"], states).mode(),
            "slow": values.slow,
            "reward": values.reward,
            "discount": values.discount,
            "weight": values.weight,
            "target": returns_of(values, behavior.config.lambda_),
        }
        dist = plan["action"]
        if case.continuous:
            return found | {"actor_loc": dist.loc, "actor_scale": dist.scale}
        return found | {"actor_logits": dist.choice.logprobs}

    ours = {name: np.array(their_rows(x, case.batch)) for name, x in run(case.params).items()}
    # Row 0 has the logits of the posterior, which `forward` compares.
    ours["logit"][0] = recorded["out/rssm/post_logit"].reshape(ours["logit"][0].shape)
    ours["action"] = np.concatenate([np.zeros_like(ours["action"][:1]), ours["action"]])
    for name in recorded.groups(r"out/img/(\w+)"):
        if name in ("actor_loss", "critic_loss", "actor_ent"):
            continue
        want = recorded.peek(f"out/img/{name}")
        value = ours[name].reshape(want.shape)
        if name == "actor_logits":  # known up to a constant of each row
            value = value - value.mean(-1, keepdims=True) + want.mean(-1, keepdims=True)
        recorded.compare(f"out/img/{name}", value)


def losses(recorded: Recorded) -> None:
    """Losses and gradients, as configured and in every variant."""
    case = Case(recorded)
    _losses(case, "img", "grad", case.behavior())
    for variant in recorded.groups(r"out/(\w+)/actor_loss"):
        if variant == "img":
            continue
        without = ("continue",) if variant == "nodisc" else ()
        options = {"implicit": True} if variant == "implicit" else {"gradient": variant}
        behavior = case.behavior(**({} if variant == "nodisc" else options))
        _losses(case, variant, f"grad_{variant}", behavior, without)
    _without_discount(case)


def _losses(
    case: Case, variant: str, prefix: str, behavior: ActorCriticV2, without: tuple[str, ...] = ()
) -> None:
    def total(params: Any, shift: Any) -> Any:
        policy, value, metrics = case.losses(behavior, params, shift, without=without)
        # The critic's loss does not depend on the policy, nor the other way round.
        return policy + value, (policy, value, metrics["policy/entropy"])

    grad = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (grads, by_action), (policy, value, entropy) = grad(case.params, case.no_shift())
    recorded = case.recorded
    recorded.compare(f"out/{variant}/actor_loss", policy)
    recorded.compare(f"out/{variant}/critic_loss", value)
    recorded.compare(f"out/{variant}/actor_ent", entropy)
    case.compare_gradient(prefix, ("actor", "critic"), grads)
    if variant == "img":
        recorded.compare("grad_img/action", their_rows(by_action, case.batch))


def _without_discount(case: Case) -> None:
    recorded, behavior = case.recorded, case.behavior()
    if "out/nodisc/discount" not in recorded:
        return
    model = shifted(case.world, case.model, case.no_shift(), ("continue",))
    start = model.starts(case.observed)
    dream = behavior.dream(case.params, model, start, case.draws)
    terminal = case.world.steps.is_terminal.reshape(-1)[start.index]
    values = behavior.judge(case.state(), model, dream, terminal)
    found = {"discount": values.discount, "weight": values.weight}
    found["target"] = returns_of(values, behavior.config.lambda_)
    for name, x in found.items():
        recorded.compare(f"out/nodisc/{name}", their_rows(x, case.batch))


def actions(recorded: Recorded) -> None:
    """Actions while acting: two sampled ones, then the mode."""
    case = Case(recorded)
    behavior = case.behavior()
    for index in recorded.groups(r"act/(\d+)/action"):
        stoch, deter = (jnp.asarray(recorded[f"act/{index}/{x}"]) for x in ("stoch", "deter"))
        feat = jnp.concatenate([stoch.reshape(len(stoch), -1).astype(jnp.float32), deter], -1)
        plan = behavior.policy.apply(case.params["policy"], feat)
        noise, mode = {}, "greedy"
        if f"act/{index}/noise_act" in recorded:
            noise, mode = {"action": jnp.asarray(recorded[f"act/{index}/noise_act"])}, "explore"
        draws = ActDraws(noise, jax.tree.map(jnp.zeros_like, noise))
        action = behavior.choose(plan, draws, mode)
        recorded.compare(f"act/{index}/action", action["action"])


MARKER = r"params/slow/out/kernel"
CHECKS = [
    Check("dreams", MARKER, dreams),
    Check("behavior", MARKER, losses),
    Check("actions", MARKER, actions),
]

"""The world model of Dreamer V2 on recorded batches: forward, losses, gradients, acting steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.heads import soft_continue
from jaxwm.models.latents import LatentConfig, balanced_kl
from jaxwm.models.recurrent import LayerNormGRUConfig
from jaxwm.models.rssm import Carry, Parts, rssm
from jaxwm.recipes.dreamer_v2 import ModelConfig, parts
from jaxwm.types import Step, is_image
from tests.parity.common import Check, Recorded, nested, renamed
from tests.parity.world import (
    World,
    action_space,
    compare_decoded,
    compare_losses,
    compare_preprocessed,
    count,
    observation_space,
    sorted_rows,
)

LAYERS = (
    (r"enc/conv(\d+)", r"encoder/conv\1"),
    (r"enc/convnorm(\d+)", r"encoder/conv_norm\1"),
    (r"enc/dense(\d+)", r"encoder/mlp/linear\1"),
    (r"enc/densenorm(\d+)", r"encoder/mlp/norm\1"),
    (r"rssm/img_in", r"core/img_in"),
    (r"rssm/img_in_norm", r"core/img_in_norm"),
    (r"rssm/gru/dense", r"core/gru/gates"),
    (r"rssm/gru/norm", r"core/gru/norm"),
    (r"rssm/img_out_0", r"prior/mlp/linear0"),
    (r"rssm/img_out_norm_0", r"prior/mlp/norm0"),
    (r"rssm/img_dist_0", r"prior/logits"),
    (r"rssm/obs_out", r"posterior/hidden"),
    (r"rssm/obs_out_norm", r"posterior/norm"),
    (r"rssm/obs_dist", r"posterior/logits"),
    (r"dec/convin", r"decoder/dense"),
    (r"dec/conv(\d+)", r"decoder/conv\1"),
    (r"dec/convnorm(\d+)", r"decoder/conv_norm\1"),
    (r"dec/dense(\d+)", r"decoder/mlp/linear\1"),
    (r"dec/densenorm(\d+)", r"decoder/mlp/norm\1"),
    (r"dec/out_(\w+)", r"decoder/out_\1"),
    (r"reward/dense(\d+)", r"reward/mlp/linear\1"),
    (r"reward/norm(\d+)", r"reward/mlp/norm\1"),
    (r"reward/out", r"reward/out"),
    (r"discount/dense(\d+)", r"continue/mlp/linear\1"),
    (r"discount/norm(\d+)", r"continue/mlp/norm\1"),
    (r"discount/out", r"continue/out"),
)
LEAVES = {"kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias"}
layer = renamed(LAYERS)


def path_of(name: str) -> str:
    """Our path of a recorded parameter."""
    place, _, leaf = name.rpartition("/")
    return f"{layer(place)}/{LEAVES[leaf]}"


def model_config(recorded: Recorded) -> ModelConfig:
    """Sizes and settings, from shapes and `cfg/*`."""
    shape = recorded.shape
    normed = lambda name: "layer" if f"params/{name}/gamma" in recorded else "none"  # noqa: E731
    hidden = shape("params/rssm/img_in/bias")[0]
    dense = [name for name in ("enc/dense", "dec/dense") if f"params/{name}0/bias" in recorded]
    codec = ClassicCodecConfig()
    if dense:
        layers = count(recorded, rf"params/{dense[0]}\d+/kernel")
        units = shape(f"params/{dense[0]}0/bias")[0]
        codec = dataclasses.replace(codec, units=units, layers=layers)
    if "params/enc/conv0/bias" in recorded:
        codec = dataclasses.replace(codec, depth=shape("params/enc/conv0/bias")[0])
    norm = "layer" if recorded.names(r"params/enc/\w+norm0/gamma") else "none"
    assert not recorded.names(r"params/rssm/img_out_1/.*"), "ensembles of priors are not known"
    stoch, classes = shape("out/rssm/post_logit")[-2:]
    clip = recorded.text("cfg/clip_rewards")
    return ModelConfig(
        core=LayerNormGRUConfig(
            deter=shape("params/rssm/gru/norm/gamma")[0] // 3,
            hidden=hidden,
            norm=normed("rssm/img_in_norm"),
        ),
        latent=LatentConfig(stoch, classes, unimix=0.0, free_nats=recorded.number("cfg/kl_free")),
        kl_balance=recorded.number("cfg/kl_balance"),
        codec=dataclasses.replace(codec, norm=norm),
        units=shape("params/reward/dense0/bias")[0],
        layers=count(recorded, r"params/reward/dense\d+/kernel"),
        norm=normed("reward/norm0"),
        discount=recorded.number("cfg/discount"),
        predict_ends="params/discount/out/bias" in recorded,
        clip_reward={"identity": "none"}.get(clip, clip),
    )


def networks(recorded: Recorded, config: ModelConfig, spaces: Any, actions: Any) -> Parts:
    """The networks, with the KL loss that `cfg/*` asks for."""
    built = parts(config, spaces, actions)
    latent = balanced_kl(
        built.latent,
        config.kl_balance,
        config.latent.free_nats,
        bool(recorded["cfg/kl_free_avg"]),
        bool(recorded["cfg/kl_forward"]),
    )
    return built._replace(latent=latent)


def tree(recorded: Recorded, spaces: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters, from the recorded ones by name."""
    ours = nested(flat, path_of)
    if "mlp" in ours["encoder"]:
        first = ours["encoder"]["mlp"]["linear0"]
        first["kernel"] = sorted_rows(first["kernel"], spaces)
    return ours


def world(recorded: Recorded) -> World:
    """The recorded batch and our model of its sizes."""
    spaces = observation_space(recorded)
    actions = action_space(recorded, recorded.text("cfg/actor_dist") == "onehot")
    config = model_config(recorded)
    built = networks(recorded, config, spaces, actions)
    stoch = jnp.asarray(recorded["in/state/stoch"])
    carry = Carry(jnp.asarray(recorded["in/state/deter"]), stoch.reshape(len(stoch), -1))
    losses = {"kl": "kl", "reward": "reward", **{key: f"rec/{key}" for key in spaces}}
    losses |= {"discount": "continue"} if config.predict_ends else {}
    scales = {name: recorded.number(f"cfg/scale_{name}") for name in ("kl", "reward", "discount")}
    weights = {name: scales.get(name, 1.0) for name in losses}
    return World(
        recorded,
        built,
        rssm(built, spaces, actions),
        lambda flat: tree(recorded, spaces, flat),
        spaces,
        losses,
        weights,
        is_first=recorded["in/is_first"],
        is_terminal=recorded["in/is_terminal"],
        carry=carry,
    )


def forward(recorded: Recorded) -> None:
    """Encoder, latents, decoder, heads and losses."""
    case = world(recorded)
    ours = case.compute()
    groups = recorded.shape("out/rssm/stoch")
    for name in spaces_of(case, image=True):
        compare_preprocessed(recorded, name, recorded[f"in/{name}"])
    discount = recorded.number("cfg/discount")
    for name, head in (
        ("reward", case.parts.heads["reward"]),
        ("discount", soft_continue(case.parts.heads["reward"].net, discount)),
    ):
        recorded.compare(f"out/pre/{name}", np.swapaxes(head.target(case.steps), 0, 1))
    recorded.compare("out/enc/embed", ours["tokens"])
    recorded.compare("out/rssm/feat", ours["feat"])
    recorded.compare("out/rssm/deter", ours["deter"])
    recorded.compare("out/rssm/stoch", ours["stoch"].reshape(groups))
    recorded.compare("out/rssm/prior_stoch", ours["prior_stoch"].reshape(groups))
    recorded.compare("out/rssm/kl", ours["kl"])
    for side in ("post", "prior"):
        recorded.compare(f"out/rssm/{side}_logit", ours[side].reshape(groups))
        recorded.compare(f"out/rssm/{side}_ent", case.parts.latent.entropy(ours[side]))
    last = ours["carry"]
    recorded.compare("out/last_state/deter", last.core)
    recorded.compare("out/last_state/stoch", last.stoch.reshape(recorded.shape("in/state/stoch")))
    recorded.compare("out/last_state/logit", ours["post"][:, -1].reshape(groups[0], *groups[2:]))
    compare_decoded(case, ours["raw"])
    recorded.compare("out/reward/mode", ours["raw"]["reward"])
    if "continue" in case.parts.heads:
        recorded.compare("out/discount/logit", ours["raw"]["continue"])
        recorded.compare("out/discount/mean", jax.nn.sigmoid(ours["raw"]["continue"]))
    compare_losses(case, ours, [name for name in case.losses if name != "kl"])
    recorded.compare("out/loss/kl", ours["means"]["kl"])
    for name, weight in case.weights.items():
        recorded.compare(f"out/scale/{name}", np.float32(weight))
    # The layer norms that were found are those that the settings ask for.
    assert (recorded.text("cfg/norm") == "layer") == (model_config(recorded).norm == "layer")


def spaces_of(case: World, image: bool) -> list[str]:
    return [name for name, space in case.spaces.items() if is_image(space) == image]


def gradients(recorded: Recorded) -> None:
    """The gradient of the model's loss, and how far each of its terms reaches."""
    world(recorded).compare_gradients("out/loss/model")


def acting(recorded: Recorded) -> None:
    """States while acting: row 0 starts an episode, all further rows see the second observation."""
    case = world(recorded)
    carry = case.model.initial(case.batch)
    action = jnp.zeros_like(case.steps.action[0])
    for index in range(count(recorded, r"act/\d+/deter")):
        time = min(index, 1)
        row: Step = jax.tree.map(lambda x, t=time: x[t], case.steps)
        row = row._replace(action=action, is_first=jnp.full(case.batch, index == 0))
        noise = jnp.asarray(recorded[f"act/{index}/noise_post"])
        carry, _ = case.filter(carry, row, noise, {})
        groups = recorded.shape(f"act/{index}/stoch")
        recorded.compare(f"act/{index}/deter", carry.core)
        recorded.compare(f"act/{index}/stoch", carry.stoch.reshape(groups))
        action = jnp.asarray(recorded[f"act/{index}/action"])


MARKER = r"params/rssm/gru/norm/gamma"
CHECKS = [
    Check("forward", MARKER, forward),
    Check("gradients", MARKER, gradients),
    Check("acting", MARKER, acting),
]
UNUSED = {
    r"in/is_last": "the original does not read it",
    r"in/state/logit": "the original does not read it",
    r"act/\d+/noise_prior": "draws a sample that nothing reads",
    r"margins": "how clear the recorded choices are; says nothing about an implementation",
}

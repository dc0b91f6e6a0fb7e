"""The world model of Dreamer V1 on recorded batches: forward, losses, gradients, acting steps."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.models.codecs import ClassicCodecConfig
from jaxwm.models.latents import GaussianConfig
from jaxwm.models.recurrent import KerasGRUConfig
from jaxwm.models.rssm import rssm
from jaxwm.recipes.dreamer_v1 import ModelConfig, parts
from jaxwm.types import Space, is_image
from tests.parity.common import Check, Recorded, nested, renamed
from tests.parity.dreamer_v1_units import keras_gru
from tests.parity.gaussian_world import compare_states, one_row
from tests.parity.world import (
    World,
    action_space,
    compare_decoded,
    compare_losses,
    compare_preprocessed,
    count,
    observation_space,
)

CORE = (
    (r"rssm/img1/(\w+)", r"core/img_in/\1"),
    (r"rssm/img2/(\w+)", r"prior/mlp/linear0/\1"),
    (r"rssm/img3/(\w+)", r"prior/out/\1"),
    (r"rssm/obs1/(\w+)", r"posterior/hidden/\1"),
    (r"rssm/obs2/(\w+)", r"posterior/logits/\1"),
    (r"reward/h(\d+)/(\w+)", r"reward/mlp/linear\1/\2"),
    (r"reward/hout/(\w+)", r"reward/out/\1"),
    (r"pcont/h(\d+)/(\w+)", r"continue/mlp/linear\1/\2"),
    (r"pcont/hout/(\w+)", r"continue/out/\1"),
)


def vector_paths(key: str) -> tuple[tuple[str, str], ...]:
    """Our paths of the decoder of the vector `key`."""
    return (
        (r"dec/h(\d+)/(\w+)", r"decoder/mlp/linear\1/\2"),
        (r"dec/hout/(\w+)", rf"decoder/out_{key}/\1"),
    )


def image_path(name: str) -> str | None:
    """Our path of a layer of the image encoder or decoder, which are counted from one."""
    match = re.fullmatch(r"(enc|dec)/h(\d+)/(\w+)", name)
    if match is None:
        return None
    part, number, leaf = match[1], int(match[2]), match[3]
    if part == "enc":
        return f"encoder/conv{number - 1}/{leaf}"
    return f"decoder/dense/{leaf}" if number == 1 else f"decoder/conv{number - 2}/{leaf}"


def tree(spaces: Mapping[str, Space], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters, from the recorded ones by name."""
    ((key, space),) = spaces.items()
    image = is_image(space)
    rules = renamed(CORE if image else CORE + vector_paths(key))
    gru = {name: x for name, x in flat.items() if name.startswith("rssm/gru/")}
    ours = nested(
        {name: x for name, x in flat.items() if name not in gru},
        lambda name: (image and image_path(name)) or rules(name),
    )
    ours["core"]["gru"] = keras_gru({name.removeprefix("rssm/gru/"): x for name, x in gru.items()})
    return {"encoder": {}} | ours


def model_config(recorded: Recorded) -> ModelConfig:
    """Sizes and settings, from shapes and `cfg/*`."""
    shape = recorded.shape
    codec = ClassicCodecConfig(conv_act="relu", vectors="identity")
    if "in/image" in recorded:
        codec = dataclasses.replace(codec, depth=shape("params/enc/h1/bias")[0])
    else:
        layers = count(recorded, r"params/dec/h\d+/kernel")
        codec = dataclasses.replace(codec, units=shape("params/dec/h0/bias")[0], layers=layers)
    ends = bool(recorded["cfg/pcont"])
    return ModelConfig(
        core=KerasGRUConfig(
            deter=shape("params/rssm/gru/recurrent_kernel")[0],
            hidden=shape("params/rssm/img1/bias")[0],
        ),
        latent=GaussianConfig(shape("out/rssm/post_mean")[-1]),
        free_nats=recorded.number("cfg/free_nats"),
        codec=codec,
        units=shape("params/reward/h0/bias")[0],
        reward_layers=count(recorded, r"params/reward/h\d+/kernel"),
        continue_layers=count(recorded, r"params/pcont/h\d+/kernel") if ends else 3,
        discount=recorded.number("cfg/discount"),
        predict_ends=ends,
        clip_reward=recorded.text("cfg/clip_rewards"),
    )


def world(recorded: Recorded) -> World:
    """The recorded batch and our model of its sizes."""
    spaces = observation_space(recorded)
    (key,) = spaces
    actions = action_space(recorded, recorded.text("cfg/action_dist") == "onehot")
    config = model_config(recorded)
    built = parts(config, spaces, actions)
    losses = {"kl": "kl", "reward": "reward", "image": f"rec/{key}"}
    weights = {"kl": recorded.number("cfg/kl_scale"), "reward": 1.0, "image": 1.0}
    scale = recorded.number("cfg/pcont_scale")
    if config.predict_ends:
        losses["pcont"], weights["pcont"] = "continue", scale
    return World(
        recorded,
        built,
        rssm(built, spaces, actions),
        lambda flat: tree(spaces, flat),
        spaces,
        losses,
        weights,
        is_terminal=1 - recorded["in/discount"],
    )


def forward(recorded: Recorded) -> None:
    """Encoder, latents, decoder, heads and losses."""
    case = world(recorded)
    ours = case.compute()
    if "in/image" in recorded:
        compare_preprocessed(recorded, "image", recorded["in/image"])
        recorded.compare("out/enc/embed", ours["tokens"])
    target = case.parts.heads["reward"].target(case.steps)
    recorded.compare("out/pre/reward", np.swapaxes(target, 0, 1))
    compare_states(case, ours, "deter", "stoch", "std")
    compare_decoded(case, ours["raw"])
    recorded.compare("out/reward/mode", ours["raw"]["reward"])
    if "continue" in case.parts.heads:
        recorded.compare("out/pcont/mean", jax.nn.sigmoid(ours["raw"]["continue"]))
    compare_losses(case, ours, [name for name in case.losses if name != "kl"])
    recorded.compare("out/loss/kl", ours["means"]["kl"])
    for name, weight in case.weights.items():
        recorded.compare(f"out/scale/{name}", np.float32(weight))


def gradients(recorded: Recorded) -> None:
    """The gradient of the model's loss, and how far each of its terms reaches."""
    world(recorded).compare_gradients("out/loss/model")


def acting(recorded: Recorded) -> None:
    """States of one environment while acting; the recorded actions lead from row to row."""
    case = world(recorded)
    carry = case.model.initial(1)
    action = jnp.zeros_like(case.steps.action[0, :1])
    for index in range(count(recorded, r"act/\d+/deter")):
        row, images = one_row(case, index, action)
        carry, _ = case.filter(carry, row, jnp.asarray(recorded[f"act/{index}/noise_post"]), images)
        recorded.compare(f"act/{index}/deter", carry.core)
        recorded.compare(f"act/{index}/stoch", carry.stoch)
        action = jnp.asarray(recorded[f"act/{index}/action"])


MARKER = r"params/rssm/gru/recurrent_kernel"
CHECKS = [
    Check("forward", MARKER, forward),
    Check("gradients", MARKER, gradients),
    Check("acting", MARKER, acting),
]
UNUSED = {r"act/\d+/noise_prior": "draws a sample that nothing reads"}

"""The world model of PlaNet on recorded batches: forward, losses, gradients, open loop, acting."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.models.codecs import ClassicCodecConfig, quantize
from jaxwm.models.latents import GaussianConfig, moments
from jaxwm.models.recurrent import PlanetGRUConfig
from jaxwm.recipes.planet import ModelConfig, parts, world_model
from tests.parity.common import Check, Recorded, nested, renamed
from tests.parity.dreamer_v1_world import image_path
from tests.parity.gaussian_world import compare_states, one_row
from tests.parity.planet_units import planet_gru
from tests.parity.world import (
    World,
    action_space,
    compare_decoded,
    compare_losses,
    compare_preprocessed,
    count,
    observation_space,
    time_major,
)

CORE = (
    (r"rssm/img1/(\w+)", r"core/img_in/\1"),
    (r"rssm/img2/(\w+)", r"prior/mlp/linear0/\1"),
    (r"rssm/img_(mean|std)/(\w+)", r"prior/\1/\2"),
    (r"rssm/obs1/(\w+)", r"posterior/hidden/\1"),
    (r"rssm/obs_(mean|std)/(\w+)", r"posterior/\1/\2"),
)


def stack_path(recorded: Recorded, part: str, root: str, out: str) -> Callable[[str], str | None]:
    """Our paths of dense layers h1, h2, ..., of which the last is the output."""
    last = count(recorded, rf"params/{part}/h\d+/kernel")

    def path_of(name: str) -> str | None:
        match = re.fullmatch(rf"{part}/h(\d+)/(\w+)", name)
        if match is None:
            return None
        number = int(match[1])
        place = out if number == last else f"mlp/linear{number - 1}"
        return f"{root}/{place}/{match[2]}"

    return path_of


def tree(recorded: Recorded, key: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters, from the recorded ones by name."""
    core = renamed(CORE)
    reward = stack_path(recorded, "reward", "reward", "out")
    codec = image_path
    if "in/image" not in recorded:
        codec = stack_path(recorded, "dec", "decoder", f"out_{key}")
    gru = {name: x for name, x in flat.items() if name.startswith("rssm/gru/")}
    ours = nested(
        {name: x for name, x in flat.items() if name not in gru},
        lambda name: reward(name) or codec(name) or core(name),
    )
    ours["core"]["gru"] = planet_gru({name.removeprefix("rssm/gru/"): x for name, x in gru.items()})
    return {"encoder": {}} | ours


def model_config(recorded: Recorded) -> ModelConfig:
    """Sizes and settings, from shapes and recorded constants."""
    shape = recorded.shape
    codec = ClassicCodecConfig(act="relu", conv_act="relu", vectors="identity")
    if "in/image" in recorded:
        codec = dataclasses.replace(codec, depth=shape("params/enc/h1/bias")[0])
    else:
        layers = count(recorded, r"params/dec/h\d+/kernel") - 1
        codec = dataclasses.replace(codec, units=shape("params/dec/h1/bias")[0], layers=layers)
    return ModelConfig(
        core=PlanetGRUConfig(
            deter=shape("params/rssm/gru/b_c")[0], hidden=shape("params/rssm/img1/bias")[0]
        ),
        latent=GaussianConfig(shape("out/rssm/post_mean")[-1]),
        free_nats=recorded.number("out/free_nats"),
        codec=codec,
        units=shape("params/reward/h1/bias")[0],
        layers=count(recorded, r"params/reward/h\d+/kernel") - 1,
    )


class PlanetWorld(World):
    """A batch whose images lose bits and gain noise before the model sees them."""

    def prepared(self) -> dict[str, Any]:
        less = {key: quantize(self.steps.obs[key], noise) for key, noise in self.images.items()}
        return self.steps.obs | less


def world(recorded: Recorded) -> PlanetWorld:
    """The recorded batch and our model of its sizes."""
    spaces = observation_space(recorded)
    (key,) = spaces
    actions = action_space(recorded, one_hot=False)
    config = model_config(recorded)
    images = {}
    if "noise/dequant_u8" in recorded:
        images[key] = (recorded["noise/dequant_u8"].astype(np.float32) + 0.5) / 256
    losses = {"divergence": "kl", "reward": "reward", "image": f"rec/{key}"}
    return PlanetWorld(
        recorded,
        parts(config, spaces, actions),
        world_model(config, spaces, actions),
        lambda flat: tree(recorded, key, flat),
        spaces,
        losses,
        {name: recorded.number(f"out/scale/{name}") for name in losses},
        images=images,
    )


def forward(recorded: Recorded) -> None:
    """Encoder, latents, decoder, heads and losses."""
    case = world(recorded)
    ours = case.compute()
    if "in/image" in recorded:
        compare_preprocessed(recorded, "image", np.swapaxes(case.prepared()["image"], 0, 1))
        recorded.compare("out/enc/embed", ours["tokens"])
    compare_states(case, ours, "belief", "sample", "stddev")
    compare_decoded(case, ours["raw"])
    recorded.compare("out/reward/mean", ours["raw"]["reward"])
    compare_losses(case, ours, ["reward", "image"])
    recorded.compare("out/loss/divergence", ours["means"]["divergence"])


def gradients(recorded: Recorded) -> None:
    """The gradient of the model's loss, and how far each of its terms reaches."""
    world(recorded).compare_gradients("out/loss/main")


def open_loop(recorded: Recorded) -> None:
    """A dream of recorded actions, from the last state of the batch."""
    case = world(recorded)
    params, model = case.tree(case.params), case.model
    actions, noise = (time_major(recorded[f"open/{name}"]) for name in ("action", "noise"))

    @jax.jit
    def dream(carry: Any) -> Any:
        def step(carry: Any, row: Any) -> Any:
            action, noise = row
            carry, latent = model.step(params, carry, action, case.draws(noise))
            raw = case.parts.prior.apply(params["prior"], carry.core)
            reward = model.predict(params, latent, ("reward",))["reward"].mean()
            return carry, (*moments(GaussianConfig(), raw), carry.stoch, carry.core, reward)

        return jax.lax.scan(step, carry, (actions, noise))[1]

    results = dream(case.compute()["carry"])
    for name, result in zip(("mean", "stddev", "sample", "belief", "reward"), results, strict=True):
        recorded.compare(f"open/{name}", np.swapaxes(result, 0, 1))


def acting(recorded: Recorded) -> None:
    """States of one environment while acting; the recorded actions lead from row to row."""
    case = world(recorded)
    params = case.tree(case.params)
    tokens = jax.jit(case.tokens)(params)
    carry = case.model.initial(1)
    for index in range(count(recorded, r"act/\d+/belief")):
        row, images = one_row(case, index, recorded[f"act/{index}/prev_action"], images=True)
        carry, _ = case.filter(carry, row, jnp.asarray(recorded[f"act/{index}/noise_post"]), images)
        embedded = case.parts.posterior.embed(params["posterior"], tokens[index, :1])
        raw = case.parts.posterior.apply(params["posterior"], carry.core, embedded)
        mean, std = moments(GaussianConfig(), raw)
        recorded.compare(f"act/{index}/mean", mean)
        recorded.compare(f"act/{index}/stddev", std)
        recorded.compare(f"act/{index}/sample", carry.stoch)
        recorded.compare(f"act/{index}/belief", carry.core)


MARKER = r"params/rssm/gru/w_ru"
CHECKS = [
    Check("forward", MARKER, forward),
    Check("gradients", MARKER, gradients),
    Check("open_loop", MARKER, open_loop),
    Check("acting", MARKER, acting),
]
UNUSED = {r"margins": "how clear the recorded choices are; says nothing about an implementation"}

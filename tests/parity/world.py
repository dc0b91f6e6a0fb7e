"""A recorded batch of one of the older systems, recomputed with our world model.

The systems differ in how their arrays are called; `World` holds what is ours, in our layout (time
before batch), and gives it back in theirs (batch before time).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.models.codecs import centred
from jaxwm.models.rssm import Parts
from jaxwm.types import Box, Discrete, Space, Step, WorldModel, is_image
from tests.parity.common import Recorded

FLAGS = ("reward", "is_first", "is_last", "is_terminal", "action", "discount")


def observation_space(recorded: Recorded) -> dict[str, Space]:
    """Spaces of the observations, in the order of the file."""
    keys = [key for key in recorded.groups(r"in/([^/]+)") if key not in FLAGS]
    shapes = {key: recorded.shape(f"in/{key}")[2:] for key in keys}
    return {key: Box(shapes[key], str(recorded.peek(f"in/{key}").dtype)) for key in keys}


def action_space(recorded: Recorded, one_hot: bool) -> Space:
    size = recorded.shape("in/action")[-1]
    return Discrete(size) if one_hot else Box((size,), low=-1.0, high=1.0)


def time_major(x: Any) -> Any:
    return jnp.swapaxes(jnp.asarray(x), 0, 1)


def count(recorded: Recorded, pattern: str) -> int:
    """How many arrays have a name that matches as a whole: layers, for example."""
    return len(recorded.names(pattern))


def sorted_rows(kernel: Any, space: Mapping[str, Space]) -> Any:
    """A kernel that reads vectors in the order of the file, with its rows sorted by key."""
    vectors = {key: math.prod(part.shape) for key, part in space.items() if not is_image(part)}
    ends = np.cumsum(list(vectors.values()))
    rows = dict(zip(vectors, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    return kernel[np.concatenate([rows[key] for key in sorted(vectors)])]


class World:
    """Parameters, steps and noise of a file, and what our model makes of them.

    Args:
      recorded: the file.
      parts: our networks, of its sizes.
      model: our model of these parts.
      tree: our parameters, from the recorded ones by name.
      spaces: space of each observation.
      losses: our name of every recorded loss.
      weights: weight of every recorded loss.
      is_first: (B, T) starts of episodes; none by default.
      is_terminal: (B, T) ends of episodes, which may be shares; none by default.
      carry: what came before the batch; nothing by default.
      images: (B, T) noise of each image, for a model that takes some.
    """

    def __init__(
        self,
        recorded: Recorded,
        parts: Parts,
        model: WorldModel,
        tree: Callable[[Mapping[str, Any]], Any],
        spaces: dict[str, Space],
        losses: dict[str, str],
        weights: dict[str, float],
        is_first: Any = None,
        is_terminal: Any = None,
        carry: Any = None,
        images: dict[str, Any] | None = None,
    ):
        self.recorded, self.parts, self.model, self.tree = recorded, parts, model, tree
        self.losses, self.weights, self.spaces = losses, weights, spaces
        self.params = {
            name: jnp.asarray(value)
            for name, value in recorded.flat("params/").items()
            if re.match(r"(enc|rssm|dec|reward|discount|pcont)/", name)
        }
        shape = recorded.shape("in/reward")
        none = np.zeros(shape, bool)
        self.batch, self.time = shape
        self.carry = model.initial(self.batch) if carry is None else carry
        self.steps = Step(
            action=time_major(recorded["in/action"]),
            obs={key: time_major(recorded[f"in/{key}"]) for key in spaces},
            reward=time_major(recorded["in/reward"]),
            is_first=time_major(none if is_first is None else is_first),
            is_last=time_major(none),
            is_terminal=time_major(none if is_terminal is None else is_terminal),
        )
        self.images = {key: time_major(noise) for key, noise in (images or {}).items()}

    def draws(self, post: Any, images: dict[str, Any] | None = None) -> Any:
        """Draws for `observe` and `loss`, from the noise of the posterior (T, B, ...)."""
        return (post, self.images if images is None else images) if self.images else post

    def forward(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """What the model makes of the batch, time before batch."""
        params, parts = self.tree(flat), self.parts
        post_noise = time_major(self.recorded["noise/post"])
        losses, observed, _ = self.model.loss(
            params, self.carry, self.steps, self.draws(post_noise)
        )
        stoch, deter = jnp.split(observed.latents, [parts.latent.size], -1)
        tokens = self.tokens(params)
        embedded = parts.posterior.embed(params["posterior"], tokens)
        prior = parts.prior.apply(params["prior"], deter)
        post = parts.posterior.apply(params["posterior"], deter, embedded)
        return {
            "losses": losses,
            "means": {name: losses[ours].mean() for name, ours in self.losses.items()},
            "carry": observed.carry,
            "tokens": tokens,
            "feat": observed.latents,
            "deter": deter,
            "stoch": stoch,
            "post": post,
            "prior": prior,
            "prior_stoch": parts.latent.sample(prior, time_major(self.recorded["noise/prior_obs"])),
            "kl": parts.latent.divergence(post, prior),
            "raw": self.raw(params, observed.latents),
        }

    def prepared(self) -> dict[str, Any]:
        """Observations as encoder and likelihoods see them; overridden by PlaNet's."""
        return self.steps.obs

    def tokens(self, params: Any) -> Any:
        obs = {key: x.reshape(-1, *x.shape[2:]) for key, x in self.prepared().items()}
        tokens = self.parts.encoder.apply(params["encoder"], obs)
        return tokens.reshape(self.time, self.batch, -1)

    def raw(self, params: Any, latents: Any) -> dict[str, Any]:
        """Outputs of decoder and heads."""
        lead = latents.shape[:-1]
        flat = latents.reshape(-1, latents.shape[-1])
        stoch, deter = jnp.split(flat, [self.parts.latent.size], -1)
        decoded = self.parts.decoder.apply(params["decoder"], deter, stoch)
        outputs = {key: x.reshape(*lead, *x.shape[1:]) for key, x in decoded.items()}
        for name, head in self.parts.heads.items():
            outputs[name] = head.net.apply(params[name], latents)[..., 0]
        return outputs

    def compute(self) -> dict[str, Any]:
        """`forward` of the recorded parameters, batch before time."""
        ours = jax.jit(self.forward)(self.params)
        return ours | {
            name: jax.tree.map(_batch_major, ours[name]) for name in set(ours) - {"means", "carry"}
        }

    def compare_gradients(self, total: str) -> None:
        """`grad/*` of the weighted sum of all losses, and `gradnorm/values` of each loss.

        Args:
          total: name of the array with that sum.
        """
        recorded = self.recorded
        order = [str(name) for name in recorded["gradnorm/losses"]]

        def weighted(flat: Mapping[str, Any], weights: Any) -> Any:
            ours = self.forward(flat)["means"]
            return sum(weight * ours[name] for weight, name in zip(weights, order, strict=True))

        compiled = jax.jit(jax.value_and_grad(weighted))
        whole = np.array([self.weights[name] for name in order], np.float32)
        value, grads = compiled(self.params, whole)
        recorded.compare(total, value)
        for name, grad in grads.items():
            recorded.compare(f"grad/{name}", grad)
        # One term after the other: XLA's CPU compiler (0.10.2) gets kernels' gradients wrong when
        # only the cotangents of a convolution behind a LayerNorm are batched, as by `jacrev`.
        rows = [compiled(self.params, one)[1] for one in np.eye(len(order), dtype=np.float32)]
        names = [str(name) for name in recorded["gradnorm/params"]]
        norms = [[np.linalg.norm(np.ravel(row[name])) for name in names] for row in rows]
        self._compare_norms(np.array(norms))

    def _compare_norms(self, ours: np.ndarray) -> None:
        """Norms of every loss (rows), each relative to its largest; zeros must be zeros."""
        recorded, name = self.recorded, "gradnorm/values"
        want = recorded.peek(name)
        recorded.compare(name, ours)
        if not np.array_equal(ours > 0, want > 0):
            recorded.wrong.append(f"{name}: other parameters are reached")
        scale = np.abs(want).max(1, keepdims=True)
        error = np.abs(ours - want).max(1, keepdims=True) / np.where(scale > 0, scale, 1)
        if not error.max() <= 2e-4:
            recorded.wrong.append(f"{name}: errors {error.ravel()} of the losses")

    def filter(self, carry: Any, row: Step, noise: Any, images: dict[str, Any]) -> tuple[Any, Any]:
        """One acting step: the carry and the latent after a row (B, ...)."""
        add = lambda x: x[None]  # noqa: E731
        draws = self.draws(add(noise), jax.tree.map(add, images))
        observed = self._observe(self.tree(self.params), carry, jax.tree.map(add, row), draws)
        return observed.carry, observed.latents[0]

    def _observe(self, *args: Any) -> Any:
        if not hasattr(self, "_jitted"):
            self._jitted = jax.jit(self.model.observe)
        return self._jitted(*args)


def compare_images(recorded: Recorded, key: str, pixels: Any) -> None:
    """A predicted image (B, T, h, w, c), of which parts were recorded."""
    pixels = np.asarray(pixels)
    recorded.compare(f"out/dec/{key}/pred_first", pixels[0, :1])
    recorded.compare(f"out/dec/{key}/pred_stride8", pixels[:, :, 3::8, 5::8])
    recorded.compare(f"out/dec/{key}/pred_sum", pixels.sum((2, 3), dtype=np.float64))


def compare_decoded(world: World, raw: Mapping[str, Any]) -> None:
    """The predicted mean of every observation."""
    for key, space in world.spaces.items():
        if is_image(space):
            compare_images(world.recorded, key, raw[key])
        else:
            world.recorded.compare(f"out/dec/{key}", raw[key])


def compare_losses(world: World, ours: Mapping[str, Any], names: Iterable[str]) -> None:
    """`out/like/NAME` of every row and `out/loss/NAME`, for losses that are likelihoods."""
    for name in names:
        rows = ours["losses"][world.losses[name]]
        world.recorded.compare(f"out/like/{name}", -rows)
        world.recorded.compare(f"out/loss/{name}", ours["means"][name])


def compare_preprocessed(recorded: Recorded, key: str, image: Any) -> None:
    """`out/pre/KEY_first`, of an image (B, T, h, w, c) in pixels or prepared already."""
    recorded.compare(f"out/pre/{key}_first", centred(jnp.asarray(image))[0, :1])


def _batch_major(x: Any) -> Any:
    return jnp.swapaxes(x, 0, 1) if jnp.ndim(x) > 1 else x

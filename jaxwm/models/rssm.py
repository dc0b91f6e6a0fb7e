"""The recurrent state-space model: one model for every encoder, core, latent and set of heads.

    tokens_t = encoder(obs_t)
    h_t      = core(h_{t-1}, z_{t-1}, action_t)      action_t led to row t
    z_t      ~ posterior(h_t, tokens_t)              when observing
    z_t      ~ prior(h_t)                            when dreaming
    obs_t, reward_t, continue_t ~ heads(h_t, z_t)

A *filtering* posterior q(z | h, tokens) needs h_t before z_t, so rows are observed one after the
other, in a scan. A *local* posterior q(z | tokens) samples all rows at once, and the core may
compute the whole sequence in parallel. Inside the scan is only what depends on the recurrent
state: the encoder, the shares of actions and tokens in their layers, the prior, the heads and all
random draws are computed for all rows at once.

A latent is the vector [h, z] that heads read, in the order of the paper at hand.

Source: PlaNet (arXiv:1811.04551).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxwm import backend
from jaxwm.models.encoders import concat_entries, reconstruction_loss
from jaxwm.models.imagine import sg
from jaxwm.models.latents import LatentSpace
from jaxwm.types import (
    Action,
    ActionSpace,
    Array,
    Core,
    Key,
    Metrics,
    Net,
    Observed,
    ObsSpace,
    Params,
    PyTree,
    Space,
    Start,
    Step,
    WorldModel,
    as_dict,
)


class Posterior(NamedTuple):
    """The network of q(z | h, tokens).

    Attributes:
      init: `key -> params`.
      embed: `params, tokens (..., F) -> embedded (..., E)`, the tokens' share.
      apply: `params, h (N, D), embedded (N, E) -> raw (N, outputs)`. A local posterior ignores h.
    """

    init: Callable[[Key], Params]
    embed: Callable[[Params, Array], Array]
    apply: Callable[[Params, Array, Array], Array]


class Head(NamedTuple):
    """A prediction from latents, and what it should have predicted.

    Attributes:
      net: `params, latents (..., F) -> raw (..., O)`.
      dist: `raw -> distribution`.
      target: `steps (T, B) -> targets (T, B)`.
    """

    net: Net
    dist: Callable[[Array], Any]
    target: Callable[[Step], Array]


class Parts(NamedTuple):
    """What an RSSM is made of.

    Attributes:
      encoder: `params, obs (N, ...) -> tokens (N, F)`.
      core: the recurrent memory.
      latent: the stochastic state.
      posterior: see `Posterior`.
      prior: `params, h (..., D) -> raw (..., outputs)`.
      decoder: `params, h (N, D), z (N, S) -> {obs key: raw (N, ...)}`.
      observation: `space, raw -> distribution` of one observation key.
      heads: "reward", and "continue" if the model predicts ends.
      order: "hz" if heads read [h, z], "zh" for [z, h].
      filters: whether the posterior reads h.
      stored: whether the replay keeps memories, for sequences to start from. Without them every
        sequence starts like an episode.
    """

    encoder: Net
    core: Core
    latent: LatentSpace
    posterior: Posterior
    prior: Net
    decoder: Net
    observation: Callable[[Space, Array], Any]
    heads: dict[str, Head]
    order: Literal["hz", "zh"] = "hz"
    filters: bool = True
    stored: bool = True


class Carry(NamedTuple):
    """The memory of an RSSM: that of its core, and z as a flat vector (B, S)."""

    core: PyTree
    stoch: Array


@dataclasses.dataclass(frozen=True)
class RSSM:
    """The model of one world; its methods are the functions of `types.WorldModel`."""

    parts: Parts
    obs_space: ObsSpace
    action_space: ActionSpace
    dtype: str = "float32"

    def init(self, key: Key) -> Params:
        parts = self.parts
        nets: dict[str, Any] = {
            "encoder": parts.encoder,
            "core": parts.core,
            "posterior": parts.posterior,
            "prior": parts.prior,
            "decoder": parts.decoder,
            **{name: head.net for name, head in parts.heads.items()},
        }
        keys = jax.random.split(key, len(nets))
        return {name: net.init(k) for (name, net), k in zip(nets.items(), keys, strict=True)}

    def initial(self, batch: int) -> Carry:
        latent = self.parts.latent
        return Carry(self.parts.core.initial(batch), jnp.zeros((batch, latent.size), self.dtype))

    def observe(self, params: Params, carry: Carry, steps: Step, draws: PyTree) -> Observed:
        return self._observe(params, carry, steps, draws)[0]

    def starts(self, params: Params, observed: Observed, key: Key | None = None) -> Start:
        """Every row, if the memory of every row is known; otherwise the last one."""
        del params, key
        if observed.carries is None:
            length, batch = observed.latents.shape[:2]
            index = (length - 1) * batch + jnp.arange(batch)
            return Start(observed.carry, observed.latents[-1], index)
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        latents = flat(observed.latents)
        return Start(jax.tree.map(flat, observed.carries), latents, jnp.arange(len(latents)))

    def step(
        self, params: Params, carry: Carry, action: Action, draws: PyTree
    ) -> tuple[Carry, Array]:
        core = self.parts.core
        embedded = core.embed(params["core"], self._vector(action))
        no = jnp.zeros(carry.stoch.shape[:1], bool)
        memory = core.step(params["core"], carry.core, carry.stoch, embedded, no)
        deter = core.deter(memory)
        stoch = self._sample(self.parts.prior.apply(params["prior"], deter), draws)
        return Carry(memory, stoch), self._join(deter, stoch)

    def predict(
        self, params: Params, latents: Array, keys: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        parts, lead = self.parts, latents.shape[:-1]
        wanted = (*self.obs_space, *parts.heads) if keys is None else keys
        outputs: dict[str, Any] = {}
        if any(key in self.obs_space for key in wanted):
            deter, stoch = (x.reshape(-1, x.shape[-1]) for x in self._split(latents))
            raw = parts.decoder.apply(params["decoder"], deter, stoch)
            for key, space in self.obs_space.items():
                whole = raw[key].reshape(*lead, *raw[key].shape[1:])
                outputs[key] = parts.observation(space, whole)
        for key, head in parts.heads.items():
            if key in wanted:
                outputs[key] = head.dist(head.net.apply(params[key], latents))
        return {key: outputs[key] for key in wanted if key in outputs}

    def loss(
        self, params: Params, carry: Carry, steps: Step, draws: PyTree
    ) -> tuple[dict[str, Array], Observed, Metrics]:
        parts, latent = self.parts, self.parts.latent
        observed, post = self._observe(params, carry, steps, draws)
        prior = parts.prior.apply(params["prior"], self._split(observed.latents)[0])
        outputs = self.predict(params, observed.latents)
        losses = dict(latent.kl(post, prior))
        for key, head in parts.heads.items():
            losses[key] = -outputs[key].log_prob(head.target(steps))
        for key, space in self.obs_space.items():
            losses[f"rec/{key}"] = reconstruction_loss(space, outputs[key], steps.obs[key])
        metrics = {
            "latent/post_entropy": latent.entropy(sg(post)).mean(),
            "latent/prior_entropy": latent.entropy(sg(prior)).mean(),
        }
        return losses, observed, metrics

    def pack(self, carry: Carry) -> PyTree:
        stored = Carry(carry.core, self.parts.latent.pack(carry.stoch))
        return stored if self.parts.stored else ()

    def unpack(self, memo: PyTree, batch: int) -> Carry:
        if not self.parts.stored:
            return self.initial(batch)
        return Carry(memo.core, self.parts.latent.unpack(memo.stoch).astype(self.dtype))

    def _observe(
        self, params: Params, carry: Carry, steps: Step, draws: PyTree
    ) -> tuple[Observed, Array]:
        """Filters rows; gives the posterior of each too."""
        observe = self._row_by_row if self.parts.filters else self._all_at_once
        return observe(params, carry, self._embed(params, steps), steps.is_first, draws)

    def _embed(self, params: Params, steps: Step) -> tuple[Array, Array]:
        """The shares of actions and tokens. The action before an episode counts as none."""
        parts, lead = self.parts, steps.is_first.shape
        obs = {name: steps.obs[name].reshape(-1, *x.shape) for name, x in self.obs_space.items()}
        tokens = parts.encoder.apply(params["encoder"], obs).reshape(*lead, -1)
        action = jnp.where(steps.is_first[..., None], 0.0, self._vector(steps.action))
        return (
            parts.core.embed(params["core"], action),
            parts.posterior.embed(params["posterior"], tokens),
        )

    def _row_by_row(
        self, params: Params, carry: Carry, embedded: tuple, is_first: Array, draws: PyTree
    ) -> tuple[Observed, Array]:
        """A scan, because the posterior reads h."""
        core, posterior = self.parts.core, self.parts.posterior

        def step(params: Params, carry: Carry, row: Any) -> tuple[Carry, tuple[Carry, Array]]:
            (action, tokens), is_first, draws = row
            stoch = jnp.where(is_first[:, None], 0, carry.stoch)
            memory = core.step(params["core"], carry.core, stoch, action, is_first)
            raw = posterior.apply(params["posterior"], core.deter(memory), tokens)
            carry = Carry(memory, self._sample(raw, draws))
            return carry, (carry, raw)

        inside = {name: params[name] for name in ("core", "posterior")}
        rows = embedded, is_first, draws
        carry, (carries, post) = backend.scan(step, inside, carry, rows)
        latents = self._join(core.deter(carries.core), carries.stoch)
        return Observed(carry, latents, carries), post

    def _all_at_once(
        self, params: Params, carry: Carry, embedded: tuple, is_first: Array, draws: PyTree
    ) -> tuple[Observed, Array]:
        """The whole sequence in parallel, because the posterior reads only the row itself."""
        action, tokens = embedded
        post = self.parts.posterior.apply(params["posterior"], tokens, tokens)
        stoch = self._sample(post, draws)
        before = jnp.concatenate([carry.stoch[None], stoch[:-1]])
        before = jnp.where(is_first[..., None], 0, before)
        memory, deter, memories = self.parts.core.sequence(
            params["core"], carry.core, before, action, is_first
        )
        carries = None if memories is None else Carry(memories, stoch)
        return Observed(Carry(memory, stoch[-1]), self._join(deter, stoch), carries), post

    def _vector(self, action: Action) -> Array:
        return concat_entries(as_dict(self.action_space), as_dict(action))

    def _sample(self, raw: Array, draws: PyTree) -> Array:
        return self.parts.latent.sample(raw, draws).astype(self.dtype)

    def _join(self, deter: Array, stoch: Array) -> Array:
        return jnp.concatenate([deter, stoch] if self.parts.order == "hz" else [stoch, deter], -1)

    def _split(self, latents: Array) -> tuple[Array, Array]:
        """h and z."""
        size = self.parts.latent.size
        if self.parts.order == "hz":
            return latents[..., :-size], latents[..., -size:]
        return latents[..., size:], latents[..., :size]


def rssm(
    parts: Parts, obs_space: ObsSpace, action_space: ActionSpace, dtype: str = "float32"
) -> WorldModel:
    """The model of one world as pure functions; see `types.WorldModel`.

    Its losses are those of the latent's KL, one for each head, and "rec/KEY" for every observation
    key.

    Args:
      parts: the networks.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      dtype: compute type of latents.
    """
    model = RSSM(parts, obs_space, action_space, dtype)
    return WorldModel(
        init=model.init,
        initial=model.initial,
        draws=parts.latent.draws,
        observe=model.observe,
        starts=model.starts,
        step=model.step,
        features=lambda latents: latents,
        predict=model.predict,
        loss=model.loss,
        pack=model.pack,
        unpack=model.unpack,
    )

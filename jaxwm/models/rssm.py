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


def rssm(
    parts: Parts, obs_space: ObsSpace, action_space: ActionSpace, dtype: str = "float32"
) -> WorldModel:
    """The model of one world; see `types.WorldModel` for the functions' signatures.

    Its losses are "rec/KEY" for every observation key, one for each head, and those of the latent's
    KL.

    Args:
      parts: the networks.
      obs_space: space of each observation key.
      action_space: one space, or a space per key.
      dtype: compute type of latents.
    """
    core, latent, posterior, prior = parts.core, parts.latent, parts.posterior, parts.prior
    nets = {"encoder": parts.encoder, "core": core, "posterior": posterior, "prior": prior}
    nets |= {"decoder": parts.decoder, **{name: head.net for name, head in parts.heads.items()}}

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(nets))
        return {name: net.init(k) for (name, net), k in zip(nets.items(), keys, strict=True)}

    def initial(batch: int) -> Carry:
        return Carry(core.initial(batch), jnp.zeros((batch, latent.size), dtype))

    def join(deter: Array, stoch: Array) -> Array:
        return jnp.concatenate([deter, stoch] if parts.order == "hz" else [stoch, deter], -1)

    def split(latents: Array) -> tuple[Array, Array]:
        if parts.order == "hz":
            return latents[..., : -latent.size], latents[..., -latent.size :]
        return latents[..., latent.size :], latents[..., : latent.size]

    def vector(action: Action) -> Array:
        return concat_entries(as_dict(action_space), as_dict(action))

    def sample(raw: Array, draws: PyTree) -> Array:
        return latent.sample(raw, draws).astype(dtype)

    def embed(params: Params, steps: Step) -> tuple[Array, Array]:
        """The shares of actions and tokens; the action before an episode counts as none."""
        lead = steps.is_first.shape
        obs = {name: steps.obs[name].reshape(-1, *x.shape) for name, x in obs_space.items()}
        tokens = parts.encoder.apply(params["encoder"], obs).reshape(*lead, -1)
        action = jnp.where(steps.is_first[..., None], 0.0, vector(steps.action))
        return core.embed(params["core"], action), posterior.embed(params["posterior"], tokens)

    def filtered(
        params: Params, carry: Carry, steps: Step, draws: PyTree
    ) -> tuple[Observed, Array]:
        """Row by row, because the posterior reads h."""

        def step(params: Params, carry: Carry, row: Any) -> tuple[Carry, tuple[Carry, Array]]:
            (embedded, tokens), is_first, draws = row
            stoch = jnp.where(is_first[:, None], 0, carry.stoch)
            memory = core.step(params["core"], carry.core, stoch, embedded, is_first)
            raw = posterior.apply(params["posterior"], core.deter(memory), tokens)
            carry = Carry(memory, sample(raw, draws))
            return carry, (carry, raw)

        inside = {name: params[name] for name in ("core", "posterior")}
        rows = embed(params, steps), steps.is_first, draws
        carry, (carries, post) = backend.scan(step, inside, carry, rows)
        return Observed(carry, join(core.deter(carries.core), carries.stoch), carries), post

    def local(params: Params, carry: Carry, steps: Step, draws: PyTree) -> tuple[Observed, Array]:
        """All rows at once, because the posterior reads only the row itself."""
        embedded, tokens = embed(params, steps)
        post = posterior.apply(params["posterior"], tokens, tokens)
        stoch = sample(post, draws)
        before = jnp.concatenate([carry.stoch[None], stoch[:-1]])
        before = jnp.where(steps.is_first[..., None], 0, before)
        memory, deter, memories = core.sequence(
            params["core"], carry.core, before, embedded, steps.is_first
        )
        carries = None if memories is None else Carry(memories, stoch)
        return Observed(Carry(memory, stoch[-1]), join(deter, stoch), carries), post

    filter_rows = filtered if parts.filters else local

    def observe(params: Params, carry: Carry, steps: Step, draws: PyTree) -> Observed:
        return filter_rows(params, carry, steps, draws)[0]

    def starts(params: Params, observed: Observed, key: Key | None = None) -> Start:
        """Every row, if the memory of every row is known; otherwise the last one."""
        if observed.carries is None:
            index = jnp.arange(observed.latents.shape[1]) + observed.latents[:-1, :, 0].size
            return Start(observed.carry, observed.latents[-1], index)
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        latents = flat(observed.latents)
        return Start(jax.tree.map(flat, observed.carries), latents, jnp.arange(len(latents)))

    def step(params: Params, carry: Carry, action: Action, draws: PyTree) -> tuple[Carry, Array]:
        embedded = core.embed(params["core"], vector(action))
        no = jnp.zeros(carry.stoch.shape[:1], bool)
        memory = core.step(params["core"], carry.core, carry.stoch, embedded, no)
        deter = core.deter(memory)
        stoch = sample(prior.apply(params["prior"], deter), draws)
        return Carry(memory, stoch), join(deter, stoch)

    def predict(
        params: Params, latents: Array, keys: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        lead, wanted = latents.shape[:-1], (*obs_space, *parts.heads) if keys is None else keys
        outputs: dict[str, Any] = {}
        if any(key in obs_space for key in wanted):
            deter, stoch = (x.reshape(-1, x.shape[-1]) for x in split(latents))
            raw = parts.decoder.apply(params["decoder"], deter, stoch)
            for key in obs_space:
                whole = raw[key].reshape(*lead, *raw[key].shape[1:])
                outputs[key] = parts.observation(obs_space[key], whole)
        for key, head in parts.heads.items():
            if key in wanted:
                outputs[key] = head.dist(head.net.apply(params[key], latents))
        return {key: outputs[key] for key in wanted if key in outputs}

    def loss(
        params: Params, carry: Carry, steps: Step, draws: PyTree
    ) -> tuple[dict[str, Array], Observed, Metrics]:
        observed, post = filter_rows(params, carry, steps, draws)
        predicted = prior.apply(params["prior"], split(observed.latents)[0])
        outputs = predict(params, observed.latents)
        losses = dict(latent.kl(post, predicted))
        for key, head in parts.heads.items():
            losses[key] = -outputs[key].log_prob(head.target(steps))
        for key, space in obs_space.items():
            losses[f"rec/{key}"] = reconstruction_loss(space, outputs[key], steps.obs[key])
        metrics = {
            "latent/post_entropy": latent.entropy(sg(post)).mean(),
            "latent/prior_entropy": latent.entropy(sg(predicted)).mean(),
        }
        return losses, observed, metrics

    def pack(carry: Carry) -> PyTree:
        return Carry(carry.core, latent.pack(carry.stoch)) if parts.stored else ()

    def unpack(memo: PyTree, batch: int) -> Carry:
        if not parts.stored:
            return initial(batch)
        return Carry(memo.core, latent.unpack(memo.stoch).astype(dtype))

    return WorldModel(
        init=init,
        initial=initial,
        draws=latent.draws,
        observe=observe,
        starts=starts,
        step=step,
        features=lambda latents: latents,
        predict=predict,
        loss=loss,
        pack=pack,
        unpack=unpack,
    )

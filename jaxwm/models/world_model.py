"""The recurrent state-space model: encoder, core, latent and heads as one `WorldModel`.

    tokens_t  = encoder(obs_t)
    h_t       = core(h_{t-1}, z_{t-1}, action_t)      action_t led to row t
    z_t       ~ posterior(h_t, tokens_t)              observe
    z_t       ~ prior(h_t)                            imagine
    obs, reward, continue ~ heads(h_t, z_t)

Only what depends on the recurrent carry is inside the scans; the encoder, the action's and the
tokens' projections, the prior, all heads, all random draws and the gradients of the kernels are
computed for every step at once.

Source: PlaNet (arXiv:1811.04551) for the model, DreamerV3 (arXiv:2301.04104) for its form.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxwm import dists, products
from jaxwm import nets_before as nets
from jaxwm.config import at_least, require
from jaxwm.models import latents as lt
from jaxwm.models.encoders import (
    CodecConfig,
    Decoder,
    Encoder,
    concat_entries,
    concat_size,
    observation_dist,
    reconstruction_loss,
)
from jaxwm.models.gru import BlockGRU, BlockGRUConfig
from jaxwm.numerics import symexp_bins
from jaxwm.types import (
    Array,
    Discrete,
    Key,
    Latent,
    Metrics,
    ObsSpace,
    Params,
    Space,
    Step,
    WorldModel,
    as_dict,
    zeros,
)

sg = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of the world model.

    Args:
      core: the recurrent core.
      latent: the stochastic latent.
      codec: encoder and decoder.
      units: width of the reward and continue heads (one layer each).
      bins: bins of the two-hot reward head.
      horizon: discount horizon in steps; the continue head learns (1 - 1/horizon) * continue.
      recompute: whether a gradient computes encoder and decoder again, some of the rows at a time,
        and keeps nothing in between: images then take two fifths (size1m) to a quarter (size12m) of
        the memory, and on a CPU 1.1 to 1.2 times the time.
      dtype: compute type; parameters are float32.
    """

    core: BlockGRUConfig = BlockGRUConfig()
    latent: lt.LatentConfig = lt.LatentConfig()
    codec: CodecConfig = CodecConfig()
    units: int = 1024
    bins: int = 255
    horizon: int = 333
    recompute: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        at_least(self, 1, "units", "horizon")
        at_least(self, 3, "bins")
        require(
            self.core.deter % self.codec.blocks == 0,
            f"CodecConfig.blocks is {self.codec.blocks}; it must divide the deterministic state "
            f"of {self.core.deter}.",
        )


class Posterior(nn.Module):
    """Logits of q(z | h, tokens), with the tokens' product split off."""

    config: WorldModelConfig
    token_size: int

    def setup(self):
        latent, core, dtype = self.config.latent, self.config.core, self.config.dtype
        self.hidden = nets.Linear(core.deter + self.token_size, core.hidden, dtype=dtype)
        self.norm = nets.RMSNorm(core.hidden, axis=0)
        self.logits = nets.Linear(core.hidden, latent.stoch * latent.classes, dtype=dtype)

    def kernels(self) -> tuple[products.Kernel, products.Kernel]:
        """What `step` multiplies with, laid out once for all steps."""
        core = self.config.core
        return self.hidden.laid_out(core.deter), self.logits.laid_out(core.hidden)

    def token_input(self, tokens: Array) -> Array:
        """The tokens' share of the hidden layer: (..., N, F) to (..., hidden, N)."""
        tokens = self.hidden.add_bias(self.hidden.rows(tokens, self.config.core.deter))
        return jnp.swapaxes(tokens, -1, -2)

    def step(
        self, kernels: tuple[products.Kernel, products.Kernel], deter: Array, token_input: Array
    ) -> Array:
        """Logits (N, S, K) from deter (D, N) and the precomputed `token_input`."""
        hidden, logits = kernels
        x = nets.silu(self.norm(products.columns(hidden, deter) + token_input))
        x = self.logits.add_bias(products.columns(logits, x), axis=0)
        return x.T.reshape(-1, self.config.latent.stoch, self.config.latent.classes)

    def __call__(self, deter: Array, tokens: Array) -> Array:
        """Logits with the batch first, from (N, D) and (N, F)."""
        return self.step(self.kernels(), deter.T, self.token_input(tokens))


class Prior(nn.Module):
    """Logits of p(z | h)."""

    config: WorldModelConfig

    @nn.compact
    def __call__(self, deter: Array, features_first: bool = False) -> Array:
        """Of deter (..., D), or of (D, N) if `features_first`."""
        latent, core, dtype = self.config.latent, self.config.core, self.config.dtype
        x = nets.MLP(core.deter, core.hidden, 2, dtype, name="mlp")(deter, features_first)
        size = latent.stoch * latent.classes
        x = nets.Linear(core.hidden, size, dtype=dtype, name="logits")(x)
        return x.reshape(*x.shape[:-1], latent.stoch, latent.classes)


def world_model(
    config: WorldModelConfig, obs_space: ObsSpace, action_space: dict[str, Space]
) -> WorldModel:
    """The model of one world as pure functions; see `types.WorldModel` for their signatures.

    Args:
      config: sizes.
      obs_space: space of each observation key.
      action_space: space of each action key.

    Raises:
      JaxwmError: if images cannot be halved to 3..16 pixels or differ in size, or the decoder's
        blocks do not divide the channels of their last stage.
    """
    dtype, latent = config.dtype, config.latent
    stoch_size = latent.stoch * latent.classes
    feature_size = config.core.deter + stoch_size
    action_size = concat_size(action_space)
    bins = symexp_bins(config.bins)

    encoder = Encoder(obs_space, config.codec, dtype)
    decoder = Decoder(obs_space, config.codec, dtype)
    one_hot = _single_choice(action_space) and action_size <= config.core.hidden
    core = BlockGRU(config.core, stoch_size, action_size, dtype, one_hot)
    prior = Prior(config)
    reward = nets.Heads(feature_size, config.units, 1, {"out": config.bins}, 0.0, dtype)
    cont = nets.Heads(feature_size, config.units, 1, {"out": 1}, 1.0, dtype)
    sample_obs = zeros(obs_space, (1,))
    tokens = jax.eval_shape(encoder.init_with_output, jax.random.key(0), sample_obs)[0]
    token_size = tokens.shape[-1]
    posterior = Posterior(config, token_size)

    encode, decode = nets.call(encoder), nets.call(decoder)
    if config.recompute:
        encode, decode = nets.recomputed(encode), nets.recomputed(decode)
    action_input = nets.call(core, "action_input")
    core_step, core_dream = nets.call(core, "step"), nets.call(core, "dream")
    core_kernels, posterior_kernels = nets.call(core, "kernels"), nets.call(posterior, "kernels")
    dream_kernels = nets.call(core, "dream_kernels")
    token_input = nets.call(posterior, "token_input")
    posterior_logits = nets.call(posterior, "step")
    prior_logits = nets.call(prior)

    def init(key: Key) -> Params:
        deter, stoch = jnp.zeros((1, config.core.deter)), jnp.zeros((1, stoch_size))
        inputs = {
            "encoder": (encoder, sample_obs),
            "core": (core, deter, stoch, jnp.zeros((1, action_size))),
            "posterior": (posterior, deter, jnp.zeros((1, token_size))),
            "prior": (prior, deter),
            "decoder": (decoder, deter, stoch),
            "reward": (reward, jnp.zeros((1, feature_size))),
            "continue": (cont, jnp.zeros((1, feature_size))),
        }
        keys = jax.random.split(key, len(inputs))
        return {
            name: module.init(keys[i], *args)["params"]
            for i, (name, (module, *args)) in enumerate(inputs.items())
        }

    def initial(batch: int) -> Latent:
        return Latent(
            jnp.zeros((batch, config.core.deter), dtype),
            jnp.zeros((batch, latent.stoch, latent.classes), dtype),
        )

    def split(feat: Array) -> Latent:
        deter, stoch = jnp.split(feat, [config.core.deter], -1)
        return Latent(deter, stoch.reshape(*feat.shape[:-1], latent.stoch, latent.classes))

    def noise(key: Key, lead: tuple[int, ...]) -> Array:
        return lt.noise(latent, key, lead)

    def sample(logits: Array, noise: Array) -> Array:
        return lt.sample(latent, logits, noise).astype(dtype)

    def observe(params: Params, carry: Latent, steps: Step, noise: Array) -> tuple[Latent, Array]:
        lead = steps.is_first.shape
        flat_obs = {k: steps.obs[k].reshape(-1, *s.shape) for k, s in obs_space.items()}
        tokens = encode(params["encoder"], flat_obs)
        action = concat_entries(action_space, as_dict(steps.action))
        inputs = (
            action_input(params["core"], jnp.where(steps.is_first[..., None], 0.0, action)),
            token_input(params["posterior"], tokens.reshape(*lead, -1)),
            ~steps.is_first,
            noise,
        )
        kernels = core_kernels(params["core"]), posterior_kernels(params["posterior"])

        def step(carry: Latent, inputs: Any) -> tuple[Latent, tuple[Latent, Array]]:
            (action, token, keep, draws), sinks = inputs
            to_core, to_posterior = products.with_sinks(kernels, sinks)
            deter = jnp.where(keep[None], carry.deter, 0)
            stoch = jnp.where(keep[:, None], _flat(carry.stoch), 0)
            deter = core_step(params["core"], to_core, deter, stoch, action)
            logits = posterior_logits(params["posterior"], to_posterior, deter, token)
            carry = Latent(deter, sample(logits, draws))
            return carry, (carry, logits)

        inputs = inputs, products.sinks(kernels, *lead)
        _, (latents, logits) = jax.lax.scan(nets.keep_products(step), _swap(carry), inputs)
        return _swap(latents), logits

    def imagine(
        params: Params, start: Latent, policy: Callable, noise: Array, policy_noise: Any
    ) -> tuple[Latent, Any, Any]:
        kernels, base = dream_kernels(params["core"])
        rows = start.deter.shape[0]
        spare = nets.spare_columns(rows)

        def widen(x: Array) -> Array:
            return jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1)))

        def step(carry: Latent, inputs: Any) -> tuple[Latent, tuple[Array, Any, Any]]:
            draws, policy_draw = inputs
            latent = Latent(carry.deter[:, :rows].T, carry.stoch)
            # Rounded before they are joined, which then moves half as much.
            action, kept = policy(features(jax.tree.map(products.rounded, latent)), policy_draw)
            read = _flat(carry.stoch), concat_entries(action_space, as_dict(action))
            deter = core_dream(params["core"], kernels, base, carry.deter, *map(widen, read))
            logits = prior_logits(params["prior"], deter, True)[:rows]
            return Latent(deter, sample(logits, draws)), (features(latent), action, kept)

        begin = Latent(widen(start.deter).T, start.stoch)
        last, (feats, actions, kept) = jax.lax.scan(step, begin, (noise, policy_noise))
        last = Latent(last.deter[:, :rows].T, last.stoch)
        # Stacked as features, which is how heads read them: the compiler sees that `features`
        # of the two slices is the array it has, and copies nothing.
        return split(jnp.concatenate([feats, features(last)[None]])), actions, kept

    def predict(
        params: Params, latents: Latent, keys: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        lead = latents.deter.shape[:-1]
        wanted = (*obs_space, "reward", "continue") if keys is None else keys
        outputs: dict[str, Any] = {}
        if any(key in obs_space for key in wanted):
            deter = latents.deter.reshape(-1, config.core.deter)
            raw = decode(params["decoder"], deter, _flat(latents.stoch).reshape(-1, stoch_size))
            for key, space in ((key, obs_space[key]) for key in obs_space if key in wanted):
                outputs[key] = observation_dist(space, raw[key].reshape(*lead, *raw[key].shape[1:]))
        heads = {
            key: head for key, head in (("reward", reward), ("continue", cont)) if key in wanted
        }
        read = nets.abreast(heads)(params, features(latents))[0] if heads else {}
        if "reward" in read:
            outputs["reward"] = dists.TwoHot(read["reward"]["out"], bins)
        if "continue" in read:
            outputs["continue"] = dists.SoftBernoulli(read["continue"]["out"][..., 0])
        return outputs

    def loss(
        params: Params, carry: Latent, steps: Step, noise: Array
    ) -> tuple[dict[str, Array], Latent, Metrics]:
        latents, post = observe(params, carry, steps, noise)
        prior = prior_logits(params["prior"], latents.deter)
        dyn, rep = lt.kl_losses(latent, post, prior)
        outputs = predict(params, latents)
        alive = (1.0 - steps.is_terminal) * (1.0 - 1.0 / config.horizon)
        losses = {
            "dyn": dyn,
            "rep": rep,
            "reward": -outputs["reward"].log_prob(steps.reward),
            "continue": -outputs["continue"].log_prob(alive),
        }
        for key, space in obs_space.items():
            losses[f"rec/{key}"] = reconstruction_loss(space, outputs[key], steps.obs[key])
        metrics = {
            "latent/post_entropy": lt.distribution(latent, sg(post)).entropy().mean(),
            "latent/prior_entropy": lt.distribution(latent, sg(prior)).entropy().mean(),
        }
        return losses, latents, metrics

    return WorldModel(init, initial, noise, observe, imagine, predict, loss, features, split)


def features(latent: Latent) -> Array:
    """What heads read: deter and the flattened stoch, (..., D + S * K)."""
    return jnp.concatenate([latent.deter, _flat(latent.stoch)], -1)


def _single_choice(action_space: dict[str, Space]) -> bool:
    """Whether an action is one choice, and nothing else."""
    spaces = list(action_space.values())
    return len(spaces) == 1 and isinstance(spaces[0], Discrete) and spaces[0].shape == ()


def _swap(latent: Latent) -> Latent:
    """Batch first to features first, or back: the core wants its state as (D, N)."""
    return latent._replace(deter=jnp.swapaxes(latent.deter, -1, -2))


def _flat(stoch: Array) -> Array:
    return stoch.reshape(*stoch.shape[:-2], -1)

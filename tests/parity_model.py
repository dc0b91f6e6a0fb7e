"""Recorded arrays of the reference implementation, recomputed: model, dream, losses, gradients.

`recompute(arrays)` takes a file of the layout of tests/data/vector.npz (any sizes, any mix of
observations and actions), loads its parameters, injects its noise and returns every output
under the recorded name and in the recorded layout: batch before time, dreams as rows
n = b * T + t.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm import dists
from jaxwm.agent import Draws, weighted_sum
from jaxwm.behaviors import actor_critic
from jaxwm.behaviors.actor_critic import ActorCriticConfig, State, dream_targets
from jaxwm.models import rssm
from jaxwm.models.encoders import CodecConfig, Encoder, concat_entries, concat_size, decoder
from jaxwm.models.gru import BlockGRUConfig
from jaxwm.models.heads import Style, head, posterior
from jaxwm.models.imagine import dreamer
from jaxwm.models.latents import LatentConfig
from jaxwm.numerics import Percentiles, symlog
from jaxwm.optim import SlowState
from jaxwm.recipes import dreamer_v3
from jaxwm.replay.device import Buffer, read
from jaxwm.returns import replay_lambda_return
from jaxwm.types import Agent, Box, Discrete, Space, Start, Step, as_dict, is_image

FLAGS = ("reward", "is_first", "is_last", "is_terminal")

# Reference parameter name -> path in our tree, first match wins.
NAMES = (
    (r"enc/mlp(\d+)norm/", r"model/encoder/mlp/norm\1/"),
    (r"enc/mlp(\d+)/", r"model/encoder/mlp/linear\1/"),
    (r"enc/cnn(\d+)norm/", r"model/encoder/conv_norm\1/"),
    (r"enc/cnn(\d+)/", r"model/encoder/conv\1/"),
    (r"dyn/dynin0(norm)?/", r"model/core/in_deter\1/"),
    (r"dyn/dynin1(norm)?/", r"model/core/in_stoch\1/"),
    (r"dyn/dynin2(norm)?/", r"model/core/in_action\1/"),
    (r"dyn/dynhid0(norm)?/", r"model/core/hidden\1/"),
    (r"dyn/dyngru/", r"model/core/gates/"),
    (r"dyn/obs0norm/", r"model/posterior/norm/"),
    (r"dyn/obs0/", r"model/posterior/hidden/"),
    (r"dyn/obslogit/", r"model/posterior/logits/"),
    (r"dyn/prior(\d+)norm/", r"model/prior/mlp/norm\1/"),
    (r"dyn/prior(\d+)/", r"model/prior/mlp/linear\1/"),
    (r"dyn/priorlogit/", r"model/prior/logits/"),
    (r"dec/vec/(.+)/(pred|logits)/", r"model/decoder/out_\1/"),
    (r"dec/sp0/", r"model/decoder/space_deter/"),
    (r"dec/sp1(norm)?/", r"model/decoder/space_stoch\1/"),
    (r"dec/sp2/", r"model/decoder/space_hidden/"),
    (r"dec/spnorm/", r"model/decoder/space_norm/"),
    (r"dec/conv(\d+)norm/", r"model/decoder/conv_norm\1/"),
    (r"dec/imgout/", r"model/decoder/image_out/"),
    (r"dec/", r"model/decoder/"),
    (r"rew/head/logits/", r"model/reward/out/"),
    (r"rew/", r"model/reward/"),
    (r"con/head/logit/", r"model/continue/out/"),
    (r"con/", r"model/continue/"),
    (r"pol/head/(.+)/mean/", r"behavior/policy/\1_mean/"),
    (r"pol/head/(.+)/stddev/", r"behavior/policy/\1_std/"),
    (r"pol/head/(.+)/logits/", r"behavior/policy/\1/"),
    (r"pol/", r"behavior/policy/"),
    (r"val/head/logits/", r"behavior/value/out/"),
    (r"val/", r"behavior/value/"),
    (r"slowval/head/logits/", r"slow/out/"),
    (r"slowval/", r"slow/"),
)


def our_path(name: str) -> tuple[str, ...]:
    """Path in our parameter tree of the reference's parameter `name`."""
    for pattern, replacement in NAMES:
        if re.match(pattern, name):
            path = re.sub(pattern, replacement, name, count=1)
            return tuple(re.sub(r"([a-z])norm/", r"\1_norm/", path).split("/"))
    raise KeyError(f"the reference's parameter {name} has no place in our tree")


def pick(tree: Any, name: str) -> np.ndarray:
    """The leaf of our {"model", "behavior", "slow"} tree for the reference's `name`."""
    for key in our_path(name):
        tree = tree[key]
    return np.asarray(tree)


def load_params(arrays: Mapping[str, np.ndarray], prefix: str = "params/") -> dict[str, Any]:
    """Our tree {"model", "behavior", "slow"} from the arrays under `prefix`."""
    tree: dict[str, Any] = {}
    for key in arrays:
        if key.startswith(prefix):
            *path, leaf = our_path(key.removeprefix(prefix))
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = jnp.asarray(arrays[key])
    return tree


def spaces(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Space], dict[str, Space]]:
    """Observation and action spaces, read off the shapes."""
    obs: dict[str, Space] = {}
    for key in _names(arrays, "in/obs/"):
        value = arrays[f"in/obs/{key}"]
        shape = value.shape[2:]
        if key in FLAGS:
            continue
        head = f"params/dec/vec/{key}/logits/bias"
        if head in arrays:
            obs[key] = Discrete(arrays[head].size // max(1, int(np.prod(shape))), shape)
        else:
            obs[key] = Box(shape, str(value.dtype))
    actions: dict[str, Space] = {}
    for key in _names(arrays, "in/prevact/"):
        shape = arrays[f"in/prevact/{key}"].shape[2:]
        head = f"params/pol/head/{key}/logits/bias"
        if head in arrays:
            actions[key] = Discrete(arrays[head].size // max(1, int(np.prod(shape))), shape)
        else:
            actions[key] = Box(shape, low=-1.0, high=1.0)
    return obs, actions


def agent_config(arrays: Mapping[str, np.ndarray]) -> dreamer_v3.Config:
    """Sizes of the recorded agent, read off the shapes."""
    count = lambda pattern: sum(bool(re.fullmatch(pattern, key)) for key in arrays)  # noqa: E731
    blocks, slice_size, _ = arrays["params/dyn/dyngru/kernel"].shape
    stoch, classes = arrays["in/carry/stoch"].shape[-2:]
    layers = count(r"params/enc/mlp\d+/kernel") or 3
    cnn0 = arrays.get("params/enc/cnn0/kernel")
    units = arrays["params/rew/mlp/norm0/scale"].size
    bins = arrays["params/rew/head/logits/bias"].size
    core = BlockGRUConfig(blocks * slice_size, arrays["params/dyn/obs0/bias"].size, blocks)
    codec = CodecConfig(units, layers, depth=4 if cnn0 is None else cnn0.shape[-1] // 2)
    model = dreamer_v3.ModelConfig(core, LatentConfig(stoch, classes), codec, units, bins)
    behavior = ActorCriticConfig(
        units,
        layers=count(r"params/pol/mlp/linear\d+/kernel"),
        bins=arrays["params/val/head/logits/bias"].size,
        imagine=arrays["noise/prior"].shape[1],
        unimix=0.0,
    )
    return dreamer_v3.Config(model, behavior, dtype="float32")


class Case:
    """One recorded batch with its agent, all in our layout."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        self.obs_space, self.action_space = spaces(arrays)
        self.config = agent_config(arrays)
        self.agent: Agent = dreamer_v3.agent(self.config, self.obs_space, self.action_space)
        tree = load_params(arrays)
        self.params = {"model": tree["model"], "behavior": tree["behavior"]}
        self.slow = tree["slow"]
        self.returns = Percentiles(
            jnp.asarray(arrays["state/retnorm_lo"]), jnp.asarray(arrays["state/retnorm_hi"])
        )
        self.state = State(self.returns, SlowState(self.slow, jnp.zeros((), jnp.int32)))
        self.batch, self.time = arrays["in/obs/is_first"].shape
        stoch = jnp.asarray(arrays["in/carry/stoch"])
        self.carry = rssm.Carry(
            jnp.asarray(arrays["in/carry/deter"]), stoch.reshape(self.batch, -1)
        )
        self.deter, self.groups = arrays["in/carry/deter"].shape[-1], stoch.shape[1:]
        self.steps = Step(
            action={k: self.time_major(f"in/prevact/{k}") for k in self.action_space},
            obs={k: self.observation(k) for k in self.obs_space},
            **{k: self.time_major(f"in/obs/{k}") for k in FLAGS},
        )
        dreams = actor_critic.Draws(self.dream_major("noise/prior"), self.action_noise())
        self.draws = Draws(self.time_major("noise/post"), dreams)
        # Actions are recorded at the last dreamed state too, where nothing learns from them.
        short = dreams._replace(action={k: v[:-1] for k, v in dreams.action.items()})
        self.trained = self.draws._replace(behavior=short)
        features = self.deter + stoch[0].size
        self.policy = actor_critic.policy(self.config.behavior, self.action_space, features)
        self.critic = actor_critic.critic(self.config.behavior, features)

    def split(self, latents: Any) -> tuple[Any, Any]:
        """h and z, the latter as (..., S, K)."""
        deter, stoch = jnp.split(latents, [self.deter], -1)
        return deter, self.grouped(stoch)

    def grouped(self, flat: Any) -> Any:
        return flat.reshape(*flat.shape[:-1], *self.groups)

    def prior(self, deter: Any) -> Any:
        """Logits (..., S, K) of p(z | h)."""
        model = self.config.model
        net = head(
            self.deter, model.core.hidden, 2, int(np.prod(self.groups)), Style(), name="logits"
        )
        return self.grouped(net.apply(self.params["model"]["prior"], deter))

    def posterior(self, deter: Any, tokens: Any) -> Any:
        """Logits (..., S, K) of q(z | h, tokens)."""
        sizes = self.config.model.core.hidden, int(np.prod(self.groups))
        net = posterior(self.deter, tokens.shape[-1], *sizes, Style())
        params = self.params["model"]["posterior"]
        return self.grouped(net.apply(params, deter, net.embed(params, tokens)))

    def act(self, feat: Any, draws: Any) -> Any:
        """Sampled actions, a dict."""
        plan = self.policy.apply(self.params["behavior"]["policy"], feat)
        return {name: dist.sample_noise(draws[name]) for name, dist in plan.items()}

    def losses(self, params: Any) -> tuple[dict[str, Any], Any]:
        """Every loss, and the behaviour's state afterwards."""
        model, behavior = self.agent.model, self.agent.behavior
        losses, observed, _ = model.loss(
            params["model"], self.carry, self.steps, self.trained.model
        )
        more, state, _ = behavior.loss(
            params["behavior"],
            self.state,
            dreamer(model, params["model"]),
            observed,
            self.steps,
            self.trained.behavior,
        )
        return losses | more, state

    def time_major(self, name: str) -> jax.Array:
        return jnp.asarray(np.swapaxes(self.arrays[name], 0, 1))

    def observation(self, key: str) -> jax.Array:
        value = self.time_major(f"in/obs/{key}")
        return value.astype(jnp.int32) if isinstance(self.obs_space[key], Discrete) else value

    def dream_major(self, name: str) -> jax.Array:
        """(b * T + t, H, ...) to (H, t * B + b, ...)."""
        x = self.arrays[name]
        x = x.reshape(self.batch, self.time, *x.shape[1:])
        x = np.moveaxis(x, 2, 0)  # H, B, T
        x = np.swapaxes(x, 1, 2)
        return jnp.asarray(x.reshape(x.shape[0], self.batch * self.time, *x.shape[3:]))

    def dream_back(self, x: jax.Array) -> np.ndarray:
        """(H, t * B + b, ...) to (b * T + t, H, ...)."""
        array = np.asarray(x)
        array = array.reshape(array.shape[0], self.time, self.batch, *array.shape[2:])
        array = np.moveaxis(np.swapaxes(array, 1, 2), 0, 2)
        return array.reshape(self.batch * self.time, *array.shape[2:])

    def action_noise(self) -> dict[str, jax.Array]:
        if "noise/act" in self.arrays:
            (key,) = self.action_space
            return {key: self.dream_major("noise/act")}
        return {key: self.dream_major(f"noise/act/{key}") for key in self.action_space}


def recompute(case: Case) -> dict[str, np.ndarray]:
    """Every `out/` array that is not a gradient, under its recorded name."""
    params, steps, trained = case.params, case.steps, case.trained
    model = case.agent.model
    out: dict[str, np.ndarray] = {}

    def put(name: str, value: Any) -> None:
        """Records a (T, B, ...) array."""
        out[f"out/{name}"] = np.swapaxes(np.asarray(value), 0, 1)

    def put_dream(name: str, value: Any) -> None:
        out[f"out/img/{name}"] = case.dream_back(value)

    out["out/enc/tokens"] = tokens(case)
    observed = jax.jit(model.observe)(params["model"], case.carry, steps, trained.model)
    latents = observed.latents
    deter, stoch = case.split(latents)
    post = case.posterior(deter, jnp.asarray(np.swapaxes(out["out/enc/tokens"], 0, 1)))
    prior = case.prior(deter)
    unimix = case.config.model.latent.unimix
    put("rssm/deter", deter)
    put("rssm/stoch", stoch)
    for name, logits in (("post", post), ("prior", prior)):
        dist = dists.OneHot(logits, unimix)
        put(f"rssm/{name}_logit", logits)
        put(f"rssm/{name}_logprob", dist.logprobs)
        put(f"rssm/{name}_entropy", dist.entropy())
    kl = dists.OneHot(post, unimix).kl_divergence(dists.OneHot(prior, unimix))
    put("rssm/kl_dyn_raw", kl)
    put("rssm/kl_rep_raw", kl)

    heads = model.predict(params["model"], latents)
    feat = model.features(latents)
    for key, space in case.obs_space.items():
        if is_image(space):
            pixels = np.swapaxes(np.asarray(heads[key].pred), 0, 1)
            out[f"out/dec/{key}/pred_first"] = pixels[0, :1]
            out[f"out/dec/{key}/pred_stride8"] = pixels[:, :, 3::8, 5::8]
            out[f"out/dec/{key}/pred_sum"] = pixels.sum((2, 3))
        elif isinstance(space, Box):
            put(f"dec/{key}/pred", heads[key].pred)
        else:
            put(f"dec/{key}/logprob", heads[key].logprobs)
            put(f"dec/{key}/logits", decoded(case, latents)[key])
    put("rew/logits", heads["reward"].logits)
    put("rew/pred", heads["reward"].mean())
    put("con/logit", heads["continue"].logit)
    put("con/prob", heads["continue"].mean())
    for name, values in (
        ("val", case.critic.apply(params["behavior"]["value"], feat)),
        ("slowval", case.critic.apply(case.slow, feat)),
    ):
        put(f"{name}/logits", values.logits)
        put(f"{name}/pred", values.mean())
    for key, dist in case.policy.apply(params["behavior"]["policy"], feat).items():
        put(f"pol/{key}/entropy", dist.entropy())
        if f"in/act_given/{key}" in case.arrays:
            put(f"pol/{key}/logp", dist.log_prob(case.time_major(f"in/act_given/{key}")))
        if isinstance(case.action_space[key], Discrete):
            # Raw logits are not kept: compare them up to the constant that softmax ignores.
            put(f"pol/{key}/logits", _unnormalise(case, f"out/pol/{key}/logits", dist.logprobs))
        else:
            put(f"pol/{key}/mean", dist.mean())
            put(f"pol/{key}/std", dist.stddev())

    losses, state = jax.jit(case.losses)(params)
    names = {"replay_value": "repval", "reward": "rew", "continue": "con"}
    for name, value in losses.items():
        ours = names.get(name, name.removeprefix("rec/"))
        put(f"loss/{ours}", value)
        out[f"out/total/mean/{ours}"] = np.asarray(value.mean())
        out[f"out/total/scale/{ours}"] = np.float32(case.config.weights.of(name))
    total, _ = weighted_sum(losses, lambda name, _: case.config.weights.of(name), jnp.zeros(()))
    out["out/total/loss"] = np.asarray(total)
    out["out/retnorm_lo_after"] = np.asarray(state.returns.lo)
    out["out/retnorm_hi_after"] = np.asarray(state.returns.hi)

    # The dream, piece by piece.
    dreams = dreamer(model, params["model"])
    act = lambda feat, draws: _bare(case.act(feat, draws))  # noqa: E731
    start: Start = dreams.starts(observed)
    imagined = jax.jit(lambda draws: dreams.imagine(start, act, draws))(trained.behavior)
    dream_feat = jnp.concatenate([imagined.latents, imagined.last[None]])
    last = case.act(dream_feat[-1], {k: v[-1] for k, v in case.draws.behavior.action.items()})
    actions = as_dict(imagined.action)
    actions = {k: jnp.concatenate([actions[k], last[k][None]]) for k in case.action_space}
    dream_deter, dream_stoch = case.split(dream_feat)
    prior_logits = case.prior(dream_deter[1:])
    dream_heads = model.predict(params["model"], dream_feat, ("reward", "continue"))
    values = case.critic.apply(params["behavior"]["value"], dream_feat)
    slow = case.critic.apply(case.slow, dream_feat)
    reward, cont = dream_heads["reward"].mean(), dream_heads["continue"].mean()
    dream, _ = dream_targets(case.config.behavior, case.returns, reward, cont, values.mean())
    policy = case.policy.apply(params["behavior"]["policy"], dream_feat)
    logp = sum(policy[k].log_prob(actions[k]) for k in actions)
    entropy = sum(dist.entropy() for dist in policy.values())
    put_dream("deter", dream_deter)
    put_dream("stoch", dream_stoch)
    put_dream("prior_logit", prior_logits)
    for key, value in actions.items():
        put_dream("action" if len(actions) == 1 else f"action/{key}", value)
    put_dream("rew", reward)
    put_dream("con", cont)
    put_dream("val", values.mean())
    put_dream("slowval", slow.mean())
    put_dream("weight", jnp.cumprod(cont, 0))
    put_dream("ret", dream.returns)
    put_dream("adv", dream.advantage)
    put_dream("logpi", logp)
    put_dream("entropy", entropy)
    for key, dist in policy.items():
        tail = "" if len(policy) == 1 else f"/{key}"
        if isinstance(case.action_space[key], Discrete):
            name = f"pol_logits{tail}"
            recorded = case.arrays.get(f"out/img/{name}")
            logits = case.dream_back(dist.logprobs)
            out[f"out/img/{name}"] = _shift(logits, recorded)
        else:
            put_dream(f"pol_mean{tail}", dist.mean())
            put_dream(f"pol_std{tail}", dist.stddev())
    score = logp[:-1] * dream.advantage + 3e-4 * entropy[:-1]
    put_dream("policy_loss", -dream.weight * score)
    short = type(values)(values.logits[:-1], values.bins)
    pull = short.log_prob(slow.mean()[:-1])
    put_dream("value_loss", -dream.weight * (short.log_prob(dream.returns) + pull))
    out["out/img/retnorm_scale"] = np.asarray(dream.scale)

    boot = dream.returns[0].reshape(case.time, case.batch)
    columns = jax.vmap(replay_lambda_return, (1, 1, 1, 1), 1)
    put("repl/boot", boot)
    put("repl/ret", columns(steps.reward, steps.is_last, steps.is_terminal, boot))
    put("repl/val", case.critic.apply(params["behavior"]["value"], feat).mean())
    put("repl/slowval", case.critic.apply(case.slow, feat).mean())
    return out


def decoded(case: Case, latents: Any) -> dict[str, Any]:
    """Raw outputs of the decoder, time before batch."""
    sizes = case.deter, latents.shape[-1] - case.deter
    net = decoder(case.config.model.codec, case.obs_space, *sizes)
    flat = latents.reshape(-1, latents.shape[-1])
    deter, stoch = jnp.split(flat, [case.deter], -1)
    raw = jax.jit(net.apply)(case.params["model"]["decoder"], deter, stoch)
    return {key: x.reshape(*latents.shape[:-1], *x.shape[1:]) for key, x in raw.items()}


def tokens(case: Case) -> np.ndarray:
    """(B, T, F) output of the encoder."""
    encoder = Encoder(case.obs_space, case.config.model.codec)
    obs = {k: v.reshape(-1, *v.shape[2:]) for k, v in case.steps.obs.items()}
    flat = jax.jit(encoder.apply)({"params": case.params["model"]["encoder"]}, obs)
    return np.swapaxes(np.asarray(flat).reshape(case.time, case.batch, -1), 0, 1)


def gradients(case: Case) -> dict[str, np.ndarray]:
    """`grad/NAME` of the total loss and `gradnorm/values` of every loss term."""

    def loss(params: Any, weights: dict[str, jax.Array]) -> jax.Array:
        losses, _ = case.losses(params)
        return sum(weights[name] * value.mean() for name, value in losses.items())

    shapes = jax.eval_shape(lambda params: case.losses(params)[0], case.params)
    grad = jax.jit(jax.grad(loss))
    ours = {"repval": "replay_value", "rew": "reward", "con": "continue"}
    out = {}
    total = grad(case.params, {n: jnp.float32(case.config.weights.of(n)) for n in shapes})
    for key in case.arrays:
        if key.startswith("grad/"):
            out[key] = pick(total, key.removeprefix("grad/"))
    rows = []
    for term in case.arrays["gradnorm/losses"]:
        name = ours.get(str(term), str(term))
        name = name if name in shapes else f"rec/{name}"
        one = grad(case.params, {n: jnp.float32(n == name) for n in shapes})
        rows.append(
            [np.linalg.norm(pick(one, str(p)).ravel()) for p in case.arrays["gradnorm/params"]]
        )
    out["gradnorm/values"] = np.array(rows, np.float32)
    return out


def acting(case: Case) -> dict[str, np.ndarray]:
    """`act/action`, `act/deter`, `act/stoch`: two acting steps on observations 1 and 2."""
    model, arrays = case.agent.model, case.arrays
    carry = case.carry
    action = {k: case.steps.action[k][1] for k in case.action_space}
    rows: dict[str, list[Any]] = {"deter": [], "stoch": []}

    @jax.jit
    def act(carry: Any, steps: Step, gumbel: Any, draws: Any) -> Any:
        observed = model.observe(case.params["model"], carry, steps, gumbel)
        return observed.carry, case.act(observed.latents[0], draws)

    for i in range(arrays["act/noise_post"].shape[1]):
        row = jax.tree.map(lambda x, i=i: x[i + 1][None], case.steps)
        row = row._replace(action={k: v[None] for k, v in action.items()})
        draws = {
            k: arrays["act/noise_act" if "act/noise_act" in arrays else f"act/noise_act/{k}"][:, i]
            for k in case.action_space
        }
        carry, action = act(carry, row, arrays["act/noise_post"][:, i][None], draws)
        rows["deter"].append(carry.core)
        rows["stoch"].append(case.grouped(carry.stoch))
        for key, value in action.items():
            name = "action" if len(action) == 1 else f"action/{key}"
            rows.setdefault(name, []).append(value)
    return {f"act/{k}": np.stack([np.asarray(x) for x in v], 1) for k, v in rows.items()}


def check_concat(arrays: Mapping[str, np.ndarray], names: list[str]) -> None:
    """The recorded concatenation of dict entries; class counts are those that fit its width."""
    values = {name: jnp.asarray(arrays[f"dictconcat/{name}"]) for name in names}
    whole = {n: v.astype(jnp.int32) for n, v in values.items() if v.dtype != jnp.float32}
    width = arrays["dictconcat/y"].shape[-1]
    counts = [
        [2] if values[n].dtype == bool else range(int(v.max()) + 1, width) for n, v in whole.items()
    ]
    fitting = 0
    for classes in itertools.product(*counts):
        space = {n: Box(v.shape[1:]) for n, v in values.items()}
        space |= {
            n: Discrete(c, v.shape[1:]) for c, (n, v) in zip(classes, whole.items(), strict=True)
        }
        if concat_size(space) != width:
            continue
        plain = np.asarray(concat_entries(space, values | whole))
        if np.allclose(plain, arrays["dictconcat/y_nosquish"], rtol=1e-6):
            fitting += 1
            squashed = np.asarray(concat_entries(space, values | whole, symlog))
            np.testing.assert_allclose(squashed, arrays["dictconcat/y"], rtol=1e-6, atol=1e-7)
    assert fitting == 1


def check_context(arrays: Mapping[str, np.ndarray]) -> None:
    """A recorded window of context and trained steps, read back from a ring.

    The recording stores with each step the action taken there, a row of ours the action that
    led there, so that a stored action belongs one row later.
    """
    part = lambda name: jnp.asarray(arrays[f"context/{name}"])  # noqa: E731
    keys = sorted(
        name
        for name in (key.removeprefix("context/in/") for key in arrays)
        if f"context/out_obs/{name}" in arrays and name not in FLAGS
    )
    taken = part("in/action")
    led = jnp.concatenate([jnp.zeros_like(taken[:, :1]), taken[:, :-1]], 1)
    rows = Step(led, {k: part(f"in/{k}") for k in keys}, *(part(f"in/{k}") for k in FLAGS))
    memo = {name: part(f"in/dyn/{name}") for name in ("deter", "stoch")}
    count, length = taken.shape[0], taken.shape[1] - 1
    env, start = jnp.arange(count), jnp.zeros(count, jnp.int32)
    window = read(Buffer(rows, memo), env, start, length)
    same = lambda have, name: np.testing.assert_array_equal(  # noqa: E731
        np.swapaxes(np.asarray(have), 0, 1), arrays[f"context/{name}"]
    )
    trained = jax.tree.map(lambda x: x[1:], window.steps)
    same(trained.action, "out_prevact/action")
    for key in FLAGS:
        same(getattr(trained, key), f"out_obs/{key}")
    for key in keys:
        same(trained.obs[key], f"out_obs/{key}")
    same(part("in/stepid")[window.env[None], window.index[1:]], "out_stepid")
    # Every window starts from stored latents; windows that continue another are not made.
    starts = arrays["context/in/consec"][:, 0] == 0
    for name in ("deter", "stoch"):
        have = np.asarray(window.memo[name])[starts]
        np.testing.assert_array_equal(have, arrays[f"context/out_carry/{name}"][starts])


def _bare(actions: dict[str, Any]) -> Any:
    """A dict of actions as an environment's space has it: bare if it is called "action"."""
    return actions["action"] if list(actions) == ["action"] else actions


def _names(arrays: Mapping[str, np.ndarray], prefix: str) -> list[str]:
    return sorted(key.removeprefix(prefix) for key in arrays if key.startswith(prefix))


def _unnormalise(case: Case, name: str, logprobs: Any) -> np.ndarray:
    recorded = case.arrays.get(name)
    moved = None if recorded is None else np.swapaxes(recorded, 0, 1)
    return _shift(np.asarray(logprobs), moved)


def _shift(logprobs: np.ndarray, recorded: np.ndarray | None) -> np.ndarray:
    """Log-probabilities moved by a constant per choice to the mean of the recorded logits."""
    if recorded is None:
        return logprobs
    return logprobs + (recorded - logprobs).mean(-1, keepdims=True)

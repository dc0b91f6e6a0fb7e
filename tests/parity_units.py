"""Checks against small recorded tables of the reference implementation and its optimiser.

Every size, count and name is read off the arrays, so a folder with the same layout but other
dimensions runs through the same code. `UNITS` and `OPTIMIZER` are lists of (topic, check) to
parametrise tests with; a check takes the loaded arrays and raises AssertionError.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxwm import dists, nets, numerics, optim, returns

Arrays = Mapping[str, np.ndarray]


def close(name: str, got, want: np.ndarray, tolerance: float = 1e-6, absolute=0.0) -> None:
    """Equal shapes, and a largest error of `tolerance` times the largest number expected."""
    got = np.asarray(got)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, recorded {want.shape}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    error = np.max(np.abs(got - want), initial=0.0)
    allowed = tolerance * np.max(np.abs(want), initial=0.0) + absolute
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"


def close_entries(name: str, got, want: np.ndarray, tolerance: float) -> None:
    """Equal shapes, and every entry within its own relative tolerance."""
    np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=0, err_msg=name)


def names(arrays: Arrays, pattern: str) -> Iterator[tuple[str, ...]]:
    """The groups of `pattern` for every key that it matches as a whole."""
    found = [match.groups() for key in arrays if (match := re.fullmatch(pattern, key))]
    assert found, f"no array is called {pattern}"
    return iter(found)


def put(arrays: Arrays, prefix: str) -> dict[str, jax.Array]:
    """All arrays under a prefix, on the device, by the rest of their names."""
    return {
        key.removeprefix(prefix): jnp.asarray(arrays[key])
        for key in arrays
        if key.startswith(prefix)
    }


def _bins(arrays: Arrays, logits: np.ndarray) -> jax.Array:
    return jnp.asarray(arrays[f"twohot/bins{logits.shape[-1]}"])


def symlog(arrays: Arrays) -> None:
    close_entries("symlog", numerics.symlog(put(arrays, "symlog/")["x"]), arrays["symlog/y"], 1e-6)


def symexp(arrays: Arrays) -> None:
    close_entries("symexp", numerics.symexp(put(arrays, "symexp/")["x"]), arrays["symexp/y"], 1e-6)


def bins(arrays: Arrays) -> None:
    for (count,) in names(arrays, r"twohot/bins(\d+)"):
        got, want = np.asarray(numerics.symexp_bins(int(count))), arrays[f"twohot/bins{count}"]
        # Near zero expm1 cannot err by more than the rounding of linspace near -20.
        close_entries(f"bins{count}", got, want, 3e-6)
        np.testing.assert_array_equal(got, -got[::-1])


def _close_means(name: str, probs: np.ndarray, bins: jax.Array, got, want: np.ndarray) -> None:
    # A sum over positions of up to 5e8 is only as exact as the terms that cancel in it; the
    # rows with mass far out are the ones that the description of the arrays calls loose.
    allowed = 1e-6 * np.sum(probs * np.abs(np.asarray(bins, np.float64)), axis=-1)
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= allowed), f"{name}: errors {error}, allowed {allowed}"


def _twohot(arrays: Arrays, prefix: str) -> None:
    data = put(arrays, prefix)
    positions = _bins(arrays, arrays[f"{prefix}logits"])
    dist = dists.TwoHot(data["logits"], positions)
    uniform = np.ptp(arrays[f"{prefix}logits"], axis=-1) == 0
    np.testing.assert_array_equal(np.asarray(dist.mean())[uniform], 0.0)
    probs = np.asarray(jax.nn.softmax(data["logits"]), np.float64)
    _close_means(f"{prefix}pred", probs, positions, dist.mean(), arrays[f"{prefix}pred"])
    loss = -dist.log_prob(data["target_value"])
    close(f"{prefix}loss", loss, arrays[f"{prefix}loss"])
    # Bins of our own instead of the recorded ones: their rounding may differ in the last place.
    ours = dists.TwoHot(data["logits"], numerics.symexp_bins(positions.shape[-1]))
    close(f"{prefix}loss, own bins", -ours.log_prob(data["target_value"]), np.asarray(loss), 1e-5)


def twohot(arrays: Arrays) -> None:
    _twohot(arrays, "twohot/")
    data = put(arrays, "twohot/")
    positions = _bins(arrays, arrays["twohot/logits"])
    weights = np.asarray(numerics.twohot(data["target_value"], positions))
    close("twohot/target", weights, arrays["twohot/target"])
    rows = np.arange(len(weights))
    rest = weights.copy()
    rest[rows, arrays["twohot/below"]] = 0
    rest[rows, arrays["twohot/above"]] = 0
    np.testing.assert_array_equal(rest, 0.0)
    gradient = jax.grad(
        lambda logits: -dists.TwoHot(logits, positions).log_prob(data["target_value"]).sum()
    )(data["logits"])
    close("twohot/grad_logits", gradient, arrays["twohot/grad_logits"])


def twohot_even(arrays: Arrays) -> None:
    _twohot(arrays, "twohot_even/")


def lambda_(arrays: Arrays) -> None:
    data = put(arrays, "lambda/")
    imagined = jax.jit(jax.vmap(returns.lambda_return))(
        data["rew"][:, 1:], data["con"][:, 1:], data["val"][:, 1:]
    )
    close("lambda/ret_imag", imagined, arrays["lambda/ret_imag"])
    replayed = jax.jit(jax.vmap(returns.replay_lambda_return))(
        data["rew"], data["last"], data["term"], data["boot"]
    )
    close("lambda/ret_replay", replayed, arrays["lambda/ret_replay"])


def norm(arrays: Arrays) -> None:
    rate, data = 0.01, put(arrays, "norm/")
    percentiles, moments = numerics.percentiles_init(), numerics.moments_init()
    weight = jnp.zeros(())
    for step in sorted(int(number) for (number,) in names(arrays, r"norm/x(\d+)")):
        x = data[f"x{step}"]
        percentiles = numerics.percentiles_update(percentiles, x, rate)
        moments = numerics.moments_update(moments, x, rate)
        weight = numerics.moving_average(weight, 1.0, rate)
        exact = numerics.debias(percentiles, weight)
        centred = numerics.debias(moments, weight)
        got = {
            f"perc/state{step}/lo": percentiles.lo,
            f"perc/state{step}/hi": percentiles.hi,
            f"perc/offset{step}": percentiles.lo,
            f"perc/scale{step}": numerics.percentiles_scale(percentiles),
            f"perc_debias/state{step}/lo": percentiles.lo,
            f"perc_debias/state{step}/hi": percentiles.hi,
            f"perc_debias/state{step}/corr": weight,
            f"perc_debias/offset{step}": exact.lo,
            f"perc_debias/scale{step}": numerics.percentiles_scale(exact, limit=1e-8),
            f"meanstd/state{step}/mean": moments.mean,
            f"meanstd/state{step}/sqrs": moments.square,
            f"meanstd/state{step}/corr": weight,
            f"meanstd/offset{step}": centred.mean,
            f"meanstd/scale{step}": numerics.moments_scale(centred),
        }
        recorded = {key.removeprefix("norm/") for key in arrays if key.startswith("norm/")}
        assert not {key for key in recorded if re.search(rf"\D{step}(/|$)", key)} - {
            *got,
            f"x{step}",
        }
        for key, value in got.items():
            # Averages of both signs cancel; the data of the batch is their scale.
            absolute = 1e-7 * rate * float(jnp.abs(x).max())
            close(f"norm/{key}", value, arrays[f"norm/{key}"], 3e-6, absolute)


def rms(arrays: Arrays) -> None:
    for (which,) in names(arrays, r"rms/(\w+)/x"):
        data = put(arrays, f"rms/{which}/")
        module = nets.RMSNorm(data["scale"].size)
        got = module.apply({"params": {"scale": data["scale"]}}, data["x"])
        close(f"rms/{which}", got, arrays[f"rms/{which}/y"])


def _module(name: str, kernel: tuple[int, ...], stride: int = 1, scale: float = 1.0):
    """The layer with a kernel of that shape, and transposed if the name says so."""
    if len(kernel) == 2:
        return nets.Linear(*kernel, scale)
    if len(kernel) == 3:
        blocks, inputs, outputs = kernel
        return nets.BlockLinear(blocks * inputs, blocks * outputs, blocks)
    straight = nets.Conv if stride == 1 else nets.StridedConv
    layer = nets.ConvTranspose if "transp" in name else straight
    return layer(kernel[2], kernel[3], kernel[0])


def layer(arrays: Arrays) -> None:
    for (which,) in names(arrays, r"layer/(\w+)/kernel"):
        data, want = put(arrays, f"layer/{which}/"), arrays[f"layer/{which}/y"]
        x = data["x"]
        stride = 1
        if x.ndim == 4:
            stride = max(x.shape[1], want.shape[1]) // min(x.shape[1], want.shape[1])
        module = _module(which, data["kernel"].shape, stride)
        params = {"kernel": data["kernel"], "bias": data["bias"]}
        got = module.apply({"params": params}, x)
        close(f"layer/{which}", got.reshape(want.shape), want)


def init(arrays: Arrays) -> None:
    for (which,) in names(arrays, r"init/(\w+)/stats"):
        shape = tuple(arrays[f"init/{which}/kernel_shape"].tolist())
        mean, std, low, high, count = arrays[f"init/{which}/stats"]
        digits = re.search(r"out(\d+)", which)  # out001 is an output scale of 0.01
        scale = float(f"{digits[1][0]}.{digits[1][1:]}") if digits else 1.0
        module = _module(which, shape, scale=scale)
        x = jnp.zeros((1, 8, 8, shape[2]) if len(shape) == 4 else (1, np.prod(shape[:-1])))
        keys = jax.random.split(jax.random.key(0), max(1, round(count / np.prod(shape))))
        params = jax.vmap(lambda key, module=module, x=x: module.init(key, x)["params"])(keys)
        kernels = np.asarray(params["kernel"], np.float64)
        assert kernels.shape == (len(keys), *shape)
        close(
            f"init/{which}/bias", jnp.abs(params["bias"]).max(), arrays[f"init/{which}/bias_absmax"]
        )
        # Five standard errors: of a mean, std / sqrt(count), of a std, that over sqrt(2).
        error = 5 * std / np.sqrt(count)
        assert abs(kernels.mean() - mean) <= 2 * error, which
        assert abs(kernels.std() - std) <= 2 * error, which
        # The tails are cut at two standard deviations and well visited there.
        np.testing.assert_allclose((kernels.min(), kernels.max()), (low, high), rtol=0.01)


def bounded_normal(arrays: Arrays) -> None:
    data = put(arrays, "bounded_normal/")
    dist = dists.BoundedNormal(data["raw_mean"], data["raw_std"])
    got = {
        "mean": dist.mean(),
        "std": dist.stddev(),
        "pred": dist.mode(),
        "logp": dist.log_prob(data["event"]),
        "entropy": dist.entropy(),
        "sample": dist.sample_noise(data["eps"]),
        "minent": _extreme_entropy(data["minent"], -1e3),
        "maxent": _extreme_entropy(data["maxent"], 1e3),
    }
    for key, value in got.items():
        close(f"bounded_normal/{key}", value, arrays[f"bounded_normal/{key}"])


def _extreme_entropy(like: jax.Array, std_raw: float) -> jax.Array:
    raw = jnp.full(like.shape, std_raw)
    return dists.BoundedNormal(raw, raw, event_ndims=0).entropy()


def unimix(arrays: Arrays) -> None:
    data, mix = put(arrays, "unimix/"), 0.01
    dist_p, dist_q = (dists.OneHot(data[f"logits_{which}"], mix) for which in "pq")
    close("unimix/logprob_p", dist_p.logprobs, arrays["unimix/logprob_p"])
    close("unimix/logprob_q", dist_q.logprobs, arrays["unimix/logprob_q"])
    close("unimix/kl", dist_p.kl_divergence(dist_q), arrays["unimix/kl"])
    close("unimix/entropy", dist_p.entropy(), arrays["unimix/entropy"])
    np.testing.assert_array_equal(dist_p.sample_noise(data["gumbel"]), arrays["unimix/sample"])

    def weighted_sample(logits):
        sample = dists.OneHot(logits, mix).sample_noise(data["gumbel"])
        return jnp.sum(data["sample_weight"] * sample)

    def weighted_kl(logits_p, logits_q):
        kl = dists.OneHot(logits_p, mix).kl_divergence(dists.OneHot(logits_q, mix))
        return jnp.sum(data["cotangent"] * kl)

    def weighted_entropy(logits):
        return jnp.sum(data["cotangent"] * dists.OneHot(logits, mix).entropy())

    close(
        "unimix/sample_grad",
        jax.grad(weighted_sample)(data["logits_p"]),
        arrays["unimix/sample_grad"],
    )
    kl_p, kl_q = jax.grad(weighted_kl, (0, 1))(data["logits_p"], data["logits_q"])
    close("unimix/kl_grad_p", kl_p, arrays["unimix/kl_grad_p"])
    close("unimix/kl_grad_q", kl_q, arrays["unimix/kl_grad_q"])
    entropy = jax.grad(weighted_entropy)(data["logits_p"])
    close("unimix/entropy_grad", entropy, arrays["unimix/entropy_grad"])


def categorical(arrays: Arrays) -> None:
    data = put(arrays, "categorical/")
    dist = dists.Categorical(data["logits"])
    close("categorical/logp", dist.log_prob(data["event"]), arrays["categorical/logp"])
    close("categorical/entropy", dist.entropy(), arrays["categorical/entropy"])
    np.testing.assert_array_equal(dist.mode(), arrays["categorical/pred"])


def binary(arrays: Arrays) -> None:
    data = put(arrays, "binary/")
    dist = dists.SoftBernoulli(data["logit"])
    close("binary/loss", -dist.log_prob(data["target"]), arrays["binary/loss"])
    close("binary/prob1", dist.mean(), arrays["binary/prob1"])
    np.testing.assert_array_equal(dist.mode(), arrays["binary/pred"])


def symlog_mse(arrays: Arrays) -> None:
    data = put(arrays, "symlog_mse/")
    loss = -dists.SymlogSquaredError(data["pred"], 1).log_prob(data["target"])
    close("symlog_mse/loss", loss, arrays["symlog_mse/loss"])


def image_mse(arrays: Arrays) -> None:
    data = put(arrays, "image_mse/")
    loss = -dists.ImageSquaredError(data["pred"]).log_prob(data["image"])
    close("image_mse/loss", loss, arrays["image_mse/loss"])


UNITS: list[tuple[str, Callable[[Arrays], None]]] = [
    ("symlog", symlog),
    ("symexp", symexp),
    ("bins", bins),
    ("twohot", twohot),
    ("twohot_even", twohot_even),
    ("lambda", lambda_),
    ("norm", norm),
    ("rms", rms),
    ("layer", layer),
    ("init", init),
    ("bounded_normal", bounded_normal),
    ("unimix", unimix),
    ("categorical", categorical),
    ("binary", binary),
    ("symlog_mse", symlog_mse),
    ("image_mse", image_mse),
]


def _run(config: optim.OptimConfig, params, slow, gradients) -> Iterator[tuple]:
    """After every step: the update, the parameters, the slow critic, the gradient norm."""
    optimizer, copy = optim.laprop(**vars(config)), optim.slow_copy()

    @jax.jit
    def step(gradient, state, params, slow):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        slow = copy.update(slow, {name: params[f"val/{name}"] for name in slow.params})
        return updates, state, params, slow, optim.global_norm(gradient)

    state, slow = jax.jit(lambda: (optimizer.init(params), copy.init(slow)))()
    for gradient in gradients:
        updates, state, params, slow, norm = step(gradient, state, params, slow)
        yield updates, params, slow.params, norm


def _ulps(count: float, *arrays: np.ndarray) -> float:
    """`count` units in the last place of the largest float32 among the arrays."""
    return count * float(max(np.spacing(np.abs(x).max(initial=0).astype("f4")) for x in arrays))


# How a compiler rounds 1 - n / 1000 shows in the learning rate of the first few updates.
RAMP = 1e-5
DEFAULT, FAST = optim.OptimConfig(), optim.OptimConfig(learning_rate=1e-3, warmup_steps=0)


def model_tree(opt: Arrays, model: Arrays) -> None:
    """Three steps on the parameters of a whole agent, and the slow critic behind them."""
    everything = put(model, "params/")
    params = {k: v for k, v in everything.items() if not k.startswith("slowval/")}
    slow = put(model, "params/slowval/")
    first = {k.removeprefix("grad/"): g for k, g in model.items() if k.startswith("grad/")}
    assert params.keys() == first.keys()
    # Squares of smaller entries underflow, or not, depending on the backend.
    gradients = [{k: np.where(np.abs(g) < 1e-12, np.float32(0), g) for k, g in first.items()}]
    numbers = sorted(int(n) for (n,) in {*names(opt, r"grad(\d+)/.*")})
    assert numbers == list(range(2, 2 + len(numbers)))
    gradients += [put(opt, f"grad{number}/") for number in numbers]
    for run, config in (("default", DEFAULT), ("fast", FAST)):
        steps = enumerate(_run(config, params, slow, gradients), start=1)
        for number, (updates, after, critic, norm) in steps:
            close(f"{run}/grad_norm{number}", norm, opt[f"{run}/grad_norm{number}"])
            if run == "default" and number == 1:
                for name, update in updates.items():
                    close(name, update, np.zeros(update.shape))
            for key in opt:
                kind, _, name = key.removeprefix(f"{run}/").partition("/")
                if key == f"{run}/{kind}/{name}":
                    if kind == f"update{number}":
                        close(key, updates[name], opt[key], RAMP)
                    elif kind == f"params{number}":
                        close(key, after[name], opt[key], 0, 1e-8 + _ulps(2 * number, opt[key]))
                    elif kind == f"slowval{number}":
                        close(key, critic[name], opt[key], 0, 1e-8 + _ulps(2 * number, opt[key]))


def extra_tree(opt: Arrays, model: Arrays) -> None:
    """The same on a few tensors of other kinds, with updates recorded for both settings."""
    del model
    params = put(opt, "extra/params0/")
    numbers = sorted(int(n) for (n,) in {*names(opt, r"extra/grad(\d+)/.*")})
    gradients = [put(opt, f"extra/grad{number}/") for number in numbers]
    for run, config in (("default", DEFAULT), ("fast", FAST)):
        steps = zip(numbers, _run(config, params, {}, gradients), strict=True)
        for number, (updates, after, _, _) in steps:
            for name in params:
                key = f"extra/{run}/update{number}/{name}"
                close(key, updates[name], opt[key], RAMP)
                key = f"extra/{run}/params{number}/{name}"
                if run == "fast":
                    close(key, after[name], opt[key], 0, 1e-8 + _ulps(2 * number, opt[key]))


def schedule(opt: Arrays, model: Arrays) -> None:
    del model
    ramp = jax.jit(optim.warmup(DEFAULT.learning_rate, DEFAULT.warmup_steps))
    rates = np.asarray([ramp(number - 1) for number in opt["schedule/update_number"]])
    # Read back from updates by the reference, hence exact to 3e-5 only.
    close_entries("schedule/lr_default", rates, opt["schedule/lr_default"], 3e-5)


OPTIMIZER: list[tuple[str, Callable[[Arrays, Arrays], None]]] = [
    ("model_tree", model_tree),
    ("extra_tree", extra_tree),
    ("schedule", schedule),
]


def check_units(arrays: Arrays) -> None:
    """Every unit check."""
    for _, check in UNITS:
        check(arrays)


def check_optimizer(opt: Arrays, model: Arrays) -> None:
    """Every optimiser check, against the arrays of the agent whose gradients were used."""
    for _, check in OPTIMIZER:
        check(opt, model)

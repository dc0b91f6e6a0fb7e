"""The least time an update can take on this machine, and where its time goes.

    python -m benchmarks.roofline --measure nano size1m --out benchmarks/results/roofline.jsonl

What an update must do is counted in its jaxpr: operations of products and convolutions, scans
multiplied out. What the machine can do is measured: its rate in large products, its bandwidth in
copies, the time of a step of a loop that does next to nothing. Together they give a floor,

    max(operations / rate, least bytes / bandwidth) + dependent steps * time of the smallest step,

for every size, without running it. `--measure` names the sizes that are run as well, in parts.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from benchmarks.lines import emit, in_words, machine, number, parser_of, seconds
from benchmarks.loop import training
from benchmarks.throughput import OBS, spaces, synthetic, window_of
from jaxwm import backend
from jaxwm.agent import Draws
from jaxwm.behaviors import actor_critic
from jaxwm.envs import wrappers
from jaxwm.models import encoders
from jaxwm.models.imagine import dreamer
from jaxwm.optim import apply_updates, laprop
from jaxwm.recipes import RunConfig, dreamer_v3
from jaxwm.replay.device import ReplayConfig, replay
from jaxwm.train import mesh
from jaxwm.train.mesh import P

SIZES = ("nano", *dreamer_v3.DETER)


class Cost(NamedTuple):
    """What a program does, its scans multiplied out."""

    products: float  # operations of matrix products; a multiplication and an addition are two
    convolutions: float  # operations of convolutions, zeros put in by dilation not counted
    bytes: float  # operands and results of both


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a jaxpr and of those within it, and how often it runs.

    A loop without a known length counts once, and of a conditional every branch.
    """
    for equation in jaxpr.eqns:
        yield equation, times
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in _inner(equation.params):
            yield from equations(inner, times * repeats)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    for leaf in leaves:
        if isinstance(leaf, core.ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, core.Jaxpr):
            yield leaf


def count(jaxpr: Any) -> Cost:
    """Operations and bytes of the matrix products and convolutions of a jaxpr."""
    products = convolutions = moved = 0.0
    for equation, times in equations(jaxpr):
        name = equation.primitive.name
        if name not in ("dot_general", "conv_general_dilated"):
            continue
        left, right = (variable.aval for variable in equation.invars)
        out = equation.outvars[0].aval
        if name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(left.shape[axis] for axis in contracted)
            products += 2 * times * out.size * depth
        else:
            numbers = equation.params["dimension_numbers"]
            taps = right.size / right.shape[numbers.rhs_spec[0]]
            real = math.prod(equation.params["lhs_dilation"])
            convolutions += 2 * times * out.size * taps / real
        moved += times * sum(x.size * x.dtype.itemsize for x in (left, right, out))
    return Cost(products, convolutions, moved)


def carried_steps(jaxpr: Any, reverse: bool) -> int:
    """Steps of the scans that hand a carry on, forwards or in reverse, all of them in a row."""
    return sum(
        times * equation.params["length"]
        for equation, times in equations(jaxpr)
        if equation.primitive.name == "scan"
        and equation.params["num_carry"] > 0
        and equation.params["reverse"] == reverse
    )


class Work(NamedTuple):
    """An update: its agent and its arguments, as shapes or as arrays."""

    agent: Any
    state: Any
    window: Any
    key: Any


def work(config: dreamer_v3.Config, obs: str, batch: int, length: int, shapes: bool) -> Work:
    """The update of a synthetic batch, with its shapes alone or with arrays."""
    make: Callable = jax.eval_shape if shapes else lambda function, *args: jax.jit(function)(*args)
    agent = dreamer_v3.agent(config, *spaces(obs))
    env = wrappers.batch(synthetic(obs), batch)
    window = lambda key: window_of(agent, env.reset(key)[1], length)  # noqa: E731
    key = jax.random.key(0)
    return Work(agent, make(agent.init, key), make(window, key), key)


def updating(config: RunConfig, obs: str) -> Callable[[], Any]:
    """One update at each call, in place and divided among shards as in training."""
    layout, batch = mesh.layout(config), mesh.shard_config(config).replay.batch_size
    shards = mesh.shards_of(layout)
    agent = dreamer_v3.agent(config.agent, *spaces(obs), shards)
    one = work(config.agent, obs, batch, config.replay.batch_length, shapes=False)
    window, own, same = one.window, P(mesh.SHARDS), P()
    if layout.shards > 1:
        window = jax.tree.map(lambda x: jnp.stack([x] * layout.shards), window)
    state, key = mesh.put((one.state, one.key), layout, same)
    window = mesh.put(window, layout, own)

    def of_shard(state: Any, window: Any, key: Any) -> Any:
        return agent.update(state, window, shards.own(key))

    update = mesh.spread(of_shard, layout, (same, own, same), (same, own, same))
    update = backend.jit(update, donate_argnums=0)

    def once() -> Any:
        nonlocal state
        state, *rest = update(state, window, key)
        return jax.block_until_ready((state, rest))

    return once


def inputs_of(agent: Any, window: Any, key: Any, shapes: bool) -> tuple[Any, Any, Draws]:
    """What the losses of an update take: carry, rows (T, B) and draws."""

    def make(window: Any, key: Any) -> tuple[Any, Any, Draws]:
        steps = jax.tree.map(lambda x: x[1:], window.steps)
        lead = steps.is_first.shape
        key_model, key_behavior = jax.random.split(key)
        model, behavior = agent.model, agent.behavior
        draws = Draws(model.draws(key_model, lead), behavior.draws(key_behavior, lead))
        return model.unpack(window.memo, lead[1]), steps, draws

    return jax.eval_shape(make, window, key) if shapes else backend.jit(make)(window, key)


def total_loss(agent: Any, state: Any, carry: Any, steps: Any, draws: Draws) -> jax.Array:
    """The sum of all losses."""
    params, model = state.params, agent.model
    losses, observed, _ = model.loss(params["model"], carry, steps, draws.model)
    dreams = dreamer(model, params["model"])
    behavior = agent.behavior.loss(
        params["behavior"], state.rest.behavior, dreams, observed, steps, draws.behavior
    )
    return sum(term.mean() for term in (losses | behavior[0]).values())


def demands(config: dreamer_v3.Config, obs: str, batch: int, length: int) -> dict[str, Any]:
    """What an update must do: operations, bytes and dependent steps, from shapes alone."""
    agent, state, window, key = work(config, obs, batch, length, shapes=True)
    cost = count(jax.make_jaxpr(agent.update)(state, window, key).jaxpr)
    carry, steps, draws = inputs_of(agent, window, key, shapes=True)
    loss = jax.make_jaxpr(functools.partial(total_loss, agent))(state, carry, steps, draws)

    def model_loss(params: Any, carry: Any, steps: Any, draws: Any) -> jax.Array:
        losses, _, _ = agent.model.loss(params, carry, steps, draws)
        return sum(term.mean() for term in losses.values())

    # Dreams are not differentiated: backwards, only the model's own recurrence waits for itself.
    gradient = jax.make_jaxpr(jax.grad(model_loss))(
        state.params["model"], carry, steps, draws.model
    )
    size = lambda tree: sum(  # noqa: E731
        x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "product_flops": cost.products,
        "convolution_flops": cost.convolutions,
        "product_bytes": cost.bytes,
        # All that is learned is read and written once, the batch is read.
        "least_bytes": 2 * size(state) + size(steps),
        "steps_forward": carried_steps(loss.jaxpr, reverse=False),
        "steps_backward": carried_steps(gradient.jaxpr, reverse=True),
    }


def limits_of(dtype: str, repeats: int = 20) -> dict[str, float]:
    """Limits, the best of some tries: operations and bytes per second, seconds of a step."""
    side, steps = 2048, 1000
    square, line = jnp.ones((side, side), dtype), [jnp.ones(2**26, jnp.float32)]
    product = jax.jit(lambda x: x @ x)
    move = jax.jit(lambda x: x + 1, donate_argnums=0)  # into the same memory
    # The smallest product in each step: of an addition XLA would make the whole loop one kernel.
    small = jnp.eye(8)
    empty = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c @ small, None), x, None, steps)[0])
    nbytes = 2 * line[0].nbytes

    def moved() -> jax.Array:
        line[0] = move(line[0])
        return line[0]

    return {
        "flops_per_second": 2 * side**3 / min(seconds(lambda: product(square), repeats)),
        "bytes_per_second": nbytes / min(seconds(moved, repeats)),
        "step_seconds": min(seconds(lambda: empty(small), repeats)) / steps,
    }


def floor(demand: dict[str, Any], limits: dict[str, float]) -> dict[str, float]:
    """The least seconds of an update, and the three terms it is made of."""
    flops = demand["product_flops"] + demand["convolution_flops"]
    steps = demand["steps_forward"] + demand["steps_backward"]
    terms = {
        "compute_seconds": flops / limits["flops_per_second"],
        "memory_seconds": demand["least_bytes"] / limits["bytes_per_second"],
        "steps_seconds": steps * limits["step_seconds"],
    }
    least = max(terms["compute_seconds"], terms["memory_seconds"]) + terms["steps_seconds"]
    return terms | {"floor_seconds": least}


def remembering(window: Any, memo: Any, batch: int, length: int, key: Any) -> Callable[[], Any]:
    """Samples a batch and writes fresh memos (T, B) back, at each call."""
    row, stored_memo = jax.tree.map(lambda x: x[0], window.steps), window.memo
    memory = replay(ReplayConfig(20_000, batch, length), row, stored_memo)
    buffer, cursor = memory.init()
    cursor = cursor._replace(written=cursor.written + 1000)
    sample = backend.jit(lambda b, c, k: memory.sample(b, c, k)[0])
    # The buffer is given away, as in training: it is changed in place.
    write = backend.jit(memory.write_back, donate_argnums=0)
    places, stored = sample(buffer, cursor, key), [buffer]

    def call() -> Any:
        jax.block_until_ready(sample(stored[0], cursor, key))
        stored[0] = write(stored[0], places, memo)
        return stored[0]

    return call


def parts(run: RunConfig, obs: str, repeats: int) -> dict[str, float]:
    """Seconds of an update in the run's shards, and of its parts alone, each on one device.

    "codec" is encoder and decoder with their gradients, "observe" the recurrence forwards,
    "losses" what else the model's loss and its gradient take, "heads" what the behaviour's loss
    and its gradient take beside the dream.
    """
    config, batch, length = run.agent, run.replay.batch_size, run.replay.batch_length
    agent, state, window, key = work(config, obs, batch, length, shapes=False)
    model, behavior, params = agent.model, agent.behavior, state.params
    obs_space, action_space = spaces(obs)
    dtype = backend.compute_dtype(config.dtype)
    carry, steps, draws = inputs_of(agent, window, key, shapes=False)
    noise = backend.jit(lambda key: inputs_of(agent, window, key, shapes=False)[2])

    observe = backend.jit(lambda p, s, d: model.observe(p["model"], carry, s, d.model))
    observed = observe(params, steps, draws)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (observed.latents, steps.obs))
    features = flat[0].shape[-1]
    policy = actor_critic.policy(config.behavior, action_space, features, dtype)

    @backend.jit
    def imagine(p, d, observed):
        def act(feat, draws):
            plan = policy.apply(p["behavior"]["policy"], feat)
            return plan["action"].sample_noise(draws["action"])

        dreams = dreamer(model, p["model"])
        return dreams.imagine(dreams.starts(observed), act, d.behavior)

    @backend.jit
    @jax.grad
    def learn_model(p, s, d):
        terms = model.loss(p["model"], carry, s, d.model)[0]
        return sum(term.mean() for term in terms.values())

    @backend.jit
    @jax.grad
    def learn_behavior(p, s, d, observed):
        dreams = dreamer(model, p["model"])
        terms = behavior.loss(p["behavior"], state.rest.behavior, dreams, observed, s, d.behavior)
        return sum(term.mean() for term in terms[0].values())

    deter, codec = config.model.core.deter, config.model.codec
    encoder = encoders.encoder(codec, obs_space, dtype)
    decoder = encoders.decoder(codec, obs_space, deter, features - deter, dtype)
    encode = backend.jit(lambda p, seen: encoder.apply(p["model"]["encoder"], seen))

    @backend.jit
    @jax.grad
    def code(p, latents, seen):
        tokens = encoder.apply(p["model"]["encoder"], seen)
        out = decoder.apply(p["model"]["decoder"], latents[:, :deter], latents[:, deter:])
        return sum(jnp.square(x).mean() for x in jax.tree.leaves((tokens, out)))

    optimizer = laprop(**vars(config.optim))

    @backend.jit
    def optimise(p, grads, rest):
        updates, opt = optimizer.update(grads, rest.opt, p)
        p = apply_updates(p, updates)
        return p, opt, behavior.after(rest.behavior, p["behavior"])

    remember = remembering(window, backend.jit(model.pack)(observed.carries), batch, length, key)
    grads = jax.tree.map(jnp.ones_like, params)
    calls = {
        "update": updating(run, obs),
        "draws": lambda: noise(key),
        "observe": lambda: observe(params, steps, draws),
        "encode": lambda: encode(params, flat[1]),
        "codec": lambda: code(params, *flat),
        "imagination": lambda: imagine(params, draws, observed),
        "optimiser": lambda: optimise(params, grads, state.rest),
        "replay": remember,
        "model": lambda: learn_model(params, steps, draws),
        "behavior": lambda: learn_behavior(params, steps, draws, observed),
    }
    took = {name: statistics.median(seconds(call, repeats)) for name, call in calls.items()}
    took["observe"] = max(0.0, took["observe"] - took.pop("encode"))
    took["heads"] = max(0.0, took.pop("behavior") - took["imagination"])
    took["losses"] = max(0.0, took.pop("model") - took["observe"] - took["codec"])
    return took


def table(lines: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    names = "size | obs | parameters | GFLOP | convolutions | steps | floor | measured | share"
    rows = [f"| {names} |", "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for line in lines:
        flops = line["product_flops"] + line["convolution_flops"]
        measured = line.get("parts", {}).get("update")
        share = f"{line['floor_seconds'] / measured:.0%}" if measured else ""
        cells = [
            line["size"],
            line["obs"],
            f"{line['parameters'] / 1e6:.1f}M",
            f"{flops / 1e9:,.1f}",
            f"{line['convolution_flops'] / flops:.0%}",
            str(line["steps_forward"] + line["steps_backward"]),
            _time(line["floor_seconds"]),
            _time(measured) if measured else "",
            share,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    for line in lines:
        if "parts" in line:
            took = ", ".join(f"{name} {_time(x)}" for name, x in line["parts"].items())
            rows.append(f"\n{line['size']} {line['obs']}: {took}")
    return "\n".join(rows)


def _time(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


PARTS = ("observe", "codec", "losses", "imagination", "heads", "draws", "optimiser", "replay")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """A picture: floors beside measured times, and measured times by part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [f"{line['size']}\n{line['obs']}" for line in lines]
    left.bar(names, [line["floor_seconds"] for line in lines], color="0.75", label="floor")
    run = [(i, line["parts"]) for i, line in enumerate(lines) if "parts" in line]
    left.plot([i for i, _ in run], [took["update"] for _, took in run], "o", label="measured")
    left.set(yscale="log", ylabel="seconds per update")
    left.tick_params(axis="x", labelsize=7, rotation=90)
    left.legend()
    for place, (index, took) in enumerate(run):
        bottom, total = 0.0, sum(took[name] for name in PARTS)
        for color, name in enumerate(PARTS):
            share = took[name] / total
            label = name if place == 0 else None
            right.bar(names[index], share, bottom=bottom, color=f"C{color}", label=label, width=0.6)
            bottom += share
    right.set(ylabel="share of the time of the parts", ylim=(0, 1))
    right.tick_params(axis="x", labelsize=8)
    if run:
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="sizes to count")
    parser.add_argument("--obs", nargs="+", default=OBS, choices=OBS)
    parser.add_argument("--measure", nargs="*", default=(), help="sizes to run as well")
    parser.add_argument("--batch", type=number, default=16)
    parser.add_argument("--length", type=number, default=64)
    parser.add_argument("--repeats", type=number, default=5)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--picture", type=Path, help="default: beside --out, as .png")
    parser.add_argument("--shards", type=number, default=1, help="shards of an update as a whole")
    args = parser.parse_args()
    shape = (args.batch, args.length)

    def run_of(size: str) -> RunConfig:
        run = training(size, args.batch, 1, *shape, args.dtype)
        return dataclasses.replace(run, shards=args.shards)

    mesh.use_cores(run_of("debug"))
    limits = limits_of(backend.compute_dtype(args.dtype))
    about = {"dtype": backend.compute_dtype(args.dtype)} | machine()
    lines = []
    for size in dict.fromkeys([*args.sizes, *args.measure]):
        run = run_of(size)
        for obs in args.obs:
            demand = demands(run.agent, obs, *shape)
            line = {"size": size, "obs": obs, "batch": shape, "shards": args.shards}
            line["imagine"] = run.agent.behavior.imagine
            line |= demand | limits | floor(demand, limits) | about
            if size in args.measure:
                line["parts"] = parts(run, obs, args.repeats)
            emit(line, args.out)
            lines.append(line)
    print(", ".join(f"{name} {value:.3g}" for name, value in limits.items()), end="\n\n")
    print(table(lines))
    if args.picture or args.out:
        draw(lines, args.picture or args.out.with_suffix(".png"))


if __name__ == "__main__":
    in_words(main)

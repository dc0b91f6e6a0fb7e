"""The least time an update can take on this machine, and where its time goes.

    python -m benchmarks.roofline --measure nano size1m --out benchmarks/results/roofline.jsonl

What an update must do is counted in its jaxpr: operations of products and convolutions, scans
multiplied out. What the machine can do is measured: its rate in large products, its bandwidth in
copies, the time of a step of a loop that does next to nothing. Together they give a floor,

    max(operations / rate, least bytes / bandwidth) + dependent steps * time of the smallest step,

for every size, without running it. `--measure` names the sizes that are run as well, in parts.
"""

import dataclasses
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
from benchmarks.throughput import OBS, spaces, synthetic
from jaxwm import compiler, heap
from jaxwm.agent import AgentConfig, compute_dtype, make_agent
from jaxwm.envs import wrappers
from jaxwm.models.encoders import Decoder, Encoder
from jaxwm.optim import apply_updates, laprop, slow_copy
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
    carry: Any
    steps: Any
    key: Any


def work(config: AgentConfig, obs: str, batch: int, length: int, shapes: bool) -> Work:
    """The update of a synthetic batch, with its shapes alone or with arrays."""
    make: Callable = jax.eval_shape if shapes else lambda function, *args: jax.jit(function)(*args)
    agent = make_agent(config, *spaces(obs))
    env = wrappers.batch(synthetic(obs), batch)

    def rows(key: jax.Array) -> Any:
        row = env.reset(key)[1]
        steps = jax.tree.map(lambda x: jnp.stack([x] * length), row)
        return steps._replace(is_first=jnp.zeros((length, batch), bool))

    key = jax.random.key(0)
    carry = make(lambda: agent.initial(batch))
    return Work(agent, make(agent.init, key), carry, make(rows, key), key)


def updating(config: RunConfig, obs: str) -> Callable[[], Any]:
    """One update at each call, in place and divided among shards as in training."""
    layout, batch = mesh.layout(config), mesh.shard_config(config).replay.batch_size
    shards = mesh.shards_of(layout)
    agent = make_agent(config.agent, *spaces(obs), shards)
    one = work(config.agent, obs, batch, config.replay.batch_length, shapes=False)
    inputs, own, same = (one.carry, one.steps), P(mesh.SHARDS), P()
    if layout.shards > 1:
        inputs = jax.tree.map(lambda x: jnp.stack([x] * layout.shards), inputs)
    state, key = mesh.put((one.state, one.key), layout, same)
    carry, steps = mesh.put(inputs, layout, own)

    def of_shard(state: Any, carry: Any, steps: Any, key: Any) -> Any:
        return agent.update(state, carry, steps, shards.own(key))

    update = mesh.spread(of_shard, layout, (same, own, own, same), (same, own, same))
    update = compiler.jit(update, donate_argnums=0)

    def once() -> Any:
        nonlocal state
        state, *rest = update(state, carry, steps, key)
        return jax.block_until_ready((state, rest))

    return once


def demands(config: AgentConfig, obs: str, batch: int, length: int) -> dict[str, Any]:
    """What an update must do: operations, bytes and dependent steps, from shapes alone."""
    agent, state, carry, steps, key = work(config, obs, batch, length, shapes=True)
    cost = count(jax.make_jaxpr(agent.update)(state, carry, steps, key).jaxpr)
    noise = jax.eval_shape(lambda key: agent.noise(key, length, batch), key)
    loss = jax.make_jaxpr(agent.loss)(
        state.params, state.slow.params, state.behavior, carry, steps, noise
    )

    def model_loss(params: Any, carry: Any, steps: Any, noise: Any) -> jax.Array:
        losses, _, _ = agent.model.loss(params, carry, steps, noise)
        return sum(term.mean() for term in losses.values())

    # Dreams are not differentiated: backwards, only the model's own recurrence waits for itself.
    gradient = jax.make_jaxpr(jax.grad(model_loss))(
        state.params["model"], carry, steps, noise.posterior
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
        "least_bytes": 2 * size((state.params, state.slow.params, state.opt)) + size(steps),
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


def parts(run: RunConfig, obs: str, repeats: int) -> dict[str, float]:
    """Seconds of an update in the run's shards, and of its parts alone, each on one device.

    "codec" is encoder and decoder with their gradients, "observe" the recurrence forwards,
    "losses" what else the model's loss and its gradient take, "heads" what the behaviour's loss
    and its gradient take beside the dream.
    """
    config, batch, length = run.agent, run.replay.batch_size, run.replay.batch_length
    agent, state, carry, steps, key = work(config, obs, batch, length, shapes=False)
    model, behavior, params = agent.model, agent.behavior, state.params
    obs_space, _ = spaces(obs)
    noise = compiler.jit(lambda key: agent.noise(key, length, batch))
    draws = noise(key)

    observe = compiler.jit(lambda p, s, d: model.observe(p["model"], carry, s, d.posterior)[0])
    latents = observe(params, steps, draws)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (latents, steps.obs))

    def act(p: Any) -> Callable:
        return lambda feat, noise: (behavior.act(p["behavior"], feat, noise), None)

    @compiler.jit
    def imagine(p, d, latents):
        dream, actions, _ = model.imagine(p["model"], latents, act(p), d.prior, d.action)
        return model.features(dream), actions

    @compiler.jit
    @jax.grad
    def learn_model(p, s, d):
        terms = model.loss(p["model"], carry, s, d.posterior)[0]
        return sum(term.mean() for term in terms.values())

    @compiler.jit
    @jax.grad
    def learn_behavior(p, s, d, latents):
        fixed = (state.slow.params, state.behavior, p["model"], latents, s, d.prior, d.action)
        return sum(term.mean() for term in behavior.loss(p["behavior"], *fixed)[0].values())

    encoder = Encoder(obs_space, config.model.codec, compute_dtype(config.dtype))
    decoder = Decoder(obs_space, config.model.codec, compute_dtype(config.dtype))

    encode = compiler.jit(lambda p, seen: encoder.apply({"params": p["model"]["encoder"]}, seen))

    @compiler.jit
    @jax.grad
    def code(p, latents, seen):
        tokens = encoder.apply({"params": p["model"]["encoder"]}, seen)
        stoch = latents.stoch.reshape(latents.deter.shape[0], -1)
        out = decoder.apply({"params": p["model"]["decoder"]}, latents.deter, stoch)
        return sum(jnp.square(x).mean() for x in jax.tree.leaves((tokens, out)))

    optimizer, slow = laprop(**vars(config.optim)), slow_copy(config.slow_rate)

    @compiler.jit
    def optimise(p, grads, opt, slow_state):
        updates, opt = optimizer.update(grads, opt, p)
        p = apply_updates(p, updates)
        return p, opt, slow.update(slow_state, {"value": p["behavior"]["value"]})

    row = jax.tree.map(lambda x: x[0], (steps, latents))
    memory = replay(ReplayConfig(20_000, batch, length), *row)
    buffer, cursor = memory.init()
    cursor = cursor._replace(written=cursor.written + 1000)
    sample = compiler.jit(lambda b, c, k: memory.sample(b, c, k)[0])
    # The buffer is given away, as in training: it is changed in place.
    write = compiler.jit(memory.write_back, donate_argnums=0)
    window = sample(buffer, cursor, key)
    stored = [buffer]

    def remember() -> Any:
        jax.block_until_ready(sample(stored[0], cursor, key))
        stored[0] = write(stored[0], window, latents)
        return stored[0]

    grads = jax.tree.map(jnp.ones_like, params)
    calls = {
        "update": updating(run, obs),
        "draws": lambda: noise(key),
        "observe": lambda: observe(params, steps, draws),
        "encode": lambda: encode(params, flat[1]),
        "codec": lambda: code(params, *flat),
        "imagination": lambda: imagine(params, draws, flat[0]),
        "optimiser": lambda: optimise(params, grads, state.opt, state.slow),
        "replay": remember,
        "model": lambda: learn_model(params, steps, draws),
        "behavior": lambda: learn_behavior(params, steps, draws, latents),
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
    limits = limits_of(compute_dtype(args.dtype))
    about = {"dtype": compute_dtype(args.dtype)} | machine()
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
    heap.ask_for_large_pages()  # as `jaxwm train` does
    in_words(main)

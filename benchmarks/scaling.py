"""How speed grows with environments, seeds and sizes; a line of JSON for each, and a picture.

    python -m benchmarks.scaling --picture curves.png --out benchmarks/results/scaling.jsonl

- envs: steps per second of a policy that acts and stores in so many environments, in one program.
- seeds: time of one update of so many seeds side by side, against one seed's, with batches of
  16 x 64 and of 4 x 32, as the presets of nano have them. Runs take turns. On a CPU seeds are
  divided among its cores, as in a training.
- sizes: time of one update, and the operations per second it comes to.

Efficiency is the share that is left of linear growth: of as many times the speed of the first
point as there are environments or seeds, of the same operations per second for a larger size. What
takes more memory than there is, or more time than `--budget`, is left out with a word.
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.lines import emit, in_words, machine, number, parser_of, seconds
from benchmarks.loop import Run, collecting, training
from benchmarks.roofline import demands, work
from benchmarks.throughput import synthetic
from jaxwm import backend
from jaxwm.backend import compute_dtype
from jaxwm.recipes import dreamer_v3
from jaxwm.replay.device import check_fits
from jaxwm.train import mesh
from jaxwm.types import JaxwmError


def environments(counts: list[int], size: str, repeats: int, dtype: str) -> dict[str, Any]:
    """Steps per second of collecting, for some numbers of environments."""
    points, left_out = [], {}
    for count in counts:
        try:
            run = Run(collecting(size, count, dtype=dtype), max(8, 16_384 // count))
        except JaxwmError as error:
            left_out[count] = str(error)
            continue
        run()
        took = statistics.median(run.seconds(repeats))
        points.append({"envs": count, "seconds_per_step": took / run.program.iterations})
        points[-1]["steps_per_second"] = run.steps / took
    for point in points:
        linear = points[0]["steps_per_second"] / points[0]["envs"] * point["envs"]
        point["efficiency"] = point["steps_per_second"] / linear
    return {"axis": "envs", "size": size, "points": points, "left_out": left_out}


def seeds(
    counts: list[int],
    size: str,
    batch: int,
    length: int,
    repeats: int,
    dtype: str,
    budget: float,
) -> dict[str, Any]:
    """Seconds of an update of so many seeds in one program, one chunk of each in turn."""
    envs = 16
    config = training(size, envs, batch * length / envs, batch, length, dtype)
    config = dataclasses.replace(
        config, replay=dataclasses.replace(config.replay, capacity=envs * 4 * length)
    )
    runs, times, left_out = {}, {count: [] for count in counts}, {}
    for count in counts:
        known = [took[0] / one for one, took in times.items() if took]
        if known and min(known) * count * repeats > budget:
            left_out[count] = f"would take {min(known) * count * repeats:.0f} s"
            continue
        try:
            run = Run(dataclasses.replace(config, seeds=count), 1, synthetic("vector"))
        except JaxwmError as error:
            left_out[count] = str(error)
            continue
        while run.updates == 0:  # fill the replay
            run()
        run()
        runs[count], times[count] = run, run.seconds(1)
    for count in runs:
        times[count].clear()
    processor = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for count, run in runs.items():
            start = time.process_time()
            times[count] += run.seconds(1)
            processor[count] += (time.process_time() - start) / repeats
    medians = {count: statistics.median(times[count]) for count in runs}
    first = next(iter(runs), 1)
    points = [
        {
            "seeds": count,
            "seconds_per_update": took,
            # Of all cores, which other work on the machine inflates less.
            "processor_seconds_per_update": processor[count],
            "seed_updates_per_second": count / took,
            "efficiency": medians[first] / first / (took / count),
            # Of as many programs of one seed.
            "cost": took / count / (medians[first] / first),
            "processor_cost": processor[count] / count / (processor[first] / first),
        }
        for count, took in medians.items()
    ]
    line = {"axis": "seeds", "size": size, "batch": [batch, length]}
    return line | {"points": points, "left_out": left_out}


def footprint(compiled: Any) -> int:
    """Bytes that a compiled program takes: of what it is given and makes, and in between."""
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + made


def sizes(
    names: list[str], batch: int, length: int, repeats: int, dtype: str, budget: float
) -> dict[str, Any]:
    """Seconds of an update of each size, smallest first."""
    points, left_out = [], {}
    for size in names:
        config = dataclasses.replace(dreamer_v3.sized(size), dtype=dtype)
        demand = demands(config, "vector", batch, length)
        flops = demand["product_flops"] + demand["convolution_flops"]
        if points and flops / points[-1]["flops_per_second"] * repeats > budget:
            hence = flops / points[-1]["flops_per_second"]
            left_out[size] = f"an update would take {hence:.0f} s"
            continue
        shapes = work(config, "vector", batch, length, shapes=True)
        update = backend.jit(shapes.agent.update, donate_argnums=0)
        try:
            compiled = update.lower(*shapes[1:]).compile()
            check_fits(footprint(compiled), "An update")
        except JaxwmError as error:
            left_out[size] = str(error)
            continue
        _, state, window, key = work(config, "vector", batch, length, shapes=False)
        held = [state]

        def once(held: list = held, rest: tuple = (window, key), run: Any = compiled) -> Any:
            held[0], _, metrics = run(held[0], *rest)
            return metrics

        took = statistics.median(seconds(once, repeats))
        points.append(
            {
                "size": size,
                "parameters": demand["parameters"],
                "seconds_per_update": took,
                "flops_per_second": flops / took,
            }
        )
    for point in points:
        point["efficiency"] = point["flops_per_second"] / points[0]["flops_per_second"]
    return {"axis": "sizes", "batch": [batch, length], "points": points, "left_out": left_out}


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The curves, and linear growth from their first points."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["points"]:
            groups.setdefault(line["axis"], []).append(line)
    figure = Figure(figsize=(4 * len(groups), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for (axis, alike), axes in zip(groups.items(), panels, strict=True):
        line = alike[-1]
        if axis == "seeds":
            for each in alike:
                x, y = ([p[name] for p in each["points"]] for name in ("seeds", "cost"))
                axes.plot(x, y, "o-", label="batches of {} x {}".format(*each["batch"]))
            axes.axhline(1, color="0.7", linestyle="--", label="as many programs of one seed")
            axes.set_xscale("log", base=2)
            axes.set(xlabel="seeds", ylabel="time of an update for each seed", ylim=(0, None))
            axes.set_title(f"{line['size']}, one seed alone is 1")
        else:
            points = line["points"]
            what = "steps_per_second" if axis == "envs" else "flops_per_second"
            x = [p["envs" if axis == "envs" else "parameters"] for p in points]
            y = [p[what] for p in points]
            axes.plot(x, y, "o-")
            linear = [y[0] * (a / x[0] if axis == "envs" else 1) for a in x]
            axes.plot(x, linear, "--", color="0.7", label="linear")
            label = "environments" if axis == "envs" else "parameters"
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=what.replace("_", " "))
            axes.set_title(f"{line['size']}, collecting" if axis == "envs" else "updates")
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


AXES = ("envs", "seeds", "sizes")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES)
    parser.add_argument("--envs", type=number, nargs="+", default=[2**i for i in range(14)])
    parser.add_argument("--seeds", type=number, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--sizes", nargs="+", default=["nano", *dreamer_v3.DETER])
    parser.add_argument("--size", default="nano", help="a size, for environments and seeds")
    parser.add_argument("--batch", type=number, nargs="+", default=[16, 4], help="of seeds each")
    parser.add_argument("--length", type=number, nargs="+", default=[64, 32], help="one a batch")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--repeats", type=number, default=10)
    parser.add_argument("--budget", type=float, default=120, help="seconds that a point may take")
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG")
    args = parser.parse_args()
    if "seeds" in args.axes:
        mesh.use_cores(dataclasses.replace(training(args.size, 1, 1), seeds=max(args.seeds)))
    if len(args.batch) != len(args.length):
        parser.error("give as many numbers to --length as to --batch")
    batches, rest = list(zip(args.batch, args.length, strict=True)), (args.repeats, args.dtype)
    points = {
        "envs": lambda: [environments(args.envs, args.size, *rest)],
        "seeds": lambda: (seeds(args.seeds, args.size, *x, *rest, args.budget) for x in batches),
        "sizes": lambda: [sizes(args.sizes, *batches[0], *rest, args.budget)],
    }
    lines = []
    for axis in args.axes:
        for line in points[axis]():
            lines.append(line | {"dtype": compute_dtype(args.dtype)} | machine())
            emit(lines[-1], args.out)
    if args.picture:
        draw(lines, args.picture)


if __name__ == "__main__":
    in_words(main)

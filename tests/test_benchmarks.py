"""What benchmarks count and measure, on programs small enough to count by hand."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_time, loop, memory, peers, scaling, throughput
from benchmarks.roofline import carried_steps, count, demands, floor
from jaxwm.recipes import dreamer_v3
from jaxwm.types import JaxwmError

pytestmark = pytest.mark.no_cover

ROOT = Path(__file__).resolve().parents[1]


def cost_of(function, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_a_product():
    # 3 * 5 results of 4 multiplications and 4 additions; 12 + 20 + 15 numbers of 4 bytes.
    assert cost_of(jnp.matmul, (3, 4), (4, 5)) == (2 * 3 * 5 * 4, 0, 4 * (12 + 20 + 15))
    # Two of them side by side.
    both = cost_of(lambda a, b: jnp.einsum("gij,gjk->gik", a, b), (2, 3, 4), (2, 4, 5))
    assert both.products == 2 * 2 * 3 * 5 * 4


def test_scans_are_multiplied_out():
    def steps(x, kernel):
        step = lambda x, _: (x @ kernel, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(step, x, None, 3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, 7)[0]

    assert cost_of(steps, (2, 4), (4, 4)).products == 7 * 3 * (2 * 2 * 4 * 4)


def test_what_is_differentiated_or_wrapped_is_counted():
    loss = lambda kernel, x: jnp.sum(jax.jit(jnp.matmul)(x, kernel))  # noqa: E731
    # The product itself and the gradient of one factor.
    assert cost_of(jax.grad(loss), (4, 5), (3, 4)).products == 2 * (2 * 3 * 4 * 5)
    assert cost_of(jax.checkpoint(jnp.matmul), (3, 4), (4, 5)).products == 2 * 3 * 4 * 5


@pytest.mark.parametrize(("stride", "dilation", "side"), [(1, 1, 6), (2, 1, 3), (1, 2, 11)])
def test_a_convolution(stride, dilation, side):
    def convolve(x, kernel):
        steps, pads, names = (stride, stride), ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
        spread = (dilation, dilation)
        return jax.lax.conv_general_dilated(x, kernel, steps, pads, spread, dimension_numbers=names)

    cost = cost_of(convolve, (2, 6, 6, 3), (3, 3, 3, 5))
    # Two maps of side * side * 5 results, each of 3 * 3 * 3 taps; of a map that is dilated by 2
    # three quarters are zeros.
    assert cost.convolutions == 2 * (2 * side * side * 5) * 27 / dilation**2
    assert cost.bytes == 4 * (2 * 36 * 3 + 9 * 15 + 2 * side * side * 5)


def test_dependent_steps():
    def total(x):
        carried = jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, 5)[0]
        return carried + jax.lax.map(jnp.sin, jnp.ones(9)).sum()

    forward = jax.make_jaxpr(total)(1.0).jaxpr
    assert carried_steps(forward, reverse=False) == 5
    backward = jax.make_jaxpr(jax.grad(total))(1.0).jaxpr
    assert carried_steps(backward, reverse=True) == 5


def test_demands_of_an_update():
    config = dreamer_v3.sized("debug")
    demand = demands(config, "vector", 2, 6)
    # Observing 6 rows and back, dreams of 5 steps, and the bits of percentiles that a CPU finds.
    bits = 32 if jax.default_backend() == "cpu" else 0
    assert (demand["steps_forward"], demand["steps_backward"]) == (6 + 5 + bits, 6)
    assert demand["convolution_flops"] == 0 < demand["product_flops"]
    # Of each parameter itself and two statistics are read and written, four bytes each.
    assert demand["least_bytes"] > 2 * 3 * 4 * demand["parameters"]
    limits = {"flops_per_second": 1e9, "bytes_per_second": 1e12, "step_seconds": 1e-3}
    have = floor(demand, limits)["floor_seconds"]
    assert have == pytest.approx(demand["product_flops"] / 1e9 + (17 + bits) * 1e-3)


@pytest.fixture
def reusing():
    """Benchmarks repeat an update with the same key: its numbers do not matter."""
    with jax.debug_key_reuse(False):
        yield


def test_a_loop_that_learns_and_one_that_collects():
    # 2 environments, 4 iterations, and 3 rows trained on for each step, of 2 * 6 in an update.
    run = loop.Run(loop.training("debug", 2, ratio=3, batch=2, length=6), 4)
    while run.updates == 0:
        run()
    line = loop.measure(run, 2)
    assert line["env_steps_per_chunk"] == 8
    made = line["updates_per_second"] / line["env_steps_per_second"] * 8
    assert made == pytest.approx(2) and line["seconds_per_update"] > 0

    run = loop.Run(loop.collecting("debug", 4, rows=70), 30)
    for _ in range(3):  # past the rows from which on it could learn
        run()
    assert "seconds_per_update" not in loop.measure(run, 1)
    assert run.updates == 0 and int(run.state.clock.cursor.written) == 4 * 30


class Standin:
    """A run whose chunks take 1 s, and 0.5 s more for each environment or seed beyond the first."""

    updates = 1

    def __init__(self, config, iterations, single=None):
        if config.envs == 64:
            raise JaxwmError("it needs 9 GiB")
        self.program = SimpleNamespace(iterations=iterations)
        self.steps = iterations * config.envs
        self.took = 1 + 0.5 * ((config.seeds if single else config.envs) - 1)

    def __call__(self):
        pass

    def seconds(self, repeats):
        return [self.took] * repeats


def test_scaling_is_measured_against_the_first_point(tmp_path, monkeypatch, reusing):
    monkeypatch.setattr(scaling, "Run", Standin)
    lines = [
        scaling.environments([1, 3, 64], "debug", 1, "auto"),
        scaling.seeds([1, 3, 4096], "debug", 2, 6, 2, "auto", budget=1000),
        scaling.sizes(["debug", "size400m"], 2, 6, 1, "auto", budget=0.1),
    ]
    # As many steps, but for one, in twice the time, by three times as many environments.
    one, three = lines[0]["points"]
    assert one["efficiency"] == 1 and three["efficiency"] == pytest.approx(1 / 6, rel=1e-3)
    assert lines[0]["left_out"] == {64: "it needs 9 GiB"}
    one, three = lines[1]["points"]
    assert three["cost"] == pytest.approx(2 / 3) and three["efficiency"] == pytest.approx(3 / 2)
    assert lines[1]["left_out"].keys() == {4096}
    assert [point["size"] for point in lines[2]["points"]] == ["debug"]
    assert lines[2]["left_out"].keys() == {"size400m"}
    scaling.draw(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_memory_of_a_row_and_of_an_update():
    config = dreamer_v3.sized("debug")
    # 24 numbers seen and 6 done, a reward and three flags; 16 numbers and 4 classes of a latent.
    row = memory.row_bytes(config, "vector")
    want = {"observation": 96, "deter": 64, "stoch": 4, "rest": 24 + 4 + 3}
    few = round(68 / 64 + 31, 1)
    above = {"above_observation": 64 + 4 + 31, "above_observation_with_few_latents": few}
    assert row == want | above
    held = memory.update_bytes(config, "vector", 2, 6)
    assert held["parameters"] == 4 * held["parameter_count"]
    # Two statistics of each parameter, and counters.
    assert 0 <= held["optimiser"] - 2 * held["parameters"] < 100
    assert held["slow_critic"] < held["parameters"] and held["temporary"] > held["batch"]


def test_stages_of_compiling(reusing):
    compiled, took = compile_time.stages(jax.jit(lambda x: x + 1), jnp.zeros(3))
    assert compiled(jnp.zeros(3)).tolist() == [1, 1, 1]
    assert took.keys() == {"trace_seconds", "lower_seconds", "compile_seconds"}
    assert min(took.values()) > 0
    assert compile_time.first_update("debug", "auto", "vector", 2, 6)["compile_seconds"] > 0


def test_a_line_names_machine_date_and_versions(tmp_path, monkeypatch, reusing):
    out = tmp_path / "lines.jsonl"
    words = "throughput --size debug --batch 2 --length 6 --repeats 1 --no-loop --out"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(out)])
    throughput.main()
    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert line["batch"] == [2, 6] and line["seconds_per_update"] > 0
    assert {"device", "date", "load", "jax", "jaxwm"} <= line.keys()


WORKER = """
import json, sys
job = json.loads(sys.argv[1])
if job["peer"] == "absent":
    sys.exit("there is no such thing")
print(json.dumps({"parameters": 7}), flush=True)
for turn, _ in enumerate(sys.stdin):
    if job["peer"] == "fragile" and turn == 1:
        sys.exit("it broke")
    print({"jaxwm": 1.0, "slow": 5.0, "fragile": 2.0}[job["peer"]] + turn, flush=True)
"""


def test_peers_take_turns_and_may_be_absent(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(peers, "WORKER", worker)
    start = lambda name: peers.Worker(  # noqa: E731
        sys.executable, {"peer": name}, tmp_path / f"{name}.log", ""
    )
    names = ["jaxwm", "slow", "absent", "fragile"]
    found = peers.summary(peers.compare(names, start, repeats=3))
    assert found["jaxwm"] == {"parameters": 7, "seconds": [1, 2, 3], "median": 2, "best": 1}
    assert found["slow"]["seconds"] == [5, 6, 7] and found["slow"]["ratio"] == 3
    assert found["slow"]["ratio_best"] == 5 and found["slow"]["ratio_of_turns"] == 3
    assert "no such thing" in found["absent"]["error"] and "ratio" not in found["absent"]
    assert "it broke" in found["fragile"]["error"] and "ratio" not in found["fragile"]


def test_a_peer_that_pip_refuses_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "REQUIREMENTS", {"odd": ["--no-index no-such-package-anywhere"]})
    with pytest.raises(peers.Failure, match=r"pip install .*no-such-package-anywhere"):
        peers.environment("odd", tmp_path)


@pytest.mark.parametrize(
    ("obs", "variant", "shards"),
    [("vector", "head", 1), ("vector", "head", 2), ("image", "paper", 2)],
)
def test_this_package_is_measured_in_a_process_of_its_own(tmp_path, obs, variant, shards):
    job = {"peer": "jaxwm", "work": "update", "size": "debug", "obs": obs, "batch": 2}
    job |= {"length": 6, "warmup": 0, "variant": variant, "shards": shards}
    worker = peers.Worker(sys.executable, job, tmp_path / "log", str(ROOT))
    try:
        assert worker.hear()["parameters"] > 1000
        assert worker.turn() > 0
    finally:
        worker.close()


class Understood(Exception):
    """Raised when a command's words have been parsed."""


def commands():
    """Every `python -m benchmarks.…` of the documents, of the Makefile and of the shell script."""
    texts = [
        "\n".join(re.findall(r"^```sh\n(.*?)^```$", path.read_text(), re.M | re.S))
        for path in (ROOT / "benchmarks/README.md", ROOT / "README.md")
    ]
    variables = {"RESULTS": "out", "OUT": "out", "DTYPE": "auto", "sizes[@]": "nano size1m"}
    for path in (ROOT / "Makefile", ROOT / "benchmarks/accelerator.sh"):
        text = path.read_text().replace('"', "").replace("sizes[0]", "sizes[@]")
        texts.append(re.sub(r"\$[({]?([\w@[\]]+)[)}]?", lambda x: variables.get(x[1], ""), text))
    found = re.findall(r"-m (benchmarks\.\w+) ?(.*)", "\n".join(texts).replace("\\\n", " "))
    return [(module, shlex.split(words)) for module, words in found]


def test_commands_are_understood(monkeypatch):
    def parse(parser, *args):
        parse_known(parser, *args)
        raise Understood

    parse_known = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    found = commands()
    modules = {module for module, _ in found}
    new = {"throughput", "loop", "scaling", "memory", "compile_time", "peers"}
    assert {f"benchmarks.{name}" for name in new} <= modules
    for module, words in found:
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Understood):
            importlib.import_module(module).main()


def test_the_script_for_accelerators_keeps_what_was_measured(tmp_path):
    """With a stand-in for Python that leaves the files a run would, and fails in one part."""
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(
        f"""#!/usr/bin/env bash
echo "$XLA_FLAGS: $*" >> {said}
case "$*" in
    -c*) echo "Some Device (1)" ;;
    *--run*) mkdir -p "${{@: -3:1}}"; cd "${{@: -3:1}}" && touch metrics.jsonl curve.png ;;
    *benchmarks.loop*) exit 3 ;;
esac
"""
    )
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "XLA_FLAGS": "--of_the_user", "SIZES": "nano size1m"}
    script = ["bash", str(ROOT / "benchmarks/accelerator.sh")]
    run = lambda **more: subprocess.run(  # noqa: E731
        script, env=env | {"OUT": str(tmp_path / "out")} | more, capture_output=True, text=True
    )
    done = run()
    assert done.returncode == 1 and "ended with 3" in done.stderr
    assert (tmp_path / "out" / "learning-cartpole-seed0.jsonl").exists()
    lines = said.read_text().splitlines()
    assert all(line.startswith("--of_the_user: ") for line in lines)
    assert any("--size nano size1m" in line for line in lines)
    assert run(LIMIT="0").stderr.count("left out") == 6
